"""A well-behaved client beside garbage: ``python -m bench.garbage [ROUNDS] [SECONDS]`` (root, two CPUs; 3 and 2).

The client makes one connection after the other through each server: connect, ask, one exchange, close. Meanwhile 16
other sources make 0, 1,500 or 8,000 connections a second whose bytes are of no protocol. Shown is the client's rate, as
a ratio to its undisturbed rate with the same server, median with lowest and highest over the rounds; its p99; and the
server's CPU. The contestants are all alive and take turns; each runs on CPU 1, clients, flood and target on CPU 0.

``rama``: ``rama-ebpf run`` with one worker, SOCKS5, HTTP and TLS on one port; ``rama strikes`` with strikes besides,
whose bans the kernel enforces; both are asked by SOCKS5, as microsocks is. HAProxy is asked by HTTP.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_COMMAND = Path(sys.executable).with_name("rama-ebpf")
RATES = (0, 1500, 8000)
_LOAD_CPU, _SERVER_CPU = 0, 1
_ECHO, _WEB, _MICROSOCKS, _HAPROXY_PORT, _RAMA_PORT, _STRIKES_PORT = range(7001, 7007)

_RAMA = """
[listeners.main]
address = "127.0.0.1:{port}"
stack = "s"
[stacks.s]
service = "mixed"
layers = [{layers}]
[server]
workers = 1
[egress]
allow = ["127.0.0.0/8"]
"""

_HAPROXY = """
global
    nbthread 1
defaults
    mode http
    timeout client 10s
    timeout server 10s
    timeout connect 10s
listen l
    bind 127.0.0.1:{port}
    server s 127.0.0.1:{target}
"""

_TARGETS = """
import asyncio, sys
import uvloop

class Echo(asyncio.Protocol):
    def connection_made(self, transport): self.transport = transport
    def data_received(self, data): self.transport.write(data)

class Web(Echo):
    def data_received(self, data):
        if data.endswith(b"\\r\\n\\r\\n"): self.transport.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 1\\r\\n\\r\\nx")

async def main():
    loop = asyncio.get_running_loop()
    await loop.create_server(Echo, "127.0.0.1", int(sys.argv[1]), backlog=4096)
    await loop.create_server(Web, "127.0.0.1", int(sys.argv[2]), backlog=4096)
    await asyncio.Event().wait()

uvloop.run(main())
"""


@dataclass
class Contestant:
    """A server under test, and what was measured by rate of garbage."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    protocol: str = "socks"
    rates: dict[int, list[float]] = field(default_factory=dict)
    p99: dict[int, list[float]] = field(default_factory=dict)
    cpu: dict[int, list[float]] = field(default_factory=dict)
    failed: dict[int, int] = field(default_factory=dict)


def _pinned(cpu: int, *command: object) -> list[str]:
    return ["taskset", "-c", str(cpu), *map(str, command)]


def _cpu_seconds(pid: int) -> float:
    """Of a process and its children that live."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK") + sum(map(_cpu_seconds, map(int, children)))


def _answers(port: int) -> bool:

    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextlib.contextmanager
def contestants(directory: Path) -> Iterator[tuple[Path, list[Contestant]]]:
    """Start everything; yields the load program and the servers."""
    load = directory / "garbage"
    subprocess.run(["gcc", "-O2", "-o", load, _HERE / "garbage.c"], check=True)
    with contextlib.ExitStack() as cleanup:

        def start(cpu: int, *command: object, port: int) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(_pinned(cpu, *command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            cleanup.callback(process.wait)
            cleanup.callback(process.terminate)
            for _ in range(600):
                if _answers(port):
                    return process
                if process.poll() is not None:
                    break
                time.sleep(0.1)
            raise RuntimeError(f"{command[0]} does not answer on port {port}")

        def rama(name: str, port: int, layers: str) -> Contestant:
            config = directory / f"{port}.toml"
            config.write_text(_RAMA.format(port=port, layers=layers))
            instance = f"bench-{os.getpid()}-{port}"
            cleanup.callback(subprocess.run, [_COMMAND, "unload", "--purge", "--instance", instance], check=False)
            run = ("run", "--instance", instance, "--config", config)
            return Contestant(name, port, start(_SERVER_CPU, _COMMAND, *run, port=port))

        start(_LOAD_CPU, sys.executable, "-c", _TARGETS, _ECHO, _WEB, port=_WEB)
        config = directory / "haproxy.cfg"
        config.write_text(_HAPROXY.format(port=_HAPROXY_PORT, target=_WEB))
        socks = start(_SERVER_CPU, "microsocks", "-i", "127.0.0.1", "-p", _MICROSOCKS, port=_MICROSOCKS)
        haproxy = start(_SERVER_CPU, "haproxy", "-db", "-f", config, port=_HAPROXY_PORT)
        yield (
            load,
            [
                rama("rama", _RAMA_PORT, ""),
                rama("rama strikes", _STRIKES_PORT, '{ strikes = { ban = "1h" } }'),
                Contestant("microsocks", _MICROSOCKS, socks),
                Contestant("haproxy", _HAPROXY_PORT, haproxy, "http"),
            ],
        )


def measure(load: Path, server: Contestant, rate: int, seconds: float) -> None:
    """Let the client run beside ``rate`` connections of garbage a second."""
    flood = None
    if rate:
        command = _pinned(_LOAD_CPU, load, "flood", server.port, rate, seconds + 1)
        flood = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        time.sleep(0.5)
    target = _WEB if server.protocol == "http" else _ECHO
    before = _cpu_seconds(server.process.pid)
    command = _pinned(_LOAD_CPU, load, "client", server.port, server.protocol, seconds, target)
    told: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    server.cpu.setdefault(rate, []).append((_cpu_seconds(server.process.pid) - before) / seconds)
    server.rates.setdefault(rate, []).append(told["rate"])
    server.p99.setdefault(rate, []).append(told["p99_us"] / 1000)
    server.failed[rate] = server.failed.get(rate, 0) + told["failed"]
    if flood is not None:
        flood.wait()


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 2.0
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        directory.chmod(0o755)
        with contestants(directory) as (load, servers):
            for number in range(rounds):
                for rate in RATES:
                    for server in servers[number % len(servers) :] + servers[: number % len(servers)]:
                        measure(load, server, rate, seconds)
    print(f"{'':14}{'garbage/s':>10}{'client/s':>10}{'ratio (lowest-highest)':>26}{'p99 ms':>9}{'CPU':>7}{'failed':>8}")
    for server in servers:
        for rate in RATES:
            ratios = [now / max(before, 0.1) for now, before in zip(server.rates[rate], server.rates[0], strict=True)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            print(
                f"{server.name:14}{rate:>10,}{statistics.median(server.rates[rate]):>10,.0f}{spread:>26}"
                f"{statistics.median(server.p99[rate]):>9.1f}{statistics.median(server.cpu[rate]):>7.0%}"
                f"{server.failed[rate]:>8}",
                flush=True,
            )


if __name__ == "__main__":
    main()
