"""Interception inside CONNECT, inside SOCKS5 and on a pass-through listener: real clients, real targets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rama_ebpf.core import SocketStream, Stream, stack
from rama_ebpf.core.address import Authority
from rama_ebpf.core.client import ClientAddress
from rama_ebpf.relay import CloseReason, TunnelReport
from rama_ebpf.services.connect import Connector
from rama_ebpf.services.http import HttpProxy
from rama_ebpf.services.socks5 import Socks5Server
from rama_ebpf.services.tls import (
    AlertError,
    CertificateAuthority,
    CertificateRejected,
    CertificateStore,
    ClientHello,
    ClientTls,
    HandshakeFailed,
    Intercepted,
    Ja4,
    KeyPair,
    LeafIssuer,
    Rejections,
    ServerTls,
    TlsAction,
    TlsDenied,
    TlsInterceptor,
    TlsMatch,
    TlsPassthrough,
    TlsPeekLayer,
    TlsPolicyLayer,
    TlsRule,
    TlsStrike,
    TlsTerminateLayer,
    TlsTunnelLayer,
)
from rama_ebpf.services.tls.bypass import Bypass

from .conftest import HOST, Running, Serve, TlsTarget
from .pki import Authority as Pki

Run = Callable[..., Awaitable[tuple[int, str, str]]]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ours(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.create("interception")


@pytest.fixture
def trusting_us(ours: CertificateAuthority) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=ours.pem.decode())


@pytest.fixture
def upstream(authority: Pki) -> ClientTls:
    return ClientTls(ca=authority.certificate, alpn=("h2", "http/1.1"))


Intercept = Callable[..., TlsTunnelLayer]


@pytest.fixture
def intercept(ours: CertificateAuthority, upstream: ClientTls) -> Intercept:
    """Make a layer that looks into tunnels with certificates of ours, and trusts the targets' authority."""

    def make(tls: ClientTls = upstream, **options: Any) -> TlsTunnelLayer:
        return TlsTunnelLayer(intercept=TlsInterceptor(LeafIssuer(ours), tls, **options))

    return make


async def lines_upper(tunnel: Intercepted) -> TunnelReport:
    """Proof of plaintext: pass the server's greeting on in capitals, then relay."""
    greeting = await tunnel.upstream.read()
    await tunnel.client.write(greeting.upper())
    return await tunnel.move(tunnel.client, tunnel.upstream)


def passthrough(connector: Connector, port: int, layer: TlsTunnelLayer) -> object:
    return stack(TlsPeekLayer(), layer, TlsPassthrough(connector, port=port))


async def greeting(running: Running, context: ssl.SSLContext, name: str) -> bytes:
    reader, writer = await asyncio.open_connection(HOST, running.port, ssl=context, server_hostname=name)
    try:
        return await reader.readline()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def http_target(serve: Serve, authority: Pki, name: str) -> int:
    """An https server that says which server name and protocol it was asked for."""
    leaf = authority.issue(name, stem=f"http-{name}")
    store = CertificateStore.of_files(ServerTls(alpn=("http/1.1",)), KeyPair(leaf.chain, leaf.key))

    async def answer(stream: Stream) -> None:
        while b"\r\n\r\n" not in stream.buffered and await stream.fill():
            pass
        hello = stream.extensions.require(ClientHello)
        body = f"{hello.server_name} {[p.decode() for p in hello.alpn]}\n".encode()
        await stream.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body), body)

    return serve(stack(TlsTerminateLayer(store), answer)).port


