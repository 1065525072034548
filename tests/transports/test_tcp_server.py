from __future__ import annotations

import asyncio
import contextlib
import os
import socket

import pytest

from rama_ebpf.core import SocketStream, Stream
from rama_ebpf.services.tcp import TcpServer, bind_tcp


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_a_connection_that_is_cut_before_its_first_step_leaks_nothing() -> None:
    async def never_runs(stream: Stream) -> None:
        raise AssertionError("the server was drained first")

    before = open_descriptors()
    listener = bind_tcp("127.0.0.1", 0)
    server = TcpServer(listener, never_runs)
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    server.start()
    server._accept_ready()
    assert server.live == 1
    assert await server.drain(0) == 1
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    with contextlib.suppress(ConnectionResetError):
        await writer.wait_closed()
    listener.close()
    assert open_descriptors() == before


async def test_accepted_sockets_send_small_writes_at_once() -> None:
    seen: list[int] = []

    async def look(stream: Stream) -> None:
        assert isinstance(stream, SocketStream)
        seen.append(stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    for host in ("127.0.0.1", "::1"):
        with bind_tcp(host, 0) as listener:
            server = TcpServer(listener, look)
            server.start()
            reader, writer = await asyncio.open_connection(host, listener.getsockname()[1])
            await reader.read()
            writer.close()
            await server.drain(5)
    assert seen == [1, 1]
