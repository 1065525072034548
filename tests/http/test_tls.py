"""HTTP on TLS: listeners that speak both versions by ALPN, TLS upstreams, and intercepted connections."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import h2.events
import pytest

from rama_ebpf.core import Authority, Stream, stack
from rama_ebpf.services.http import (
    BackendPool,
    Body,
    ForwardProxy,
    Headers,
    HttpInspector,
    HttpProxy,
    HttpServer,
    HttpTimeouts,
    Request,
    Response,
)
from rama_ebpf.services.http.layers import HarLayer, HarRecorder, ResponseHeadersLayer
from rama_ebpf.services.tls import CertificateStore, ClientTls, KeyPair, ServerTls, TlsConnector, TlsTerminateLayer
from rama_ebpf.services.tls.ca import CertificateAuthority, LeafIssuer
from rama_ebpf.services.tls.mitm import TlsInterceptor
from rama_ebpf.services.tls.tunnel import TlsTunnelLayer

from ..tls.pki import Authority as Pki
from .conftest import Connect, Run, eventually
from .h2_client import h2_client
from .peers import command
from .test_upgrade import KEY, asking, echo_app

BOTH = ("h2", "http/1.1")


def terminate(pki: Pki, name: str, *alpn: str) -> TlsTerminateLayer:
    leaf = pki.issue(name, "127.0.0.1", stem=f"{name}-{'-'.join(alpn).replace('/', '')}")
    return TlsTerminateLayer(CertificateStore.of_files(ServerTls(alpn=alpn), KeyPair(leaf.chain, leaf.key)))


async def tell(request: Request) -> Response:
    """Say what came, and in which version."""
    body = f"{request.method} {request.url} {request.version} {len(await request.body.read(10_000_000))}"
    return Response(200, Headers([("Content-Type", "text/plain")]), Body.of(body.encode()))


def curl(*arguments: str | Path) -> tuple[str | Path, ...]:
    return ("curl", "-sS", "--noproxy", "", *arguments)


@pytest.mark.parametrize(("flag", "version"), [("--http2", "2"), ("--http1.1", "1.1")])
async def test_listener_speaks_what_alpn_agreed_on(run: Run, pki: Pki, flag: str, version: str) -> None:
    server = run(stack(terminate(pki, "a.test", *BOTH), HttpServer(tell)))
    out = await command(
        *curl(flag, "--cacert", pki.certificate, "-d", "hello", "-w", " %{http_version}"),
        f"https://127.0.0.1:{server.port}/x?y",
    )
    assert out.decode() == f"POST https://127.0.0.1:{server.port}/x?y {version} 5 {version}"


@pytest.mark.parametrize("offered", [BOTH, ("http/1.1",)])
async def test_upstream_is_spoken_to_as_alpn_agreed(
    run: Run, pki: Pki, connector: Connect, offered: tuple[str, ...]
) -> None:
    origin = run(stack(terminate(pki, "origin.test", *BOTH), HttpServer(tell)))
    tls = TlsConnector(connector, ClientTls(ca=pki.certificate, alpn=offered))
    pool = BackendPool([Authority.of("origin.test", origin.port)], tls)
    proxy = run(HttpServer(pool))
    version = "2" if "h2" in offered else "1.1"
    for _ in range(3):
        answer = await proxy.exchange(b"GET /x HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")
        # The scheme is of the connection that carries the request: http is what the client spoke.
        assert answer.endswith(f"://a.test/x {version} 0".encode())
    assert origin.tcp.accepted == 1
    await pool.stop()


async def test_upgrade_to_an_h2_upstream_goes_over_a_connection_of_http_1(
    run: Run, pki: Pki, connector: Connect
) -> None:
    origin = run(stack(terminate(pki, "origin.test", *BOTH), HttpServer(echo_app)))

    def client(*alpn: str) -> TlsConnector:
        return TlsConnector(connector, ClientTls(ca=pki.certificate, alpn=alpn))

    pool = BackendPool([Authority.of("origin.test", origin.port)], client(*BOTH), upgrade_connector=client("http/1.1"))
    proxy = run(HttpServer(pool))
    answer = await proxy.exchange(asking(f"Sec-WebSocket-Key: {KEY}") + b"hello", eof=True)
    assert answer.startswith(b"HTTP/1.1 101 ")
    assert answer.endswith(b"\r\n\r\nHELLO")
    await pool.stop()


async def test_forward_proxy_on_a_tls_listener_over_h2_and_http_1(run: Run, pki: Pki, connector: Connect) -> None:
    plain = run(HttpServer(tell))
    secure = run(stack(terminate(pki, "origin.test", *BOTH), HttpServer(tell)))
    forward = ForwardProxy(connector)
    proxy = run(stack(terminate(pki, "proxy.test", *BOTH), HttpServer(forward)))
    through = ("-x", f"https://127.0.0.1:{proxy.port}", "--proxy-cacert", pki.certificate, "--cacert", pki.certificate)
    out = await command(*curl(*through, f"http://127.0.0.1:{plain.port}/a"))
    assert out.decode() == f"GET http://127.0.0.1:{plain.port}/a 1.1 0"
    out = await command(*curl(*through, f"https://127.0.0.1:{secure.port}/b"))
    assert out.decode() == f"GET https://127.0.0.1:{secure.port}/b 2 0"
    # curl 7.88 speaks only HTTP/1.1 to proxies; a client that does speak h2 sends the scheme and authority.
    context = ssl.create_default_context(cafile=str(pki.certificate))
    context.set_alpn_protocols(["h2"])
    async with h2_client(proxy.port, ssl=context, server_hostname="proxy.test") as client:
        fields = [(":method", "GET"), (":scheme", "http"), (":authority", f"127.0.0.1:{plain.port}"), (":path", "/c")]
        _, body = await client.response(client.request(fields))
        assert body.decode() == f"GET http://127.0.0.1:{plain.port}/c 1.1 0"
    forward.pool.close()
    await forward.pool.wait_closed()


class Intercepting:
    """A forward proxy that looks into CONNECT, and the authority that its clients must trust."""

    def __init__(self, run: Run, connector: Connect, pki: Pki, directory: Path, inspector: HttpInspector) -> None:
        ours = CertificateAuthority.create("interception")
        self.ca = directory / "ours.pem"
        self.ca.write_bytes(ours.pem)
        upstream = ClientTls(ca=pki.certificate, alpn=BOTH)
        interceptor = TlsInterceptor(LeafIssuer(ours), upstream, inspect=inspector)
        self.server = run(stack(TlsTunnelLayer(intercept=interceptor), HttpProxy(connector)))

    def curl(self, *arguments: str | Path) -> tuple[str | Path, ...]:
        return curl("-x", f"http://{self.server.authority}", "--cacert", self.ca, *arguments)

    async def open(self, port: int, *alpn: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a TLS connection to ``origin.test:port`` through CONNECT, trusting the interceptor."""
        reader, writer = await self.server.open()
        writer.write(f"CONNECT origin.test:{port} HTTP/1.1\r\nHost: origin.test:{port}\r\n\r\n".encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        context = ssl.create_default_context(cafile=str(self.ca))
        if alpn:
            context.set_alpn_protocols(list(alpn))
        await writer.start_tls(context, server_hostname="origin.test")
        return reader, writer


Start = Callable[..., Intercepting]


@pytest.fixture
def intercepting(run: Run, connector: Connect, pki: Pki, tmp_path: Path) -> Start:
    def start(inspector: HttpInspector) -> Intercepting:
        return Intercepting(run, connector, pki, tmp_path, inspector)

    return start


@pytest.mark.parametrize(("flag", "version"), [("--http2", "2"), ("--http1.1", "1.1")])
async def test_intercepted_requests_pass_through_the_layers(
    run: Run, pki: Pki, intercepting: Start, flag: str, version: str
) -> None:
    origin = run(stack(terminate(pki, "origin.test", *BOTH), HttpServer(tell)))
    recorder = HarRecorder()
    proxy = intercepting(HttpInspector([HarLayer(recorder), ResponseHeadersLayer(set={"X-Seen": "1"})]))
    url = f"https://origin.test:{origin.port}/x?y=1"
    out = await command(*proxy.curl(flag, "-i", "-d", "hello", url, url))
    head, _, body = out.decode().replace("\r\n", "\n").partition("\n\n")[2].partition("\n\n")
    assert f"HTTP/{version} 200" in head
    assert "x-seen: 1" in head.lower()
    assert f"via: {version} rama-ebpf" in head.lower()
    assert body.startswith(f"POST {url} {version} 5")
    assert len(recorder.archive()["log"]["entries"]) == 2  # type: ignore[index]
    assert origin.tcp.accepted == 1


async def test_intercepted_upstream_that_closes_is_seen_to_close(run: Run, pki: Pki, intercepting: Start) -> None:
    async def closes(stream: Stream) -> None:
        await stream.read()
        await stream.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")

    origin = run(stack(terminate(pki, "origin.test", "http/1.1"), closes))
    proxy = intercepting(HttpInspector())
    reader, writer = await proxy.open(origin.port, "http/1.1")
    writer.write(b"GET / HTTP/1.1\r\nHost: origin.test\r\n\r\n")
    answer = await reader.read()
    assert b"\r\nConnection: close\r\n" in answer
    assert answer.endswith(b"\r\n\r\nok")
    writer.close()


async def test_intercepted_upstream_that_closed_a_kept_connection_gets_no_502(
    run: Run, pki: Pki, intercepting: Start
) -> None:
    async def once(stream: Stream) -> None:
        await stream.read()
        await stream.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    origin = run(stack(terminate(pki, "origin.test", "http/1.1"), once))
    proxy = intercepting(HttpInspector())
    reader, writer = await proxy.open(origin.port, "http/1.1")
    request = b"GET / HTTP/1.1\r\nHost: origin.test\r\n\r\n"
    writer.write(request)
    await reader.readuntil(b"ok")
    await eventually(lambda: origin.tcp.live == 0)
    writer.write(request)
    assert b"HTTP" not in await _rest(reader)
    writer.close()


async def _rest(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except (ConnectionResetError, ssl.SSLError):
        return b""


async def test_intercepted_host_that_differs_asks_no_other_server(run: Run, pki: Pki, intercepting: Start) -> None:
    other = run(HttpServer(tell))
    origin = run(stack(terminate(pki, "origin.test", "http/1.1"), HttpServer(tell)))
    proxy = intercepting(HttpInspector())
    reader, writer = await proxy.open(origin.port, "http/1.1")
    for target in (b"/x", b"http://127.0.0.1:%d/x" % other.port):
        writer.write(b"GET " + target + b" HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % other.port)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
    assert other.tcp.accepted == 0
    writer.close()


@pytest.mark.parametrize("alpn", [(), ("http/1.1",)])
async def test_intercepted_smuggling_is_refused(run: Run, pki: Pki, intercepting: Start, alpn: tuple[str, ...]) -> None:
    received: list[bytes] = []

    async def record(stream: Stream) -> None:
        while data := await stream.read():
            received.append(data)

    origin = run(stack(terminate(pki, "origin.test", *alpn), record))
    proxy = intercepting(HttpInspector(timeouts=HttpTimeouts(linger=0.1)))
    reader, writer = await proxy.open(origin.port, *alpn)
    writer.write(
        b"POST / HTTP/1.1\r\nHost: origin.test\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /"
    )
    assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
    assert received == []
    writer.close()


async def test_intercepted_websocket_passes_in_both_versions(run: Run, pki: Pki, intercepting: Start) -> None:
    origin = run(stack(terminate(pki, "origin.test", *BOTH), HttpServer(echo_app)))
    proxy = intercepting(HttpInspector())
    reader, writer = await proxy.open(origin.port, "http/1.1")
    writer.write(asking(f"Sec-WebSocket-Key: {KEY}", host="origin.test") + b"hello")
    assert (await reader.readuntil(b"HELLO")).startswith(b"HTTP/1.1 101 ")
    writer.close()
    reader, writer = await proxy.open(origin.port, "h2")
    from .h2_client import H2Client

    client = H2Client(reader, writer)
    await client.until(h2.events.RemoteSettingsChanged)
    stream_id = client.request(
        [
            (":method", "CONNECT"),
            (":protocol", "websocket"),
            (":scheme", "https"),
            (":authority", "origin.test"),
            (":path", "/"),
        ],
        end=False,
    )
    await client.until(h2.events.ResponseReceived, stream_id)
    client.h2.send_data(stream_id, b"hello")
    assert (await client.until(h2.events.DataReceived, stream_id)).data == b"HELLO"
    writer.close()


async def test_intercepted_bodies_stream_both_ways(run: Run, pki: Pki, intercepting: Start, tmp_path: Path) -> None:
    async def echo(request: Request) -> Response:
        return Response(200, Headers(), Body.stream(aiter(request.body), length=request.body.length))

    origin = run(stack(terminate(pki, "origin.test", *BOTH), HttpServer(echo)))
    proxy = intercepting(HttpInspector())
    data = tmp_path / "data"
    data.write_bytes(bytes(range(256)) * 20_000)
    url = f"https://origin.test:{origin.port}/"
    for flag in ("--http2", "--http1.1"):
        got = await command(*proxy.curl(flag, "-H", "Expect:", "--data-binary", f"@{data}", url))
        assert got == data.read_bytes()


async def test_what_is_not_http_is_relayed(run: Run, pki: Pki, intercepting: Start) -> None:
    async def smtp(stream: Stream) -> None:
        await stream.write(b"220 origin.test ESMTP\r\n")
        await stream.write(b"250 " + await stream.read())

    async def binary(stream: Stream) -> None:
        await stream.write(b"got " + await stream.read())

    proxy = intercepting(HttpInspector())
    origin = run(stack(terminate(pki, "origin.test"), smtp))
    reader, writer = await proxy.open(origin.port)
    assert await reader.readline() == b"220 origin.test ESMTP\r\n"
    writer.write(b"EHLO\r\n")
    assert await reader.readline() == b"250 EHLO\r\n"
    writer.close()
    origin = run(stack(terminate(pki, "origin.test"), binary))
    reader, writer = await proxy.open(origin.port)
    writer.write(b"\x00\x01\x02")
    assert await reader.readexactly(7) == b"got \x00\x01\x02"
    writer.close()


@pytest.mark.parametrize("said", [b"", b"GE"])
async def test_silence_is_no_way_around_the_layers(run: Run, pki: Pki, intercepting: Start, said: bytes) -> None:
    received: list[bytes] = []

    async def origin(stream: Stream) -> None:
        with contextlib.suppress(OSError):
            while data := await stream.read():
                received.append(data)

    proxy = intercepting(HttpInspector(timeouts=HttpTimeouts(idle=0.3, head=0.3)))
    reader, writer = await proxy.open(run(stack(terminate(pki, "origin.test"), origin)).port)
    writer.write(said)
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    await proxy.server.idle()
    assert received == []
    writer.close()


async def test_layers_of_an_intercepted_connection_may_answer_themselves(
    run: Run, pki: Pki, intercepting: Start
) -> None:
    async def blocked(request: Request) -> Response:
        return Response.text(403, "blocked")

    origin = run(stack(terminate(pki, "origin.test", *BOTH), HttpServer(tell)))
    proxy = intercepting(HttpInspector([lambda inner: blocked]))
    out = await command(*proxy.curl("-w", " %{http_code}", f"https://origin.test:{origin.port}/"))
    assert out == b"blocked 403"


async def test_slow_stream_of_events_arrives_as_it_is_sent(run: Run, pki: Pki, intercepting: Start) -> None:
    go_on = asyncio.Event()

    async def events(request: Request) -> Response:
        async def ticks() -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"
            await go_on.wait()
            yield b"data: 2\n\n"

        return Response(200, Headers([("Content-Type", "text/event-stream")]), Body.stream(ticks()))

    origin = run(stack(terminate(pki, "origin.test", "http/1.1"), HttpServer(events)))
    proxy = intercepting(HttpInspector())
    reader, writer = await proxy.open(origin.port, "http/1.1")
    writer.write(b"GET / HTTP/1.1\r\nHost: origin.test\r\n\r\n")
    await reader.readuntil(b"data: 1\n\n")
    go_on.set()
    await reader.readuntil(b"data: 2\n\n")
    writer.close()