@pytest.mark.parametrize("proxy", ["http", "socks5h", "https"])
async def test_curl_through_a_proxy_is_decrypted_and_sees_our_certificate(
    serve: Serve,
    run: Run,
    connector: Connector,
    authority: Pki,
    ours: CertificateAuthority,
    tmp_path: Path,
    proxy: str,
    intercept: Intercept,
) -> None:
    port = await http_target(serve, authority, "a.test")
    seen: list[bytes] = []

    async def inspect(tunnel: Intercepted) -> TunnelReport:
        seen.append(await tunnel.client.peek(14))
        return await tunnel.move(tunnel.client, tunnel.upstream)

    layer = intercept(inspect=inspect)
    if proxy == "socks5h":
        running = serve(stack(layer, Socks5Server(connector)))
    elif proxy == "http":
        running = serve(stack(layer, HttpProxy(connector)))
    else:
        front = authority.issue("proxy.test")
        store = CertificateStore.of_files(ServerTls(), KeyPair(front.chain, front.key))
        running = serve(stack(TlsTerminateLayer(store), layer, HttpProxy(connector)))
    (tmp_path / "ca.pem").write_bytes(ours.pem)
    code, out, err = await run(
        *("curl", "-sS", "--proxy", f"{proxy}://proxy.test:{running.port}", "--proxy-cacert", authority.certificate),
        *("--resolve", f"proxy.test:{running.port}:{HOST}", "--cacert", tmp_path / "ca.pem"),
        f"https://a.test:{port}/",
    )
    assert (code, err) == (0, "")
    assert out == "a.test ['h2', 'http/1.1']\n"
    assert seen == [b"GET / HTTP/1.1"]
    await running.idle()
    assert running.errors == []


async def test_a_tunnel_of_clients_that_trust_us_is_plaintext_to_us(
    serve: Serve,
    connector: Connector,
    tls_target: TlsTarget,
    trusting_us: ssl.SSLContext,
    intercept: Intercept,
) -> None:
    port = await tls_target("a.test")
    layer = intercept(inspect=lines_upper)
    running = serve(passthrough(connector, port, layer))
    reader, writer = await asyncio.open_connection(HOST, running.port, ssl=trusting_us, server_hostname="a.test")
    assert await reader.readline() == b"A.TEST\n"
    payload = bytes(range(256)) * 4000
    writer.write(payload)
    assert await reader.readexactly(len(payload)) == payload
    writer.close()
    await writer.wait_closed()
    await running.idle()
    assert running.errors == []


async def agreed_with(running: Running, context: ssl.SSLContext) -> str | None:
    """The protocol that a client and the proxy agree on, when the target's greeting has come."""
    reader, writer = await asyncio.open_connection(HOST, running.port, ssl=context, server_hostname="a.test")
    assert await reader.readline() == b"a.test\n"
    agreed: str | None = writer.get_extra_info("ssl_object").selected_alpn_protocol()
    writer.close()
    await writer.wait_closed()
    return agreed


@pytest.mark.parametrize(("offered", "agreed"), [(["h2", "http/1.1"], "h2"), (["http/1.1"], "http/1.1"), ([], None)])
async def test_the_client_gets_the_protocol_that_the_server_speaks(
    serve: Serve,
    connector: Connector,
    tls_target: TlsTarget,
    trusting_us: ssl.SSLContext,
    offered: list[str],
    agreed: str | None,
    intercept: Intercept,
) -> None:
    port = await tls_target("a.test", alpn=("h2", "http/1.1"))
    running = serve(passthrough(connector, port, intercept()))
    if offered:
        trusting_us.set_alpn_protocols([*offered, "something/else"])
    assert await agreed_with(running, trusting_us) == agreed


async def test_files_of_an_interception_are_read_when_it_is_made_and_not_later(
    serve: Serve,
    connector: Connector,
    tls_target: TlsTarget,
    ours: CertificateAuthority,
    upstream: ClientTls,
    trusting_us: ssl.SSLContext,
    tmp_path: Path,
) -> None:
    port = await tls_target("a.test", alpn=("h2", "http/1.1"))
    assert upstream.ca is not None
    authorities = tmp_path / "authorities.pem"
    authorities.write_bytes(upstream.ca.read_bytes())
    intercept = TlsInterceptor(LeafIssuer(ours), replace(upstream, ca=authorities, alpn=("h2", "http/1.1")))
    running = serve(passthrough(connector, port, TlsTunnelLayer(intercept=intercept)))
    authorities.unlink()  # as for a worker that has given up its privileges
    for offered, agreed in ((["h2", "http/1.1"], "h2"), (["http/1.1"], "http/1.1"), (["h2"], "h2"), (["other"], None)):
        trusting_us.set_alpn_protocols(offered)
        assert await agreed_with(running, trusting_us) == agreed


