"""The peek layer on real sockets: nothing is consumed, nothing hangs, and what is not TLS is told apart."""

from __future__ import annotations

import asyncio
import socket
import ssl

import pytest

from rama_ebpf.core import HandshakeTimeout, PeerClosed, Stream, stack
from rama_ebpf.layers.access_log import AccessLogLayer, AccessRecord
from rama_ebpf.services.tls import Alert, AlertError, ClientHello, Ja3, Ja4, NotTls, TlsPeekLayer

from .conftest import HOST, Running, Serve
from .hello import build, handshake, of_vector, records, server_name
from .vectors import VECTORS

CHROME = records(of_vector(VECTORS[1]))


async def everything(stream: Stream) -> bytes:
    """A service that reads to EOF and answers with the length."""
    data = b""
    while part := await stream.read():
        data += part
    await stream.write(str(len(data)).encode())
    return data


async def fallback(stream: Stream) -> str:
    first = await stream.read()
    await stream.write(b"fallback got " + first)
    return "fallback"


async def exchange(running: Running, data: bytes, *, eof: bool = True) -> bytes:
    reader, writer = await running.connect()
    writer.write(data)
    if eof:
        writer.write_eof()
    answer = await reader.read()
    writer.close()
    await running.idle()
    return answer


async def test_the_service_inside_finds_every_byte_unread_and_the_eof_behind(serve: Serve) -> None:
    seen: list[Stream] = []

    async def inner(stream: Stream) -> bytes:
        seen.append(stream)
        return await everything(stream)

    running = serve(stack(TlsPeekLayer(), inner))
    early = CHROME + b"\x17\x03\x03 data right behind"
    assert await exchange(running, early) == str(len(early)).encode()
    assert running.results == [early]
    extensions = seen[0].extensions
    assert extensions.require(ClientHello).server_name == VECTORS[1].server_name
    assert extensions.require(Ja3).digest == VECTORS[1].ja3
    assert extensions.require(Ja4).value == VECTORS[1].ja4


async def test_one_byte_a_segment_gives_the_same(serve: Serve) -> None:
    running = serve(stack(TlsPeekLayer(), everything))
    reader, writer = await running.connect()
    sock = writer.get_extra_info("socket")
    assert sock is not None
    for i in range(len(CHROME)):
        writer.write(CHROME[i : i + 1])
        await writer.drain()
        await asyncio.sleep(0)
    writer.write_eof()
    assert await reader.read() == str(len(CHROME)).encode()
    writer.close()
    assert running.results == [CHROME]


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\x05\x01\x00", b"\x80\x2e\x02", b"hello"])
async def test_another_protocol_goes_to_the_fallback_without_waiting_for_more(serve: Serve, data: bytes) -> None:
    running = serve(stack(TlsPeekLayer(fallback=fallback, timeout=60), everything))
    assert await exchange(running, data, eof=False) == b"fallback got " + data


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\x05\x01\x00", b"\x04\x01\x00\x50\x7f\0\0\1\0"])
async def test_another_protocol_without_a_fallback_gets_an_alert(serve: Serve, data: bytes) -> None:
    running = serve(stack(TlsPeekLayer(), everything))
    assert await exchange(running, data) == Alert.UNEXPECTED_MESSAGE.record
    assert [type(error) for error in running.errors] == [NotTls]


async def test_no_reset_follows_the_alert_though_more_was_sent_than_is_read(serve: Serve) -> None:
    running = serve(stack(TlsPeekLayer(), everything))
    loop = asyncio.get_running_loop()
    with socket.create_connection((HOST, running.port)) as client:
        client.setblocking(False)
        await loop.sock_sendall(client, b"POST / HTTP/1.1\r\n\r\n" + bytes(48 * 1024))
        assert await loop.sock_recv(client, 100) == Alert.UNEXPECTED_MESSAGE.record
        assert await loop.sock_recv(client, 100) == b""
        await asyncio.sleep(0.02)  # in which nothing may come
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


@pytest.mark.parametrize(
    ("data", "alert"),
    [
        (b"\x80\x2e\x01\x00\x02", Alert.PROTOCOL_VERSION),
        (b"\x16\x03\x01\xff\xff" + bytes(100), Alert.RECORD_OVERFLOW),
        (records(handshake(build(server_name(b"127.0.0.1")))), Alert.UNRECOGNIZED_NAME),
        (records(handshake(build(server_name(b"a\0b.test")))), Alert.UNRECOGNIZED_NAME),
        (records(handshake(build(server_name(b"a" * 300)))), Alert.UNRECOGNIZED_NAME),
        (records(handshake(build(server_name(b"")))), Alert.DECODE_ERROR),
        (b"".join(records(bytes((part,))) for part in handshake(bytes(8000))), Alert.RECORD_OVERFLOW),
    ],
)
async def test_a_bad_hello_gets_its_alert_or_with_fail_open_the_fallback(
    serve: Serve, data: bytes, alert: Alert
) -> None:
    closed = serve(stack(TlsPeekLayer(), everything))
    assert await exchange(closed, data) == alert.record
    assert [type(error) for error in closed.errors] == [AlertError]
    opened = serve(stack(TlsPeekLayer(fallback=everything, fail_open=True), fallback))
    assert await exchange(opened, data) == str(len(data)).encode()


async def test_a_client_that_never_finishes_its_hello_is_cut(serve: Serve) -> None:
    running = serve(stack(TlsPeekLayer(timeout=0.05), everything))
    reader, writer = await running.connect()
    writer.write(CHROME[:-1])
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    await running.idle()
    assert [type(error) for error in running.errors] == [HandshakeTimeout]


async def test_a_hello_that_ends_early_is_refused_or_with_fail_open_passed_on(serve: Serve) -> None:
    running = serve(stack(TlsPeekLayer(), everything))
    _, writer = await running.connect()
    writer.write(CHROME[:-1])
    writer.close()
    await running.idle(1)
    assert [type(error) for error in running.errors] == [PeerClosed]
    opened = serve(stack(TlsPeekLayer(fallback=everything, fail_open=True), fallback))
    assert await exchange(opened, CHROME[:-1]) == str(len(CHROME) - 1).encode()


async def test_what_real_openssl_sends_is_read(serve: Serve) -> None:
    hellos: list[ClientHello] = []

    async def inner(stream: Stream) -> None:
        hellos.append(stream.extensions.require(ClientHello))

    running = serve(stack(TlsPeekLayer(), inner))
    context = ssl.create_default_context()
    context.set_alpn_protocols(["h2", "http/1.1"])
    with pytest.raises(ConnectionResetError):
        await asyncio.open_connection(HOST, running.port, ssl=context, server_hostname="www.example.test")
    assert hellos[0].server_name == "www.example.test"
    assert hellos[0].alpn == (b"h2", b"http/1.1")
    assert hellos[0].version == 0x0304


async def test_the_access_log_shows_what_rules_are_written_of(serve: Serve) -> None:
    records: list[AccessRecord] = []
    running = serve(stack(AccessLogLayer(records.append), TlsPeekLayer(), everything))
    await exchange(running, CHROME)
    assert f" sni={VECTORS[1].server_name} ja4={VECTORS[1].ja4}" in str(records[0])
