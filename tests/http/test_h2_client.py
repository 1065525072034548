"""HTTP/2 to upstreams: many requests on one connection, and responses that cannot smuggle."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import pytest
from hyperframe.frame import GoAwayFrame

from rama_ebpf.core import Authority, Service, Stream
from rama_ebpf.services.http import Body, Headers, HttpServer, HttpTimeouts, PoolLimits, Request, Response

from .conftest import DATE, MakePool, Run, abort, descriptors, eventually, read_until_reset

Connect = Service[Authority, Stream]
Script = Callable[[h2.connection.H2Connection, Any], Awaitable[bytes | None] | bytes | None]


@pytest.fixture
def pool_of(pool_of: MakePool) -> MakePool:
    return functools.partial(pool_of, h2_prior_knowledge=True)


def scripted(script: Script) -> Service[Stream, Any]:
    """An origin that speaks h2 by the library and lets ``script`` answer each event; bytes it returns are sent raw."""

    async def serve(stream: Stream) -> None:
        config = h2.config.H2Configuration(
            client_side=False,
            header_encoding="latin-1",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
        connection = h2.connection.H2Connection(config)
        connection.initiate_connection()
        await stream.write(connection.data_to_send())
        while data := await stream.read():
            for event in connection.receive_data(data):
                raw = script(connection, event)
                if raw is not None and not isinstance(raw, bytes):
                    raw = await raw
                await stream.write(connection.data_to_send() + (raw or b""))

    return serve


def answering(*fields: tuple[str, str], body: bytes = b"ok") -> Script:
    def script(connection: h2.connection.H2Connection, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            connection.send_headers(event.stream_id, [(":status", "200"), *fields], end_stream=not body)
            if body:
                connection.send_data(event.stream_id, body, end_stream=True)

    return script


def get(*fields: str, method: str = "GET", path: str = "/") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: a.test", "Connection: close", *fields, "", ""]).encode()


async def test_request_becomes_http_2_and_the_response_http_1(run: Run, pool_of: MakePool) -> None:
    seen: list[Any] = []

    def script(connection: h2.connection.H2Connection, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            seen.append(event.headers)
        answering(("date", "x"), ("x-a", "1"))(connection, event)

    proxy = run(HttpServer(pool_of(run(scripted(script)).port)))
    answer = await proxy.exchange(get("X-Custom: 1", "TE: trailers", "Cookie: a=1", path="/x?y"))
    assert seen == [
        [
            (":method", "GET"),
            (":scheme", "http"),
            (":authority", "a.test"),
            (":path", "/x?y"),
            ("x-custom", "1"),
            ("via", "1.1 rama-ebpf"),
            ("cookie", "a=1"),
        ]
    ]
    assert answer == (
        b"HTTP/1.1 200 OK\r\ndate: x\r\nx-a: 1\r\nVia: 2 rama-ebpf\r\nTransfer-Encoding: chunked\r\n"
        b"Connection: close\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    )


async def test_requests_share_a_connection(run: Run, pool_of: MakePool) -> None:
    begun: set[str] = set()
    all_begun = asyncio.Event()

    async def app(request: Request) -> Response:
        begun.add(request.path)
        if len(begun) == 51:
            all_begun.set()
        if request.path != "/first":
            await all_begun.wait()
        return Response.text(200, request.path)

    origin = run(HttpServer(app, h2c=True))
    proxy = run(HttpServer(pool_of(origin.port)))
    assert (await proxy.exchange(get(path="/first"))).endswith(b"/first")
    answers = await asyncio.gather(*(proxy.exchange(get(path=f"/{number}")) for number in range(50)))
    assert [answer.rpartition(b"\r\n\r\n")[2] for answer in answers] == [b"/%d" % number for number in range(50)]
    assert origin.tcp.accepted == 1


async def test_bodies_stream_both_ways_with_trailers(run: Run, pool_of: MakePool) -> None:
    async def echo(request: Request) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            async for chunk in request.body:
                yield chunk
            response.body.trailers = request.body.trailers

        response = Response(200, Headers([("Date", "x")]), Body.stream(chunks()))
        return response

    proxy = run(HttpServer(pool_of(run(HttpServer(echo, h2c=True)).port)))
    size = 3_000_000
    head = get("Transfer-Encoding: chunked", "TE: trailers", method="POST").replace(b"close", b"close, TE")
    body = (b"8000\r\n" + bytes(0x8000) + b"\r\n") * (size // 0x8000) + b"0\r\nX-Sum: 7\r\n\r\n"
    answer = await proxy.exchange(head + body)
    got = answer.partition(b"\r\n\r\n")[2]
    assert got.endswith(b"\r\n0\r\nx-sum: 7\r\n\r\n")
    assert got.count(b"\0") == size // 0x8000 * 0x8000


async def test_early_response_ends_the_upload_and_not_the_connection(run: Run, pool_of: MakePool) -> None:
    async def app(request: Request) -> Response:
        return Response.text(413 if request.method == "POST" else 200, request.method)

    origin = run(HttpServer(app, h2c=True))
    proxy = run(HttpServer(pool_of(origin.port)))
    reader, writer = await proxy.open()
    writer.write(get("Content-Length: 50000000", method="POST") + bytes(100_000))
    assert (await reader.read()).startswith(b"HTTP/1.1 413 ")
    writer.close()
    assert (await proxy.exchange(get())).endswith(b"GET")
    assert origin.tcp.accepted == 1


async def test_interim_responses_and_100_continue_pass(run: Run, pool_of: MakePool) -> None:
    async def app(request: Request) -> Response:
        assert request.inform is not None
        await request.inform(103, Headers([("Link", "</a>")]))
        return Response.text(200, (await request.body.read(10)).decode())

    proxy = run(HttpServer(pool_of(run(HttpServer(app, h2c=True)).port)))
    reader, writer = await proxy.open()
    writer.write(get("Content-Length: 5", "Expect: 100-continue", method="PUT"))
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"hello")
    assert (await reader.read()).endswith(b"\r\n\r\nhello")
    writer.close()


@pytest.mark.parametrize(("method", "status"), [("HEAD", "200"), ("GET", "304")])
async def test_length_of_a_response_without_a_body_is_kept(
    run: Run, pool_of: MakePool, method: str, status: str
) -> None:
    def script(connection: h2.connection.H2Connection, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            connection.send_headers(event.stream_id, [(":status", status), ("content-length", "1234")], end_stream=True)

    proxy = run(HttpServer(pool_of(run(scripted(script)).port)))
    answer = await proxy.exchange(get(method=method))
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"\r\nContent-Length: 1234\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


SMUGGLING = {
    "CRLF in a value": answering(("x", "1\r\nSet-Cookie: a=b")),
    "response in a value": answering(("x", "1\r\n\r\nHTTP/1.1 200 OK")),
    "LF in a value": answering(("x", "1\nx: y")),
    "NUL in a value": answering(("x", "\0")),
    "CRLF in a name": answering(("x\r\ny", "1")),
    "name in upper case": answering(("X", "1")),
    "transfer-encoding": answering(("transfer-encoding", "chunked")),
    "connection": answering(("connection", "close")),
    "content_length": answering(("content_length", "1")),
    "two lengths": answering(("content-length", "2"), ("content-length", "3")),
    "bad length": answering(("content-length", "+2")),
    "length too large": answering(("content-length", "3")),
    "length too small": answering(("content-length", "1")),
    "method in a response": answering((":method", "GET")),
    "two statuses": answering((":status", "200")),
    "pseudo-header behind": answering(("x", "1"), (":foo", "1")),
    "100 KiB of fields": answering(("x", "a" * 100_000)),
}


@pytest.mark.parametrize("name", SMUGGLING)
async def test_response_that_could_smuggle_becomes_502_or_a_reset(run: Run, pool_of: MakePool, name: str) -> None:
    proxy = run(HttpServer(pool_of(run(scripted(SMUGGLING[name])).port)))
    reader, writer = await proxy.open()
    writer.write(get())
    try:
        answer = await reader.read()
    except ConnectionResetError:
        assert name.startswith("length too")
    else:
        assert answer.startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
        assert answer.count(b"HTTP/1.1") == 1
        assert b"ok" not in answer.partition(b"\r\n\r\n")[2]
    writer.close()


@pytest.mark.parametrize("status", ["101", "99", "600", "abc", "20", "", "200\r\nx: y"])
async def test_bad_status_becomes_502(run: Run, pool_of: MakePool, status: str) -> None:
    def script(connection: h2.connection.H2Connection, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            connection.send_headers(event.stream_id, [(":status", status)], end_stream=True)

    proxy = run(HttpServer(pool_of(run(scripted(script)).port)))
    assert (await proxy.exchange(get())).startswith(b"HTTP/1.1 502 ")


async def test_reset_of_a_response_is_a_reset_for_the_client(run: Run, pool_of: MakePool) -> None:
    def script(connection: h2.connection.H2Connection, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            connection.send_headers(event.stream_id, [(":status", "200")])
            connection.send_data(event.stream_id, b"hel")
            connection.reset_stream(event.stream_id, 2)

    proxy = run(HttpServer(pool_of(run(scripted(script)).port)))
    reader, writer = await proxy.open()
    writer.write(get())
    assert not (await read_until_reset(reader)).endswith(b"0\r\n\r\n")
    writer.close()


async def test_refused_stream_is_repeated_on_a_new_connection(run: Run, pool_of: MakePool) -> None:
    refused: list[int] = []

    def script(connection: h2.connection.H2Connection, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived) and event.stream_id == 3:
            refused.append(event.stream_id)
            connection.reset_stream(event.stream_id, h2.errors.ErrorCodes.REFUSED_STREAM)
        else:
            answering()(connection, event)

    proxy = run(HttpServer(pool_of(run(scripted(script)).port)))
    for _ in range(2):
        assert (await proxy.exchange(get())).endswith(b"\r\n\r\n2\r\nok\r\n0\r\n\r\n")
    assert refused == [3]


async def test_go_away_lets_what_is_under_way_finish_and_takes_no_more(run: Run, pool_of: MakePool) -> None:
    async def script(connection: h2.connection.H2Connection, event: Any) -> bytes | None:
        if not isinstance(event, h2.events.RequestReceived):
            return None
        connection.send_headers(event.stream_id, [(":status", "200")])
        out = connection.data_to_send() + GoAwayFrame(0, last_stream_id=event.stream_id).serialize()
        connection.send_data(event.stream_id, b"ok", end_stream=True)
        return bytes(out + connection.data_to_send())

    origin = run(scripted(script))
    proxy = run(HttpServer(pool_of(origin.port)))
    for _ in range(3):
        assert (await proxy.exchange(get())).endswith(b"\r\n\r\n2\r\nok\r\n0\r\n\r\n")
    assert origin.tcp.accepted == 3


async def test_unprocessed_requests_are_repeated_and_others_are_not(run: Run, pool_of: MakePool) -> None:
    def script(connection: h2.connection.H2Connection, event: Any) -> bytes | None:
        if isinstance(event, h2.events.RequestReceived) and event.stream_id > 1:
            return bytes(GoAwayFrame(0, last_stream_id=1).serialize())
        answering()(connection, event)
        return None

    proxy = run(HttpServer(pool_of(run(scripted(script)).port)))
    assert (await proxy.exchange(get())).startswith(b"HTTP/1.1 200 ")
    assert (await proxy.exchange(get())).startswith(b"HTTP/1.1 200 ")
    assert (await proxy.exchange(get("Content-Length: 1", method="POST") + b"x")).startswith(b"HTTP/1.1 502 ")


async def test_silent_upstream_gets_504_and_its_stream_is_cancelled(run: Run, pool_of: MakePool) -> None:
    resets: list[Any] = []

    def script(connection: h2.connection.H2Connection, event: Any) -> None:
        if isinstance(event, h2.events.StreamReset):
            resets.append(event.error_code)

    origin = run(scripted(script))
    proxy = run(HttpServer(pool_of(origin.port, timeouts=HttpTimeouts(response=0.2))))
    assert (await proxy.exchange(get())).startswith(b"HTTP/1.1 504 ")
    await eventually(lambda: resets == [h2.errors.ErrorCodes.CANCEL])


async def test_client_that_resets_cancels_its_stream_only(run: Run, pool_of: MakePool) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def app(request: Request) -> Response:
        if request.path == "/wait":
            begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise
        return Response.text(200, "ok")

    origin = run(HttpServer(app, h2c=True))
    proxy = run(HttpServer(pool_of(origin.port), timeouts=HttpTimeouts(watch=0.05)))
    assert (await proxy.exchange(get())).endswith(b"ok")
    _, writer = await proxy.open()
    writer.write(get(path="/wait"))
    await begun.wait()
    abort(writer)
    await cancelled.wait()
    assert (await proxy.exchange(get())).endswith(b"ok")
    assert origin.tcp.accepted == 1


async def test_client_that_leaves_within_a_response_cancels_its_stream(run: Run, pool_of: MakePool) -> None:
    given_up = asyncio.Event()

    async def app(request: Request) -> Response:
        async def trickle() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"x"
                    await asyncio.sleep(0.01)
            finally:
                given_up.set()

        if request.path == "/":
            return Response.text(200, "ok")
        return Response(200, Headers(), Body.stream(trickle()))

    origin = run(HttpServer(app, h2c=True))
    proxy = run(HttpServer(pool_of(origin.port), timeouts=HttpTimeouts(watch=0.05)))
    reader, writer = await proxy.open()
    writer.write(get(path="/trickle"))
    await reader.readuntil(b"x")
    writer.close()
    await given_up.wait()
    assert (await proxy.exchange(get())).endswith(b"ok")
    assert origin.tcp.accepted == 1


async def test_stalled_client_closes_the_window_of_its_stream(run: Run, pool_of: MakePool) -> None:
    produced = 0

    async def app(request: Request) -> Response:
        async def endless() -> AsyncIterator[bytes]:
            nonlocal produced
            while True:
                produced += 65536
                yield bytes(65536)

        if request.path == "/":
            return Response.text(200, "ok")
        return Response(200, Headers(), Body.stream(endless()))

    proxy = run(HttpServer(pool_of(run(HttpServer(app, h2c=True)).port)))
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1024)
    writer.write(get(path="/endless"))
    before = -1
    while produced != before or produced == 0:
        before = produced
        await asyncio.sleep(0.3)  # until nothing moves any more
    assert produced < 32 * 1024 * 1024
    assert (await proxy.exchange(get())).endswith(b"ok")
    writer.transport.abort()
    del reader


async def test_idle_connection_is_closed_in_order_and_leaves_nothing(run: Run, pool_of: MakePool) -> None:
    terminated: list[Any] = []

    def script(connection: h2.connection.H2Connection, event: Any) -> None:
        if isinstance(event, h2.events.ConnectionTerminated):
            terminated.append(event.error_code)
        answering()(connection, event)

    origin = run(scripted(script))
    proxy = run(HttpServer(pool_of(origin.port, pool_limits=PoolLimits(keep=0.2))))
    before = descriptors()
    assert (await proxy.exchange(get())).startswith(b"HTTP/1.1 200 ")
    await eventually(lambda: origin.tcp.live == 0 and proxy.tcp.live == 0)
    await eventually(lambda: descriptors() <= before)
    assert terminated == [0]


async def test_upstream_that_is_no_h2_becomes_502(run: Run, pool_of: MakePool) -> None:
    async def smtp(stream: Stream) -> None:
        await stream.write(b"220 smtp.test ESMTP\r\n")
        with contextlib.suppress(OSError):
            await stream.read()

    proxy = run(HttpServer(pool_of(run(smtp).port)))
    assert (await proxy.exchange(get())).startswith(b"HTTP/1.1 502 ")
    h1 = b"HTTP/1.1 400 Bad\r\n" + DATE + b"\r\n"

    async def old(stream: Stream) -> None:
        await stream.read()
        await stream.write(h1)

    proxy = run(HttpServer(pool_of(run(old).port)))
    assert (await proxy.exchange(get())).startswith(b"HTTP/1.1 502 ")