async def test_a_server_that_does_not_verify_is_never_vouched_for(
    serve: Serve,
    connector: Connector,
    tls_target: TlsTarget,
    upstream: ClientTls,
    trusting_us: ssl.SSLContext,
    intercept: Intercept,
) -> None:
    port = await tls_target("a.test")
    settings = [
        (ClientTls(), "a.test"),  # the system's authorities do not know the target's
        (upstream, "b.test"),
        (ClientTls(ca=upstream.ca, pins=frozenset([bytes(32)])), "a.test"),
    ]
    for tls, name in settings:
        layer = intercept(tls)
        running = serve(passthrough(connector, port, layer))
        with pytest.raises(ssl.SSLError, match="BAD_CERTIFICATE"):
            await greeting(running, trusting_us, name)
        await running.idle()
        assert [type(error) for error in running.errors] == [CertificateRejected]


async def test_names_on_the_bypass_list_reach_their_server_unopened(
    serve: Serve,
    connector: Connector,
    tls_target: TlsTarget,
    trust: ssl.SSLContext,
    intercept: Intercept,
) -> None:
    port = await tls_target("a.test")
    layer = intercept(bypass=[".a.test"], inspect=lines_upper)
    running = serve(passthrough(connector, port, layer))
    assert await greeting(running, trust, "a.test") == b"a.test\n"


async def test_a_name_on_the_bypass_list_opens_no_other_target(
    serve: Serve,
    connector: Connector,
    tls_target: TlsTarget,
    trust: ssl.SSLContext,
    trusting_us: ssl.SSLContext,
    intercept: Intercept,
) -> None:
    """The server name is the client's to choose, and so is the target that it asks the proxy for."""
    port = await tls_target("a.test")

    async def through(target: str, name: str, context: ssl.SSLContext, **options: bool) -> bytes:
        layer = intercept(bypass=["a.test", "b.test"], **options)
        running = serve(stack(layer, Socks5Server(connector)))
        reader, writer = await running.connect()
        if target[0].isdigit():
            asked = b"\x01" + socket.inet_aton(target)
        else:
            asked = b"\x03" + bytes((len(target),)) + target.encode()
        writer.write(b"\x05\x01\x00" + b"\x05\x01\x00" + asked + port.to_bytes(2, "big"))
        await reader.readexactly(2 + 10)
        try:
            await writer.start_tls(context, server_hostname=name)
            return await reader.readline()
        finally:
            errors.extend(running.errors)
            writer.close()

    errors: list[BaseException] = []
    # The name and the target are listed, and the server is who it is said to be: its own certificate is seen.
    assert await through("a.test", "a.test", trust) == b"a.test\n"
    assert await through(HOST, "a.test", trust) == b"a.test\n"
    # Another target under a listed name is looked into, as if the name were not listed.
    with pytest.raises(ssl.SSLCertVerificationError):
        await through("other.test", "a.test", trust)
    assert await through("other.test", "a.test", trusting_us) == b"a.test\n"
    # A server that cannot prove the listed name is not reached, whoever asks for it, unless nobody wants a proof.
    for target in (HOST, "b.test"):
        with pytest.raises(ssl.SSLError, match="BAD_CERTIFICATE"):
            await through(target, "b.test", trust)
    trust.check_hostname = False
    assert await through("b.test", "b.test", trust, verify_bypass=False) == b"a.test\n"


async def test_what_was_proven_of_a_bypassed_server_holds_for_a_while_and_no_longer(
    connector: Connector, tls_target: TlsTarget, upstream: ClientTls
) -> None:
    clock, asked = Clock(), 0
    target = Authority("a.test", await tls_target("a.test"))

    async def counted(where: Authority) -> Stream:
        nonlocal asked
        asked += 1
        return await connector(where)

    bypass = Bypass(["a.test"], upstream, connector=counted, ttl=60, clock=clock)
    stream = await connector(target)
    proven = await bypass.prove(target, stream, "a.test")
    assert proven is not stream
    assert await bypass.prove(target, proven, "a.test") is proven
    assert asked == 1
    clock.now += 61
    again = await bypass.prove(target, proven, "a.test")
    assert asked == 2
    with pytest.raises(CertificateRejected):
        await bypass.prove(target, again, "c.test")
    assert asked == 2


