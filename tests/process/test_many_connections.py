"""Many live tunnels from many sources through the real server, and a worker killed in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from ..conftest import StartProxy
from ..lab import Host, Lab, wait_for
from ..proxy import ProxyProcess

SOURCES = [f"127.0.{1 + number // 250}.{1 + number % 250}" for number in range(200)]
PER_SOURCE = 10
CONNECT = b"\x05\x01\x00" + b"\x05\x01\x00\x01" + bytes([127, 0, 0, 1])


@dataclass
class Tunnel:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, source: str, target: int) -> Tunnel:
        """Ask the proxy for the echo server, as a SOCKS5 client at ``source``."""
        reader, writer = await asyncio.open_connection("127.0.0.1", 1080, local_addr=(source, 0))
        writer.write(CONNECT + target.to_bytes(2, "big"))
        answer = await reader.readexactly(2 + 10)
        assert answer[:4] == b"\x05\x00\x05\x00", answer
        return cls(reader, writer)

    async def echoes(self, data: bytes) -> bool:
        """Whether ``data`` comes back; False if the tunnel has been reset. Anything else is a failure."""
        try:
            self.writer.write(data)
            answer = await self.reader.readexactly(len(data))
        except ConnectionResetError:
            return False
        assert answer == data
        return True

    def close(self) -> None:
        self.writer.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionResetError:
        pass  # the killed worker's end of a tunnel
    finally:
        writer.close()


async def open_all(target: int) -> list[Tunnel]:
    gate = asyncio.Semaphore(100)  # at once are the live tunnels; no need to strain the handshakes as well

    async def one(source: str) -> Tunnel:
        async with gate:
            return await Tunnel.open(source, target)

    return await asyncio.gather(*(one(source) for source in SOURCES for _ in range(PER_SOURCE)))


def resident(pid: int) -> int:
    """Resident memory of a process in KiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"^VmRSS:\s+(\d+)", text, flags=re.M)[0])


IDLE_SOCKETS = 4
"""Of a worker: its listening socket, its channel, and the pair by which uvloop hears of signals."""


def sockets(pid: int) -> int:
    found = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            found += os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:")
    return found


def at_rest(*pids: int) -> int:
    """How many descriptors processes keep: now and then a look at the gate or the policy opens some more."""
    found = []
    for _ in range(20):
        found.append(sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids))
        time.sleep(0.05)  # so that a look has come to its end
    return min(found)


async def session(proxy: ProxyProcess, kill: bool) -> None:
    """Open all tunnels, use them, kill a worker (or not), use what is left and new ones, close all."""
    server = await asyncio.start_server(echo, "127.0.0.1", 0, backlog=4096)
    target = server.sockets[0].getsockname()[1]
    rng = random.Random(7)
    tunnels = await open_all(target)
    assert len(tunnels) == 2000
    assert all(await asyncio.gather(*(tunnel.echoes(rng.randbytes(1000)) for tunnel in tunnels)))
    lost = 0
    if kill:
        victim = proxy.workers()[0]
        lost = (sockets(victim) - IDLE_SOCKETS) // 2
        os.kill(victim, signal.SIGKILL)
    # These reach the dead worker's queue as well as the live one's.
    new = await asyncio.gather(*(Tunnel.open(source, target) for source in SOURCES))
    alive = await asyncio.gather(*(tunnel.echoes(rng.randbytes(1000)) for tunnel in tunnels))
    assert alive.count(False) == lost, f"{lost} tunnels were the dead worker's, {alive.count(False)} broke"
    assert not kill or 200 < lost < 1800, "the sources are not spread over the workers"
    assert all(await asyncio.gather(*(tunnel.echoes(rng.randbytes(1000)) for tunnel in new)))
    for tunnel in (*tunnels, *new):
        tunnel.close()
    server.close()


def test_2000_tunnels_of_200_sources_with_a_worker_killed_in_the_middle(lab: Lab, start_proxy: StartProxy) -> None:
    host: Host = lab.host("proxy")
    proxy = start_proxy(host, "--listen", "127.0.0.1:1080", "--allow-egress", "127.0.0.1", "--workers", "2")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the clients and the echo server are in this process

    def idle() -> bool:
        return len(proxy.workers()) == 2 and proxy.descriptors() == at_start

    without_audit = at_rest(proxy.pid)
    # Twice without harm: what the first costs for good (imports, pools, the allocator's arenas) is not a leak.
    host.call(lambda: asyncio.run(session(proxy, kill=False)))
    wait_for(lambda: max(map(sockets, proxy.workers())) <= IDLE_SOCKETS, timeout=30, what="the end of all tunnels")
    what = "the audit's first look, which keeps the set in force open"
    wait_for(lambda: at_rest(proxy.pid) > without_audit, timeout=30, what=what)
    at_start = at_rest(proxy.pid, *proxy.workers())
    memory = {pid: resident(pid) for pid in proxy.workers()}
    host.call(lambda: asyncio.run(session(proxy, kill=False)))
    wait_for(idle, timeout=30, what="the descriptors of the start")
    survivor = proxy.workers()[1]
    host.call(lambda: asyncio.run(session(proxy, kill=True)))
    wait_for(idle, timeout=60, what="the descriptors of the start")
    assert survivor in proxy.workers()
    grown = resident(survivor) - memory[survivor]
    assert grown < 8192, f"the surviving worker grew by {grown} KiB over two sessions"
