from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from rama_ebpf.core import ProtocolError, client_address, local_address
from rama_ebpf.services.udp import Datagram, UdpServer, bind_udp

Serve = Callable[..., Awaitable[UdpServer]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    servers: list[UdpServer] = []

    async def start(host: str, service: Callable[[Datagram], Awaitable[Any]], **limits: int) -> UdpServer:
        server = UdpServer(bind_udp(host, 0), service, **limits)
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        await server.drain(0)
        server.socket.close()


async def echo(datagram: Datagram) -> None:
    assert datagram.reply(datagram.data.upper())


async def ask(server: UdpServer, host: str, data: bytes) -> tuple[bytes, str]:
    """Send ``data`` to ``host`` from a socket of its own; return the answer and the address it came from."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_sendto(client, data, (host, server.socket.getsockname()[1]))
        answer, source = await asyncio.wait_for(loop.sock_recvfrom(client, 65535), 30)
        return answer, source[0]


@pytest.mark.parametrize(("bound", "asked"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1")])
async def test_answers(serve: Serve, bound: str, asked: str) -> None:
    server = await serve(bound, echo)
    assert await ask(server, asked, b"hello") == (b"HELLO", asked)
    assert await ask(server, asked, b"") == (b"", asked)
    assert (await ask(server, asked, b"x" * 65000))[0] == b"X" * 65000


@pytest.mark.parametrize(("bound", "asked"), [("0.0.0.0", "127.0.7.7"), ("::", "::1")])
async def test_a_wildcard_socket_answers_from_the_address_that_was_asked(serve: Serve, bound: str, asked: str) -> None:
    seen: list[str] = []

    async def note(datagram: Datagram) -> None:
        peer, local = client_address(datagram), local_address(datagram)
        assert peer is not None
        assert local is not None
        seen.append(str(local.ip))
        await echo(datagram)

    assert await ask(await serve(bound, note), asked, b"hi") == (b"HI", asked)
    assert seen == [asked]


async def test_what_a_service_raises_ends_that_datagram_only(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    async def picky(datagram: Datagram) -> None:
        if datagram.data == b"bad":
            raise ProtocolError("nonsense")
        if datagram.data == b"bug":
            raise KeyError("bug")
        await echo(datagram)

    server = await serve("127.0.0.1", picky)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for data in (b"bad", b"bug"):
            client.sendto(data, server.socket.getsockname())
    assert await ask(server, "127.0.0.1", b"good") == (b"GOOD", "127.0.0.1")
    assert "service failed" in caplog.text


async def test_what_is_above_the_bound_is_dropped_and_counted(serve: Serve) -> None:
    gate = asyncio.Event()

    async def slow(datagram: Datagram) -> None:
        await gate.wait()

    server = await serve("127.0.0.1", slow, max_pending=3)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for _ in range(10):
            client.sendto(b"x", server.socket.getsockname())
    server._readable()  # on loopback all ten are there by now
    assert (server.received, server.dropped) == (10, 7)
    gate.set()
    assert await server.drain(5) == 0


async def test_an_address_in_use_is_named() -> None:
    with bind_udp("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot bind UDP 127.0.0.1 port {port}: Address already in use"):
            bind_udp("127.0.0.1", port)
