"""HTTP/2 to our server: translation that cannot smuggle, flow control end to end, and floods that end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import h2.errors
import h2.events
import h2.settings
import pytest
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    ExtensionFrame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from rama_ebpf.core import Authority, Stream
from rama_ebpf.services.http import (
    BackendPool,
    Body,
    ForwardProxy,
    Headers,
    HttpLimits,
    HttpServer,
    HttpTimeouts,
    Request,
    Response,
)
from rama_ebpf.services.http.h2 import server as server_of_h2

from .conftest import DATE, OK, Connect, Run, RunOrigin, descriptors, eventually, read_until_reset
from .h2_client import GET, H2Client, h2_client
from .peers import command


async def echo(request: Request) -> Response:
    """Send the body back as it comes, with what the request said in a header."""
    headers = Headers([("X-Request", f"{request.method} {request.url} {request.version}")])
    return Response(200, headers, Body.stream(aiter(request.body), close=request.body.close))


def with_(*changed: tuple[str, str], without: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """The fields of a good GET, with pseudo-header fields replaced and others appended."""
    new = dict(changed)
    fields = [(name, new.pop(name, value)) for name, value in GET if name not in without]
    pseudo = [(name, value) for name, value in changed if name in new and name.startswith(":")]
    return fields + pseudo + [(name, value) for name, value in changed if not name.startswith(":")]


async def test_request_and_body_are_served(run: Run) -> None:
    server = run(HttpServer(echo, h2c=True))
    async with h2_client(server.port) as client:
        stream_id = client.request(with_((":method", "POST"), (":path", "/x?y"), ("cookie", "a=1")), end=False)
        client.h2.send_data(stream_id, b"hello", end_stream=True)
        fields, body = await client.response(stream_id)
    assert fields[":status"] == "200"
    assert fields["x-request"] == "POST http://a.test/x?y 2"
    assert body == b"hello"


async def test_http_1_still_works_on_the_same_listener(run: Run) -> None:
    server = run(HttpServer(echo, h2c=True))
    answer = await server.exchange(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")
    assert b"\r\nX-Request: GET http://a.test/ 1.1\r\n" in answer


async def test_without_h2c_the_preface_is_refused(run: Run) -> None:
    server = run(HttpServer(echo))
    assert (await server.exchange(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")).startswith(b"HTTP/1.1 400 ")


async def test_streams_are_served_side_by_side(run: Run) -> None:
    release = asyncio.Event()

    async def app(request: Request) -> Response:
        if request.path == "/slow":
            await release.wait()
        return Response.text(200, request.path)

    server = run(HttpServer(app, h2c=True))
    async with h2_client(server.port) as client:
        slow = client.request(with_((":path", "/slow")))
        fast = client.request(with_((":path", "/fast")))
        assert (await client.response(fast))[1] == b"/fast"
        release.set()
        assert (await client.response(slow))[1] == b"/slow"


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (with_(("x-a", "1"), ("te", "trailers")), b"GET / HTTP/1.1\r\nHost: a.test\r\nx-a: 1\r\n"),
        (with_(("cookie", "a=1"), ("cookie", "b=2")), b"GET / HTTP/1.1\r\nHost: a.test\r\ncookie: a=1; b=2\r\n"),
        (with_(("host", "a.test")), b"GET / HTTP/1.1\r\nHost: a.test\r\nVia: 2 rama-ebpf\r\n"),
        (with_(("host", "a.test"), without=(":authority",)), b"GET / HTTP/1.1\r\nHost: a.test\r\n"),
        (with_((":method", "OPTIONS"), (":path", "*")), b"OPTIONS * HTTP/1.1\r\nHost: a.test\r\n"),
    ],
)
async def test_request_becomes_http_1_without_ambiguity(
    run: Run, connector: Connect, run_origin: RunOrigin, fields: list[tuple[str, str]], line: bytes
) -> None:
    origin = run_origin(OK)
    pool = BackendPool([Authority.of("127.0.0.1", origin.port)], connector)
    server = run(HttpServer(pool, h2c=True))
    async with h2_client(server.port) as client:
        got, body = await client.response(client.request(fields))
    assert (got[":status"], got["via"], got["content-length"], body) == ("200", "1.1 rama-ebpf", "2", b"ok")
    assert origin.requests[0].startswith(line)
    assert origin.requests[0].count(b"Host") == 1
    await pool.stop()


@pytest.mark.parametrize("length", ["5", None])
async def test_body_that_comes_at_once_with_its_request_is_forwarded(
    run: Run, connector: Connect, run_origin: RunOrigin, length: str | None
) -> None:
    origin = run_origin(OK, until=b"hello")
    pool = BackendPool([Authority.of("127.0.0.1", origin.port)], connector)
    server = run(HttpServer(pool, h2c=True))
    async with h2_client(server.port) as client:
        declared = [] if length is None else [("content-length", length)]
        stream_id = client.request(with_((":method", "POST"), *declared), end=False)
        client.h2.send_data(stream_id, b"hello", end_stream=True)
        assert (await client.response(stream_id))[0][":status"] == "200"
    framing = b"Content-Length: 5\r\n\r\nhello" if length else b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello"
    assert framing in origin.requests[0]
    await pool.stop()


SMUGGLING = {
    "CRLF in a value": with_(("x", "1\r\nTransfer-Encoding: chunked")),
    "LF in a value": with_(("x", "1\nx")),
    "CR in a value": with_(("x", "1\rx")),
    "NUL in a value": with_(("x", "\0")),
    "control character in a value": with_(("x", "\x01")),
    "blank at the end of a value": with_(("x", "1 ")),
    "CRLF in a name": with_(("x\r\ny", "1")),
    "colon in a name": with_(("x:y", "1")),
    "blank in a name": with_(("x y", "1")),
    "empty name": with_(("", "1")),
    "name in upper case": with_(("X", "1")),
    "content_length": with_(("content_length", "5")),
    "x_forwarded_for": with_(("x_forwarded_for", "1")),
    "transfer-encoding": with_(("transfer-encoding", "chunked")),
    "connection": with_(("connection", "close")),
    "keep-alive": with_(("keep-alive", "1")),
    "proxy-connection": with_(("proxy-connection", "close")),
    "upgrade": with_(("upgrade", "h2c")),
    "te other than trailers": with_(("te", "gzip")),
    "two lengths": with_(("content-length", "0"), ("content-length", "1")),
    "bad length": with_(("content-length", "+0")),
    "length without a body": with_(("content-length", "5")),
    "host that contradicts": with_(("host", "b.test")),
    "two hosts": with_(("host", "a.test"), ("host", "a.test")),
    "CRLF in the method": with_((":method", "GET / HTTP/1.1\r\nHost: x\r\n\r\nGET")),
    "blank in the method": with_((":method", "GET /")),
    "method in lower case": with_((":method", "get")),
    "CRLF in the path": with_((":path", "/ HTTP/1.1\r\nHost: x")),
    "blank in the path": with_((":path", "/a b")),
    "fragment in the path": with_((":path", "/a#b")),
    "path without a slash": with_((":path", "a")),
    "absolute path": with_((":path", "http://b.test/")),
    "empty path": with_((":path", "")),
    "asterisk for GET": with_((":path", "*")),
    "no path": with_(without=(":path",)),
    "no method": with_(without=(":method",)),
    "no scheme": with_(without=(":scheme",)),
    "no authority": with_(without=(":authority",)),
    "scheme ftp": with_((":scheme", "ftp")),
    "CRLF in the scheme": with_((":scheme", "http\r\nx: y")),
    "user information": with_((":authority", "u@a.test")),
    "CRLF in the authority": with_((":authority", "a.test\r\nx: y")),
    "path in the authority": with_((":authority", "a.test/x")),
    "short IPv4 address": with_((":authority", "127.1")),
    "empty authority": with_((":authority", "")),
    "repeated pseudo-header": [*GET, (":path", "/b")],
    "unknown pseudo-header": with_((":foo", "x")),
    "status in a request": with_((":status", "200")),
    "pseudo-header at the end": [*GET[:3], ("x", "1"), GET[3]],
    "protocol without CONNECT": with_((":protocol", "websocket")),
    "CONNECT with a path": with_((":method", "CONNECT")),
    "CONNECT without a port": [(":method", "CONNECT"), (":authority", "a.test")],
    "TRACE with a body": with_((":method", "TRACE"), ("content-length", "5")),
}


@pytest.mark.parametrize("name", SMUGGLING)
async def test_what_could_smuggle_is_reset_and_never_reaches_a_service(run: Run, name: str) -> None:
    served: list[Request] = []

    async def app(request: Request) -> Response:
        served.append(request)
        return Response.text(200, "ok")

    server = run(HttpServer(app, h2c=True, timeouts=HttpTimeouts(linger=0.1)))
    async with h2_client(server.port) as client:
        client.request(SMUGGLING[name])
        await client.flush()
        while (
            not client.closed and not client.of(h2.events.StreamReset) and not client.of(h2.events.ConnectionTerminated)
        ):
            await client.step()
        assert client.of(h2.events.ResponseReceived) == []
    assert served == []


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([*GET, ("x", "a" * 100_000)], "431"),
        ([*GET, *((f"x-{number}", "1") for number in range(200))], "431"),
        (with_((":path", "/" + "a" * 20_000)), "414"),
        ([*GET, ("expect", "200-ok")], "417"),
        ([*GET, ("content-length", "2000000")], "413"),
    ],
)
async def test_what_is_too_large_gets_its_status_and_the_connection_lives_on(
    run: Run, fields: list[tuple[str, str]], status: str
) -> None:
    server = run(HttpServer(echo, h2c=True, limits=HttpLimits(body=1_000_000)))
    async with h2_client(server.port) as client:
        stream_id = client.request(fields, end=False)
        assert (await client.response(stream_id))[0][":status"] == status
        assert (await client.response(client.request()))[0][":status"] == "200"


async def test_body_above_the_limit_gets_413(run: Run) -> None:
    async def swallow(request: Request) -> Response:
        async for _ in request.body:
            pass
        return Response.text(200, "ok")

    server = run(HttpServer(swallow, h2c=True, limits=HttpLimits(body=1000)))
    async with h2_client(server.port) as client:
        stream_id = client.request(end=False)
        client.h2.send_data(stream_id, bytes(1001))
        assert (await client.response(stream_id))[0][":status"] == "413"


@pytest.mark.parametrize(
    "name", ["host", "content-length", "content-type", "authorization", "x-forwarded-for", "set-cookie", "x_real_ip"]
)
async def test_trailer_that_routes_or_authenticates_resets_the_stream(run: Run, name: str) -> None:
    read: list[bytes] = []

    async def app(request: Request) -> Response:
        read.append(await request.body.read(100))
        return Response.text(200, "ok")

    async with h2_client(run(HttpServer(app, h2c=True)).port) as client:
        stream_id = client.request(with_((":method", "POST")), end=False)
        client.h2.send_data(stream_id, b"hello")
        client.h2.send_headers(stream_id, [(name, "1")], end_stream=True)
        reset = await client.until(h2.events.StreamReset)
        assert reset.error_code == h2.errors.ErrorCodes.PROTOCOL_ERROR
    assert read == []


async def test_refused_request_whose_trailers_are_refused_too_is_no_bug_of_ours(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    server = run(HttpServer(echo, h2c=True))
    async with h2_client(server.port) as client:
        stream_id = client.request(with_((":method", "POST"), ("expect", "200-ok")), end=False)
        client.h2.send_headers(stream_id, [("host", "a.test")], end_stream=True)  # in one segment with the request
        reset = await client.until(h2.events.StreamReset)
        assert reset.error_code == h2.errors.ErrorCodes.PROTOCOL_ERROR
        assert (await client.response(client.request()))[0][":status"] == "200"
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_answer_to_an_upload_that_is_not_read_reaches_the_client(run: Run, tmp_path: Path) -> None:
    async def refuse(_request: Request) -> Response:
        return Response.text(403, "not here")

    (tmp_path / "upload").write_bytes(bytes(1_500_000))
    server = run(HttpServer(refuse, h2c=True))
    for limits in (None, HttpLimits(body=1_000_000)):
        if limits is not None:
            server = run(HttpServer(refuse, h2c=True, limits=limits))
        url = f"http://127.0.0.1:{server.port}/"
        status = ("-o", "/dev/null", "-w", "%{http_code}")
        said = await command(
            "curl", "-sS", "--http2-prior-knowledge", "--data-binary", f"@{tmp_path}/upload", *status, url
        )
        assert said == (b"403" if limits is None else b"413")


async def test_rest_of_an_upload_that_is_not_wanted_is_declined_after_a_moment(run: Run) -> None:
    async def refuse(_request: Request) -> Response:
        return Response.text(403, "not here")

    server = run(HttpServer(refuse, h2c=True, timeouts=HttpTimeouts(linger=0.05)))
    async with h2_client(server.port) as client:
        stream_id = client.request(with_((":method", "POST")), end=False)
        reset = await client.until(h2.events.StreamReset, stream_id)
        assert reset.error_code == h2.errors.ErrorCodes.NO_ERROR
        assert client.of(h2.events.StreamEnded)


async def test_trailers_pass_both_ways(run: Run) -> None:
    async def app(request: Request) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            yield await request.body.read(100)
            response.body.trailers = request.body.trailers

        response = Response(200, Headers(), Body.stream(chunks()))
        return response

    server = run(HttpServer(app, h2c=True))
    async with h2_client(server.port) as client:
        stream_id = client.request(with_((":method", "POST")), end=False)
        client.h2.send_data(stream_id, b"hello")
        client.h2.send_headers(stream_id, [("x-sum", "7")], end_stream=True)
        assert (await client.response(stream_id))[1] == b"hello"
        (trailers,) = client.of(h2.events.TrailersReceived)
    assert trailers.headers == [("x-sum", "7")]


async def test_100_continue_is_sent_when_the_body_is_read(run: Run) -> None:
    async def reads_first(request: Request) -> Response:
        return Response(200, Headers(), Body.of(await request.body.read(10)))

    server = run(HttpServer(reads_first, h2c=True))
    async with h2_client(server.port) as client:
        stream_id = client.request(with_((":method", "POST"), ("expect", "100-continue")), end=False)
        event = await client.until(h2.events.InformationalResponseReceived)
        assert event.headers == [(":status", "100")]
        client.h2.send_data(stream_id, b"hello", end_stream=True)
        assert (await client.response(stream_id))[1] == b"hello"


async def test_service_that_answers_before_it_reads_never_sends_100_too_late(run: Run) -> None:
    server = run(HttpServer(echo, h2c=True))
    async with h2_client(server.port) as client:
        stream_id = client.request(with_((":method", "POST"), ("expect", "100-continue")), end=False)
        await client.until(h2.events.StreamReset, stream_id)
        assert client.of(h2.events.InformationalResponseReceived) == []
    answer = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n"
    reader, writer = await server.open()
    writer.write(answer)
    assert (await read_until_reset(reader)).count(b"HTTP/1.1") == 1
    writer.close()


async def test_a_reader_that_stops_closes_the_window_of_its_stream_only(run: Run) -> None:
    stalled = asyncio.Event()

    async def app(request: Request) -> Response:
        if request.path == "/stall":
            await stalled.wait()
        size = 0
        async for chunk in request.body:
            size += len(chunk)
        return Response.text(200, str(size))

    server = run(HttpServer(app, h2c=True))
    async with h2_client(server.port) as client:
        await client.until(h2.events.RemoteSettingsChanged)
        stall = client.request(with_((":method", "POST"), (":path", "/stall")), end=False)
        other = client.request(with_((":method", "POST")), end=False)
        sent = 0
        while room := min(client.h2.local_flow_control_window(stall), 16384):
            client.h2.send_data(stall, bytes(room))
            sent += room
        assert sent == 128 * 1024
        for _ in range(100):
            while client.h2.local_flow_control_window(other) < 16384:
                await client.flush()
                await client.step()
            client.h2.send_data(other, bytes(16384))
        client.h2.end_stream(other)
        assert (await client.response(other))[1] == b"1638400"
        assert client.h2.local_flow_control_window(stall) == 0
        stalled.set()
        client.h2.end_stream(stall)
        assert (await client.response(stall))[1] == str(sent).encode()


async def test_a_client_that_takes_nothing_holds_the_service_back(run: Run) -> None:
    produced = 0

    async def app(request: Request) -> Response:
        async def endless() -> AsyncIterator[bytes]:
            nonlocal produced
            while True:
                produced += 16384
                yield bytes(16384)

        return Response(200, Headers(), Body.stream(endless()))

    server = run(HttpServer(app, h2c=True, timeouts=HttpTimeouts(write=0.3)))
    async with h2_client(server.port, auto=False) as client:
        stream_id = client.request()
        await client.until(h2.events.StreamReset, stream_id)
        assert produced <= 65535 + 2 * 16384
        received = sum(len(event.data) for event in client.of(h2.events.DataReceived))
        assert received == 65535


async def test_a_client_with_an_endless_window_that_does_not_read_holds_the_service_back(run: Run) -> None:
    produced = 0

    async def app(request: Request) -> Response:
        async def endless() -> AsyncIterator[bytes]:
            nonlocal produced
            while True:
                produced += 65536
                yield bytes(65536)
                await asyncio.sleep(0)

        return Response(200, Headers(), Body.stream(endless()))

    server = run(HttpServer(app, h2c=True, timeouts=HttpTimeouts(write=0.5)))
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
    client = H2Client(reader, writer)
    client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 2**31 - 1})
    client.h2.increment_flow_control_window(2**31 - 1 - 65535)
    client.request()
    await client.flush()
    await server.idle()
    assert 65535 < produced < 64 * 1024 * 1024  # what the kernel's socket buffers take, and not 2 GiB
    writer.transport.abort()


async def test_reset_by_the_client_cancels_the_service(run: Run) -> None:
    cancelled = asyncio.Event()
    started = asyncio.Event()

    async def app(request: Request) -> Response:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return Response.text(200, "")

    server = run(HttpServer(app, h2c=True))
    async with h2_client(server.port) as client:
        stream_id = client.request()
        await client.flush()
        await started.wait()
        client.h2.reset_stream(stream_id)
        await client.flush()
        await cancelled.wait()


async def test_service_that_breaks_off_resets_the_stream_and_no_other(run: Run) -> None:
    async def app(request: Request) -> Response:
        async def breaks() -> AsyncIterator[bytes]:
            yield b"hello"
            raise ConnectionResetError("the upstream went away")

        if request.path == "/good":
            return Response.text(200, "ok")
        return Response(200, Headers(), Body.stream(breaks()))

    server = run(HttpServer(app, h2c=True))
    async with h2_client(server.port) as client:
        bad = client.request(with_((":path", "/bad")))
        event = await client.until(h2.events.StreamReset, bad)
        assert event.error_code == h2.errors.ErrorCodes.INTERNAL_ERROR
        assert (await client.response(client.request(with_((":path", "/good")))))[1] == b"ok"


async def test_go_away_of_the_client_lets_its_streams_finish(run: Run) -> None:
    release = asyncio.Event()

    async def app(request: Request) -> Response:
        await release.wait()
        return Response.text(200, "ok")

    server = run(HttpServer(app, h2c=True))
    async with h2_client(server.port) as client:
        stream_id = client.request()
        client.raw(GoAwayFrame(0, last_stream_id=0, error_code=0))
        await client.writer.drain()
        await eventually(lambda: server.tcp.live == 1)
        release.set()
        assert (await client.response(stream_id))[1] == b"ok"
        while not client.closed:
            await client.step()


async def test_draining_says_go_away_and_finishes_what_is_under_way(run: Run) -> None:
    release = asyncio.Event()
    started = asyncio.Event()

    async def app(request: Request) -> Response:
        started.set()
        await release.wait()
        return Response.text(200, "ok")

    service = HttpServer(app, h2c=True)
    server = run(service)
    async with h2_client(server.port) as client, h2_client(server.port) as idle:
        stream_id = client.request()
        await client.flush()
        await idle.until(h2.events.SettingsAcknowledged)
        await started.wait()
        service.drain()
        # What follows GOAWAY would be a protocol error to the h2 library, so the rest is read as frames.
        release.set()
        rest = await client.reader.read()
        assert GoAwayFrame(0, last_stream_id=stream_id).serialize() in rest
        assert DataFrame(stream_id, b"ok").serialize()[9:] in rest
        assert await idle.reader.read() == GoAwayFrame(0).serialize()


async def test_idle_connection_is_closed_with_go_away(run: Run) -> None:
    server = run(HttpServer(echo, h2c=True, timeouts=HttpTimeouts(idle=0.2)))
    async with h2_client(server.port) as client:
        assert (await client.response(client.request()))[0][":status"] == "200"
        event = await client.until(h2.events.ConnectionTerminated)
        assert event.error_code == 0
        assert await client.reader.read() == b""


@pytest.mark.parametrize("sent", [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
async def test_preface_without_more_is_not_waited_for(run: Run, sent: bytes) -> None:
    server = run(HttpServer(echo, h2c=True, timeouts=HttpTimeouts(idle=0.2, head=0.1)))
    await server.exchange(sent)
    await server.idle()


async def test_header_block_that_stays_open_is_not_waited_for(run: Run) -> None:
    server = run(HttpServer(echo, h2c=True, timeouts=HttpTimeouts(head=0.2)))
    async with h2_client(server.port) as client:
        client.raw(HeadersFrame(1, b"\x82", flags=["END_STREAM"]))
        assert (await client.reader.read()).endswith(GoAwayFrame(0).serialize())


FLOODS: dict[str, Callable[[H2Client], None]] = {
    "CONTINUATION": lambda client: client.raw(
        HeadersFrame(1, b"\x82"), *(ContinuationFrame(1, b"") for _ in range(1000))
    ),
    "a large header block": lambda client: client.raw(
        HeadersFrame(1, bytes(16000)), *(ContinuationFrame(1, bytes(16000)) for _ in range(10))
    ),
    "PING": lambda client: client.raw(*(PingFrame(0, bytes(8)) for _ in range(4000))),
    "SETTINGS": lambda client: client.raw(*(SettingsFrame(0) for _ in range(4000))),
    "PRIORITY": lambda client: client.raw(*(PriorityFrame(1, depends_on=0) for _ in range(4000))),
    "unknown frames": lambda client: client.raw(*(ExtensionFrame(type=0xFA, stream_id=0) for _ in range(4000))),
    "WINDOW_UPDATE": lambda client: client.raw(*(WindowUpdateFrame(0, window_increment=1) for _ in range(4000))),
    "empty DATA": lambda client: (
        client.request(with_((":method", "POST")), end=False),
        client.raw(*(DataFrame(1) for _ in range(4000))),
    )[1],
}


@pytest.mark.parametrize("name", FLOODS)
async def test_flood_ends_the_connection_with_enhance_your_calm(run: Run, name: str) -> None:
    server = run(HttpServer(echo, h2c=True))
    async with h2_client(server.port) as client:
        FLOODS[name](client)
        event = await client.until(h2.events.ConnectionTerminated)
        assert event.error_code == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM
    await server.idle()


async def test_rapid_reset_ends_the_connection_and_runs_few_services(run: Run) -> None:
    served = 0

    async def app(request: Request) -> Response:
        nonlocal served
        served += 1
        await asyncio.Event().wait()
        return Response.text(200, "ok")

    server = run(HttpServer(app, h2c=True))
    async with h2_client(server.port) as client:
        for _ in range(2000):
            stream_id = client.request()
            client.h2.reset_stream(stream_id)
        event = await client.until(h2.events.ConnectionTerminated)
        assert event.error_code == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM
    await server.idle()
    assert served <= 200


async def test_more_streams_than_allowed_are_refused(run: Run) -> None:
    release = asyncio.Event()

    async def app(request: Request) -> Response:
        await release.wait()
        return Response.text(200, "ok")

    server = run(HttpServer(app, h2c=True))
    async with h2_client(server.port) as client:
        await client.until(h2.events.RemoteSettingsChanged)
        assert client.h2.remote_settings.max_concurrent_streams == 100
        client.h2.remote_settings = h2.settings.Settings(client=False)  # it forgets the limit
        ids = [client.request() for _ in range(102)]
        for refused in ids[100:]:
            reset = await client.until(h2.events.StreamReset, refused)
            assert reset.error_code == h2.errors.ErrorCodes.REFUSED_STREAM
        release.set()
        for served in ids[:100]:
            assert (await client.response(served))[0][":status"] == "200"
    await server.idle()


async def test_reset_streams_whose_services_linger_make_no_room(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_of_h2, "_STREAMS", 20)
    running = 0
    cleaned_up = asyncio.Event()

    async def stubborn(request: Request) -> Response:
        nonlocal running
        running += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await cleaned_up.wait()
            raise
        finally:
            running -= 1
        return Response.text(200, "")

    server = run(HttpServer(stubborn, h2c=True))
    async with h2_client(server.port) as client:
        for number in range(1, 41):
            stream_id = client.request()
            await client.flush()
            await eventually(lambda number=number: running == number)
            client.h2.reset_stream(stream_id)
        for _ in range(10):
            reset = await client.until(h2.events.StreamReset, client.request())
            assert reset.error_code == h2.errors.ErrorCodes.REFUSED_STREAM
        assert running == 40
        cleaned_up.set()
        await eventually(lambda: running == 0)


async def test_connect_tunnels_over_a_stream(run: Run, connector: Connect, run_origin: RunOrigin) -> None:
    origin = run_origin(b"hello client", until=b"hello server", close=True)
    server = run(HttpServer(ForwardProxy(connector), h2c=True))
    async with h2_client(server.port) as client:
        stream_id = client.request([(":method", "CONNECT"), (":authority", origin.authority)], end=False)
        head = await client.until(h2.events.ResponseReceived, stream_id)
        assert dict(head.headers)[":status"] == "200"
        client.h2.send_data(stream_id, b"hello server")
        data = await client.until(h2.events.DataReceived, stream_id)
        assert data.data == b"hello client"
        await client.until(h2.events.StreamEnded, stream_id)
        client.h2.end_stream(stream_id)
        await client.flush()
    assert origin.requests == [b"hello server"]


async def test_reset_of_the_origin_resets_the_stream_of_the_tunnel(run: Run, connector: Connect) -> None:
    async def resets(stream: Stream) -> None:
        await stream.read()
        stream.abort()

    origin = run(resets)
    server = run(HttpServer(ForwardProxy(connector), h2c=True))
    async with h2_client(server.port) as client:
        stream_id = client.request([(":method", "CONNECT"), (":authority", origin.authority)], end=False)
        await client.until(h2.events.ResponseReceived, stream_id)
        client.h2.send_data(stream_id, b"x")
        event = await client.until(h2.events.StreamReset, stream_id)
        assert event.error_code == h2.errors.ErrorCodes.CONNECT_ERROR


async def test_broken_upstream_response_resets_the_stream(run: Run, connector: Connect, run_origin: RunOrigin) -> None:
    origin = run_origin(b"HTTP/1.1 200 OK\r\n" + DATE + b"Content-Length: 10\r\n\r\nhel", close=True)
    server = run(HttpServer(BackendPool([Authority.of("127.0.0.1", origin.port)], connector), h2c=True))
    async with h2_client(server.port) as client:
        event = await client.until(h2.events.StreamReset, client.request())
        assert event.error_code == h2.errors.ErrorCodes.INTERNAL_ERROR


@pytest.mark.parametrize("cut", [0, 10, 24, 30, 60, 90])
@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
async def test_client_that_leaves_leaves_nothing_behind(
    run: Run, connector: Connect, run_origin: RunOrigin, cut: int, reset: bool
) -> None:
    origin = run_origin(b"")  # never answers
    pool = BackendPool([Authority.of("127.0.0.1", origin.port)], connector)
    server = run(HttpServer(pool, h2c=True))
    before = descriptors()
    reader, writer = await server.open()
    client = H2Client(reader, writer)
    client.request()
    client.request(with_((":method", "POST")), end=False)
    writer.write(client.h2.data_to_send()[: cut or None])
    await writer.drain()
    await eventually(lambda: server.tcp.accepted == 1)
    await asyncio.sleep(0.05)  # so that the server has taken what was sent: no event tells of that
    if reset:
        writer.transport.abort()
    else:
        writer.close()
    await eventually(lambda: server.tcp.live == 0)
    await eventually(lambda: descriptors() <= before)


async def test_curl_speaks_h2_with_prior_knowledge(run: Run) -> None:
    server = run(HttpServer(echo, h2c=True))
    out = await command(
        "curl", "-s", "--http2-prior-knowledge", "-d", "hello", "-w", " %{http_version}", f"http://{server.authority}/"
    )
    assert out == b"hello 2"


async def test_lone_rst_frames_are_no_way_around_the_count(run: Run) -> None:
    server = run(HttpServer(echo, h2c=True))
    async with h2_client(server.port) as client:
        client.raw(RstStreamFrame(1, error_code=8))
        await client.until(h2.events.ConnectionTerminated)
