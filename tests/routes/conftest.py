"""Parents of every kind on loopback: real ones of ours, and such as misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from ipaddress import ip_address

import pytest

from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.routes import Group, LocalBoard, Parent, Route, RouteTable, WayBook
from rama_ebpf.services.connect import Connector, ResolveError
from rama_ebpf.services.route import RouteConnector, parse_parent
from rama_ebpf.services.tcp import TcpServer, bind_tcp

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Hosts:
    """A resolver over a table, which notes what it was asked."""

    def __init__(self, **table: list[str]) -> None:
        self.table = {name.replace("_", "."): ips for name, ips in table.items()}
        self.asked: list[str] = []

    async def resolve(self, name: str):
        self.asked.append(name)
        if name not in self.table:
            raise ResolveError(f"{name!r} does not exist")
        return [ip_address(text) for text in self.table[name]]


@dataclass
class Peer:
    """A server of a test."""

    host: str
    port: int
    accepted: int = 0
    heads: list[bytes] = field(default_factory=list)

    def url(self, scheme: str, login: str = "") -> str:
        return f"{scheme}://{login}{self.host}:{self.port}"


class Clock:
    """Seconds that a test sets. It begins at a time at which nothing is of long ago."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Awaitable[Peer]]]:
    """Start a server with a handler of its own: ``await serve(handler)``."""
    async with contextlib.AsyncExitStack() as cleanup:

        async def start(handler: Handler, host: str = "127.0.0.1", port: int = 0) -> Peer:
            writers: list[asyncio.StreamWriter] = []
            tasks: set[asyncio.Task[None]] = set()

            async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                peer.accepted += 1
                writers.append(writer)
                task = asyncio.current_task()
                assert task is not None
                tasks.add(task)
                with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                    await handler(reader, writer)
                tasks.discard(task)
                writer.close()

            server = await asyncio.start_server(handle, host, port)
            peer = Peer(host, server.sockets[0].getsockname()[1])

            async def stop() -> None:
                server.close()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                for writer in writers:
                    writer.transport.abort()

            cleanup.push_async_callback(stop)
            return peer

        yield start


@pytest.fixture
async def run_service(serve) -> AsyncIterator[Callable[..., Awaitable[Peer]]]:
    """Serve one of our services: ``await run_service(Socks5Server(connector))``."""
    async with contextlib.AsyncExitStack() as cleanup:

        async def start(service, host: str = "127.0.0.1") -> Peer:
            listener = bind_tcp(host, 0)
            server = TcpServer(listener, service, name="front")
            server.start()
            peer = Peer(host, listener.getsockname()[1])

            async def stop() -> None:
                await server.drain(0)
                if hasattr(service, "drain"):  # connections to upstreams that are kept
                    service.drain()
                listener.close()

            cleanup.push_async_callback(stop)
            return peer

        yield start


def direct(*, hosts: Hosts | None = None, allow=("127.0.0.0/8", "::1/128"), timeout: float = 10.0) -> Connector:
    return Connector(hosts or Hosts(), EgressPolicy.of(allow), timeout=timeout)


def routed(
    ways: dict | None = None, *routes: Route, base: Connector | None = None, way: str = "it", **more
) -> RouteConnector:
    """A connector with one route to ``way``, or with these."""
    book = WayBook({name: parse_parent(made) if isinstance(made, str) else made for name, made in (ways or {}).items()})
    table = RouteTable(list(routes) or [Route("all", way)])
    return RouteConnector(table, book, base or direct(), **{"secret": b"k" * 32, "board": LocalBoard()} | more)


def group(*members: str, **more) -> Group:
    return Group((members,), **more)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def says(data: bytes, *, ends: bool = False) -> Handler:
    """Reads a head, and says this."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        writer.write(data)
        await writer.drain()
        if not ends:
            await asyncio.Event().wait()

    return handler


def status(code: int) -> Handler:
    return says(b"HTTP/1.1 %d Said\r\nContent-Length: 0\r\n\r\n" % code)


def socks_reply(rep: int) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(3)
        writer.write(b"\5\0")
        await reader.read(512)
        writer.write(bytes((5, rep, 0, 1)) + bytes(6))
        await writer.drain()
        await asyncio.Event().wait()

    return handler


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def dead(scheme: str = "socks5") -> str:
    return f"{scheme}://127.0.0.1:{closed_port()}"


def parent_of(peer: Peer, scheme: str = "http", login: str = "", **more) -> Parent:
    return parse_parent(peer.url(scheme, login), **more)
