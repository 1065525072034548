"""Streams in memory keep the rules that those over sockets keep: each test runs on both."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from rama_ebpf.core import LimitExceeded, PeerClosed, SocketStream, Stream
from rama_ebpf.core.stream import MAX_UNREAD
from rama_ebpf.testing import MemoryStream, stream_pair

Pair = tuple[Stream, Stream]


@pytest.fixture(params=["memory", "tcp"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    made: Pair = stream_pair() if request.param == "memory" else _over_tcp()
    yield made
    for stream in made:
        stream.abort()


def _over_tcp() -> Pair:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return SocketStream(client), SocketStream(listener.accept()[0])


async def _all(stream: Stream) -> bytes:
    came = bytearray()
    while data := await stream.read():
        came += data
    return bytes(came)


async def test_more_than_fits_waits_for_the_reader_and_arrives_whole(pair: Pair) -> None:
    near, far = pair
    data = bytes(range(256)) * 64 * 1024
    writing = asyncio.create_task(near.write(data, b"", b"end"))
    await far.peek(1)
    assert not writing.done()
    assert await far.read_exactly(1) == data[:1]
    rest = asyncio.create_task(_all(far))
    await writing
    await near.write_eof()
    assert await rest == data[1:] + b"end"
    assert near.bytes_sent == far.bytes_received == len(data) + 3


async def test_half_close_leaves_the_other_direction_open(pair: Pair) -> None:
    near, far = pair
    await near.write(b"question")
    await near.write_eof()
    await near.write_eof()
    assert await _all(far) == b"question"
    await far.write(b"answer")
    await far.close()
    assert await _all(near) == b"answer"
    with pytest.raises(PeerClosed, match="0 of 1"):
        await near.read_exactly(1)
    with pytest.raises(OSError, match=r"."):
        await near.write(b"more")


async def test_what_came_before_a_reset_is_read_and_then_the_reset(pair: Pair) -> None:
    near, far = pair
    await near.write(b"last words")
    assert await far.peek(10) == b"last words"
    near.abort()
    assert await far.read() == b"last words"
    with pytest.raises(ConnectionResetError):
        await far.read()
    with pytest.raises(ConnectionError):
        await far.write(b"x")


async def test_close_over_unread_bytes_resets(pair: Pair) -> None:
    near, far = pair
    await far.write(b"unread, all of it")
    assert await near.read(1) == b"u"
    await near.close()
    with pytest.raises(ConnectionResetError):
        await _all(far)


async def test_second_reader_and_a_closed_stream_are_refused(pair: Pair) -> None:
    near, far = pair
    first = asyncio.create_task(near.read())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError):
        await near.read()
    await far.write(b"for the first")
    assert await first == b"for the first"
    await near.close()
    await near.close()
    with pytest.raises((OSError, RuntimeError)):
        await near.read()


async def test_closing_ends_a_read_and_a_write_that_wait(pair: Pair) -> None:
    near, far = pair
    reading = asyncio.create_task(near.read())
    writing = asyncio.create_task(far.write(b"x" * 32_000_000))
    await reading
    near.abort()
    with pytest.raises(ConnectionError):
        await writing


async def test_departure_of_the_peer_is_told_behind_its_eof(pair: Pair) -> None:
    near, far = pair
    await far.write_eof()
    assert await near.read() == b""
    gone = asyncio.create_task(near.reset_by_peer())
    await asyncio.sleep(0)
    assert not gone.done()
    far.abort()
    await gone


async def test_what_is_on_its_way_in_memory_is_bounded() -> None:
    near, far = stream_pair(capacity=4)
    assert near.write_now(b"abcdef") == 4
    assert near.write_now(b"ef") == 0
    assert not far.quiet()
    assert await far.read() == b"abcd"
    assert far.quiet()
    with pytest.raises(ValueError, match="use 1 or more"):
        stream_pair(capacity=0)
    await near.write(b"gh")
    await far.fill(2)
    with pytest.raises(LimitExceeded):
        await far.fill(2)
    assert isinstance(near, MemoryStream)
    assert MAX_UNREAD >= 4
