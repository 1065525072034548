"""The server when something goes wrong around it: processes, disks, locks, files, the channel. What must hold stands
beside each fault. ``RAMA_EBPF_FAULT_ROUNDS`` is how often random faults happen (``make faults`` sets it).
"""
