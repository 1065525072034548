"""All that a client says goes to one target, in callbacks and in a coroutine: plain, and TLS by its server name."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from rama_ebpf.core import Authority, Service, Stream, stack
from rama_ebpf.core.at_once import Entered, Visit, at_once_of, entered_by
from rama_ebpf.core.first_bytes import FirstBytes
from rama_ebpf.core.poller import Poller
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.relay import TunnelReport, tunnels
from rama_ebpf.services.connect import Connector
from rama_ebpf.services.dns import DnsResolver
from rama_ebpf.services.forward import Forward
from rama_ebpf.services.tcp import TcpServer, bind_tcp
from rama_ebpf.services.tls import Alert, TlsPassthrough, TlsPeekLayer

from ..socks5.conftest import listener_with_full_queue
from ..tls.test_match import hello


class Observing:
    """Notes how connections end, and which had a coroutine."""

    accepts = Stream

    def __init__(self) -> None:
        self.coroutines = self.begun = self.ended = 0
        self.errors: list[BaseException] = []
        self.reports: list[TunnelReport | None] = []

    def __call__(self, inner: Service[Stream, Any]) -> Service[Stream, Any]:
        async def observed(stream: Stream) -> Any:
            if entered_by(stream, self) is None:
                self.begun += 1
            self.coroutines += 1
            try:
                return await inner(stream)
            except Exception as error:
                self.errors.append(error)
                raise
            finally:
                self.ended += 1
                self.reports.append(stream.extensions.get(TunnelReport))

        return observed

    def enter(self, visit: Visit) -> Entered:
        self.begun += 1
        return _Left(self, visit)

    def first_bytes(self, inner: FirstBytes | None) -> FirstBytes | None:
        return inner


class _Left:
    def __init__(self, layer: Observing, visit: Visit) -> None:
        self._layer, self._visit = layer, visit

    def leave(self, _error: BaseException | None, /) -> None:
        """It has ended in callbacks."""
        self._layer.ended += 1
        self._layer.reports.append(self._visit.stream.extensions.get(TunnelReport))


Serve = Callable[..., tuple[int, TcpServer, Observing]]


@pytest.fixture(params=["callbacks", "coroutine"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def serve(way: str) -> AsyncIterator[Serve]:
    async with contextlib.AsyncExitStack() as cleanup:

        def start(service: Service[Stream, Any]) -> tuple[int, TcpServer, Observing]:
            observing = Observing()
            listener = bind_tcp("127.0.0.1", 0)
            server = TcpServer(listener, observing(service) if way == "coroutine" else stack(observing, service))
            server.start()

            async def stop() -> None:
                await server.drain(0)
                listener.close()
                assert observing.begun == observing.ended
                assert len(tunnels) == 0

            cleanup.push_async_callback(stop)
            return listener.getsockname()[1], server, observing

        yield start


@pytest.fixture
def connector(tmp_path: Path) -> Connector:
    """Knows a.test, and takes 0.4 s for what does not answer."""
    hosts, conf = tmp_path / "hosts", tmp_path / "resolv.conf"
    hosts.write_text("127.0.0.1 a.test\n")
    conf.write_text("nameserver 127.0.0.1\n")
    resolver = DnsResolver(hosts=str(hosts), resolv_conf=str(conf), timeout=0.2, attempts=1)
    return Connector(resolver, EgressPolicy.of(["127.0.0.1/32"]), timeout=0.4)


@pytest.fixture
async def target() -> AsyncIterator[int]:
    """Returns what it gets once that has ended."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(await reader.read())
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server:
        yield int(server.sockets[0].getsockname()[1])


