"""Upgrades: WebSocket through every pair of HTTP versions, by the bytes; and what is not let through."""

from __future__ import annotations

import h2.events
import pytest

from rama_ebpf.core import Authority, Stream, client_address
from rama_ebpf.relay import TunnelReport
from rama_ebpf.services.http import ForwardProxy, Headers, HttpProxy, HttpServer, Request, Response
from rama_ebpf.services.http.message.websocket import accept_for

from .conftest import DATE, OK, Connect, MakePool, Run, RunOrigin, descriptors, eventually
from .h2_client import h2_client

# RFC 6455 section 1.3.
KEY, ACCEPT = "dGhlIHNhbXBsZSBub25jZQ==", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def asking(*fields: str, target: str = "/chat", host: str = "a.test", upgrade: str = "websocket") -> bytes:
    if upgrade == "websocket" and not any(field.startswith("Sec-WebSocket-Version") for field in fields):
        fields = (*fields, "Sec-WebSocket-Version: 13")
    lines = [f"GET {target} HTTP/1.1", f"Host: {host}", f"Upgrade: {upgrade}", "Connection: Upgrade", *fields]
    return "\r\n".join([*lines, "", ""]).encode()


class Echo:
    """An upgrade that sends back what it gets, in capitals."""

    abandoned = 0

    async def run(self, client: Stream) -> None:
        while data := await client.read():
            await client.write(data.upper())
        await client.write_eof()

    def abandon(self) -> None:
        Echo.abandoned += 1


async def echo_app(request: Request) -> Response:
    """A WebSocket endpoint, as far as the handshake goes."""
    if request.upgrade != "websocket":
        return Response.text(426, "WebSocket only")
    headers = Headers([("Date", "x"), ("X-Path", request.path)])
    key = request.headers.get("sec-websocket-key")
    if request.version != "2":
        assert key is not None
        headers.add("Sec-WebSocket-Accept", accept_for(key))
    return Response(101, headers, upgrade=Echo())


def test_accept_is_that_of_the_rfc() -> None:
    assert accept_for(KEY) == ACCEPT


