"""What a guard costs the rest of the host: nanoseconds that its program takes for a packet that is not for a listener.

``python -m bench.guard [--seconds S] [--rounds N] [--rules R]``, as root. Messages go back and forth on a connection of
loopback beside a guarded port; the kernel's own count of the program's time (``kernel.bpf_stats_enabled``, see
``Documentation/admin-guide/sysctl/kernel.rst``) is divided by its runs. That includes what counting costs, some 20 ns.
The same without a guard says how many messages a second go either way.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path

from rama_ebpf import SyncGate
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.loader import unload

INSTANCE = "bench-guard"
_STATS = Path("/proc/sys/kernel/bpf_stats_enabled")


@contextmanager
def _counting() -> Iterator[None]:
    before = _STATS.read_text()
    _STATS.write_text("1")
    try:
        yield
    finally:
        _STATS.write_text(before)


def _program() -> tuple[int, int]:
    """The nanoseconds and the runs of the guard's program."""
    listed = json.loads(
        subprocess.run(["bpftool", "-j", "prog", "show", "name", "gate_guard"], capture_output=True).stdout
    )
    (found,) = listed if isinstance(listed, list) else [listed]
    return int(found.get("run_time_ns", 0)), int(found.get("run_cnt", 0))


@contextmanager
def _echo() -> Iterator[socket.socket]:
    """A connection to a peer that sends back each message."""
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    peer, _ = listener.accept()
    for sock in (client, peer):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def serve() -> None:
        while data := peer.recv(64):
            peer.sendall(data)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield client
    finally:
        client.close()
        thread.join()
        peer.close()
        listener.close()


def _messages(client: socket.socket, seconds: float) -> float:
    """How many messages a second go back and forth."""
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        client.sendall(b"x")
        client.recv(64)
        count += 1
    return count / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rules", type=int, default=10_000)
    args = parser.parse_args()
    guarded = socket.create_server(("127.0.0.1", 0))
    rates: dict[bool, list[float]] = {False: [], True: []}
    costs = []
    try:
        with _echo() as client, SyncGate(INSTANCE) as gate:
            for number in range(args.rounds):
                rates[False].append(_messages(client, args.seconds))
                with gate.guard(guarded):
                    if not number:
                        gate.block(ip_network((0xC6120000 + n, 32)) for n in range(args.rules))
                    rates[True].append(_messages(client, args.seconds))
                    with _counting():
                        before = _program()
                        _messages(client, args.seconds)
                        after = _program()
                    costs.append((after[0] - before[0]) / max(1, after[1] - before[1]))
    finally:
        guarded.close()
        unload(Instance(INSTANCE))
    print(f"ns a packet that is for no listener: {_spread(costs, 0)}")
    for on, name in ((False, "without a guard"), (True, "beside one")):
        print(f"messages a second {name}: {_spread(rates[on], 0)}")


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} – {max(values):,.{digits}f})"


if __name__ == "__main__":
    main()
