"""Duties of a server and a proxy towards those who share them: by the bytes on both sides."""

from __future__ import annotations

import asyncio
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
import hpack
import pytest
from hyperframe.frame import DataFrame, HeadersFrame, SettingsFrame

from rama_ebpf.core import Stream, stack
from rama_ebpf.services.http import (
    ForwardedField,
    ForwardedLayer,
    ForwardProxy,
    HttpLimits,
    HttpProxy,
    HttpServer,
    HttpTimeouts,
    OriginOptions,
    PassiveHealth,
    Request,
    Response,
    Route,
    Routes,
)
from rama_ebpf.services.http.h2.server import H2_PREFACE

from .conftest import DATE, OK, OK_VIA, Connect, MakePool, Run, RunOrigin, eventually
from .h2_client import GET, h2_client
from .test_upgrade import KEY, asking


def get(target: str = "/", *fields: str, method: str = "GET", host: str = "a.test") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close", *fields, "", ""]).encode()


async def answered(request: Request) -> Response:
    return Response.text(200, f"{request.scheme} {request.arrived_by}")


# -- the scheme comes from the connection ----------------------------------------------------------------------


async def test_client_cannot_choose_the_scheme_that_servers_behind_are_told(
    run: Run, pool_of: MakePool, run_origin: RunOrigin
) -> None:
    origin = run_origin(OK)
    for field in ForwardedField:
        server = run(HttpServer(stack(ForwardedLayer(field), pool_of(origin.port)), h2c=True))
        answer = await server.exchange(get("https://a.test/"))
        assert answer.startswith(b"HTTP/1.1 421 Misdirected Request\r\n")
        async with h2_client(server.port) as client:
            fields = [(name, "https" if name == ":scheme" else value) for name, value in GET]
            assert (await client.response(client.request(fields)))[0][":status"] == "421"
        assert origin.requests == []
        await server.exchange(get("/", "X-Forwarded-Proto: https", "Forwarded: proto=https", "X-Forwarded-Ssl: on"))
        await server.exchange(get("http://a.test/"))
        for seen in origin.requests:
            assert b"https" not in seen
            assert b"-Ssl" not in seen
            assert (b"X-Forwarded-Proto: http\r\n" if field is ForwardedField.X_FORWARDED else b"proto=http") in seen
        origin.requests.clear()


async def test_scheme_of_a_tls_connection_is_https_whatever_the_target_says(run: Run) -> None:
    server = run(HttpServer(answered, scheme="https"))
    assert (await server.exchange(get("/"))).endswith(b"https https")
    assert (await server.exchange(get("https://a.test/"))).endswith(b"https https")
    assert (await server.exchange(get("http://a.test/"))).startswith(b"HTTP/1.1 421 ")


async def test_a_forward_proxy_tells_the_clients_connection_and_serves_targets_elsewhere(
    run: Run, connector: Connect, run_origin: RunOrigin
) -> None:
    origin = run_origin(OK)
    layer = ForwardedLayer(ForwardedField.X_FORWARDED)
    server = run(HttpServer(stack(layer, ForwardProxy(connector)), scheme="https"))
    assert (await server.exchange(get(f"http://{origin.authority}/", host=origin.authority))).startswith(
        b"HTTP/1.1 200"
    )
    assert b"X-Forwarded-Proto: https\r\n" in origin.requests[0]


# -- extended CONNECT, WebSocket -------------------------------------------------------------------------------


def extended(protocol: str = "websocket", *fields: tuple[str, str]) -> list[tuple[str, str]]:
    return [
        (":method", "CONNECT"),
        (":protocol", protocol),
        (":scheme", "http"),
        (":authority", "a.test"),
        (":path", "/chat"),
        *fields,
    ]


VERSION = ("sec-websocket-version", "13")


@pytest.mark.parametrize("status", [b"200 OK", b"204 No Content", b"206 Partial Content"])
async def test_a_backends_plain_success_does_not_open_a_websocket(
    run: Run, pool_of: MakePool, run_origin: RunOrigin, status: bytes
) -> None:
    origin = run_origin(b"HTTP/1.1 " + status + b"\r\n" + DATE + b"\r\n", close=True)
    server = run(HttpServer(pool_of(origin.port), h2c=True))
    async with h2_client(server.port) as client:
        head, _ = await client.response(client.request(extended("websocket", VERSION), end=False))
        assert head[":status"] == "502"
        assert "http_upgrade_failed" in head["proxy-status"]