async def test_by_default_a_client_that_refuses_us_is_not_passed_through_the_next_time(
    serve: Serve,
    connector: Connector,
    tls_target: TlsTarget,
    trust: ssl.SSLContext,
    intercept: Intercept,
) -> None:
    port = await tls_target("a.test")
    running = serve(passthrough(connector, port, intercept()))

    def connect() -> None:
        with socket.create_connection((HOST, running.port), timeout=20) as sock:
            trust.wrap_socket(sock, server_hostname="a.test").close()

    for _ in range(3):
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.to_thread(connect)


async def test_a_name_whose_client_refuses_us_is_passed_through_from_then_on_for_that_client(
    serve: Serve,
    connector: Connector,
    tls_target: TlsTarget,
    trust: ssl.SSLContext,
    trusting_us: ssl.SSLContext,
    intercept: Intercept,
) -> None:
    def connect(context: ssl.SSLContext) -> bytes:
        with (
            socket.create_connection((HOST, running.port), timeout=20) as sock,
            context.wrap_socket(sock, server_hostname="a.test") as tls,
        ):
            return tls.recv(100)

    clock = Clock()
    port = await tls_target("a.test")
    rejections = Rejections(ttl=60, clock=clock)
    layer = intercept(inspect=lines_upper, rejections=rejections)
    running = serve(passthrough(connector, port, layer))
    with pytest.raises(ssl.SSLCertVerificationError):
        await asyncio.to_thread(connect, trust)
    await running.idle()
    assert [type(error) for error in running.errors] == [HandshakeFailed]
    assert await asyncio.to_thread(connect, trust) == b"a.test\n"
    clock.now += 61
    with pytest.raises(ssl.SSLCertVerificationError):
        await asyncio.to_thread(connect, trust)
    await running.idle()
    clock.now += 61
    assert await asyncio.to_thread(connect, trusting_us) == b"A.TEST\n"


async def test_clients_that_hang_up_without_a_word_count_at_the_third_time_in_a_row(
    serve: Serve,
    connector: Connector,
    tls_target: TlsTarget,
    trust: ssl.SSLContext,
    trusting_us: ssl.SSLContext,
    intercept: Intercept,
) -> None:
    port = await tls_target("a.test")
    layer = intercept(inspect=lines_upper, rejections=Rejections())
    running = serve(passthrough(connector, port, layer))

    async def refuse() -> None:
        with pytest.raises(ssl.SSLCertVerificationError):  # of which asyncio does not tell the server
            await greeting(running, trust, "a.test")
        await running.idle()

    await refuse()
    await refuse()
    assert await greeting(running, trusting_us, "a.test") == b"A.TEST\n"
    for _ in range(3):
        await refuse()
    assert await greeting(running, trust, "a.test") == b"a.test\n"


def test_what_one_client_refuses_is_not_hidden_from_view_for_another() -> None:
    clock = Clock()
    rejections = Rejections(ttl=10, limit=2, clock=clock)
    rejections.refused("10.0.0.1", "a.test")
    assert rejections.remembers("10.0.0.1", "a.test")
    assert not rejections.remembers("10.0.0.2", "a.test")
    assert not rejections.remembers("10.0.0.1", "b.test")
    clock.now += 10
    assert not rejections.remembers("10.0.0.1", "a.test")
    for number in range(3):
        rejections.refused("10.0.0.1", f"{number}.test")
    assert [rejections.remembers("10.0.0.1", f"{number}.test") for number in range(3)] == [False, True, True]


def test_hang_ups_far_apart_are_not_counted_together() -> None:
    clock = Clock()
    rejections = Rejections(ttl=10, hang_ups=2, clock=clock)
    for _ in range(3):
        rejections.hung_up("10.0.0.1", "a.test")
        assert not rejections.remembers("10.0.0.1", "a.test")
        clock.now += 11
    rejections.hung_up("10.0.0.1", "a.test")
    rejections.hung_up("10.0.0.1", "a.test")
    assert rejections.remembers("10.0.0.1", "a.test")


