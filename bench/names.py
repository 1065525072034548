"""Names through the proxy: ``python -m bench.names [SECONDS]`` (root, and port 53 of 127.0.0.53 and .54 free; 10).

``rama-ebpf run`` with one worker is asked by SOCKS5 to connect to names, and asks name servers of this process. Three
figures:

- the first of two name servers is dead: how long the first name takes, and those after it;
- the AAAA is never answered: how long until connected, after the A was answered;
- 50 names a second from one source that nobody answers: how long cached and uncached good names of another source take,
  beside them and alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import dns.message
import dns.rdatatype
import dns.rrset
import uvloop

from .served import served

__all__ = ["NameServer", "look_up"]

_DEAD, _GOOD = "127.0.0.53", "127.0.0.54"
_PORT, _ECHO = 7201, 7202
_SILENT_RATE, _GOOD_RATE = 50, 20

_CONFIG = """
[listeners.main]
address = "127.0.0.1:{port}"
stack = "s"
[stacks.s]
service = "socks5"
[server]
workers = 1
[resolver]
servers = [{servers}]
[egress]
allow = ["127.0.0.0/8"]
"""


class NameServer(asyncio.DatagramProtocol):
    """Answers every A with 127.0.0.1 and every AAAA with nothing; names that begin with ``silent`` not at all, with
    ``noaaaa`` the A only. ``told`` is when the A of a name was answered."""

    def __init__(self) -> None:
        self.told: dict[str, float] = {}
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str | object, int]) -> None:
        query = dns.message.from_wire(data)
        name = query.question[0].name.to_text(omit_final_dot=True)
        is_a = query.question[0].rdtype == dns.rdatatype.A
        if name.startswith("silent") or (name.startswith("noaaaa") and not is_a):
            return
        response = dns.message.make_response(query)
        if is_a:
            response.answer.append(dns.rrset.from_text(name + ".", 300, "IN", "A", "127.0.0.1"))
            self.told[name] = time.monotonic()
        assert self._transport is not None
        self._transport.sendto(response.to_wire(), addr)


async def look_up(source: str, name: str) -> tuple[int, float]:
    """Connect from ``source`` to ``name`` through the proxy; return its reply, and the seconds until it came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", _PORT, local_addr=(source, 0))
    try:
        started = time.monotonic()
        writer.write(b"\5\1\0\5\1\0\3" + bytes((len(name),)) + name.encode() + _ECHO.to_bytes(2, "big"))
        await reader.readexactly(2)
        reply = await reader.readexactly(10)
        return reply[1], time.monotonic() - started
    finally:
        writer.close()


def _config(*servers: str) -> str:
    return _CONFIG.format(port=_PORT, servers=", ".join(f'"{server}"' for server in servers))


@contextlib.asynccontextmanager
async def _name_server() -> AsyncIterator[NameServer]:
    transport, server = await asyncio.get_running_loop().create_datagram_endpoint(NameServer, local_addr=(_GOOD, 53))
    async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", _ECHO, backlog=1024):
        yield server
    transport.close()


async def _dead_first() -> None:
    took = [await look_up("127.0.1.1", f"good{number}.example") for number in range(21)]
    assert not any(reply for reply, _ in took), took
    later = [seconds for _, seconds in took[1:]]
    print(f"first of two name servers dead: first name {took[0][1]:.2f} s, then at most {max(later) * 1e3:.0f} ms")


async def _silent_aaaa(server: NameServer) -> None:
    waits = []
    for number in range(20):
        name = f"noaaaa{number}.example"
        reply, _ = await look_up("127.0.1.1", name)
        assert reply == 0, reply
        waits.append(time.monotonic() - server.told[name])
    median, most = statistics.median(waits) * 1e3, max(waits) * 1e3
    print(f"AAAA silent: connected {median:.0f} ms (at most {most:.0f} ms) after the A")


async def _flood(until: float) -> None:
    number = 0
    asking: set[asyncio.Task[tuple[int, float]]] = set()
    while time.monotonic() < until:
        task = asyncio.create_task(look_up("127.0.2.1", f"silent{number}.example"))
        asking.add(task)
        task.add_done_callback(asking.discard)
        number += 1
        await asyncio.sleep(1 / _SILENT_RATE)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


async def _others(seconds: float, *, flood: bool) -> None:
    until = time.monotonic() + seconds
    attack = asyncio.create_task(_flood(until)) if flood else None
    await asyncio.sleep(1.0 if flood else 0.0)  # until there are some
    took: dict[str, list[float]] = {"uncached": [], "cached": []}
    number = 0
    while time.monotonic() < until:
        for kind, name in (("uncached", f"good{flood}{number}.example"), ("cached", "good.example")):
            reply, seconds_taken = await look_up("127.0.1.1", name)
            assert reply == 0, (name, reply)
            took[kind].append(seconds_taken)
        number += 1
        await asyncio.sleep(1 / _GOOD_RATE)
    if attack is not None:
        await attack
    beside = f"beside {_SILENT_RATE} silent names a second of another source" if flood else "alone"
    for kind, values in took.items():
        values.sort()
        p50, p99 = statistics.median(values) * 1e3, values[int(len(values) * 0.99)] * 1e3
        print(f"{kind} good names, {beside}: p50 {p50:.1f} ms, p99 {p99:.1f} ms ({len(values)})")


async def _run(seconds: float) -> None:
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        os.chmod(made, 0o755)
        async with _name_server() as server:
            # A socket that never answers: nobody there would be told at once by ICMP.
            loop = asyncio.get_running_loop()
            dead, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=(_DEAD, 53))
            with served(directory, _config(_DEAD, _GOOD)):
                await _dead_first()
            dead.close()
            with served(directory, _config(_GOOD)):
                await _silent_aaaa(server)
                await _others(seconds, flood=False)
                await _others(seconds + 1, flood=True)


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    uvloop.run(_run(seconds))


if __name__ == "__main__":
    main()
