from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket

import pytest

from rama_ebpf.core import ProtocolError, SocketStream, Stream
from rama_ebpf.core.socket_stream import resets_on_close
from rama_ebpf.services.tcp import TcpServer, bind_tcp

from ..relay.flows import open_descriptors


async def test_a_connection_that_is_cut_before_its_first_step_leaks_nothing() -> None:
    async def never_runs(stream: Stream) -> None:
        raise AssertionError("the server was drained first")

    before = open_descriptors()
    listener = bind_tcp("127.0.0.1", 0)
    server = TcpServer(listener, never_runs)
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    server.start()
    server._accept_ready()
    assert server.live == 1
    assert await server.drain(0) == 1
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    with contextlib.suppress(ConnectionResetError):
        await writer.wait_closed()
    listener.close()
    assert open_descriptors() == before


async def test_accepted_sockets_send_small_writes_at_once() -> None:
    seen: list[int] = []

    async def look(stream: Stream) -> None:
        assert isinstance(stream, SocketStream)
        seen.append(stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    for host in ("127.0.0.1", "::1"):
        with bind_tcp(host, 0) as listener:
            server = TcpServer(listener, look)
            server.start()
            reader, writer = await asyncio.open_connection(host, listener.getsockname()[1])
            await reader.read()
            writer.close()
            await server.drain(5)
    assert seen == [1, 1]


async def test_a_connection_that_waited_for_its_server_to_start_is_reset_when_the_process_dies() -> None:
    """Accepted sockets inherit it from the listener, so those in its queue have it before anybody accepts them."""
    with bind_tcp("127.0.0.1", 0) as listener:
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        accepted = listener._accept()[0]  # type: ignore[attr-defined]  # as close to accept(2) as Python goes
        os.close(accepted)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionResetError):
            await writer.wait_closed()


async def test_connections_of_a_listener_of_others_are_reset_when_the_process_dies_too() -> None:
    lingers: list[bool] = []

    async def look(stream: Stream) -> None:
        assert isinstance(stream, SocketStream)
        lingers.append(resets_on_close(stream.socket))

    with socket.create_server(("127.0.0.1", 0)) as listener:  # a service manager's, say
        listener.setblocking(False)
        server = TcpServer(listener, look)
        server.start()
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        await reader.read()
        writer.close()
        await server.drain(1)
    assert lingers == [True]


async def test_a_client_that_there_is_no_descriptor_for_is_refused_at_once_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def serve(stream: Stream) -> None:
        await stream.write(b"served")

    async def ask(client: socket.socket, address: tuple[str, int]) -> bytes:
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, address)
        return await asyncio.get_running_loop().sock_recv(client, 1)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with bind_tcp("127.0.0.1", 0) as listener:
        server = TcpServer(listener, serve)
        server.start()
        clients = [socket.socket() for _ in range(3)]
        held: list[int] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(0))
            for client in clients:
                assert await ask(client, listener.getsockname()) == b""
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in held:
                os.close(fd)
        assert server.refused == 3
        assert len([record for record in caplog.records if "cannot accept" in record.message]) == 1
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        assert await reader.read() == b"served"
        writer.close()
        for client in clients:
            client.close()
        await server.drain(5)


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n", b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n"),
        (b"\x05\x01\x00", b"\x05\xff"),
        (b"\x05\x01\x00\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x50", b"\x05\x00\x05\x01\x00\x01"),
        (b"\x04\x01\x00\x50\x7f\x00\x00\x01\0", b"\x00\x5b"),
        (b"\x16\x03\x01\x02\x00\x01", b"\x15\x03\x01\x00\x02\x02\x50"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x08\x07"),
        (b"\xff\xfe", b""),
    ],
    ids=["HTTP", "SOCKS5 greeting", "SOCKS5 in one", "SOCKS4", "TLS", "HTTP/2", "nothing known"],
)
async def test_without_descriptors_a_client_is_refused_in_its_protocol(sent: bytes, told: bytes) -> None:
    async def serve(stream: Stream) -> None:
        raise AssertionError("there was no descriptor for it")

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    loop = asyncio.get_running_loop()
    with bind_tcp("127.0.0.1", 0) as listener, socket.socket() as client:
        server = TcpServer(listener, serve)
        server.start()
        held: list[int] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(0))
            client.setblocking(False)
            await loop.sock_connect(client, listener.getsockname())
            await loop.sock_sendall(client, sent)
            got = b""
            while data := await loop.sock_recv(client, 1000):  # until it ends, in order
                got += data
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in held:
                os.close(fd)
        assert got.startswith(told)
        assert bool(got) is bool(told)
        await server.drain(1)


async def test_a_flood_of_failures_does_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(stream: Stream) -> None:
        raise ProtocolError("nonsense")

    caplog.set_level("INFO")
    with bind_tcp("127.0.0.1", 0) as listener:
        server = TcpServer(listener, fail)
        server.start()
        for _ in range(130):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            with contextlib.suppress(ConnectionResetError):
                await reader.read()
            writer.close()
        await server.drain(5)
    assert len([record for record in caplog.records if "connection ended" in record.message]) == 100
