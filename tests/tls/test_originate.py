"""Originating TLS against servers of Python's own ssl: who is believed, what is asked for, what a failure leaves."""

from __future__ import annotations

import asyncio
import ssl

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from rama_ebpf.core import Authority as Target
from rama_ebpf.core import HandshakeTimeout, PolicyDenied, Stream, stack
from rama_ebpf.relay import relay
from rama_ebpf.services.connect import Connector
from rama_ebpf.services.tls import (
    CertificateRejected,
    CertificateStore,
    ClientAuth,
    ClientTls,
    HandshakeFailed,
    KeyPair,
    ServerTls,
    TlsConnector,
    TlsParameters,
    TlsTerminateLayer,
    spki_sha256,
)

from .conftest import HOST, Serve, TlsTarget
from .pki import Authority


@pytest.fixture
def ours(authority: Authority) -> ClientTls:
    return ClientTls(ca=authority.certificate)


async def test_a_verified_server_is_talked_to(tls_target: TlsTarget, connector: Connector, ours: ClientTls) -> None:
    port = await tls_target("a.test")
    stream = await TlsConnector(connector, ours)(Target("a.test", port))
    assert await stream.read() == b"a.test\n"
    await stream.write(b"hello")
    assert await stream.read() == b"hello"
    await stream.close()


async def test_a_server_is_verified_by_address_too(
    tls_target: TlsTarget, connector: Connector, ours: ClientTls
) -> None:
    connect = TlsConnector(connector, ours)
    stream = await connect(Target.of(HOST, await tls_target(HOST)))
    assert await stream.read() == HOST.encode() + b"\n"
    await stream.close()
    with pytest.raises(CertificateRejected, match=HOST):
        await connect(Target.of(HOST, await tls_target("a.test")))


async def test_an_unverified_server_is_refused(tls_target: TlsTarget, connector: Connector, ours: ClientTls) -> None:
    port = await tls_target("a.test")
    with pytest.raises(CertificateRejected, match=r"b\.test"):
        await TlsConnector(connector, ours)(Target("b.test", port))
    with pytest.raises(CertificateRejected, match="certificate"):
        await TlsConnector(connector)(Target("a.test", port))  # the system's authorities do not know ours
    stream = await TlsConnector(connector, ClientTls(verify=False))(Target("b.test", port))
    assert await stream.read() == b"a.test\n"
    await stream.close()


async def test_another_server_name_can_be_asked_for(
    tls_target: TlsTarget, connector: Connector, ours: ClientTls
) -> None:
    connect = TlsConnector(connector, ours, server_name="a.test")
    stream = await connect(Target("alias.test", await tls_target("a.test")))
    await stream.close()


@pytest.mark.parametrize(("offered", "agreed"), [(("h2", "http/1.1"), "h2"), (("http/1.1",), "http/1.1"), ((), None)])
async def test_a_protocol_is_agreed_on(
    tls_target: TlsTarget, connector: Connector, authority: Authority, offered: tuple[str, ...], agreed: str | None
) -> None:
    port = await tls_target("a.test", alpn=("h2", "http/1.1"))
    settings = ClientTls(ca=authority.certificate, alpn=offered)
    stream = await TlsConnector(connector, settings)(Target("a.test", port))
    assert stream.extensions.require(TlsParameters).alpn == agreed
    await stream.close()


async def test_a_pinned_key_must_be_the_servers(
    tls_target: TlsTarget, connector: Connector, authority: Authority
) -> None:
    port = await tls_target("a.test")
    stream = await TlsConnector(connector, ClientTls(ca=authority.certificate))(Target("a.test", port))
    certificate = stream.parameters.peer_certificate
    await stream.close()
    assert certificate is not None
    right, wrong = spki_sha256(certificate), bytes(32)
    for verify in (True, False):
        pinned = ClientTls(ca=authority.certificate, verify=verify, pins=frozenset([wrong, right]))
        await (await TlsConnector(connector, pinned)(Target("a.test", port))).close()
        with pytest.raises(CertificateRejected, match="pinned"):
            await TlsConnector(connector, ClientTls(ca=authority.certificate, verify=verify, pins=frozenset([wrong])))(
                Target("a.test", port)
            )
    with pytest.raises(ValueError, match="32 bytes"):
        ClientTls(pins=frozenset([b"short"]))


async def test_a_client_certificate_is_shown_where_it_is_asked_for(
    serve: Serve, connector: Connector, authority: Authority
) -> None:
    leaf, tom = authority.issue("a.test", stem="mtls"), authority.issue("tom", client=True)
    settings = ServerTls(client_auth=ClientAuth.REQUIRED, client_ca=authority.certificate)
    store = CertificateStore.of_files(settings, KeyPair(leaf.chain, leaf.key))

    async def who(stream: Stream) -> None:
        shown = stream.extensions.require(TlsParameters).peer_certificate
        await stream.write(shown or b"")

    running = serve(stack(TlsTerminateLayer(store), who))
    with_certificate = ClientTls(ca=authority.certificate, certificate=KeyPair(tom.chain, tom.key))
    stream = await TlsConnector(connector, with_certificate)(Target("a.test", running.port))
    shown = await stream.read()
    assert spki_sha256(shown) == spki_sha256(tom.certificate.public_bytes(Encoding.DER))
    await stream.close()
    without = await TlsConnector(connector, ClientTls(ca=authority.certificate))(Target("a.test", running.port))
    with pytest.raises(ConnectionError, match="certificate required"):
        await without.read()
    without.abort()


async def test_what_is_no_tls_server_fails_the_handshake_and_leaves_no_socket(connector: Connector) -> None:
    closed = asyncio.Event()

    async def speak_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()
        writer.close()
        closed.set()

    server = await asyncio.start_server(speak_http, HOST, 0)
    with pytest.raises(HandshakeFailed):
        await TlsConnector(connector)(Target("a.test", server.sockets[0].getsockname()[1]))
    await asyncio.wait_for(closed.wait(), 10)
    server.close()


async def test_a_silent_server_is_given_up(connector: Connector) -> None:
    server = await asyncio.start_server(lambda reader, _writer: reader.read(), HOST, 0)
    with pytest.raises(HandshakeTimeout):
        await TlsConnector(connector, handshake_timeout=0.05)(Target("a.test", server.sockets[0].getsockname()[1]))
    server.close()


async def test_egress_policy_holds_for_tls_too(connector: Connector) -> None:
    with pytest.raises(PolicyDenied):
        await TlsConnector(connector)(Target.of("10.0.0.1", 443))


async def test_a_relay_from_tls_to_tls_loses_nothing_and_half_closes(
    serve: Serve, tls_target: TlsTarget, connector: Connector, authority: Authority, trust: ssl.SSLContext
) -> None:
    leaf = authority.issue("front.test")
    port = await tls_target("a.test")
    connect = TlsConnector(connector, ClientTls(ca=authority.certificate))

    async def forward(stream: Stream) -> object:
        return await relay(stream, await connect(Target("a.test", port)))

    store = CertificateStore.of_files(ServerTls(), KeyPair(leaf.chain, leaf.key))
    running = serve(stack(TlsTerminateLayer(store), forward))
    reader, writer = await asyncio.open_connection(HOST, running.port, ssl=trust, server_hostname="front.test")
    payload = bytes(range(256)) * 8192
    writer.write(payload)
    assert await reader.readexactly(7 + len(payload)) == b"a.test\n" + payload
    writer.close()
    await writer.wait_closed()
    await running.idle()
    assert running.errors == []