async def test_an_inspection_that_answers_by_itself_ends_in_order_for_the_client(
    serve: Serve,
    connector: Connector,
    tls_target: TlsTarget,
    trusting_us: ssl.SSLContext,
    intercept: Intercept,
) -> None:
    async def refuse(tunnel: Intercepted) -> TunnelReport:
        await tunnel.client.write(b"blocked\n")
        return TunnelReport(CloseReason.CUT, 0, 8, 0.0, "inspection")

    trusting_us.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    port = await tls_target("a.test")
    layer = intercept(inspect=refuse)
    running = serve(passthrough(connector, port, layer))

    def connect() -> list[bytes]:
        with (
            socket.create_connection((HOST, running.port), timeout=20) as sock,
            trusting_us.wrap_socket(sock, server_hostname="a.test", suppress_ragged_eofs=False) as tls,
        ):
            return [tls.recv(100), tls.recv(100)]

    assert await asyncio.to_thread(connect) == [b"blocked\n", b""]


async def test_a_client_that_names_no_server_gets_the_certificate_of_the_target_it_named_to_the_proxy(
    serve: Serve,
    connector: Connector,
    tls_target: TlsTarget,
    ours: CertificateAuthority,
    intercept: Intercept,
) -> None:
    port = await tls_target("a.test")
    running = serve(stack(intercept(), Socks5Server(connector)))
    context = ssl.create_default_context(cadata=ours.pem.decode())
    context.check_hostname = False
    reader, writer = await socks(running, port)
    await writer.start_tls(context)
    assert await reader.readline() == b"a.test\n"
    shown = writer.get_extra_info("peercert")
    assert shown["subjectAltName"] == (("DNS", "a.test"),)
    writer.close()


async def test_a_client_that_names_no_server_is_intercepted_by_the_address_it_asked_for(
    serve: Serve,
    connector: Connector,
    run: Run,
    authority: Pki,
    ours: CertificateAuthority,
    tmp_path: Path,
    intercept: Intercept,
) -> None:
    port = await http_target(serve, authority, HOST)
    (tmp_path / "ca.pem").write_bytes(ours.pem)
    for scheme, server in (("socks5", Socks5Server(connector)), ("http", HttpProxy(connector))):
        layer = intercept()
        running = serve(stack(layer, server))
        code, out, err = await run(
            *("curl", "-sS", "--proxy", f"{scheme}://{HOST}:{running.port}", "--cacert", tmp_path / "ca.pem"),
            f"https://{HOST}:{port}/",
        )
        assert (code, err) == (0, "")
        assert out == "None ['h2', 'http/1.1']\n"


async def test_policy_holds_inside_tunnels(serve: Serve, connector: Connector, run: Run, authority: Pki) -> None:
    port = await http_target(serve, authority, "a.test")
    policy = TlsPolicyLayer(
        [
            TlsRule("no-b", TlsMatch(sni=["b.test"]), TlsAction.CLOSE),
            TlsRule("no-c", TlsMatch(sni=["c.test"]), TlsAction.STRIKE),
        ]
    )
    for scheme, server in (("socks5h", Socks5Server(connector)), ("http", HttpProxy(connector))):
        running = serve(stack(TlsTunnelLayer(policy=policy), server))

        async def curl(name: str, scheme: str = scheme, running: Running = running) -> tuple[int, str]:
            code, _, err = await run(
                *("curl", "-sS", "--proxy", f"{scheme}://{HOST}:{running.port}", "--cacert", authority.certificate),
                f"https://{name}:{port}/",
            )
            return code, err

        assert await curl("a.test") == (0, "")
        code, err = await curl("b.test")
        assert code == 35
        assert "access denied" in err
        code, err = await curl("c.test")
        assert code == 35
        assert "reset" in err.lower()
        await running.idle()
        assert [type(error) for error in running.errors] == [TlsDenied, TlsStrike]


