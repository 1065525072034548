"""Random frames at both sides of HTTP/2, over real connections: no bug shows, nobody waits, nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random

import hpack
import pytest
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    ExtensionFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    PushPromiseFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from rama_ebpf.core import Authority, Service, Stream
from rama_ebpf.services.http import BackendPool, HttpServer, HttpTimeouts
from rama_ebpf.services.http.h2_server import H2_PREFACE

from .conftest import Run, descriptors, eventually
from .h2_client import h2_client
from .test_h2_server import echo

FIELDS = [
    (":method", "GET"),
    (":method", "POST"),
    (":method", "CONNECT"),
    (":scheme", "http"),
    (":authority", "a.test"),
    (":authority", "127.0.0.1:1"),
    (":path", "/"),
    (":status", "200"),
    (":status", "100"),
    (":status", "204"),
    (":protocol", "websocket"),
    ("content-length", "5"),
    ("content-length", "0"),
    ("expect", "100-continue"),
    ("te", "trailers"),
    ("cookie", "a=1"),
    ("x", "y"),
    ("x-bad", "\r\n"),
]
GOOD_REQUEST = [(":method", "POST"), (":scheme", "http"), (":authority", "a.test"), (":path", "/")]
GOOD_RESPONSE = [(":status", "200")]
FLAGS = ["END_STREAM", "END_HEADERS", "END_STREAM", "END_HEADERS", "PADDED", "PRIORITY"]


def frames(chance: random.Random, good: list[tuple[str, str]], streams: list[int]) -> bytes:
    """Return a connection's worth of frames, some as they should be, cut anywhere at the end."""
    encoder = hpack.Encoder()
    out = bytearray()
    for _ in range(chance.randint(1, 40)):
        frame = _frame(chance, encoder, good, chance.choice(streams))
        data = bytearray(frame.serialize())
        if chance.random() < 0.05:
            data[chance.randrange(len(data))] = chance.randrange(256)
        out += data
    return bytes(out[: chance.randint(1, len(out))] if chance.random() < 0.3 else out)


def _frame(chance: random.Random, encoder: hpack.Encoder, good: list[tuple[str, str]], stream: int) -> Frame:
    kind = chance.randrange(14)
    if kind < 5:
        fields = [*good, *chance.sample(FIELDS, chance.randint(0, 2))] if kind < 4 else chance.sample(FIELDS, 5)
        flags = ["END_HEADERS"] if chance.random() < 0.9 else []
        flags += ["END_STREAM"] if chance.random() < 0.4 else []
        return HeadersFrame(stream, encoder.encode(fields), flags=flags)
    match kind:
        case 5 | 6:
            return DataFrame(
                stream, chance.randbytes(chance.choice((0, 5, 5, 20_000))), flags=_some(chance, "END_STREAM")
            )
        case 7:
            return RstStreamFrame(stream, error_code=chance.randrange(15))
        case 8:
            return WindowUpdateFrame(chance.choice((0, stream)), window_increment=chance.choice((1, 65535, 2**31 - 1)))
        case 9:
            settings = {chance.randrange(10): chance.choice((0, 1, 100, 65535, 2**31 - 1, 2**32 - 1))}
            return SettingsFrame(0, settings=settings)
        case 10:
            return chance.choice(
                (PingFrame(0, bytes(8)), PriorityFrame(stream, depends_on=0), ExtensionFrame(0xF0, stream))
            )
        case 11:
            return ContinuationFrame(stream, encoder.encode(good), flags=_some(chance, "END_HEADERS"))
        case 12:
            return GoAwayFrame(0, last_stream_id=chance.choice((0, 1, 2**31 - 1)), error_code=0)
        case _:
            return PushPromiseFrame(stream, 2, encoder.encode(good), flags=_some(chance, "END_HEADERS"))


def _some(chance: random.Random, flag: str) -> list[str]:
    return [flag] if chance.random() < 0.5 else []


def bugs(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


async def test_server_survives_random_frames(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(9113)
    server = run(HttpServer(echo, h2c=True, timeouts=HttpTimeouts(head=0.2, idle=0.2, body=0.2, write=0.5, linger=0.1)))
    before = descriptors()

    async def one() -> None:
        data = SettingsFrame(0).serialize() + frames(chance, GOOD_REQUEST, [1, 3, 5, 7, 9, 9, 2])
        reader, writer = await server.open()
        with contextlib.suppress(ConnectionError):
            for offset in range(0, len(data), size := chance.choice((1000, 100_000))):
                writer.write((H2_PREFACE if not offset else b"") + data[offset : offset + size])
                await writer.drain()
            await reader.read(chance.choice((-1, 100)))
        writer.transport.abort()

    for _ in range(10):
        await asyncio.gather(*(one() for _ in range(30)))
    await server.idle()
    assert bugs(caplog) == []
    async with h2_client(server.port) as client:
        assert (await client.response(client.request()))[0][":status"] == "200"
    await eventually(lambda: descriptors() <= before)


async def test_client_survives_random_frames(
    run: Run, connector: Service[Authority, Stream], caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(7540)

    async def origin(stream: Stream) -> None:
        await stream.read()
        data = SettingsFrame(0).serialize() + frames(chance, GOOD_RESPONSE, [1, 1, 1, 3, 2])
        with contextlib.suppress(OSError):
            await stream.write(data)
            while await stream.read():
                pass

    timeouts = HttpTimeouts(head=0.2, response=0.2, body=0.2, write=0.5, linger=0.1)
    pool = BackendPool(
        [Authority.of("127.0.0.1", run(origin).port)], connector, h2_prior_knowledge=True, timeouts=timeouts
    )
    proxy = run(HttpServer(pool, timeouts=timeouts))
    before = descriptors()

    async def one(number: int) -> None:
        reader, writer = await proxy.open()
        body = b"Content-Length: 5\r\n\r\nhello" if number % 2 else b"\r\n"
        writer.write(
            (b"POST" if number % 2 else b"GET") + b" / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n" + body
        )
        with contextlib.suppress(ConnectionError):
            answer = await reader.read()
            assert answer == b"" or answer.startswith(b"HTTP/1.1 "), answer
        writer.transport.abort()

    for _ in range(10):
        await asyncio.gather(*(one(number) for number in range(20)))
    await proxy.idle()
    assert bugs(caplog) == []
    await pool.stop()
    await eventually(lambda: descriptors() <= before)
