"""TlsStream between real sockets: what is written arrives, each side ends for itself, and a break is never an end."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from rama_ebpf.core import HandshakeTimeout, LimitExceeded, PeerClosed, SocketStream, Stream
from rama_ebpf.services.tcp import TcpServer, bind_tcp
from rama_ebpf.services.tls import (
    CertificateRejected,
    HandshakeFailed,
    KeyPair,
    ServerTls,
    TlsError,
    TlsParameters,
    TlsStream,
    TlsTruncated,
)

from .pki import Authority

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports use what newer Pythons have deprecated
    from tlslite.api import HandshakeSettings, TLSConnection
    from tlslite.errors import TLSRemoteAlert
    from tlslite.messages import ClientHello

Versions = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
Transports = Callable[[], tuple[SocketStream, SocketStream]]
Pair = Callable[[ssl.TLSVersion], Awaitable[tuple[TlsStream, TlsStream]]]


@pytest.fixture
def server_context(authority: Authority) -> ssl.SSLContext:
    leaf = authority.issue("a.test", stem="stream")
    return ServerTls(alpn=("h2", "http/1.1")).context(KeyPair(leaf.chain, leaf.key))


@pytest.fixture
async def transports() -> AsyncIterator[Transports]:
    """Two ends of a connection, as often as called; closed after the test."""
    with contextlib.ExitStack() as cleanup:

        def make() -> tuple[SocketStream, SocketStream]:
            ends = [SocketStream(end) for end in socket.socketpair()]
            for end in ends:
                cleanup.callback(end.abort)
            return ends[0], ends[1]

        yield make


@pytest.fixture
async def pair(transports: Transports, server_context: ssl.SSLContext, authority: Authority) -> AsyncIterator[Pair]:
    """``client, server = await pair(version)``: two streams of ours that have done their handshake."""
    streams: list[TlsStream] = []

    async def make(version: ssl.TLSVersion) -> tuple[TlsStream, TlsStream]:
        context = ssl.create_default_context(cafile=str(authority.certificate))
        context.maximum_version = version
        left, right = transports()
        client, server = await asyncio.gather(
            TlsStream.connect(left, context, server_name="a.test"),
            TlsStream.accept(right, server_context),
        )
        streams.extend((client, server))
        return client, server

    yield make
    for stream in streams:
        stream.abort()


async def read_all(stream: Stream, size: int = 65536) -> bytes:
    parts = []
    while data := await stream.read(size):
        parts.append(data)
    return b"".join(parts)


@Versions
async def test_both_directions_at_once_in_any_portions_lose_nothing(pair: Pair, version: ssl.TLSVersion) -> None:
    client, server = await pair(version)
    chance = random.Random(7)
    data = chance.randbytes(3_000_000)

    async def send(stream: TlsStream) -> None:
        at = 0
        while at < len(data):
            chunks = [data[at : (at := at + chance.choice((1, 100, 16384, 16385, 200_000)))] for _ in range(3)]
            await stream.write(*chunks)
        await stream.write_eof()

    _, _, up, down = await asyncio.gather(send(client), send(server), read_all(server, 5000), read_all(client, 300_000))
    assert up == data
    assert down == data
    assert client.bytes_sent == server.bytes_received == len(data)
    await asyncio.gather(client.close(), server.close())


@Versions
async def test_a_half_closed_stream_goes_on_in_the_other_direction(pair: Pair, version: ssl.TLSVersion) -> None:
    client, server = await pair(version)
    await client.write(b"request")
    await client.write_eof()
    assert await read_all(server) == b"request"
    answer = bytes(1_000_000)
    sent = asyncio.create_task(server.write(answer))
    assert await client.read_exactly(1000) == bytes(1000)
    rest = asyncio.create_task(read_all(client))
    await sent
    await server.write_eof()
    assert await rest == answer[1000:]
    await asyncio.gather(client.close(), server.close())


@Versions
async def test_half_closing_over_unread_data_loses_none_of_it(pair: Pair, version: ssl.TLSVersion) -> None:
    client, server = await pair(version)
    first, second = b"1" * 10_000, b"2" * 30_000
    await client.write(first)
    await client.write(second)
    assert await server.read(10) == first[:10]  # the rest of this record is decrypted, the next ones are not
    await server.write_eof()
    await client.write(b"3")
    await client.write_eof()
    assert await read_all(server) == first[10:] + second + b"3"
    assert await read_all(client) == b""


@Versions
async def test_half_closing_while_the_other_task_waits_for_data(pair: Pair, version: ssl.TLSVersion) -> None:
    client, server = await pair(version)
    reading = asyncio.create_task(read_all(client))
    await asyncio.sleep(0)
    await client.write_eof()
    assert await read_all(server) == b""
    await server.write(b"late")
    await server.close()
    assert await reading == b"late"


@Versions
async def test_an_end_without_close_notify_is_no_end(pair: Pair, version: ssl.TLSVersion) -> None:
    client, server = await pair(version)
    await client.write(b"all but the end")
    await client.transport.write_eof()
    assert await server.read() == b"all but the end"
    for _ in range(2):
        with pytest.raises(TlsTruncated):
            await server.read()
    await server.write(b"the other direction is not touched")
    assert await client.read() == b"the other direction is not touched"


async def test_peers_that_end_without_close_notify_are_tolerated_on_request(
    transports: Transports, server_context: ssl.SSLContext, trust: ssl.SSLContext
) -> None:
    left, right = transports()
    client, server = await asyncio.gather(
        TlsStream.connect(left, trust, server_name="a.test"),
        TlsStream.accept(right, server_context, ragged_eof=True),
    )
    await client.write(b"data")
    await client.transport.write_eof()
    assert await read_all(server) == b"data"
    await server.write(b"answer")
    assert await client.read() == b"answer"
    await server.close()
    await client.close()


@Versions
async def test_a_changed_byte_breaks_the_stream_for_good(pair: Pair, version: ssl.TLSVersion) -> None:
    client, server = await pair(version)
    await client.write(b"good")
    assert await server.read() == b"good"
    record = bytearray(b"\x17\x03\x03\x00\x40" + bytes(64))
    await client.transport.write(record)
    with pytest.raises(TlsError, match="broken"):
        await server.read()
    with pytest.raises(ConnectionAbortedError):
        await server.write(b"more")
    await server.close()
    with pytest.raises(OSError, match=r"broken|reset|close_notify"):
        await read_all(client)


FORGED = b"\x17\x03\x03\x00\x20" + b"\x55" * 32
OVERSIZED = b"\x17\x03\x03\x4e\x20" + b"x" * 20_000
PLAINTEXT = b"GET / HTTP/1.1\r\n\r\n"
ENDLESS = FORGED + b"\x17\x03\x03\x40\x00" * 400_000  # more than the kernel's buffers: unread, it would mean RST


@Versions
@pytest.mark.parametrize(
    ("sent", "alert"),
    [
        (FORGED, "bad record mac"),
        (OVERSIZED, "record overflow"),
        (PLAINTEXT, "unexpected message|protocol version"),
        (ENDLESS, "bad record mac"),
    ],
    ids=["forged", "oversized", "plaintext", "endless"],
)
async def test_bad_record_is_answered_with_its_alert_and_an_orderly_end(
    server_context: ssl.SSLContext, authority: Authority, version: ssl.TLSVersion, sent: bytes, alert: str
) -> None:
    context = ssl.create_default_context(cafile=str(authority.certificate))
    context.maximum_version = version
    ended = asyncio.Event()

    async def serve(stream: Stream) -> None:
        server = await TlsStream.accept(stream, server_context)
        try:
            with pytest.raises(TlsError, match="broken"):
                await server.read()
            with pytest.raises(ConnectionAbortedError):
                await server.write(b"more")
        finally:
            server.abort()  # as whoever serves a stream does when it has failed
            ended.set()

    with bind_tcp("127.0.0.1", 0) as listener:
        tcp = TcpServer(listener, serve)
        tcp.start()
        client = socket.create_connection(listener.getsockname())

        def exchange() -> None:
            with client:
                client.settimeout(20)
                incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
                tls = context.wrap_bio(incoming, outgoing, server_hostname="a.test")
                while True:
                    try:
                        tls.do_handshake()
                        break
                    except ssl.SSLWantReadError:
                        client.sendall(outgoing.read())
                        incoming.write(client.recv(65536))
                client.sendall(outgoing.read() + sent)
                while data := client.recv(65536):  # and no reset
                    incoming.write(data)
                with pytest.raises(ssl.SSLError, match=alert.replace(" ", "_").upper()):
                    tls.read(1)

        await asyncio.to_thread(exchange)
        await ended.wait()
        await tcp.drain(0)


async def test_what_came_before_the_break_is_delivered_first(pair: Pair) -> None:
    client, server = await pair(ssl.TLSVersion.TLSv1_3)
    await client.write(b"good")
    await client.transport.write(b"\x17\x03\x03\x00\x40" + bytes(64))
    assert await server.read() == b"good"
    with pytest.raises(TlsError, match="broken"):
        await server.read()


async def test_close_is_seen_as_an_orderly_end_by_pythons_own_ssl(
    transports: Transports, server_context: ssl.SSLContext, trust: ssl.SSLContext
) -> None:
    trust.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    left, right = socket.socketpair()

    def client() -> bytes:
        left.settimeout(20)
        with trust.wrap_socket(left, server_hostname="a.test", suppress_ragged_eofs=False) as tls:
            data = b""
            while part := tls.recv(1000):
                data += part
            return data

    theirs = asyncio.create_task(asyncio.to_thread(client))
    server = await TlsStream.accept(SocketStream(right), server_context)
    await server.write(b"x" * 5000)
    await server.close()
    assert await theirs == b"x" * 5000


async def test_a_writer_waits_for_its_reader_and_a_cut_write_is_never_continued(pair: Pair) -> None:
    client, _server = await pair(ssl.TLSVersion.TLSv1_3)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await client.write(bytes(50_000_000))
    assert client.bytes_sent < 10_000_000
    with pytest.raises(ConnectionAbortedError):
        await client.write(b"after a torn record")
    await client.close()


@Versions
async def test_both_sides_know_what_was_agreed_on(pair: Pair, version: ssl.TLSVersion) -> None:
    client, server = await pair(version)
    ours = server.extensions.require(TlsParameters)
    theirs = client.extensions.require(TlsParameters)
    assert ours.version == theirs.version == {"TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}[version.name]
    assert ours.cipher == theirs.cipher
    assert theirs.peer_certificate is not None
    assert ours.peer_certificate is None
    assert not ours.resumed
    assert ours.alpn is None


async def test_tls_runs_inside_tls(pair: Pair, server_context: ssl.SSLContext, trust: ssl.SSLContext) -> None:
    client, server = await pair(ssl.TLSVersion.TLSv1_3)
    inner_client, inner_server = await asyncio.gather(
        TlsStream.connect(client, trust, server_name="a.test"), TlsStream.accept(server, server_context)
    )
    data = random.Random(1).randbytes(500_000)
    sending = asyncio.create_task(inner_client.write(data))
    assert await inner_server.read_exactly(60_000) == data[:60_000]
    received = asyncio.create_task(read_all(inner_server))
    await sending
    await inner_client.close()
    assert await received == data[60_000:]


async def test_bytes_read_ahead_of_the_handshake_are_used(
    transports: Transports, server_context: ssl.SSLContext, trust: ssl.SSLContext
) -> None:
    left, right = transports()
    connecting = asyncio.create_task(TlsStream.connect(left, trust, server_name="a.test"))
    await right.peek(100)
    server = await TlsStream.accept(right, server_context)
    client = await connecting
    await client.write(b"in")
    assert await server.read() == b"in"


async def test_a_server_that_cannot_be_verified_is_refused_and_told(
    transports: Transports, server_context: ssl.SSLContext, trust: ssl.SSLContext
) -> None:
    left, right = transports()
    accepting = asyncio.create_task(TlsStream.accept(right, server_context))
    with pytest.raises(CertificateRejected, match=r"b\.test"):
        await TlsStream.connect(left, trust, server_name="b.test")
    with pytest.raises(HandshakeFailed) as caught:
        await accepting
    assert caught.value.rejected_our_certificate
    left, right = transports()
    accepting = asyncio.create_task(TlsStream.accept(right, server_context))
    with pytest.raises(CertificateRejected, match="self-signed certificate in certificate chain"):
        await TlsStream.connect(left, ssl.create_default_context(), server_name="a.test")
    with pytest.raises(HandshakeFailed) as caught:
        await accepting
    assert caught.value.reason == "TLSV1_ALERT_UNKNOWN_CA"


@pytest.mark.parametrize("name", ["", ".a.test", "a" * 64 + ".test"])
async def test_a_server_name_that_cannot_be_sent_is_refused(
    transports: Transports, trust: ssl.SSLContext, name: str
) -> None:
    left, _ = transports()
    with pytest.raises(HandshakeFailed, match="cannot ask for"):
        await TlsStream.connect(left, trust, server_name=name)


async def test_a_silent_or_vanishing_peer_ends_the_handshake(
    transports: Transports, server_context: ssl.SSLContext
) -> None:
    _left, right = transports()
    with pytest.raises(HandshakeTimeout):
        await TlsStream.accept(right, server_context, timeout=0.05)
    left, right = transports()
    await left.write(b"\x16\x03\x01")
    await left.close()
    with pytest.raises(PeerClosed):
        await TlsStream.accept(right, server_context)


def ask_for_renegotiation(sock: socket.socket, count: int) -> int:
    """With tlslite-ng send ``count`` further ClientHellos, read nothing meanwhile; return how many bytes came."""
    settings = HandshakeSettings()
    settings.minVersion = settings.maxVersion = (3, 3)
    connection = TLSConnection(sock)
    connection.handshakeClientCert(settings=settings, serverName="a.test")
    for _ in range(count):
        hello = ClientHello().create((3, 3), bytearray(32), bytearray(), [0xC02B], extensions=[])
        for _ in connection._sendMsg(hello):
            pass
    return len(sock.recv(10))


async def test_a_stream_that_is_only_read_refuses_renegotiation(server_context: ssl.SSLContext) -> None:
    left, right = socket.socketpair()
    left.settimeout(20)
    asking = asyncio.create_task(asyncio.to_thread(ask_for_renegotiation, left, 1))
    server = await TlsStream.accept(SocketStream(right), server_context)
    reading = asyncio.create_task(server.read())
    assert await asking > 0
    reading.cancel()
    server.abort()
    left.close()


async def test_a_peer_that_asks_for_replies_without_end_and_takes_none_is_cut(server_context: ssl.SSLContext) -> None:
    left, right = socket.socketpair()
    left.settimeout(20)
    for end in (left, right):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, 4096)
    asking = asyncio.create_task(asyncio.to_thread(ask_for_renegotiation, left, 5000))
    server = await TlsStream.accept(SocketStream(right), server_context)
    with pytest.raises(LimitExceeded, match="does not take them"):
        await server.read()
    server.abort()
    with pytest.raises((OSError, TLSRemoteAlert), match=r"[Bb]roken pipe|reset|no_renegotiation"):
        await asking
    left.close()
