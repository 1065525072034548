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

from rama_ebpf.core import Authority, Stream
from rama_ebpf.services.http import BackendPool, HttpServer, HttpTimeouts, Request, Response
from rama_ebpf.services.http.h2.server import H2_PREFACE

from .conftest import Connect, Run, descriptors, eventually
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
GOOD_REQUESTS = [
    [(":method", "POST"), (":scheme", "http"), (":authority", "a.test"), (":path", "/")],
    [(":method", "POST"), (":scheme", "http"), (":authority", "a.test"), (":path", "/"), ("expect", "100-continue")],
    [(":method", "GET"), (":scheme", "http"), (":authority", "a.test"), (":path", "/"), ("te", "trailers")],
    [(":method", "CONNECT"), (":authority", "a.test:1")],
]
GOOD_RESPONSES = [[(":status", "200")], [(":status", "100")], [(":status", "204")], [(":status", "200"), ("x", "y")]]
TRAILERS = [[("x-sum", "7")], [("x-sum", "7")], [("host", "a.test")], [("x_real_ip", "1")]]


def scenes(chance: random.Random, good: list[list[tuple[str, str]]], streams: list[int]) -> list[bytes]:
    """Return what to write, piece by piece: frames in order, in half of all cases with one that is not."""
    encoder = hpack.Encoder()
    begun: list[int] = []
    todo = list(streams)
    out: list[Frame] = []
    for _ in range(chance.randint(1, 25)):
        if todo and (not begun or chance.random() < 0.3):
            begun.append(todo.pop(0))
            end = ["END_STREAM"] if chance.random() < 0.3 else []
            fields = encoder.encode(chance.choice(good))
            out.append(HeadersFrame(begun[-1], fields, flags=["END_HEADERS", *end]))
            if end and chance.random() < 0.9:
                begun.pop()
        elif begun:
            stream = chance.choice(begun)
            frame, ends = _proper(chance, encoder, good, stream)
            out.append(frame)
            if ends:
                begun.remove(stream)
    if chance.random() < 0.5:
        out.append(_improper(chance, encoder, chance.choice(streams)))
    pieces = [bytearray(frame.serialize()) for frame in out]
    if chance.random() < 0.1:
        piece = chance.choice(pieces)
        piece[chance.randrange(len(piece))] = chance.randrange(256)
    if chance.random() < 0.3:
        del pieces[-1][chance.randrange(len(pieces[-1])) :]
    return [bytes(piece) for piece in pieces]


def _proper(
    chance: random.Random, encoder: hpack.Encoder, good: list[list[tuple[str, str]]], stream: int
) -> tuple[Frame, bool]:
    match chance.randrange(10):
        case 0:
            return HeadersFrame(
                stream, encoder.encode(chance.choice(TRAILERS)), flags=["END_HEADERS", "END_STREAM"]
            ), True
        case 1:
            return RstStreamFrame(stream, error_code=chance.randrange(15)), True
        case 2:
            return WindowUpdateFrame(chance.choice((0, stream)), window_increment=chance.choice((1, 65535))), False
        case 3:
            return SettingsFrame(0, settings={4: chance.choice((0, 1, 65535, 2**31 - 1))}), False
        case 4:
            return chance.choice((PingFrame(0, bytes(8)), PriorityFrame(stream), ExtensionFrame(0xF0, stream))), False
        case 5:
            return HeadersFrame(stream, encoder.encode(chance.choice(good)), flags=["END_HEADERS"]), False
        case _:
            end = chance.random() < 0.3
            data = chance.randbytes(chance.choice((0, 5, 5, 16_000)))
            return DataFrame(stream, data, flags=["END_STREAM"] if end else []), end


def _improper(chance: random.Random, encoder: hpack.Encoder, stream: int) -> Frame:
    fields = encoder.encode(chance.sample(FIELDS, 4))
    settings = {chance.randrange(10): chance.choice((0, 2**31 - 1, 2**32 - 1))}
    return chance.choice(
        (
            HeadersFrame(stream, fields, flags=["END_HEADERS"]),
            HeadersFrame(stream, fields),
            ContinuationFrame(stream, fields, flags=["END_HEADERS"]),
            DataFrame(stream, bytes(20_000)),
            WindowUpdateFrame(chance.choice((0, stream)), window_increment=2**31 - 1),
            SettingsFrame(0, settings=settings),
            GoAwayFrame(0, last_stream_id=chance.choice((0, 1, 2**31 - 1)), error_code=0),
            PushPromiseFrame(stream, 2, fields, flags=["END_HEADERS"]),
        )
    )


async def echo_but_connect(request: Request) -> Response:
    return Response.text(405, "no") if request.method == "CONNECT" else await echo(request)


def bugs(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


async def test_server_survives_random_frames(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(9113)
    server = run(
        HttpServer(
            echo_but_connect, h2c=True, timeouts=HttpTimeouts(head=0.2, idle=0.2, body=0.2, write=0.5, linger=0.1)
        )
    )
    before = descriptors()

    async def one() -> None:
        reader, writer = await server.open()
        with contextlib.suppress(ConnectionError):
            writer.write(H2_PREFACE + SettingsFrame(0).serialize())
            for piece in scenes(chance, GOOD_REQUESTS, [1, 3, 5, 7, 9]):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(chance.choice((0, 0, 0.01)))
            await reader.read(chance.choice((-1, 100)))
        writer.transport.abort()

    for _ in range(5):
        await asyncio.gather(*(one() for _ in range(30)))
    await server.idle()
    assert bugs(caplog) == []
    async with h2_client(server.port) as client:
        assert (await client.response(client.request()))[0][":status"] == "200"
    await eventually(lambda: descriptors() <= before)


async def test_client_survives_random_frames(run: Run, connector: Connect, caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(7540)

    async def origin(stream: Stream) -> None:
        await stream.read()
        with contextlib.suppress(OSError):
            await stream.write(SettingsFrame(0).serialize())
            for piece in scenes(chance, GOOD_RESPONSES, [1]):
                await stream.write(piece)
                await asyncio.sleep(chance.choice((0, 0, 0.01)))
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

    for _ in range(5):
        await asyncio.gather(*(one(number) for number in range(20)))
    await proxy.idle()
    assert bugs(caplog) == []
    await pool.stop()
    await eventually(lambda: descriptors() <= before)
