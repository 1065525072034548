"""One port, several protocols: each client reaches its own service with every byte, and nobody can hold the port."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from rama_ebpf.core import HandshakeTimeout, PeerClosed, ProtocolError, RamaError, Service, Stream
from rama_ebpf.services.router import PeekRouter, is_http, is_socks, is_tls
from rama_ebpf.services.tcp import TcpServer, bind_tcp

Serve = Callable[[Service[Stream, Any]], tuple[str, int]]


@pytest.fixture(params=["127.0.0.1", "::1"], ids=["ipv4", "ipv6"])
def loopback(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def serve(loopback: str, errors: asyncio.Queue[BaseException]) -> AsyncIterator[Serve]:
    servers: list[TcpServer] = []

    def start(service: Service[Stream, Any]) -> tuple[str, int]:
        async def observed(stream: Stream) -> None:
            try:
                await service(stream)
            except (RamaError, OSError) as error:
                errors.put_nowait(error)
                raise

        server = TcpServer(bind_tcp(loopback, 0), observed)
        server.start()
        servers.append(server)
        return loopback, server.listener.getsockname()[1]

    yield start
    for server in servers:
        await server.drain(0)
        server.listener.close()


@pytest.fixture
async def errors() -> asyncio.Queue[BaseException]:
    return asyncio.Queue()


def named(name: str) -> Service[Stream, None]:
    """A service that answers with its name and everything it was sent."""

    async def service(stream: Stream) -> None:
        received = b""
        while more := await stream.read():
            received += more
        await stream.write(name.encode() + b"|" + received)

    return service


async def talk(address: tuple[str, int], *segments: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for segment in segments:
            writer.write(segment)
            await writer.drain()
            await asyncio.sleep(0.001)  # so that each has a segment and a wake-up of its own
        writer.write_eof()
        return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


def everything(**options: Any) -> PeekRouter:
    return PeekRouter((is_socks, named("socks")), (is_tls, named("tls")), (is_http, named("http")), **options)


def client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="example.test")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


FIRST_BYTES = {
    "socks4": ("socks", b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00"),
    "socks5": ("socks", b"\x05\x01\x00"),
    "tls": ("tls", client_hello()),
    "get": ("http", b"GET http://example.test/ HTTP/1.1\r\n\r\n"),
    "connect": ("http", b"CONNECT example.test:443 HTTP/1.1\r\n\r\n"),
    "empty line first": ("http", b"\r\nGET / HTTP/1.1\r\n\r\n"),
    "extension method": ("http", b"VERSION-CONTROL / HTTP/1.1\r\n\r\n"),
    "http2": ("http", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "ssh": ("other", b"SSH-2.0-OpenSSH_9.2\r\n"),
    "noise": ("other", b"\x00\x01\x02\x03" * 16),
    "long word": ("other", b"A" * 4000),
}


@pytest.mark.parametrize(("name", "sent"), FIRST_BYTES.values(), ids=FIRST_BYTES.keys())
async def test_each_protocol_reaches_its_service_with_every_byte(serve, name, sent):
    address = serve(everything(fallback=named("other")))
    expected = name.encode() + b"|" + sent
    assert await talk(address, sent) == expected
    assert await talk(address, *(sent[at : at + 1] for at in range(min(len(sent), 40))), sent[40:]) == expected


@pytest.mark.parametrize("sent", [b"SSH-2.0-x\r\n", b"\x00", b"\x16\x02"])
async def test_unknown_protocol_without_fallback_is_a_protocol_error(serve, errors, sent):
    address = serve(everything())
    reader, writer = await asyncio.open_connection(*address)
    writer.write(sent)
    with pytest.raises(ConnectionResetError):
        assert await reader.read() is None
    writer.close()
    assert isinstance(await errors.get(), ProtocolError)


@pytest.mark.parametrize("sent", [b"", b"\x16", b"GET", b"\r\n"])
async def test_silent_client_is_closed_or_by_choice_handed_to_the_fallback(serve, errors, sent):
    reader, writer = await asyncio.open_connection(*serve(everything(timeout=0.2)))
    writer.write(sent)
    with pytest.raises(ConnectionResetError):
        assert await reader.read() is None
    writer.close()
    assert isinstance(await errors.get(), HandshakeTimeout)

    async def speaks_first(stream: Stream) -> None:
        await stream.write(b"220 hello|" + stream.buffered)

    reader, writer = await asyncio.open_connection(
        *serve(everything(timeout=0.2, fallback=speaks_first, fail_open=True))
    )
    writer.write(sent)
    assert await reader.read() == b"220 hello|" + sent
    writer.close()
    await writer.wait_closed()


async def test_client_that_leaves_before_it_is_clear_is_peer_closed(serve, errors):
    address = serve(everything(fallback=named("other")))
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GE")
    writer.write_eof()
    with pytest.raises(ConnectionResetError):
        assert await reader.read() is None
    writer.close()
    assert isinstance(await errors.get(), PeerClosed)


async def test_matcher_that_never_decides_is_bounded(serve, errors):
    address = serve(PeekRouter((lambda data: None, named("never")), limit=16))
    reader, writer = await asyncio.open_connection(*address)
    writer.write(bytes(64))
    with pytest.raises(ConnectionResetError):
        assert await reader.read() is None
    writer.close()
    assert isinstance(await errors.get(), ProtocolError)


async def test_earlier_route_is_waited_for_however_the_bytes_are_cut(serve):
    def needs_four(data: bytes) -> bool | None:
        return data[:4] == b"GET!" if len(data) >= 4 else None

    address = serve(PeekRouter((needs_four, named("first")), (lambda data: data[:1] == b"G", named("second"))))
    for cut in range(1, 4):
        assert await talk(address, b"GET!"[:cut], b"GET!"[cut:]) == b"first|GET!"
        assert await talk(address, b"GET "[:cut], b"GET "[cut:]) == b"second|GET "


@pytest.mark.parametrize("matcher", [is_socks, is_tls, is_http])
@given(data=some.binary(max_size=80))
def test_matcher_never_takes_back_what_it_has_decided(matcher: Callable[[bytes], bool | None], data: bytes) -> None:
    decided = None
    for length in range(len(data) + 1):
        verdict = matcher(data[:length])
        assert decided is None or verdict is decided
        decided = verdict


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout"),
        ({"limit": 0}, "limit"),
        ({"limit": 1 << 20}, "limit"),
        ({"fail_open": True}, "fall"),
    ],
)
def test_setting_that_cannot_work_is_refused_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        everything(**options)