async def test_a_refusal_of_the_backend_is_passed_on(run: Run, pool_of: MakePool, run_origin: RunOrigin) -> None:
    origin = run_origin(b"HTTP/1.1 403 No\r\n" + DATE + b"Content-Length: 2\r\n\r\nno")
    server = run(HttpServer(pool_of(origin.port), h2c=True))
    async with h2_client(server.port) as client:
        head, body = await client.response(client.request(extended("websocket", VERSION), end=False))
        assert (head[":status"], body) == ("403", b"no")


@pytest.mark.parametrize("protocol", ["webtransport", "connect-udp", "h2c", "websocket2"])
async def test_an_unknown_protocol_of_extended_connect_is_501_and_no_get(
    run: Run, pool_of: MakePool, run_origin: RunOrigin, protocol: str
) -> None:
    origin = run_origin(OK)
    server = run(HttpServer(pool_of(origin.port), h2c=True))
    async with h2_client(server.port) as client:
        head, _ = await client.response(client.request(extended(protocol, VERSION), end=False))
        assert head[":status"] == "501"
    assert origin.connections == 0


@pytest.mark.parametrize("how", ["204", "length", "end"])
async def test_an_http_2_backend_that_does_not_open_the_tunnel_is_502(run: Run, pool_of: MakePool, how: str) -> None:
    async def origin(stream: Stream) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        connection.local_settings = h2.settings.Settings(
            client=False, initial_values={h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL: 1}
        )
        connection.initiate_connection()
        await stream.write(connection.data_to_send())
        while data := await stream.read():
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    head = [(":status", "204" if how == "204" else "200")]
                    if how == "length":
                        head.append(("content-length", "5"))
                    connection.send_headers(event.stream_id, head, end_stream=how == "end")
                    if how == "length":
                        connection.send_data(event.stream_id, b"plain", end_stream=True)
            await stream.write(connection.data_to_send())

    server = run(HttpServer(pool_of(run(origin).port, h2_prior_knowledge=True)))
    answer = await server.exchange(asking(f"Sec-WebSocket-Key: {KEY}"), eof=True)
    assert answer.startswith(b"HTTP/1.1 502 ")


OPENINGS: dict[str, tuple[bytes, int]] = {
    "without a key": (asking(), 400),
    "with an empty key": (asking("Sec-WebSocket-Key:"), 400),
    "with two keys": (asking(f"Sec-WebSocket-Key: {KEY}", f"Sec-WebSocket-Key: {KEY}"), 400),
    "with a key of 15 bytes": (asking("Sec-WebSocket-Key: " + "A" * 20), 400),
    "with a key that is no base64": (asking("Sec-WebSocket-Key: " + "!" * 22 + "=="), 400),
    "by POST": (asking(f"Sec-WebSocket-Key: {KEY}", "Content-Length: 0").replace(b"GET", b"POST"), 400),
    "by HEAD": (asking(f"Sec-WebSocket-Key: {KEY}").replace(b"GET", b"HEAD"), 400),
    "of version 12": (asking(f"Sec-WebSocket-Key: {KEY}", "Sec-WebSocket-Version: 12"), 426),
    "of two versions": (asking(f"Sec-WebSocket-Key: {KEY}", "Sec-WebSocket-Version: 13, 8"), 426),
    "without a version": (asking(f"Sec-WebSocket-Key: {KEY}").replace(b"Sec-WebSocket-Version: 13\r\n", b""), 426),
}


@pytest.mark.parametrize("name", OPENINGS)
async def test_a_bad_opening_of_a_websocket_is_refused_and_never_repaired(
    run: Run, pool_of: MakePool, connector: Connect, run_origin: RunOrigin, name: str
) -> None:
    request, status = OPENINGS[name]
    origin = run_origin(OK)
    forward = request.replace(b" /chat", b" http://" + origin.host + b"/chat")
    for server, asked in ((run(HttpServer(pool_of(origin.port))), request), (run(HttpProxy(connector)), forward)):
        answer = await server.exchange(asked, eof=True)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        if status == 426:
            assert b"\r\nSec-WebSocket-Version: 13\r\n" in answer
            assert b"\r\nUpgrade: websocket\r\n" in answer
    assert origin.connections == 0


async def test_a_bad_opening_over_http_2_is_refused(run: Run, pool_of: MakePool, run_origin: RunOrigin) -> None:
    origin = run_origin(OK)
    server = run(HttpServer(pool_of(origin.port), h2c=True))
    async with h2_client(server.port) as client:
        head, _ = await client.response(client.request(extended("websocket", (VERSION[0], "8")), end=False))
        assert (head[":status"], head["sec-websocket-version"]) == ("426", "13")
    assert origin.connections == 0


