"""A tunnel handler is given what the protocols have opened, and what it refuses is cut on both sides."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import pytest

from rama_ebpf.core import PolicyDenied, SocketStream, Stream
from rama_ebpf.relay import CloseReason, Move, TunnelHandler, TunnelReport, relay


@pytest.fixture
def ends() -> Iterator[list[socket.socket]]:
    """Client, its end here, the upstream's end here, upstream."""
    with contextlib.ExitStack() as cleanup:
        made = [cleanup.enter_context(end) for pair in range(2) for end in socket.socketpair()]
        for end in made:
            end.setblocking(False)
        yield made


async def test_a_handler_may_look_before_it_lets_the_relay_go_on(
    ends: list[socket.socket],
) -> None:
    client, upstream = SocketStream(ends[1]), SocketStream(ends[2])
    seen = []

    async def handle(client: Stream, upstream: Stream, move: Move) -> TunnelReport:
        seen.append(await client.peek(5))
        return await move(client, upstream)

    client.extensions.add(TunnelHandler(handle))
    relaying = asyncio.create_task(relay(client, upstream))
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(ends[0], b"hello")
    ends[0].shutdown(socket.SHUT_WR)
    assert await loop.sock_recv(ends[3], 100) == b"hello"
    assert await loop.sock_recv(ends[3], 100) == b""
    ends[3].shutdown(socket.SHUT_WR)
    assert (await relaying).reason is CloseReason.EOF
    assert seen == [b"hello"]
    assert client.extensions.get(TunnelReport) is not None


async def test_what_a_handler_refuses_is_closed_on_both_sides(ends: list[socket.socket]) -> None:
    client, upstream = SocketStream(ends[1]), SocketStream(ends[2])

    async def refuse(_client: Stream, _upstream: Stream, _move: Move) -> TunnelReport:
        raise PolicyDenied("not today")

    client.extensions.add(TunnelHandler(refuse))
    with pytest.raises(PolicyDenied):
        await relay(client, upstream)
    for end in (ends[0], ends[3]):
        assert await asyncio.get_running_loop().sock_recv(end, 10) == b""