async def test_handshake_and_bytes_pass_http_1_unchanged(run: Run, pool_of: MakePool, run_origin: RunOrigin) -> None:
    switch = b"HTTP/1.1 101 Switching Protocols\r\n" + DATE + b"Sec-WebSocket-Accept: " + ACCEPT.encode() + b"\r\n"
    origin = run_origin(
        switch + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x05hello",
        b"\x88\x00",
        until=[b"\r\n\r\n", b"\x88"],
    )
    proxy = run(HttpServer(pool_of(origin.port)))
    reader, writer = await proxy.open()
    writer.write(asking(f"Sec-WebSocket-Key: {KEY}", "Sec-WebSocket-Version: 13"))
    expected = switch + b"Via: 1.1 rama-ebpf\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x05hello"
    assert await reader.readexactly(len(expected)) == expected
    assert origin.requests == [
        b"GET /chat HTTP/1.1\r\nHost: a.test\r\nSec-WebSocket-Key: "
        + KEY.encode()
        + b"\r\nSec-WebSocket-Version: 13\r\n"
        b"Via: 1.1 rama-ebpf\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    ]
    writer.write(b"\x88\x80masked")
    assert await reader.readexactly(2) == b"\x88\x00"
    assert origin.requests[1] == b"\x88\x80masked"
    writer.close()


async def test_bytes_sent_right_behind_the_handshake_are_not_lost(run: Run, pool_of: MakePool) -> None:
    proxy = run(HttpServer(pool_of(run(HttpServer(echo_app)).port)))
    answer = await proxy.exchange(asking(f"Sec-WebSocket-Key: {KEY}") + b"hello", eof=True)
    assert answer.endswith(b"\r\n\r\nHELLO")


async def test_absolute_form_upgrades_through_the_forward_proxy(run: Run, connector: Connect) -> None:
    origin = run(HttpServer(echo_app)).authority
    proxy = run(HttpProxy(connector))
    answer = await proxy.exchange(
        asking(f"Sec-WebSocket-Key: {KEY}", target=f"http://{origin}/chat", host=origin) + b"hello", eof=True
    )
    assert answer.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert answer.endswith(b"\r\n\r\nHELLO")


async def test_http_2_client_reaches_an_http_1_upstream(run: Run, pool_of: MakePool) -> None:
    proxy = run(HttpServer(pool_of(run(HttpServer(echo_app)).port), h2c=True))
    await talk_h2(proxy.port)


async def test_http_2_client_reaches_an_http_2_upstream(run: Run, pool_of: MakePool) -> None:
    origin = run(HttpServer(echo_app, h2c=True))
    proxy = run(HttpServer(pool_of(origin.port, h2_prior_knowledge=True), h2c=True))
    await talk_h2(proxy.port)
    assert origin.tcp.accepted == 1


async def talk_h2(port: int) -> None:
    async with h2_client(port) as client:
        await client.until(h2.events.RemoteSettingsChanged)
        assert client.h2.remote_settings.enable_connect_protocol == 1
        stream_id = client.request(
            [
                (":method", "CONNECT"),
                (":protocol", "websocket"),
                (":scheme", "http"),
                (":authority", "a.test"),
                (":path", "/chat"),
                ("sec-websocket-version", "13"),
            ],
            end=False,
        )
        head = dict((await client.until(h2.events.ResponseReceived, stream_id)).headers)
        assert (head[":status"], head["x-path"]) == ("200", "/chat")
        assert "sec-websocket-accept" not in head
        client.h2.send_data(stream_id, b"hello")
        data = await client.until(h2.events.DataReceived, stream_id)
        assert data.data == b"HELLO"
        client.h2.end_stream(stream_id)
        await client.until(h2.events.StreamEnded, stream_id)


async def test_http_1_client_reaches_an_http_2_upstream(run: Run, pool_of: MakePool) -> None:
    origin = run(HttpServer(echo_app, h2c=True))
    proxy = run(HttpServer(pool_of(origin.port, h2_prior_knowledge=True)))
    answer = await proxy.exchange(asking(f"Sec-WebSocket-Key: {KEY}") + b"hello", eof=True)
    assert answer.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert f"Sec-WebSocket-Accept: {ACCEPT}\r\n".encode() in answer
    assert answer.endswith(b"\r\n\r\nHELLO")


async def test_upgrade_avoids_http_2_where_the_upstream_lacks_it(
    run: Run, pool_of: MakePool, connector: Connect
) -> None:
    h1, h2_ = run(HttpServer(echo_app)), run(HttpServer(echo_app, h2c=True))

    async def to_h1(target: Authority) -> Stream:
        return await connector(Authority.of("127.0.0.1", h1.port))

    proxy = run(HttpServer(pool_of(h2_.port, h2_prior_knowledge=True, upgrade_connector=to_h1)))
    plain = b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n"
    assert (await proxy.exchange(plain)).startswith(b"HTTP/1.1 426 ")
    answer = await proxy.exchange(asking(f"Sec-WebSocket-Key: {KEY}") + b"hello", eof=True)
    assert answer.endswith(b"\r\n\r\nHELLO")
    assert (h1.tcp.accepted, h2_.tcp.accepted) == (1, 1)


async def test_wrong_accept_for_our_key_is_502(run: Run, pool_of: MakePool) -> None:
    async def lies(request: Request) -> Response:
        return Response(101, Headers([("Sec-WebSocket-Accept", ACCEPT)]), upgrade=Echo())

    proxy = run(HttpServer(pool_of(run(HttpServer(lies)).port), h2c=True))
    async with h2_client(proxy.port) as client:
        stream_id = client.request(
            [
                (":method", "CONNECT"),
                (":protocol", "websocket"),
                (":scheme", "http"),
                (":authority", "a.test"),
                (":path", "/"),
                ("sec-websocket-version", "13"),
            ],
            end=False,
        )
        head = dict((await client.until(h2.events.ResponseReceived, stream_id)).headers)
        assert head[":status"] == "502"


@pytest.mark.parametrize("upgrade", ["h2c", "h2c, websocket", "TLS/1.0", "tcp", "websocket2"])
async def test_other_protocols_are_not_asked_for(
    run: Run, pool_of: MakePool, run_origin: RunOrigin, upgrade: str
) -> None:
    origin = run_origin(OK)
    proxy = run(HttpServer(pool_of(origin.port)))
    answer = await proxy.exchange(asking("HTTP2-Settings: AAMAAABkAAQAAP__", upgrade=upgrade), eof=True)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert origin.requests == [b"GET /chat HTTP/1.1\r\nHost: a.test\r\nVia: 1.1 rama-ebpf\r\n\r\n"]


async def test_other_protocols_pass_if_configured(run: Run, pool_of: MakePool) -> None:
    async def app(request: Request) -> Response:
        assert request.upgrade == "tcp"
        return Response(101, Headers(), upgrade=Echo())

    proxy = run(HttpServer(pool_of(run(HttpServer(app)).port, upgrades={"tcp"})))
    answer = await proxy.exchange(asking(upgrade="tcp") + b"hello", eof=True)
    assert answer.endswith(b"Connection: Upgrade\r\nUpgrade: tcp\r\n\r\nHELLO")


async def test_upgrade_with_a_body_is_no_upgrade(run: Run, pool_of: MakePool, run_origin: RunOrigin) -> None:
    origin = run_origin(OK, until=b"hello")
    proxy = run(HttpServer(pool_of(origin.port)))
    answer = await proxy.exchange(asking("Content-Length: 5") + b"hello", eof=True)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Upgrade" not in origin.requests[0]


async def test_a_refused_upgrade_leaves_the_connection_in_use(
    run: Run, pool_of: MakePool, run_origin: RunOrigin
) -> None:
    origin = run_origin(b"HTTP/1.1 403 No\r\n" + DATE + b"Content-Length: 0\r\n\r\n", OK)
    proxy = run(HttpServer(pool_of(origin.port)))
    answer = await proxy.exchange(
        asking(f"Sec-WebSocket-Key: {KEY}"), b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 403 No\r\n")
    assert answer.endswith(b"ok")


async def test_origin_that_leaves_the_socket_and_client_that_leaves_it_leave_nothing(
    run: Run, pool_of: MakePool
) -> None:
    origin = run(HttpServer(echo_app))
    proxy = run(HttpServer(pool_of(origin.port)))
    before = descriptors()
    for leave in ("abort", "close"):
        reader, writer = await proxy.open()
        writer.write(asking(f"Sec-WebSocket-Key: {KEY}") + b"x")
        await reader.readuntil(b"X")
        getattr(writer.transport, leave)()
    await eventually(lambda: proxy.tcp.live == 0 and origin.tcp.live == 0)
    await eventually(lambda: descriptors() <= before)


async def test_tunnel_tells_the_layers_outside_who_and_how_much(
    run: Run, connector: Connect, run_origin: RunOrigin
) -> None:
    told: list[tuple[object, object, object]] = []
    inner = HttpServer(ForwardProxy(connector))

    async def outer(stream: Stream) -> None:
        await inner(stream)
        report = stream.extensions.require(TunnelReport)
        target = stream.extensions.require(Authority)
        told.append((client_address(stream), str(target), (report.to_upstream, report.to_client)))

    origin = run_origin(b"hello client", until=b"hello server", close=True)
    proxy = run(outer)
    await proxy.exchange(f"CONNECT {origin.authority} HTTP/1.1\r\nHost: a\r\n\r\nhello server".encode(), eof=True)
    await proxy.idle()
    ((client, target, moved),) = told
    assert client is not None
    assert target == origin.authority
    assert moved == (12, 12)
