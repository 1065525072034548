"""Healthy slow exchanges complete through every stack and both versions: events, a body that pauses, a long poll, an
upload that pauses, and clients that have half-closed. What is longer than the settings say is cut."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import h2.events
import pytest

from rama_ebpf.config.http import HttpTimeoutSettings
from rama_ebpf.config.tls import InterceptSettings
from rama_ebpf.core import Authority, Service, Stream, stack
from rama_ebpf.services.http import (
    BackendPool,
    Body,
    ForwardProxy,
    HttpInspector,
    HttpProxy,
    HttpServer,
    HttpTimeouts,
    Request,
    Response,
)
from rama_ebpf.services.proxy import mixed_proxy
from rama_ebpf.services.tls import CertificateStore, ClientTls, KeyPair, ServerTls, TlsTerminateLayer
from rama_ebpf.services.tls.ca import CertificateAuthority, LeafIssuer
from rama_ebpf.services.tls.mitm import TlsInterceptor
from rama_ebpf.services.tls.tunnel import TlsTunnelLayer

from ..tls.pki import Authority as Pki
from .conftest import Connect, Run, abort, eventually
from .h2_client import H2Client

PAUSE = 0.4
PATIENT = HttpTimeouts(idle=60.0, body=20.0, response=20.0, watch=0.01, body_grace=0.01, body_rate=0.0, linger=0.5)
"""As the defaults are, a hundred times as quick where the tests wait."""
HASTY = HttpTimeouts(body=0.2, response=0.2, watch=0.01, linger=0.1)


async def slow_app(request: Request) -> Response:
    """What a slow server does, by the path."""

    async def events() -> AsyncIterator[bytes]:
        for number in range(4):
            yield b"data: %d\n\n" % number
            await asyncio.sleep(PAUSE / 2)

    async def pausing() -> AsyncIterator[bytes]:
        yield b"begin"
        await asyncio.sleep(PAUSE)
        yield b"end"

    if request.path == "/events":
        return Response(200, body=Body.stream(events()))
    if request.path == "/pause":
        return Response(200, body=Body.stream(pausing(), length=8))
    if request.path == "/poll":
        await asyncio.sleep(PAUSE)
        return Response(200, body=Body.of(b"news"))
    return Response(200, body=Body.of(await request.body.read(100)))


ANSWERS = {
    "/events": b"".join(b"data: %d\n\n" % number for number in range(4)),
    "/pause": b"beginend",
    "/poll": b"news",
    "/upload": b"firstlast",
}


class Route:
    """How a client reaches the slow server: an address, TLS or not, and what stands before its path."""

    def __init__(self, port: int, origin: str, *, absolute: bool, tls: ssl.SSLContext | None, connect: bool) -> None:
        self.port, self.origin, self.tls, self.connect = port, origin, tls, connect
        self.prefix = f"http://{origin}" if absolute else ""

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if not self.connect:
            name = None if self.tls is None else "origin.test"
            return await asyncio.open_connection("127.0.0.1", self.port, ssl=self.tls, server_hostname=name)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"CONNECT {self.origin} HTTP/1.1\r\nHost: {self.origin}\r\n\r\n".encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        assert self.tls is not None
        await writer.start_tls(self.tls, server_hostname="origin.test")
        return reader, writer


class Over1:
    """Exchanges over HTTP/1.1."""

    def __init__(self, route: Route) -> None:
        self.route = route

    async def __call__(self, path: str, *, half_close: bool = False) -> bytes:
        reader, writer = await self.route.open()
        method, framing = ("POST", "Content-Length: 9\r\n") if path == "/upload" else ("GET", "")
        head = f"{method} {self.route.prefix}{path} HTTP/1.1\r\nHost: {self.route.origin}\r\n{framing}"
        writer.write(head.encode() + (b"\r\n" if half_close else b"Connection: close\r\n\r\n"))
        if path == "/upload":
            writer.write(b"first")
            await writer.drain()
            await asyncio.sleep(PAUSE)
            writer.write(b"last")
        if half_close:
            await writer.drain()
            half_close_socket(writer)
        try:
            answer = await reader.read()
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        head_of, _, body = answer.partition(b"\r\n\r\n")
        assert head_of.startswith(b"HTTP/1.1 200 "), answer
        return _unchunked(body) if b"chunked" in head_of.lower() else body


def _unchunked(body: bytes) -> bytes:
    out = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        if not int(size, 16):
            return out
        out, body = out + body[: int(size, 16)], body[int(size, 16) + 2 :]


def half_close_socket(writer: asyncio.StreamWriter) -> None:
    """Send FIN, with TLS without close_notify, as many clients do."""
    writer.get_extra_info("socket").shutdown(socket.SHUT_WR)


class Silent(H2Client):
    """A client that sends nothing any more when it has half-closed."""

    half_closed = False

    async def flush(self) -> None:
        if not self.half_closed:
            await super().flush()


class Over2:
    """Exchanges over HTTP/2, each on a connection of its own."""

    def __init__(self, route: Route) -> None:
        self.route = route

    async def __call__(self, path: str, *, half_close: bool = False) -> bytes:
        reader, writer = await self.route.open()
        try:
            client = Silent(reader, writer)
            upload = path == "/upload"
            scheme = "http" if self.route.tls is None or self.route.prefix else "https"
            pseudo = {":method": "POST" if upload else "GET", ":scheme": scheme, ":path": path}
            stream_id = client.request([*pseudo.items(), (":authority", self.route.origin)], end=not upload)
            if upload:
                for number, part in enumerate((b"first", b"last")):
                    await client.flush()
                    await asyncio.sleep(PAUSE * number)
                    client.h2.send_data(stream_id, part, end_stream=bool(number))
            await client.flush()
            if half_close:
                # The settings are acknowledged first: what a client does that says no more.
                await client.until(h2.events.SettingsAcknowledged)
                half_close_socket(writer)
                client.half_closed = True
            while not client.of(h2.events.StreamEnded):
                assert not client.of(h2.events.StreamReset), "the stream was reset"
                assert not client.closed, "the connection has ended"
                await client.step()
            (head,) = client.of(h2.events.ResponseReceived)
            assert dict(head.headers)[":status"] == "200"
            return b"".join(event.data for event in client.of(h2.events.DataReceived))
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


Make = Callable[[HttpTimeouts], Awaitable[Any]]
STACKS = ["forward", "mixed", "reverse", "reverse over h2", "intercepted"]


@pytest.fixture(
    params=[(name, version) for name in STACKS for version in ("1.1", "2")], ids=lambda pair: "-".join(pair)
)
def exchange(
    request: pytest.FixtureRequest, run: Run, pki: Pki, connector: Connect, tmp_path: Path
) -> Callable[[HttpTimeouts], Any]:
    """Return what makes a proxy with some time-outs in front of the slow server, and exchanges through it."""
    name, version = request.param
    alpn = {"1.1": "http/1.1", "2": "h2"}[version]

    def terminated(host: str, service: Any, *protocols: str) -> Service[Stream, Any]:
        leaf = pki.issue(host, "127.0.0.1", stem=f"slow-{host}")
        return stack(
            TlsTerminateLayer(CertificateStore.of_files(ServerTls(alpn=protocols), KeyPair(leaf.chain, leaf.key))),
            service,
        )

    def trusting(ca: Path) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(ca))
        context.set_alpn_protocols([alpn])
        return context

    def make(timeouts: HttpTimeouts) -> Any:
        if name == "intercepted":
            origin = run(terminated("origin.test", HttpServer(slow_app, timeouts=PATIENT), alpn))
            ours = CertificateAuthority.create("interception")
            ca = tmp_path / "ours.pem"
            ca.write_bytes(ours.pem)
            inspector = HttpInspector(timeouts=timeouts)
            interceptor = TlsInterceptor(
                LeafIssuer(ours), ClientTls(ca=pki.certificate, alpn=("h2", "http/1.1")), inspect=inspector
            )
            proxy = run(stack(TlsTunnelLayer(intercept=interceptor), HttpProxy(connector)))
            route = Route(proxy.port, f"origin.test:{origin.port}", absolute=False, tls=trusting(ca), connect=True)
            return (Over1 if version == "1.1" else Over2)(route)
        origin = run(HttpServer(slow_app, h2c=True, timeouts=PATIENT))
        service: Any
        if name.startswith("reverse"):
            target = Authority.of("127.0.0.1", origin.port)
            over_h2 = name.endswith("h2")
            pool = BackendPool([target], connector, h2_prior_knowledge=over_h2, timeouts=timeouts, retries=0)
            service = HttpServer(pool, h2c=True, timeouts=timeouts)
        elif name == "mixed":
            service = mixed_proxy(connector, http_timeouts=timeouts)
        else:
            service = HttpProxy(connector, timeouts=timeouts)
        tls = None
        if version == "2" and name in ("forward", "mixed"):
            # Forward proxies speak HTTP/2 on TLS, and mixed not at all: over it h2 is that of its origin's tunnel.
            service = HttpServer(ForwardProxy(connector, timeouts=timeouts), timeouts=timeouts)
            service, tls = terminated("origin.test", service, "h2"), trusting(pki.certificate)
        absolute = not name.startswith("reverse")
        route = Route(run(service).port, origin.authority, absolute=absolute, tls=tls, connect=False)
        return (Over1 if version == "1.1" else Over2)(route)

    return make


async def test_slow_healthy_exchanges_complete(exchange: Callable[[HttpTimeouts], Any]) -> None:
    through = exchange(PATIENT)
    bodies = await asyncio.gather(*map(through, ANSWERS))
    assert dict(zip(ANSWERS, bodies, strict=True)) == ANSWERS


async def test_half_closed_client_gets_its_late_answer(exchange: Callable[[HttpTimeouts], Any]) -> None:
    through = exchange(PATIENT)
    assert await through("/poll", half_close=True) == b"news"
    assert await through("/events", half_close=True) == ANSWERS["/events"]


async def test_what_is_slower_than_the_settings_is_cut(exchange: Callable[[HttpTimeouts], Any]) -> None:
    through = exchange(HASTY)
    for path in ("/pause", "/poll", "/upload"):
        with pytest.raises((AssertionError, OSError, ValueError)):
            assert await through(path) == ANSWERS[path]


async def test_half_closed_h2_client_that_goes_altogether_ends_its_request(run: Run) -> None:
    ended = asyncio.Event()
    begun = asyncio.Event()

    async def never(request: Request) -> Response:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    server = run(HttpServer(never, h2c=True, timeouts=PATIENT))
    reader, writer = await server.open()
    client = H2Client(reader, writer)
    client.request()
    await client.flush()
    await begun.wait()
    writer.write_eof()
    assert not ended.is_set()
    abort(writer)
    await ended.wait()
    await eventually(lambda: server.tcp.live == 0)


async def test_half_closed_h2_client_with_half_a_body_is_not_waited_for(run: Run) -> None:
    failed = asyncio.Event()

    async def reads(request: Request) -> Response:
        try:
            await request.body.read(100)
        except OSError:
            failed.set()
            raise
        raise AssertionError("half a body was taken for the whole")

    server = run(HttpServer(reads, h2c=True, timeouts=PATIENT))
    reader, writer = await server.open()
    client = H2Client(reader, writer)
    stream_id = client.request(end=False)
    client.h2.send_data(stream_id, b"half")
    await client.flush()
    writer.write_eof()
    await failed.wait()
    writer.close()


def test_interception_waits_as_rama_toml_says(tmp_path: Path) -> None:
    ours = CertificateAuthority.create("interception")
    (tmp_path / "ca.pem").write_bytes(ours.pem)
    settings = InterceptSettings(ca=str(tmp_path / "ca.pem"), ca_key="", timeouts=HttpTimeoutSettings(first_byte=7.0))
    assert settings.timeouts is not None
    assert settings.timeouts.timeouts().response == 7.0
