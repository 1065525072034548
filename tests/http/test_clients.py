"""Real clients through every mode of the proxy, to a Python origin and to nginx in front of it."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import httpx
import pytest

from rama_ebpf.core import Authority, Service, Stream, stack
from rama_ebpf.services.http import BackendPool, HttpInspector, HttpProxy, HttpServer
from rama_ebpf.services.tls import ClientTls, TlsConnector
from rama_ebpf.services.tls.ca import CertificateAuthority, LeafIssuer
from rama_ebpf.services.tls.mitm import TlsInterceptor
from rama_ebpf.services.tls.tunnel import TlsTunnelLayer

from ..tls.pki import Authority as Pki
from .conftest import Connect, Run, RunOrigin
from .origins import BIG, BIG_SHA256, Application, nginx, python_origin
from .peers import command

MODES = ["forward", "connect", "intercepted"]
ORIGINS = ["python", "nginx"]


@dataclass
class Setup:
    """A proxy in one mode and an origin behind it. ``via`` is what the proxy adds where it sees the request."""

    mode: str
    proxy: str
    proxy_port: int
    origin: str
    url: str
    ca: Path
    application: Application
    sees: bool

    @property
    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.ca))


@pytest.fixture(params=[(mode, origin) for mode in MODES for origin in ORIGINS], ids="-".join)
async def setup(
    request: pytest.FixtureRequest, run: Run, connector: Connect, pki: Pki, tmp_path: Path
) -> AsyncIterator[Setup]:
    mode, origin = request.param
    leaf = pki.issue("origin.test", stem="clients")
    secure = mode != "forward"
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if secure and origin == "python" else None
    if tls is not None:
        tls.load_cert_chain(leaf.chain, leaf.key)
    ours = CertificateAuthority.create("interception")
    trusted = tmp_path / "ca.pem"
    trusted.write_bytes(ours.pem if mode == "intercepted" else pki.pem)
    service: Service[Stream, object] = HttpProxy(connector)
    if mode == "intercepted":
        upstream = ClientTls(ca=pki.certificate, alpn=("h2", "http/1.1"))
        interceptor = TlsInterceptor(LeafIssuer(ours), upstream, inspect=HttpInspector())
        service = stack(TlsTunnelLayer(intercept=interceptor), service)
    proxy = run(service)

    def configured(port: int, application: Application) -> Setup:
        url = f"http{'s' if secure else ''}://origin.test:{port}"
        return Setup(
            mode, f"http://{proxy.authority}", proxy.port, origin, url, trusted, application, mode != "connect"
        )

    async with python_origin(tls) as application:
        if origin == "python":
            yield configured(application.port, application)
        else:
            async with nginx(tmp_path, leaf, application) as server:
                yield configured(server.tls_port if secure else server.port, application)


async def test_curl(setup: Setup, tmp_path: Path) -> None:
    base = ("curl", "-sS", "-x", setup.proxy, "--cacert", setup.ca)
    for version in ("--http1.1", "--http2"):
        assert await command(*base, version, f"{setup.url}/hello?a=1") == b"hello GET /hello?a=1"
        data = tmp_path / "data"
        data.write_bytes(BIG)
        assert await command(*base, version, "--data-binary", f"@{data}", f"{setup.url}/echo") == BIG
        assert await command(*base, version, "-T", "-", f"{setup.url}/echo", "-X", "POST", input=BIG) == BIG
        if setup.origin == "python":
            assert await command(*base, version, "--data-binary", f"@{data}", f"{setup.url}/stream") == BIG
        assert await command(*base, version, f"{setup.url}/download") == BIG
        twice = await command(*base, version, f"{setup.url}/hello", f"{setup.url}/hello", "-w", " %{num_connects} ")
        assert twice.split() == [b"hello", b"GET", b"/hello", b"1", b"hello", b"GET", b"/hello", b"0"]


@pytest.mark.parametrize("http2", [False, True])
async def test_httpx(setup: Setup, http2: bool) -> None:
    proxy = httpx.Proxy(setup.proxy)
    async with httpx.AsyncClient(proxy=proxy, verify=setup.context, http2=http2, trust_env=False) as client:
        for _ in range(3):
            response = await client.get(f"{setup.url}/hello?a=1")
            assert (response.status_code, response.text) == (200, "hello GET /hello?a=1")
            assert ("rama-ebpf" in response.headers.get("via", "")) == setup.sees

        async def chunks() -> AsyncIterator[bytes]:
            for offset in range(0, len(BIG), 100_000):
                yield BIG[offset : offset + 100_000]

        response = await client.post(f"{setup.url}/echo", content=chunks())
        assert hashlib.sha256(response.content).hexdigest() == BIG_SHA256
        async with client.stream("GET", f"{setup.url}/download") as stream:
            assert b"".join([chunk async for chunk in stream.aiter_bytes()]) == BIG
        answers = await asyncio.gather(*(client.get(f"{setup.url}/hello?{number}") for number in range(20)))
        assert [answer.text for answer in answers] == [f"hello GET /hello?{number}" for number in range(20)]


async def test_aiohttp(setup: Setup) -> None:
    connector = aiohttp.TCPConnector(ssl=setup.context)
    async with aiohttp.ClientSession(connector=connector) as session:
        for _ in range(3):
            async with session.get(f"{setup.url}/hello?a=1", proxy=setup.proxy) as response:
                assert (response.status, await response.text()) == (200, "hello GET /hello?a=1")
        async with session.post(f"{setup.url}/echo", data=io.BytesIO(BIG), proxy=setup.proxy) as response:
            assert await response.read() == BIG
        async with session.post(
            f"{setup.url}/echo", data=io.BytesIO(BIG), proxy=setup.proxy, expect100=True
        ) as response:
            assert await response.read() == BIG
        async with session.ws_connect(f"{setup.url}/ws", proxy=setup.proxy) as socket:
            for number in range(10):
                await socket.send_str(str(number))
                assert await socket.receive_str() == f"echo {number}"


async def test_node(setup: Setup) -> None:
    mode = "forward" if setup.mode == "forward" else "connect"
    script = Path(__file__).with_name("client.mjs")
    out = json.loads(await command("node", script, str(setup.proxy_port), setup.url, setup.ca, mode))
    assert out["statuses"] == [200, 200, 200]
    assert (out["hello"], out["echo"], out["big"]) == ("hello GET /hello?a=1", 1_000_000, len(BIG))
    assert ("rama-ebpf" in (out["via"] or "")) == setup.sees


@pytest.fixture(params=["python", "nginx", "nginx-h2"])
async def reverse(
    request: pytest.FixtureRequest, run: Run, connector: Connect, pki: Pki, tmp_path: Path
) -> AsyncIterator[str]:
    """The URL of a reverse proxy in front of each origin."""
    leaf = pki.issue("origin.test", stem="reverse")
    async with python_origin() as application, nginx(tmp_path, leaf, application) as server:
        if request.param == "nginx-h2":
            tls = TlsConnector(connector, ClientTls(ca=pki.certificate, alpn=("h2",)))
            h1 = TlsConnector(connector, ClientTls(ca=pki.certificate, alpn=("http/1.1",)))
            pool = BackendPool([Authority.of("origin.test", server.tls_port)], tls, upgrade_connector=h1)
        else:
            port = application.port if request.param == "python" else server.port
            pool = BackendPool([Authority.of("origin.test", port)], connector)
        yield f"http://{run(HttpServer(pool)).authority}"
        await pool.stop()


async def test_reverse_proxy_serves_real_clients(reverse: str) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        answers = await asyncio.gather(*(client.get(f"{reverse}/hello?{number}") for number in range(20)))
        assert [answer.text for answer in answers] == [f"hello GET /hello?{number}" for number in range(20)]
        response = await client.post(f"{reverse}/echo", content=BIG)
        assert response.content == BIG
        assert (await client.get(f"{reverse}/download")).content == BIG
        assert (await client.head(f"{reverse}/hello")).status_code == 200
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{reverse}/ws") as socket:
        await socket.send_str("x")
        assert await socket.receive_str() == "echo x"


async def test_compression_is_left_untouched(run: Run, connector: Connect, run_origin: RunOrigin) -> None:
    packed = gzip.compress(b"hello" * 100, mtime=0)
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    origin = run_origin(head + packed)
    proxy = run(HttpProxy(connector))
    url = f"http://{origin.authority}/"
    assert await command("curl", "-sS", "-x", f"http://{proxy.authority}", url) == packed
    assert await command("curl", "-sS", "--compressed", "-x", f"http://{proxy.authority}", url) == b"hello" * 100
    assert b"Accept-Encoding: deflate, gzip, br, zstd\r\n" in origin.requests[1]
