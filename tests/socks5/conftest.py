"""A real SOCKS server on loopback for every test, in IPv4 and IPv6, and real targets behind it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import pytest
import uvloop

from rama_ebpf.core import Extensions, IPAddress, RamaError, Service, Stream, stack
from rama_ebpf.core.at_once import Entered, Visit, entered_by
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.relay import TunnelReport
from rama_ebpf.services.connect import Connector, ResolveError
from rama_ebpf.services.socks5 import Socks5Server
from rama_ebpf.services.tcp import TcpServer, bind_tcp

ALLOWED = ("127.0.0.1/32", "::1/128")


class Hosts:
    """A resolver over a fixed table: every other name does not exist."""

    def __init__(self, table: dict[str, Sequence[str]]) -> None:
        self.table = table
        self.asked: list[str] = []

    async def resolve(self, name: str) -> Sequence[IPAddress]:
        self.asked.append(name)
        if name not in self.table:
            raise ResolveError(f"{name!r} does not exist")
        return [ip_address(text) for text in self.table[name]]


@dataclass
class Proxy:
    """A running server, and the errors that left its service (what a strike layer would see)."""

    host: str
    port: int
    server: TcpServer
    hosts: Hosts
    errors: list[BaseException] = field(default_factory=list)
    results: list[object] = field(default_factory=list)
    extensions: list[Extensions] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    served: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await self.dial(self.host, self.port)

    async def dial(
        self, host: str, port: int, local_addr: tuple[str, int] | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect anywhere; the connection is closed with the proxy at the latest."""
        reader, writer = await asyncio.open_connection(host, port, local_addr=local_addr)
        self.writers.append(writer)
        return reader, writer

    def note_end(self) -> None:
        self.served += 1
        self.ended.set()

    async def idle(self) -> None:
        """Wait until every accepted connection has been served to its end."""
        await self.until_served(self.server.accepted)

    async def until_served(self, count: int) -> None:
        """Wait until ``count`` connections have been served to their end."""
        while self.served < count:
            self.ended.clear()
            await self.ended.wait()


Target = tuple[str, int]
StreamHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


_ON_BOTH_LOOPS = {"test_bind", "test_client", "test_udp"}
"""The modules that test code which registers descriptors with the loop itself."""


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run on the loop that ``rama-ebpf run`` uses, and where loops could differ on Python's own as well."""
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"uvloop": uvloop.new_event_loop}
    if item.path.stem in _ON_BOTH_LOOPS:
        factories["asyncio"] = asyncio.new_event_loop
    return factories


_HERE = Path(__file__).parent
_TEST_SECONDS = 90.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End a test that hangs: uvloop logs and forgets what pytest-timeout's signal handler raises."""
    for item in items:
        ours = isinstance(item, pytest.Function) and item.path.is_relative_to(_HERE)
        if ours and inspect.iscoroutinefunction(item.obj):
            item.obj = _bounded(item.obj)