async def exchange(port: int, *parts: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(0.001)  # a segment of its own
    with contextlib.suppress(OSError):  # it may have been reset by now, as reading says
        writer.write_eof()
    try:
        return await reader.read()
    finally:
        writer.close()


def by_address(connector: Connector, port: int) -> Service[Stream, Any]:
    return Forward(connector, Authority.of("127.0.0.1", port))


def by_name(connector: Connector, port: int) -> Service[Stream, Any]:
    return stack(TlsPeekLayer(timeout=1), TlsPassthrough(connector, port=port))


HELLO = hello(b"a.test")

KINDS = pytest.mark.parametrize("make", [by_address, by_name])


@KINDS
async def test_what_comes_in_one_segment_reaches_the_target(
    serve: Serve, connector: Connector, target: int, make: Any, way: str
) -> None:
    port, server, observing = serve(make(connector, target))
    assert await exchange(port, HELLO + b"ahead") == HELLO + b"ahead"
    assert await server.drain(5) == 0
    assert observing.coroutines == (0 if way == "callbacks" else 1)
    [report] = observing.reports
    assert report is not None
    assert (report.to_upstream, report.to_client) == (len(HELLO) + 5, len(HELLO) + 5)


@KINDS
async def test_byte_by_byte_is_the_same(serve: Serve, connector: Connector, target: int, make: Any) -> None:
    port, server, _observing = serve(make(connector, target))
    assert await exchange(port, *(bytes([byte]) for byte in HELLO)) == HELLO
    assert await server.drain(5) == 0


@KINDS
async def test_target_that_refuses_or_never_answers_resets_the_client(
    serve: Serve, connector: Connector, make: Any
) -> None:
    with bind_tcp("127.0.0.1", 0, backlog=None) as refusing, listener_with_full_queue("127.0.0.1") as silent:
        numbers = []
        for listener in (refusing, silent):
            port, server, observing = serve(make(connector, listener.getsockname()[1]))
            with pytest.raises(ConnectionResetError):
                await exchange(port, HELLO)
            assert await server.drain(5) == 0
            numbers += [error.errno for error in observing.errors if isinstance(error, OSError)]
    assert numbers == [errno.ECONNREFUSED, errno.ETIMEDOUT]


@KINDS
@pytest.mark.parametrize("how", ["FIN", "RST", "cut"])
async def test_client_that_leaves_while_its_target_is_waited_for_leaves_nothing(
    serve: Serve, connector: Connector, make: Any, how: str
) -> None:
    with listener_with_full_queue("127.0.0.1") as silent:
        port, server, observing = serve(make(connector, silent.getsockname()[1]))
        _reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HELLO)
        while not observing.begun:  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.01)
        if how == "cut":
            server.cut("a test")
        elif how == "FIN":
            writer.write_eof()
        else:
            writer.transport.abort()
        assert await server.drain(5) == 0
        writer.close()


@KINDS
@pytest.mark.parametrize("nth", [1, 2])
async def test_socket_that_the_kernel_does_not_watch_is_served_all_the_same(
    serve: Serve, connector: Connector, target: int, make: Any, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    port, server, _observing = serve(make(connector, target))
    poller, calls = Poller.current(), 0
    add = poller.add

    def refuse_one(fd: int, watcher: Any, *, writes: bool = False) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(fd, watcher, writes=writes)

    monkeypatch.setattr(poller, "add", refuse_one)
    assert await exchange(port, HELLO) == HELLO
    assert await server.drain(5) == 0


async def test_hello_that_is_refused_gets_the_same_alert(serve: Serve, connector: Connector) -> None:
    port, server, _observing = serve(stack(TlsPeekLayer(timeout=1), TlsPassthrough(connector, port=None)))
    assert await exchange(port, HELLO) == Alert.UNRECOGNIZED_NAME.record
    assert await exchange(port, hello(None)) == Alert.UNRECOGNIZED_NAME.record
    assert await exchange(port, b"\x16\x03\x01\x00\x05\x02\x00\x00\x01\x00") != b""
    assert await server.drain(5) == 0


async def test_name_that_nobody_knows_resets_the_client(serve: Serve, connector: Connector, target: int) -> None:
    port, server, observing = serve(by_name(connector, target))
    with pytest.raises(ConnectionResetError):
        await exchange(port, hello(b"b.test"))
    assert await server.drain(5) == 0
    [error] = observing.errors
    assert "b.test" in str(error)


def test_what_stands_around_them_is_never_passed_by(connector: Connector) -> None:
    class Special(Forward):
        async def __call__(self, stream: Stream, /) -> TunnelReport:
            raise AssertionError("never called")

    class Careful(TlsPeekLayer):
        def __call__(self, inner: Any, /) -> Any:
            return super().__call__(inner)

    where = Authority.of("127.0.0.1", 1)
    assert at_once_of(Forward(connector, where)) is not None
    assert at_once_of(Special(connector, where)) is None
    assert at_once_of(by_name(connector, 1)) is not None
    assert at_once_of(stack(Careful(), TlsPassthrough(connector))) is None
