"""Whether any of 100,000 ``block`` calls from 4 processes at once is lost: ``python -m bench.policy_writers``.

Each call opens the pinned maps, changes them and closes them again, as the command does; what is left out is the start
of 100,000 Pythons. Exit code 1 if anything is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from ipaddress import ip_address

from rama_ebpf.kernel import bpffs
from rama_ebpf.kernel.gate_maps import GateMaps, MapSizes
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.loader import unload
from rama_ebpf.policy.kernel_store import KernelStore
from tests.policy.writers import address, block_at_once


def main() -> int:
    parser = argparse.ArgumentParser(description="Block from several processes at once and look for what is missing.")
    parser.add_argument("--calls", type=int, default=100_000, help="of all processes together (default: 100,000)")
    parser.add_argument("--processes", type=int, default=4, choices=range(1, 17), metavar="N")
    options = parser.parse_args()
    each = options.calls // options.processes
    place = Instance(f"bench-{os.getpid()}")
    bpffs.ensure_mounted()
    place.pin_dir.mkdir(parents=True, mode=0o700)
    try:
        GateMaps.create(place.pin_dir, MapSizes()).close()
        seconds = block_at_once(place.name, processes=options.processes, calls=each)
        with KernelStore(place) as store:
            wanted = {address(process, number) for process in range(options.processes) for number in range(each)}
            begun = time.perf_counter()
            records = store.records()
            listing = time.perf_counter() - begun
            found = {str(source.network_address) for record in records for source in record.sources}
            ids = {record.rule.id for record in records}
            undecided = sum(store.verdict(ip_address(source), 1080).allowed for source in wanted)
            revision = store.revision
    finally:
        unload(place)
    total = each * options.processes
    print(
        f"{total} calls from {options.processes} processes in {seconds:.1f} s ({total / seconds:.0f} a second): "
        f"{len(wanted - found)} missing, {len(found - wanted)} too many, {undecided} not decided by their rule, "
        f"{total - len(ids)} ids used twice, revision {revision}; listed in {listing:.1f} s"
    )
    return 0 if (found, len(ids), undecided, revision) == (wanted, total, 0, total) else 1


if __name__ == "__main__":
    sys.exit(main())
