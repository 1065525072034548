from __future__ import annotations

import asyncio
import contextlib
import os

import pytest

from rama_ebpf.core import Stream
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
