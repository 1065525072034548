from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from rama_ebpf.core import LimitExceeded, PeerClosed, SocketStream
from rama_ebpf.core.poller import Poller
from rama_ebpf.core.stream import MAX_UNREAD
from rama_ebpf.core.wrapped import WrappedStream


@dataclass
class Pair:
    """A stream and the raw socket at its other end, over TCP."""

    stream: SocketStream
    peer: socket.socket

    async def receive(self, count: int) -> bytes:
        """Read exactly ``count`` bytes at the other end, fewer at EOF."""
        loop, data = asyncio.get_running_loop(), bytearray()
        while len(data) < count and (more := await loop.sock_recv(self.peer, min(count - len(data), 1 << 16))):
            data += more
        return bytes(data)

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.peer, data)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        stream = SocketStream(listener.accept()[0])
    peer.setblocking(False)
    with peer:
        yield Pair(stream, peer)
        await stream.close()


async def begun() -> None:
    """Let the tasks that were made begin: each tries once, and then waits for the poller."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_peek_consumes_nothing_and_unread_goes_in_front(pair: Pair) -> None:
    await pair.send(b"abcdef")
    assert (await pair.stream.peek(6)) == b"abcdef"
    pair.stream.consume(2)
    pair.stream.unread(b"AB")
    assert pair.stream.buffered == b"ABcdef"
    assert await pair.stream.read(3) == b"ABc"
    assert await pair.stream.read_exactly(3) == b"def"
    with pytest.raises(ValueError, match="only 0 are buffered"):
        pair.stream.consume(1)


async def test_what_is_read_ahead_is_bounded(pair: Pair) -> None:
    await pair.send(b"x" * 100)
    while len(pair.stream.buffered) < 100:
        await pair.stream.fill(100)
    with pytest.raises(LimitExceeded):
        await pair.stream.fill(100)
    sending = asyncio.create_task(pair.send(b"y" * 2 * MAX_UNREAD))
    while len(pair.stream.buffered) < MAX_UNREAD:
        await pair.stream.fill()
    with pytest.raises(LimitExceeded):
        await pair.stream.fill()
    while not sending.done():
        await pair.stream.read()


async def test_read_into_takes_what_was_read_ahead_first_and_then_the_sockets(pair: Pair) -> None:
    await pair.send(b"abcdef")
    await pair.stream.peek(6)
    buffer = bytearray(4)
    assert await pair.stream.read_into(buffer) == 4
    assert buffer == b"abcd"
    assert await pair.stream.read_into(memoryview(buffer)[2:]) == 2
    assert buffer == b"abef"
    assert await pair.stream.read_into(bytearray()) == 0
    reading = asyncio.create_task(pair.stream.read_into(buffer))
    await asyncio.sleep(0)
    await pair.send(b"gh")
    assert await reading == 2
    assert buffer == b"ghef"
    assert pair.stream.bytes_received == 8
    wrapped = WrappedStream(pair.stream)
    await pair.send(b"ij")
    assert await wrapped.read_into(buffer) == 2
    assert buffer == b"ijef"
    pair.peer.shutdown(socket.SHUT_WR)
    assert await pair.stream.read_into(buffer) == 0


async def test_any_number_of_chunks_arrives_whole_and_in_order(pair: Pair) -> None:
    rng = random.Random(3)
    chunks = [rng.randbytes(rng.randrange(0, 40)) for _ in range(5000)] + [rng.randbytes(3_000_000), b"", b"end"]
    whole = b"".join(chunks)
    received, _ = await asyncio.gather(pair.receive(len(whole)), pair.stream.write(*chunks))
    assert received == whole
    assert pair.stream.bytes_sent == len(whole)


async def test_write_waits_for_a_peer_that_does_not_read(pair: Pair) -> None:
    data = random.Random(4).randbytes(64_000_000)  # no socket buffer holds it
    writing = asyncio.create_task(pair.stream.write(data))
    await begun()
    assert not writing.done()
    assert await pair.receive(len(data)) == data
    await writing


async def test_end_of_stream_is_told_apart_from_too_few_bytes(pair: Pair) -> None:
    await pair.send(b"abc")
    pair.peer.shutdown(socket.SHUT_WR)
    assert await pair.stream.peek(5) == b"abc"
    with pytest.raises(PeerClosed, match="after 3 of 5"):
        await pair.stream.read_exactly(5)
    assert await pair.stream.read() == b"abc"
    assert await pair.stream.read() == b""


async def test_half_close_lets_the_other_direction_live(pair: Pair) -> None:
    await pair.stream.write(b"question")
    await pair.stream.write_eof()
    await pair.stream.write_eof()
    assert await pair.receive(100) == b"question"
    await pair.send(b"answer")
    assert await pair.stream.read() == b"answer"


async def test_close_ends_the_connection_in_order_after_the_last_byte(pair: Pair) -> None:
    await pair.stream.write(b"last words")
    await pair.stream.close()
    assert await pair.receive(100) == b"last words"


async def test_abort_resets_the_connection(pair: Pair) -> None:
    pair.stream.abort()
    with pytest.raises(ConnectionResetError):
        await pair.receive(1)


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_who_waits_when_the_stream_is_closed_is_told(pair: Pair, how: str) -> None:
    reading = asyncio.create_task(pair.stream.read())
    writing = asyncio.create_task(pair.stream.write(bytes(64_000_000)))
    await begun()
    if how == "close":
        await pair.stream.close()
    else:
        pair.stream.abort()
    for task in (reading, writing):
        with pytest.raises(ConnectionAbortedError):
            await task
    with pytest.raises(ConnectionAbortedError):
        await pair.stream.read()


async def test_a_second_reader_or_writer_is_refused_and_takes_no_byte(pair: Pair) -> None:
    reading = asyncio.create_task(pair.stream.read(3))
    writing = asyncio.create_task(pair.stream.write(bytes(64_000_000)))
    await begun()
    pair.peer.send(b"abc")
    with pytest.raises(RuntimeError, match="two tasks read"):  # though there is something to read by now
        await pair.stream.read(3)
    with pytest.raises(RuntimeError, match="two tasks write"):
        await pair.stream.write(b"x")
    with pytest.raises(RuntimeError, match="cannot detach"):
        pair.stream.detach()
    assert await reading == b"abc"
    assert await pair.receive(64_000_000) == bytes(64_000_000)
    await writing


async def test_cancelled_read_loses_no_byte(pair: Pair) -> None:
    reading = asyncio.create_task(pair.stream.read())
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await pair.send(b"abc")
    assert await pair.stream.read() == b"abc"


async def test_detach_hands_over_the_socket_and_what_was_read_ahead(pair: Pair) -> None:
    await pair.send(b"abcdef")
    await pair.stream.peek(6)
    pair.stream.consume(1)
    sock, unread = pair.stream.detach()
    with sock:
        assert unread == b"bcdef"
        with pytest.raises(ConnectionAbortedError):
            await pair.stream.read()
        await pair.stream.close()  # it is not ours any more: this must not close it
        sock.send(b"still open")
        assert await pair.receive(10) == b"still open"


async def _noisy(stream: SocketStream) -> None:
    while stream.quiet():  # noqa: ASYNC110  it is what is being tested
        await asyncio.sleep(0.01)


async def test_quiet_is_open_with_nothing_to_read(pair: Pair) -> None:
    assert pair.stream.quiet()
    await pair.send(b"x")
    await _noisy(pair.stream)
    assert await pair.stream.read() == b"x"
    assert pair.stream.quiet()
    pair.peer.shutdown(socket.SHUT_WR)
    await _noisy(pair.stream)
    await pair.stream.close()
    assert not pair.stream.quiet()


async def test_splice_moves_bytes_through_a_pipe_and_waits_for_none(pair: Pair) -> None:
    data = random.Random(7).randbytes(1 << 20)
    read, write = os.pipe2(os.O_NONBLOCK)
    echoing = asyncio.create_task(pair.receive(len(data)))
    try:
        assert pair.stream.splice_to(write, 100) == 0  # nothing has come
        sending = asyncio.create_task(pair.send(data))
        await pair.stream.peek(1)
        assert pair.stream.splice_to(write, 100) == 0  # what was read ahead goes first
        moved = len(ahead := await pair.stream.read())
        await pair.stream.write(ahead)
        while moved < len(data):
            if count := pair.stream.splice_to(write, len(data) - moved):
                moved += count
                await pair.stream.splice_from(read, count)
            else:
                await asyncio.sleep(0)
        await sending
        assert await echoing == data
        assert (pair.stream.bytes_received, pair.stream.bytes_sent) == (len(data), len(data))
        pair.peer.shutdown(socket.SHUT_WR)
        assert await pair.stream.read() == b""
        assert pair.stream.splice_to(write, 100) == 0
    finally:
        os.close(read)
        os.close(write)


async def test_splice_from_waits_for_a_peer_that_does_not_read(pair: Pair) -> None:
    read, write = os.pipe2(os.O_NONBLOCK)

    async def fill() -> None:
        while True:
            await pair.stream.splice_from(read, os.write(write, bytes(65536)))

    try:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(fill(), 0.2)
    finally:
        os.close(read)
        os.close(write)


async def test_the_end_of_the_stream_is_read_as_often_as_it_is_asked_for(pair: Pair) -> None:
    reading = asyncio.create_task(pair.stream.read())
    await begun()
    await pair.send(b"last")
    assert await reading == b"last"
    pair.peer.shutdown(socket.SHUT_WR)
    async with asyncio.timeout(5):
        assert [await pair.stream.read() for _ in range(3)] == [b""] * 3


async def test_bytes_behind_an_urgent_mark_are_read_though_no_new_ones_come(pair: Pair) -> None:
    """A read ends at the mark (tcp(7)), which looks like "that was all"."""
    reading = asyncio.create_task(pair.stream.read())
    await begun()
    await pair.send(b"first")
    assert await reading == b"first"
    pair.peer.send(b"before!", socket.MSG_OOB)
    await pair.send(b"behind")
    data = b""
    async with asyncio.timeout(5):
        while len(data) < len(b"beforebehind"):
            data += await pair.stream.read()
    assert data == b"beforebehind", "the urgent byte itself is out of band"


async def test_a_stream_that_the_kernel_does_not_watch_goes_on_all_the_same(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = 0

    def refuse(*_args: object, **_kwargs: object) -> None:
        nonlocal refusals
        refusals += 1
        raise OSError(errno.ENOSPC, "no more watches")

    monkeypatch.setattr(Poller.current(), "add", refuse)
    reading = asyncio.create_task(pair.stream.read_exactly(4))
    await begun()
    await pair.send(b"ping")
    assert await reading == b"ping"
    writing = asyncio.create_task(pair.stream.write(b"x" * (32 << 20)))
    assert len(await pair.receive(32 << 20)) == 32 << 20
    await writing
    assert refusals >= 2


async def test_no_byte_is_missed_between_short_reads(pair: Pair) -> None:
    """A read that is shorter than asked for ends the trying; the bytes that come at that moment must still be told."""
    rng = random.Random(4)
    sent = rng.randbytes(400_000)

    async def send() -> None:
        at = 0
        while at < len(sent):
            step = rng.choice((1, 7, 100, 5_000))
            await pair.send(sent[at : at + step])
            at += step
            if rng.random() < 0.1:
                await asyncio.sleep(0)
        pair.peer.shutdown(socket.SHUT_WR)

    sending = asyncio.create_task(send())
    data = bytearray()
    async with asyncio.timeout(30):
        while chunk := await pair.stream.read(rng.choice((1, 50, 4_096, 65_536))):
            data += chunk
    await sending
    assert data == sent