# -- HTTP/2: what one stream does is its own -------------------------------------------------------------------

MALFORMED: dict[str, tuple[list[tuple[str, str]], bytes]] = {
    "upper case": ([*GET, ("X-Up", "1")], b""),
    "unknown pseudo-header": ([*GET, (":what", "1")], b""),
    "pseudo-header behind a field": ([GET[0], ("x", "1"), *GET[1:]], b""),
    "no path": ([field for field in GET if field[0] != ":path"], b""),
    "no method": (GET[1:], b""),
    "connection": ([*GET, ("connection", "close")], b""),
    "te gzip": ([*GET, ("te", "gzip")], b""),
    "transfer-encoding": ([*GET, ("transfer-encoding", "chunked")], b""),
    "CR in a value": ([*GET, ("x", "a\rb")], b""),
    "bad length": ([*GET, ("content-length", "x")], b""),
    "two lengths": ([*GET, ("content-length", "1"), ("content-length", "2")], b"a"),
    "less than its length": ([*GET, ("content-length", "5")], b"hell"),
    "more than its length": ([*GET, ("content-length", "3")], b"hell"),
    "host that contradicts": ([*GET, ("host", "b.test")], b""),
}


@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_request_ends_its_own_stream_only(run: Run, name: str, priority: bool) -> None:
    release = asyncio.Event()

    async def app(request: Request) -> Response:
        if request.path == "/slow":
            await release.wait()
        return Response.text(200, str(len(await request.body.read(100))))

    fields, body = MALFORMED[name]
    async with h2_client(run(HttpServer(app, h2c=True)).port) as client:
        slow = client.request(GET)
        bad = client.h2.get_next_available_stream_id()
        client.h2.send_headers(bad, GET)  # for the client's own state; what is sent is below
        flags = ["END_HEADERS", *([] if body else ["END_STREAM"]), *(["PRIORITY"] if priority else [])]
        encoder = hpack.Encoder()
        client.h2.clear_outbound_data_buffer()
        asked = [(key, "/slow" if key == ":path" else value) for key, value in GET]
        frames: list[Any] = [
            SettingsFrame(0),
            HeadersFrame(slow, encoder.encode(asked), flags=["END_HEADERS", "END_STREAM"]),
            HeadersFrame(bad, encoder.encode(fields), flags=flags),
        ]
        if body:
            frames.append(DataFrame(bad, body, flags=["END_STREAM"]))
        client.writer.write(H2_PREFACE + b"".join(frame.serialize() for frame in frames))
        reset = await client.until(h2.events.StreamReset, bad)
        assert reset.error_code == h2.errors.ErrorCodes.PROTOCOL_ERROR
        release.set()
        assert (await client.response(slow))[0][":status"] == "200"
        assert client.of(h2.events.ConnectionTerminated) == []


async def test_requests_above_the_limit_before_it_is_known_are_refused_and_not_lost(run: Run) -> None:
    release = asyncio.Event()
    served = 0

    async def app(request: Request) -> Response:
        nonlocal served
        served += 1
        await release.wait()
        return Response.text(200, "ok")

    async with h2_client(run(HttpServer(app, h2c=True)).port) as client:
        ids = [client.request() for _ in range(150)]  # before the server's settings have come
        await client.flush()
        for refused in ids[100:]:
            reset = await client.until(h2.events.StreamReset, refused)
            assert reset.error_code == h2.errors.ErrorCodes.REFUSED_STREAM
        release.set()
        for asked in ids[:100]:
            assert (await client.response(asked))[0][":status"] == "200"
        assert (await client.response(client.request()))[0][":status"] == "200"  # one of them, again
    assert served == 101


