"""CONNECT from accept to the tunnel's end in callbacks, and in a coroutine: the same to all who look."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import functools
import os
import re
import resource
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from rama_ebpf.core import Service, Stream, stack
from rama_ebpf.core.at_once import Entered, Visit, at_once_of, entered_by
from rama_ebpf.core.errors import PeerClosed
from rama_ebpf.core.first_bytes import FirstBytes
from rama_ebpf.core.poller import Poller
from rama_ebpf.core.request_log import RequestRecord
from rama_ebpf.layers.access_log import AccessLogLayer, AccessRecord
from rama_ebpf.layers.auth import StaticUsers
from rama_ebpf.layers.mapping import AddExtensionLayer
from rama_ebpf.layers.timeout import TimeoutLayer
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.relay import CloseReason, TunnelReport, tunnels
from rama_ebpf.services.connect import Connector, SystemResolver
from rama_ebpf.services.http import HttpLimits, HttpProxy
from rama_ebpf.services.http.exchange.running import running
from rama_ebpf.services.http.layers import ProxyAuthLayer
from rama_ebpf.services.proxy import mixed_proxy
from rama_ebpf.services.tcp import TcpServer, bind_tcp

from ..relay.flows import open_descriptors
from ..socks5.conftest import listener_with_full_queue
from .conftest import Origin, abort, eventually, nobody

RunOrigin = Callable[..., Origin]

ESTABLISHED = re.compile(
    rb"HTTP/1\.1 200 \r\nDate: [^\r]+ GMT\r\n\r\n|HTTP/1\.1 200 [A-Za-z ]+\r\nDate: [^\r]+\r\n\r\n"
)


class Observing:
    """A layer that notes how connections end, and which had a coroutine."""

    accepts = Stream

    def __init__(self) -> None:
        self.coroutines = 0
        self.begun = self.ended = 0
        self.reports: list[TunnelReport | None] = []
        self.errors: list[BaseException] = []

    def __call__(self, inner: Service[Stream, Any]) -> Service[Stream, Any]:
        async def observed(stream: Stream) -> Any:
            if entered_by(stream, self) is None:
                self.begun += 1
            self.coroutines += 1
            error: BaseException | None = None
            try:
                return await inner(stream)
            except BaseException as raised:
                error = raised
                raise
            finally:
                self._note(stream, error)

        return observed

    def enter(self, visit: Visit) -> Entered:
        self.begun += 1
        return _Observed(self, visit.stream)

    def first_bytes(self, inner: FirstBytes | None) -> FirstBytes | None:
        return inner

    def _note(self, stream: Stream, error: BaseException | None) -> None:
        self.ended += 1
        self.reports.append(stream.extensions.get(TunnelReport))
        if error is not None:
            self.errors.append(error)


@dataclass
class _Observed:
    layer: Observing
    stream: Stream

    def leave(self, error: BaseException | None, /) -> None:
        """It has ended in callbacks."""
        self.layer._note(self.stream, error)


@dataclass
class Proxy:
    port: int
    server: TcpServer
    way: str
    observing: Observing
    lines: list[RequestRecord] = field(default_factory=list)
    connections: list[AccessRecord] = field(default_factory=list)

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def exchange(self, data: bytes) -> bytes:
        """Send, end our side, and return all that comes."""
        reader, writer = await self.open()
        writer.write(data)
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        return answer

    async def rests(self) -> None:
        await eventually(lambda: self.server.live == 0)

    async def nothing_left(self) -> None:
        assert await self.server.drain(20) == 0
        assert self.observing.ended == self.observing.begun
        assert (self.server.live, len(tunnels), len(running)) == (0, 0, 0)


MakeProxy = Callable[..., Proxy]


@pytest.fixture(params=["callbacks", "coroutine"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def run_proxy(way: str) -> AsyncIterator[MakeProxy]:
    """``run_proxy(make)`` serves what ``make(connector)`` returns, an :class:`HttpProxy` by default."""
    async with contextlib.AsyncExitStack() as cleanup:

        def start(
            make: Callable[[Connector], Service[Stream, Any]] = HttpProxy,
            *,
            allow: Sequence[str] = ("127.0.0.1/32",),
            timeout: float = 10.0,
            logged: bool = True,
        ) -> Proxy:
            service = make(Connector(SystemResolver(), EgressPolicy.of(allow), timeout=timeout))
            listener = bind_tcp("127.0.0.1", 0)
            observing, lines, connections = Observing(), [], []  # type: ignore[var-annotated]
            layers: list[Any] = [observing]
            if logged:
                layers.append(AccessLogLayer(connections.append, request_sink=lines.append))
            if way == "coroutine":
                composed: Service[Stream, Any] = service
                for layer in reversed(layers):
                    composed = layer(composed)
            else:
                composed = stack(*layers, service)
            server = TcpServer(listener, composed)
            server.start()

            async def stop() -> None:
                await server.drain(0)
                listener.close()

            cleanup.push_async_callback(stop)
            return Proxy(listener.getsockname()[1], server, way, observing, lines, connections)

        yield start


@pytest.fixture
async def echo() -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield int(server.sockets[0].getsockname()[1])


def connect(port: int, *lines: str) -> bytes:
    head = [f"CONNECT 127.0.0.1:{port} HTTP/1.1", f"Host: 127.0.0.1:{port}", *lines, "", ""]
    return "\r\n".join(head).encode()


def basic(user: str, password: str) -> str:
    return "Proxy-Authorization: Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


async def granted(reader: asyncio.StreamReader) -> None:
    assert ESTABLISHED.fullmatch(await reader.readuntil(b"\r\n\r\n"))


async def test_everything_in_one_segment_reaches_the_target(run_proxy: MakeProxy, echo: int) -> None:
    proxy = run_proxy()
    head, _, rest = (await proxy.exchange(connect(echo) + b"ahead")).partition(b"\r\n\r\n")
    assert ESTABLISHED.fullmatch(head + b"\r\n\r\n")
    assert rest == b"ahead"
    await proxy.nothing_left()
    [report] = proxy.observing.reports
    assert report is not None
    assert (report.reason, report.to_upstream, report.to_client) == (CloseReason.EOF, 5, 5)
    assert proxy.observing.coroutines == (0 if proxy.way == "callbacks" else 1)


async def test_mixed_port_serves_it_in_the_same_way(run_proxy: MakeProxy, echo: int) -> None:
    proxy = run_proxy(mixed_proxy)
    assert (await proxy.exchange(connect(echo) + b"ahead")).endswith(b"\r\n\r\nahead")
    await proxy.nothing_left()
    assert proxy.observing.coroutines == (0 if proxy.way == "callbacks" else 1)


async def test_byte_by_byte_is_the_same(run_proxy: MakeProxy, echo: int) -> None:
    proxy = run_proxy()
    reader, writer = await proxy.open()
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in connect(echo) + b"ahead":
        writer.write(bytes([byte]))
        await asyncio.sleep(0.001)  # a segment of its own
    await granted(reader)
    writer.write_eof()
    assert await reader.read() == b"ahead"
    writer.close()
    await proxy.nothing_left()


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_client_that_leaves_at_any_step_leaves_nothing_behind(run_proxy: MakeProxy, echo: int, how: str) -> None:
    proxy = run_proxy()
    whole = connect(echo) + b"x"
    before = open_descriptors()
    for count in range(0, len(whole) + 1, 3 if len(whole) % 3 else 1):
        reader, writer = await proxy.open()
        writer.write(whole[:count])
        if how == "FIN":
            writer.write_eof()
            await reader.read()
            writer.close()
        else:
            abort(writer)
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    await proxy.nothing_left()
    del reader, writer
    await eventually(lambda: open_descriptors() <= before)


async def test_target_that_refuses_is_told_and_the_connection_lives(run_proxy: MakeProxy, echo: int) -> None:
    proxy = run_proxy()
    reader, writer = await proxy.open()
    dead = await nobody()
    for _ in range(2):
        writer.write(connect(dead))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 502 ")
        assert b"error=connection_refused" in head
        await reader.readexactly(int(re.findall(rb"Content-Length: (\d+)", head)[0]))
    writer.write(connect(echo) + b"x")
    await granted(reader)
    assert await reader.readexactly(1) == b"x"
    writer.close()
    await proxy.nothing_left()
    assert [(line.status, line.reason) for line in proxy.lines] == [(502, "connect"), (502, "connect"), (200, "eof")]
    assert not proxy.connections


async def test_target_that_refuses_late_is_told(run_proxy: MakeProxy) -> None:
    proxy = run_proxy()
    with listener_with_full_queue("127.0.0.1") as listener:
        reader, writer = await proxy.open()
        writer.write(connect(listener.getsockname()[1]))
        await eventually(lambda: len(running) == 1)
    head = await reader.readuntil(b"\r\n\r\n")  # its SYN is sent again after a second, to nobody
    assert head.startswith(b"HTTP/1.1 502 ")
    writer.close()
    await proxy.nothing_left()


async def test_target_that_never_answers_costs_its_time_out_and_the_client_is_told(run_proxy: MakeProxy) -> None:
    proxy = run_proxy(timeout=0.3)
    with listener_with_full_queue("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        reader, writer = await proxy.open()
        writer.write(connect(port))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 504 ")
        writer.close()
        await proxy.nothing_left()
    [line] = proxy.lines
    assert line.status == 504
    assert f"cannot connect to 127.0.0.1:{port}: no answer within 0.3 s" in line.error


async def test_target_that_answers_late_gets_what_was_sent_ahead(run_proxy: MakeProxy) -> None:
    proxy = run_proxy()
    loop = asyncio.get_running_loop()
    with listener_with_full_queue("127.0.0.1") as listener, contextlib.ExitStack() as cleanup:
        reader, writer = await proxy.open()
        writer.write(connect(listener.getsockname()[1]) + b"ah")
        await eventually(lambda: len(running) == 1)
        writer.write(b"ead")
        writer.write_eof()
        listener.setblocking(False)
        data = b""
        while not data:  # those that filled the queue say nothing
            accepted, _ = await loop.sock_accept(listener)
            cleanup.enter_context(accepted)
            accepted.setblocking(False)
            with contextlib.suppress(TimeoutError):
                data = await asyncio.wait_for(loop.sock_recv(accepted, 100), 0.3)
        while len(data) < 5:
            data += await loop.sock_recv(accepted, 100)
        assert data == b"ahead"
        assert await loop.sock_recv(accepted, 1) == b""
        accepted.close()
        await granted(reader)
        assert await reader.read() == b""
        writer.close()
    await proxy.nothing_left()


async def test_client_that_resets_ends_the_wait_for_its_target(run_proxy: MakeProxy) -> None:
    proxy = run_proxy()
    with listener_with_full_queue("127.0.0.1") as listener:
        _reader, writer = await proxy.open()
        writer.write(connect(listener.getsockname()[1]))
        await eventually(lambda: len(running) == 1)
        abort(writer)
        await proxy.nothing_left()
    [error] = proxy.observing.errors
    assert isinstance(error, PeerClosed)
    assert [line.status for line in proxy.lines] == [0]


@pytest.mark.parametrize("room", [0, 1])
async def test_without_a_descriptor_for_the_target_the_client_is_told(
    run_proxy: MakeProxy, echo: int, room: int
) -> None:
    proxy = run_proxy()
    reader, writer = await proxy.open()
    await eventually(lambda: proxy.server.accepted == 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_descriptors() + 8, 64), hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        for _ in range(room):
            os.close(held.pop())
        writer.write(connect(echo))
        head = await reader.readuntil(b"\r\n\r\n")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)
    assert head.startswith(b"HTTP/1.1 200 " if room else b"HTTP/1.1 503 ")
    writer.close()
    await proxy.nothing_left()


@pytest.mark.parametrize("nth", [1, 2, 3])
async def test_socket_that_the_kernel_does_not_watch_is_served_all_the_same(
    run_proxy: MakeProxy, echo: int, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    proxy = run_proxy()
    poller, calls = Poller.current(), 0
    add = poller.add

    def refuse_one(fd: int, watcher: Any, *, writes: bool = False) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(fd, watcher, writes=writes)

    monkeypatch.setattr(poller, "add", refuse_one)
    reader, writer = await proxy.open()
    writer.write(connect(echo) + b"ping")
    await granted(reader)
    assert await reader.readexactly(4) == b"ping"
    writer.close()
    await proxy.nothing_left()


async def test_cut_connection_is_reset_wherever_it_stands(run_proxy: MakeProxy, echo: int) -> None:
    proxy = run_proxy()
    with listener_with_full_queue("127.0.0.1") as listener:
        for port, waits in ((listener.getsockname()[1], True), (echo, False)):
            reader, writer = await proxy.open()
            writer.write(connect(port))
            if waits:
                await eventually(lambda: len(running) == 1)
            else:
                await granted(reader)
            proxy.server.cut("a test")
            with pytest.raises(ConnectionResetError):
                await reader.readexactly(1)
        await proxy.nothing_left()
    assert [line.reason for line in proxy.lines] == ["cut: a test", "cut: a test"]
    assert not proxy.connections


async def test_line_in_the_access_log_is_the_same(run_proxy: MakeProxy, echo: int) -> None:
    proxy = run_proxy()
    reader, writer = await proxy.open()
    client = writer.get_extra_info("sockname")
    request = connect(echo)
    writer.write(request + b"hello")
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    await proxy.nothing_left()
    [line] = proxy.lines
    assert not proxy.connections
    assert (line.method, line.target, line.status, line.reason) == ("CONNECT", f"127.0.0.1:{echo}", 200, "eof")
    assert (str(line.client), str(line.listener)) == (f"127.0.0.1:{client[1]}", f"127.0.0.1:{proxy.port}")
    assert (line.received, line.sent, line.relay, line.error) == (len(request) + 5, len(answer), "copy", "")
    assert line.upstream is not None
    assert (str(line.upstream.address), line.upstream.kept) == (f"127.0.0.1:{echo}", False)
    assert line.first_byte is not None
    assert line.first_byte <= line.total


_BAD = {
    "no host": b"CONNECT 127.0.0.1:1 HTTP/1.1\r\n\r\n",
    "no port": b"CONNECT 127.0.0.1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "port 0": b"CONNECT 127.0.0.1:0 HTTP/1.1\r\nHost: x\r\n\r\n",
    "a path": b"CONNECT /x HTTP/1.1\r\nHost: x\r\n\r\n",
    "a URI": b"CONNECT http://127.0.0.1:1/ HTTP/1.1\r\nHost: x\r\n\r\n",
    "a body": b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx",
    "chunks": b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bare LF": b"CONNECT 127.0.0.1:1 HTTP/1.1\nHost: x\r\n\r\n",
    "folded": b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\n y\r\n\r\n",
    "two hosts": b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n",
    "HTTP/3": b"CONNECT 127.0.0.1:1 HTTP/3.0\r\nHost: x\r\n\r\n",
    "user": b"CONNECT a@127.0.0.1:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "NUL": b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\nA: \0\r\n\r\n",
    "too large": b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\nA: " + 900 * b"a" + b"\r\n\r\n",
    "denied": b"CONNECT 127.0.0.9:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "denied IPv6": b"CONNECT [::1]:1 HTTP/1.1\r\nHost: x\r\n\r\n",
}


async def test_refusals_are_those_of_a_coroutine() -> None:
    answers: dict[str, list[bytes]] = {"callbacks": [], "coroutine": []}
    errors: dict[str, list[str]] = {"callbacks": [], "coroutine": []}
    for way, told in answers.items():
        service = HttpProxy(
            Connector(SystemResolver(), EgressPolicy.of(["127.0.0.1/32"])), limits=HttpLimits(head=800, target=400)
        )
        observing = Observing()
        with bind_tcp("127.0.0.1", 0) as listener:
            server = TcpServer(listener, observing(service) if way == "coroutine" else stack(observing, service))
            server.start()
            proxy = Proxy(listener.getsockname()[1], server, way, observing)
            for data in _BAD.values():
                told.append(re.sub(rb"Date: [^\r]+", b"Date: -", await proxy.exchange(data)))
                await proxy.rests()
                errors[way].append(" ".join(map(repr, observing.errors)))
                observing.errors.clear()
            await proxy.nothing_left()
    assert answers["callbacks"] == answers["coroutine"]
    assert errors["callbacks"] == errors["coroutine"]
    for name, answer in zip(_BAD, answers["callbacks"], strict=True):
        assert re.match(rb"HTTP/1\.1 4\d\d ", answer), name


async def test_proven_user_is_let_through_and_nobody_else(run_proxy: MakeProxy, echo: int) -> None:
    users = StaticUsers({"tom": "secret"})
    proxy = run_proxy(lambda connector: HttpProxy(connector, layers=[ProxyAuthLayer(users)]))
    assert (await proxy.exchange(connect(echo, basic("tom", "secret")) + b"x")).endswith(b"\r\n\r\nx")
    assert proxy.observing.coroutines == (0 if proxy.way == "callbacks" else 1)
    for wrong in ((), (basic("tom", "wrong"),), (basic("eve", "secret"),), ("Proxy-Authorization: Basic !",)):
        assert (await proxy.exchange(connect(echo, *wrong) + b"x")).startswith(b"HTTP/1.1 407 ")
    await proxy.nothing_left()
    assert [line.user for line in proxy.lines] == ["tom", "", "", "", ""]


async def test_ports_that_connect_may_not_name_are_refused(run_proxy: MakeProxy, echo: int) -> None:
    proxy = run_proxy(lambda connector: HttpProxy(connector, connect_ports=[443]))
    assert (await proxy.exchange(connect(echo))).startswith(b"HTTP/1.1 403 ")
    await proxy.nothing_left()


async def test_tunnel_has_the_time_outs_of_its_stack(run_proxy: MakeProxy, echo: int) -> None:
    proxy = run_proxy(lambda connector: stack(TimeoutLayer(5, idle=0.3), HttpProxy(connector)))
    reader, writer = await proxy.open()
    writer.write(connect(echo))
    await granted(reader)
    with pytest.raises(ConnectionResetError):
        await reader.readexactly(1)
    await proxy.nothing_left()
    [report] = proxy.observing.reports
    assert report is not None
    assert report.reason is CloseReason.IDLE_TIMEOUT


def test_what_stands_around_a_proxy_is_never_passed_by() -> None:
    connector = Connector(SystemResolver(), EgressPolicy.of([]))

    def any_layer(inner: Any) -> Any:
        async def serve(request: Any) -> Any:
            return await inner(request)

        return serve

    class Special(HttpProxy):
        async def __call__(self, stream: Stream, /) -> None:
            raise AssertionError("never called")

    @functools.wraps(stack(AddExtensionLayer(1), HttpProxy(connector)))
    async def looks_like_it(stream: Stream) -> None:
        raise AssertionError("never called")

    assert at_once_of(HttpProxy(connector)) is not None
    assert at_once_of(stack(AddExtensionLayer(1), HttpProxy(connector))) is not None
    assert at_once_of(HttpProxy(connector, layers=[any_layer])) is None
    assert at_once_of(HttpProxy(connector, layers=[ProxyAuthLayer(StaticUsers({}))])) is not None
    assert at_once_of(Special(connector)) is None
    assert at_once_of(looks_like_it) is None
