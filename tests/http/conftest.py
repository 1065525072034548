"""Real sockets on loopback: servers of this package, and origins that say exactly what a test scripts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import pytest

from rama_ebpf.core import Authority, IPAddress, RamaError, Service, Stream
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.services.connect import Connector, ResolveError, SystemResolver
from rama_ebpf.services.http import BackendPool, ConnectionPool, HttpProxy
from rama_ebpf.services.tcp import TcpServer, bind_tcp

from ..tls import pki as pki_of_tests

DATE = b"Date: Thu, 01 Jan 2026 00:00:00 GMT\r\n"


@dataclass
class Server:
    """A server of this package, running."""

    port: int
    tcp: TcpServer
    errors: list[BaseException] = field(default_factory=list)

    @property
    def authority(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def exchange(self, *parts: bytes, eof: bool = False) -> bytes:
        """Send the parts, each in a segment of its own, and return all that comes until the server closes."""
        reader, writer = await self.open()
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reading = asyncio.create_task(reader.read())  # beside the writing: neither side's buffers may have to hold it
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
            if eof:
                writer.write_eof()
            return await reading
        finally:
            reading.cancel()
            writer.close()

    async def idle(self) -> None:
        """Wait until no connection is being served."""
        await eventually(lambda: self.tcp.live == 0)


def abort(writer: asyncio.StreamWriter) -> None:
    """Close a client's connection with RST."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


Run = Callable[[Service[Stream, Any]], Server]


@contextlib.asynccontextmanager
async def _pools_closed() -> AsyncIterator[None]:
    """Close the pools that are made within, however deep in a stack they are."""
    made: list[ConnectionPool] = []
    initialize = ConnectionPool.__init__

    def noted(pool: ConnectionPool, *arguments: Any, **options: Any) -> None:
        initialize(pool, *arguments, **options)
        made.append(pool)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConnectionPool, "__init__", noted)
        yield
    for pool in made:
        pool.close()
        await pool.wait_closed()


@pytest.fixture
async def run() -> AsyncIterator[Run]:
    """``run(service)`` serves a transport service on a loopback port until the test ends. Then whatever connections
    pools have kept are closed."""
    async with contextlib.AsyncExitStack() as cleanup:
        await cleanup.enter_async_context(_pools_closed())

        def start(service: Service[Stream, Any]) -> Server:
            listener = bind_tcp("127.0.0.1", 0)

            async def observed(stream: Stream) -> None:
                try:
                    await service(stream)
                except (RamaError, OSError) as error:
                    server.errors.append(error)
                    raise

            server = Server(listener.getsockname()[1], TcpServer(listener, observed))
            server.tcp.start()

            async def stop() -> None:
                if isinstance(service, HttpProxy):
                    service.drain()
                await server.tcp.drain(0)
                listener.close()

            cleanup.push_async_callback(stop)
            return server

        yield start


class Loopback(SystemResolver):
    """Every name under ``.test`` is loopback, but nowhere.test, which does not exist, and late.test, which nobody knows
    in time. The others are the system's."""

    async def resolve(self, name: str) -> Sequence[IPAddress]:
        if name == "nowhere.test":
            return []
        if name == "late.test":
            raise ResolveError("no answer for 'late.test'", temporary=True)
        return [ip_address("127.0.0.1")] if name.endswith(".test") else await super().resolve(name)


class Remembering(Connector):
    """Knows what it has opened: a pool keeps connections to origins, and belongs to nobody whom a test could ask."""

    def __init__(self) -> None:
        super().__init__(Loopback(), EgressPolicy.of(["127.0.0.0/8", "::1/128"]), timeout=5.0)
        self.opened: list[Stream] = []

    async def __call__(self, target: Authority, /) -> Stream:
        stream = await super().__call__(target)
        self.opened.append(stream)
        return stream


@pytest.fixture
async def connector() -> AsyncIterator[Connector]:
    made = Remembering()
    yield made
    for stream in made.opened:
        stream.abort()


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> pki_of_tests.Authority:
    """The authority that signs the certificates of the tests' servers."""
    return pki_of_tests.Authority(tmp_path_factory.mktemp("pki"))


@dataclass
class Origin:
    """An origin server that records the bytes of each connection and answers each request with the next script.

    A request is taken to end with ``until`` (default: the empty line behind its header section).
    """

    port: int
    replies: list[bytes]
    until: list[bytes]
    close_after: bool
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def authority(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def host(self) -> bytes:
        return self.authority.encode()

    async def serve(self, stream: Stream) -> None:
        self.connections += 1
        while True:
            got = b""
            until = self.until[min(len(self.requests), len(self.until) - 1)]
            while until not in got:
                data = await stream.read()
                if not data:
                    if got:
                        self.requests.append(got)
                        self.arrived.set()
                    return
                got += data
            self.requests.append(got)
            self.arrived.set()
            reply = self.replies[min(len(self.requests), len(self.replies)) - 1]
            await stream.write(reply)
            if self.close_after:
                return


@pytest.fixture
def run_origin(run: Run) -> Callable[..., Origin]:
    """``run_origin(reply, …)`` starts an :class:`Origin`; the last reply repeats."""

    def start(*replies: bytes, until: bytes | list[bytes] = b"\r\n\r\n", close: bool = False) -> Origin:
        origin = Origin(0, list(replies), until if isinstance(until, list) else [until], close)
        origin.port = run(origin.serve).port
        return origin

    return start


async def nobody() -> int:
    """Return a loopback port that nobody listens on."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Return as many different loopback ports that nobody listens on."""
    with contextlib.ExitStack() as cleanup:
        socks = [cleanup.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in socks]


def descriptors() -> int:
    """How many file descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


async def read_until_reset(reader: asyncio.StreamReader) -> bytes:
    """Return what comes before the connection is reset; fails if it ends in order."""
    got = b""
    while True:
        try:
            data = await reader.read(65536)
        except ConnectionResetError:
            return got
        assert data, "the connection ended in order"
        got += data


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds; the test's time-out is the bound."""
    while not condition():  # noqa: ASYNC110  # what is waited for, such as a closed descriptor, tells nobody
        await asyncio.sleep(0.01)


OK = b"HTTP/1.1 200 OK\r\n" + DATE + b"Content-Length: 2\r\n\r\nok"
OK_VIA = b"HTTP/1.1 200 OK\r\n" + DATE + b"Via: 1.1 rama-ebpf\r\nContent-Length: 2\r\n\r\nok"


MakePool = Callable[..., BackendPool]
RunOrigin = Callable[..., Origin]
Connect = Service[Authority, Stream]


@pytest.fixture
async def pool_of(connector: Service[Authority, Stream]) -> AsyncIterator[MakePool]:
    """``pool_of(port, …, option=…)`` makes a pool of backends of this host that is stopped at the end."""
    pools: list[BackendPool] = []

    def make(*ports: int, **options: Any) -> BackendPool:
        pools.append(BackendPool([Authority.of("127.0.0.1", port) for port in ports], connector, **options))
        return pools[-1]

    yield make
    for pool in pools:
        await pool.stop()