async def test_a_malformed_response_over_http_2_ends_no_other_users_request(run: Run, pool_of: MakePool) -> None:
    good = asyncio.Event()

    async def origin(stream: Stream) -> None:
        config = h2.config.H2Configuration(
            client_side=False, validate_outbound_headers=False, normalize_outbound_headers=False
        )
        connection = h2.connection.H2Connection(config)
        connection.initiate_connection()
        await stream.write(connection.data_to_send())
        waiting: list[int] = []
        while data := await stream.read():
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    assert event.stream_id is not None
                    if (b":path", b"/bad") in [(bytes(k), bytes(v)) for k, v in event.headers or []]:
                        connection.send_headers(event.stream_id, [(":status", "200"), ("X-Up", "1")])
                    else:
                        waiting.append(event.stream_id)
                        good.set()
                elif isinstance(event, h2.events.StreamReset):
                    for stream_id in waiting:
                        connection.send_headers(stream_id, [(":status", "200")], end_stream=True)
            await stream.write(connection.data_to_send())

    server = run(HttpServer(pool_of(run(origin).port, h2_prior_knowledge=True, passive=PassiveHealth(failures=99))))
    healthy = asyncio.create_task(server.exchange(get("/good")))
    await good.wait()
    assert (await server.exchange(get("/bad"))).startswith(b"HTTP/1.1 502 ")
    assert (await healthy).startswith(b"HTTP/1.1 200 ")


# -- legal, though unusual -------------------------------------------------------------------------------------


async def test_zeros_in_front_of_a_length_are_legal_both_ways_and_not_passed_on(
    run: Run, connector: Connect, run_origin: RunOrigin
) -> None:
    origin = run_origin(OK.replace(b"Content-Length: 2", b"Content-Length: 002"), until=b"abc")
    proxy = run(HttpProxy(connector))
    request = get(f"http://{origin.authority}/", "Content-Length: 003", method="POST", host=origin.authority) + b"abc"
    answer = await proxy.exchange(request)
    assert answer.endswith(b"Content-Length: 2\r\nConnection: close\r\n\r\nok")
    assert b"\r\nContent-Length: 3\r\n" in origin.requests[0]


async def test_an_empty_port_is_the_default_one_and_not_passed_on(run: Run) -> None:
    async def tell(request: Request) -> Response:
        return Response.text(200, f"{request.authority} {request.target}")

    server = run(HttpServer(tell, h2c=True))
    assert (await server.exchange(get("http://a.test:/"))).endswith(b"\r\n\r\na.test a.test:80")
    assert (await server.exchange(get("/", host="[::1]:"))).endswith(b"\r\n\r\n[::1] [::1]:80")
    async with h2_client(server.port) as client:
        fields = [(name, "a.test:" if name == ":authority" else value) for name, value in GET]
        assert (await client.response(client.request(fields)))[1] == b"a.test a.test:80"
        bad = client.request([(":method", "CONNECT"), (":authority", "a.test:")])
        assert (await client.until(h2.events.StreamReset, bad)).error_code == 1


@pytest.mark.parametrize("status", [600, 777, 999])
async def test_a_status_above_599_is_a_servers_failure_whose_response_arrives(
    run: Run, connector: Connect, run_origin: RunOrigin, status: int
) -> None:
    origin = run_origin(OK.replace(b"200 OK", b"%d Odd" % status))
    proxy = run(HttpProxy(connector))
    answer = await proxy.exchange(get(f"http://{origin.authority}/", host=origin.authority))
    assert answer == OK_VIA.replace(b"200 OK", b"502 Bad Gateway").replace(
        b"Content-Length: 2\r\n", b"Content-Length: 2\r\nConnection: close\r\n"
    )


@pytest.mark.parametrize("behind", [b"0\r\n\r\n", b""])
async def test_a_204_ends_with_its_header_section_and_its_connection_is_not_used_again(
    run: Run, connector: Connect, run_origin: RunOrigin, behind: bytes
) -> None:
    origin = run_origin(b"HTTP/1.1 204 No Content\r\n" + DATE + b"Transfer-Encoding: chunked\r\n\r\n" + behind)
    proxy = run(HttpProxy(connector))
    for _ in range(2):
        answer = await proxy.exchange(get(f"http://{origin.authority}/", host=origin.authority))
        assert answer == (b"HTTP/1.1 204 No Content\r\n" + DATE + b"Via: 1.1 rama-ebpf\r\nConnection: close\r\n\r\n")
    assert origin.connections == 2


# -- refusing an upload ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["chunked", "length", "short"])
async def test_413_to_an_upload_that_goes_on_says_close_and_can_be_read(
    run: Run, pool_of: MakePool, run_origin: RunOrigin, framing: str
) -> None:
    early = run_origin(b"HTTP/1.1 413 Content Too Large\r\n" + DATE + b"Content-Length: 2\r\n\r\nno")
    server = run(HttpServer(pool_of(early.port)))
    body = bytes(32_000 if framing == "short" else 8_000_000)
    field = "Transfer-Encoding: chunked" if framing == "chunked" else f"Content-Length: {len(body) + 5}"
    reader, writer = await server.open()
    writer.write(f"POST / HTTP/1.1\r\nHost: a.test\r\n{field}\r\n\r\n".encode())
    writer.write(b"%x\r\n%b\r\n" % (len(body), body) if framing == "chunked" else body)
    await writer.drain()  # all of it is sent before a byte is read, as many clients do
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"\r\nConnection: close\r\n" in answer
    assert answer.endswith(b"\r\n\r\nno")
    writer.close()