async def socks(running: Running, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a tunnel to ``a.test`` through SOCKS5."""
    reader, writer = await running.connect()
    writer.write(b"\x05\x01\x00" + b"\x05\x01\x00\x03\x06a.test" + port.to_bytes(2, "big"))
    await reader.readexactly(2 + 10)
    return reader, writer


async def test_a_server_that_speaks_first_is_not_kept_waiting(serve: Serve, connector: Connector) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 ready\r\n")
        writer.write(await reader.readline())
        writer.close()

    server = await asyncio.start_server(greet, HOST, 0)
    running = serve(stack(TlsTunnelLayer(), Socks5Server(connector)))
    reader, writer = await socks(running, server.sockets[0].getsockname()[1])
    assert await reader.readline() == b"220 ready\r\n"
    writer.write(b"EHLO\r\n")
    assert await reader.read() == b"EHLO\r\n"
    writer.close()
    server.close()


@pytest.mark.parametrize("data", [b"G", b"GET / HTTP/1.0\r\n\r\n", b"SSH-2.0-x\r\n"])
async def test_a_tunnel_of_another_protocol_is_relayed_as_it_is(
    serve: Serve, connector: Connector, data: bytes
) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        writer.close()

    server = await asyncio.start_server(echo, HOST, 0)
    running = serve(stack(TlsTunnelLayer(), Socks5Server(connector)))
    reader, writer = await socks(running, server.sockets[0].getsockname()[1])
    writer.write(data)
    writer.write_eof()
    assert await reader.read() == data
    writer.close()
    server.close()


async def test_a_hello_that_cannot_be_read_is_refused_or_with_fail_open_relayed(
    serve: Serve, connector: Connector
) -> None:
    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(str(len(await reader.read())).encode())
        writer.close()

    server = await asyncio.start_server(count, HOST, 0)
    port = server.sockets[0].getsockname()[1]
    bad = b"\x16\x03\x01\xff\xff" + bytes(100)
    for fail_open, answer in ((False, b"\x15\x03\x01\x00\x02\x02\x16"), (True, b"105")):
        running = serve(stack(TlsTunnelLayer(fail_open=fail_open), Socks5Server(connector)))
        reader, writer = await socks(running, port)
        writer.write(bad)
        writer.write_eof()
        assert await reader.read() == answer
        writer.close()
        await running.idle()
        assert [type(error) for error in running.errors] == ([] if fail_open else [AlertError])
    server.close()


async def test_silence_is_no_way_around_the_look(serve: Serve, connector: Connector, tls_target: TlsTarget) -> None:
    port = await tls_target("a.test")
    layer = TlsTunnelLayer(first_byte_timeout=0.05, timeout=0.05)
    running = serve(stack(layer, Socks5Server(connector)))
    for sent in (b"", b"\x16\x03\x01"):
        reader, writer = await socks(running, port)
        writer.write(sent)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
    await running.idle()
    assert [error.kind for error in running.errors] == ["handshake_timeout"] * 2


async def test_a_client_or_server_that_vanishes_before_a_word_ends_the_tunnel(
    serve: Serve, connector: Connector
) -> None:
    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, HOST, 0)
    running = serve(stack(TlsTunnelLayer(), Socks5Server(connector)))
    reader, writer = await socks(running, server.sockets[0].getsockname()[1])
    assert await reader.read() == b""
    writer.close()
    await running.idle()
    server.close()


async def test_what_the_look_finds_is_added_to_the_clients_extensions(
    serve: Serve, connector: Connector, tls_target: TlsTarget, trust: ssl.SSLContext
) -> None:
    port = await tls_target("a.test")
    streams: list[Stream] = []
    inner = stack(TlsTunnelLayer(), Socks5Server(connector))

    async def outer(stream: Stream) -> None:
        streams.append(stream)
        await inner(stream)

    running = serve(outer)
    _, writer = await socks(running, port)
    await writer.start_tls(trust, server_hostname="a.test")
    writer.close()
    await running.idle()
    extensions = streams[0].extensions
    assert extensions.require(ClientHello).server_name == "a.test"
    assert extensions.require(Ja4).value.startswith("t13d")
    assert extensions.get(TunnelReport) is not None
    assert isinstance(streams[0], SocketStream)
    assert extensions.get(ClientAddress) is not None


async def test_a_certificate_made_up_for_the_name_serves_without_an_upstream(
    serve: Serve, ours: CertificateAuthority, trusting_us: ssl.SSLContext
) -> None:
    issuer = LeafIssuer(ours)

    async def made_up(hello: ClientHello) -> ssl.SSLContext:
        return issuer.for_name(hello.server_name or HOST)

    async def greet(stream: Stream) -> None:
        await stream.write(b"hello\n")

    running = serve(stack(TlsTerminateLayer(made_up), greet))
    for name in ("x.test", "y.test", HOST):
        assert await greeting(running, trusting_us, name) == b"hello\n"