def _bounded(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def run(*args: object, **kwargs: object) -> None:
        async with asyncio.timeout(_TEST_SECONDS):
            await test(*args, **kwargs)

    return run


@pytest.fixture(params=["127.0.0.1", "::1"], ids=["ipv4", "ipv6"])
def loopback(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Observing:
    """A layer that notes in ``proxy`` what goes on, in callbacks as in a coroutine."""

    accepts = Stream
    proxy: Proxy

    def __call__(self, inner: Service[Stream, object]) -> Service[Stream, object]:
        async def observed(stream: Stream) -> object:
            if entered_by(stream, self) is None:
                self.proxy.extensions.append(stream.extensions)
            try:
                result = await inner(stream)
                self.proxy.results.append(result)
                return result
            except (RamaError, OSError) as error:
                self.proxy.errors.append(error)
                raise
            finally:
                self.proxy.note_end()

        return observed

    def enter(self, visit: Visit) -> Entered:
        self.proxy.extensions.append(visit.stream.extensions)
        return _Observed(self.proxy, visit.stream.extensions)


@dataclass
class _Observed:
    proxy: Proxy
    extensions: Extensions

    def leave(self, error: BaseException | None, /) -> None:
        """It has ended without a coroutine: in order, or cut."""
        if error is None:
            self.proxy.results.append(self.extensions.get(TunnelReport))
        self.proxy.note_end()


_BOTH_WAYS = {"test_at_once", "test_connect", "test_handshake", "test_strikes"}
"""The modules whose tests run in callbacks (core/at_once.py) and in coroutines alone; the others as the server does."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "way" in metafunc.fixturenames:
        module = metafunc.module.__name__.rpartition(".")[2]
        metafunc.parametrize("way", ["callbacks", "coroutine"] if module in _BOTH_WAYS else ["callbacks"])


@pytest.fixture
async def run_proxy(loopback: str, way: str) -> AsyncIterator[Callable[..., Awaitable[Proxy]]]:
    """Start a proxy: ``await run_proxy(auth=...)`` or ``await run_proxy(service=...)``."""
    async with contextlib.AsyncExitStack() as cleanup:

        async def start(
            *,
            make: Callable[[Connector], Service[Stream, object]] = Socks5Server,
            allow: Sequence[str] = ALLOWED,
            timeout: float = 10.0,
        ) -> Proxy:
            hosts = Hosts({"target.test": [loopback], "private.test": ["10.0.0.1"]})
            service = make(Connector(hosts, EgressPolicy.of(allow), timeout=timeout))
            listener = bind_tcp(loopback, 0)
            observing = Observing()
            observed = observing(service) if way == "coroutine" else stack(observing, service)
            server = TcpServer(listener, observed)
            proxy = observing.proxy = Proxy(loopback, listener.getsockname()[1], server, hosts)
            server.start()

            async def stop() -> None:
                await server.drain(0)
                listener.close()
                await hang_up(proxy.writers)

            cleanup.push_async_callback(stop)
            return proxy

        yield start


@pytest.fixture
async def run_target(loopback: str) -> AsyncIterator[Callable[[StreamHandler], Awaitable[Target]]]:
    """Start a TCP target: ``await run_target(handler)`` gives its address."""
    async with contextlib.AsyncExitStack() as cleanup:

        async def start(handler: StreamHandler) -> Target:
            writers: list[asyncio.StreamWriter] = []
            handling: set[asyncio.Task[None]] = set()

            async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                task = asyncio.current_task()
                assert task is not None
                handling.add(task)
                writers.append(writer)
                try:
                    await handler(reader, writer)
                except ConnectionError:
                    pass  # a client that resets is what some tests are about
                finally:
                    handling.discard(task)
                    writer.close()

            server = await asyncio.start_server(closing, loopback, 0)

            async def stop() -> None:
                server.close()
                for task in handling:
                    task.cancel()
                await asyncio.gather(*handling, return_exceptions=True)
                await hang_up(writers)

            cleanup.push_async_callback(stop)
            return loopback, server.sockets[0].getsockname()[1]

        yield start


async def hang_up(writers: Sequence[asyncio.StreamWriter]) -> None:
    """Close every connection and wait until its socket is closed too."""
    for writer in writers:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what comes until EOF."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


@contextlib.contextmanager
def listener_with_full_queue(address: str, port: int = 0) -> Iterator[socket.socket]:
    """A listener that has accepted nobody and whose queue is full: a SYN to it is dropped, not refused."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as listener, contextlib.ExitStack() as cleanup:
        listener.bind((address, port))
        listener.listen(0)
        for _ in range(3):
            waiting = cleanup.enter_context(socket.socket(family))
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener


@pytest.fixture
def full_backlog(loopback: str) -> Iterator[int]:
    """The port of one that never accepts."""
    with listener_with_full_queue(loopback) as listener:
        yield int(listener.getsockname()[1])


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Room for 8,192 descriptors, which a thousand clients with both of their ends in one process need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 8192), max(hard, 8192)))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