async def test_413_of_our_own_limit_says_close_and_can_be_read(run: Run) -> None:
    async def swallow(request: Request) -> Response:
        return Response.text(200, str(len(await request.body.read(10**9))))

    server = run(HttpServer(swallow, limits=HttpLimits(body=1000)))
    for field, body in (
        ("Content-Length: 8000000", bytes(8_000_000)),
        ("Transfer-Encoding: chunked", b"7a1200\r\n" + bytes(8_000_000)),
    ):
        reader, writer = await server.open()
        writer.write(f"POST / HTTP/1.1\r\nHost: a.test\r\n{field}\r\n\r\n".encode() + body)
        await writer.drain()
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"\r\nConnection: close\r\n" in answer
        writer.close()


# -- repeats, kept connections, routes -------------------------------------------------------------------------


@pytest.mark.parametrize("retries", [0, 1, 2])
@pytest.mark.parametrize("method", ["PUT", "DELETE"])
async def test_an_unsafe_request_is_sent_no_oftener_than_retries_allow(
    run: Run, pool_of: MakePool, method: str, retries: int
) -> None:
    unsafe: list[bytes] = []

    async def origin(stream: Stream) -> None:
        """Answers GET, and closes in place of answering anything else."""
        while data := await stream.read():
            if not data.startswith(b"GET "):
                unsafe.append(data)
                return
            await stream.write(OK)

    backends = [run(origin).port for _ in range(4)]
    pool = pool_of(*backends, retries=retries, passive=PassiveHealth(failures=99))
    server = run(HttpServer(pool))
    fields = ["Content-Length: 0"] if method == "PUT" else []
    gets = [server.exchange(get()) for _ in range(16)]
    await asyncio.gather(*gets)  # now there are kept connections
    assert pool.connections.idle
    assert (await server.exchange(get("/", *fields, method=method))).startswith(b"HTTP/1.1 502 ")
    assert len(unsafe) == 1 + retries


async def test_connections_to_an_upstream_that_is_not_to_be_kept_carry_one_request(
    run: Run, pool_of: MakePool, connector: Connect, run_origin: RunOrigin
) -> None:
    late = OK + OK.replace(b"ok", b"no")  # a second response, for whoever asks next
    for keep in (True, False):
        origin, other = run_origin(OK), run_origin(late)
        reverse = run(HttpServer(pool_of(origin.port, origin=OriginOptions(keep=keep))))
        forward = run(HttpProxy(connector, origins=lambda _, keep=keep: OriginOptions(keep=keep)))  # type: ignore[misc]
        for _ in range(3):
            assert (await reverse.exchange(get())).endswith(b"ok")
            assert (await forward.exchange(get(f"http://{other.authority}/"))).endswith(b"ok")
        assert origin.connections == (1 if keep else 3)
        if not keep:
            assert other.connections == 3


async def test_options_of_the_whole_server_goes_where_all_paths_do(
    run: Run, pool_of: MakePool, run_origin: RunOrigin
) -> None:
    deep, whole = run_origin(OK), run_origin(OK)
    routes = [Route(pool_of(deep.port), path="/very/deep/path"), Route(pool_of(whole.port))]
    server = run(HttpServer(Routes(routes)))
    assert (await server.exchange(get("*", method="OPTIONS"))).endswith(b"ok")
    assert deep.requests == []
    assert whole.requests[0].startswith(b"OPTIONS * HTTP/1.1\r\n")
    only_deep = run(HttpServer(Routes(routes[:1])))
    assert (await only_deep.exchange(get("*", method="OPTIONS"))).startswith(b"HTTP/1.1 404 ")
    assert deep.requests == []


async def test_a_slow_drain_of_a_refused_upload_ends(run: Run) -> None:
    async def refuse(request: Request) -> Response:
        return Response.text(403, "no")

    server = run(HttpServer(refuse, timeouts=HttpTimeouts(linger=0.2)))
    _, writer = await server.open()
    writer.write(b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel")
    await eventually(lambda: server.tcp.accepted == 1)
    await server.idle()  # though the client neither goes on nor closes
    writer.close()
