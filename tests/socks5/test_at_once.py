"""What clients and targets do at each step of a connection that is served in callbacks, and what is left of it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import resource
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rama_ebpf.core.at_once import Entered, Visit, at_once_of
from rama_ebpf.core.auth import User
from rama_ebpf.core.errors import AuthFailed, HandshakeTimeout, PeerClosed
from rama_ebpf.core.poller import Poller
from rama_ebpf.core.service import stack
from rama_ebpf.core.stream import Stream
from rama_ebpf.layers.access_log import AccessLogLayer, AccessRecord
from rama_ebpf.layers.auth import StaticUsers
from rama_ebpf.layers.mapping import AddExtensionLayer
from rama_ebpf.layers.timeout import TimeoutLayer
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.relay import CloseReason, TunnelReport, tunnels
from rama_ebpf.services.connect import Connector, SystemResolver
from rama_ebpf.services.dns import DnsResolver
from rama_ebpf.services.router import PeekRouter, is_socks
from rama_ebpf.services.socks5 import Socks5Server
from rama_ebpf.services.tcp import TcpServer, bind_tcp

from ..relay.flows import open_descriptors
from .conftest import Proxy, StreamHandler, Target, echo, listener_with_full_queue

RunProxy = Callable[..., Awaitable[Proxy]]
RunTarget = Callable[[StreamHandler], Awaitable[Target]]

GREETING = b"\x05\x01\x00"


def request(target: Target) -> bytes:
    host, port = target
    if ":" in host:
        return b"\x05\x01\x00\x04" + socket.inet_pton(socket.AF_INET6, host) + port.to_bytes(2, "big")
    return b"\x05\x01\x00\x01" + socket.inet_aton(host) + port.to_bytes(2, "big")


def reply_size(proxy: Proxy) -> int:
    return 2 + (22 if ":" in proxy.host else 10)


async def nothing_left(proxy: Proxy) -> None:
    assert await proxy.server.drain(20) == 0
    assert proxy.served == proxy.server.accepted
    assert (proxy.server.live, len(tunnels)) == (0, 0)


async def test_everything_in_one_segment_reaches_the_target(run_proxy: RunProxy, run_target: RunTarget) -> None:
    proxy, target = await run_proxy(), await run_target(echo)
    reader, writer = await proxy.open()
    writer.write(GREETING + request(target) + b"ahead")
    writer.write_eof()
    answer = await reader.read()
    assert answer[:2] == b"\x05\x00"
    assert answer[2:4] == b"\x05\x00"
    assert answer[reply_size(proxy) :] == b"ahead"
    await nothing_left(proxy)
    [report] = proxy.results
    assert isinstance(report, TunnelReport)
    assert (report.reason, report.to_upstream, report.to_client) == (CloseReason.EOF, 5, 5)


async def test_byte_by_byte_is_the_same(run_proxy: RunProxy, run_target: RunTarget) -> None:
    proxy, target = await run_proxy(), await run_target(echo)
    reader, writer = await proxy.open()
    for byte in GREETING + request(target) + b"ahead":
        writer.write(bytes([byte]))
        await asyncio.sleep(0.001)  # a segment of its own
    writer.write_eof()
    answer = await reader.read()
    assert answer[reply_size(proxy) :] == b"ahead"
    await nothing_left(proxy)


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_client_that_leaves_at_any_step_leaves_nothing_behind(
    run_proxy: RunProxy, run_target: RunTarget, how: str
) -> None:
    proxy, target = await run_proxy(), await run_target(echo)
    whole = GREETING + request(target) + b"x"
    before = open_descriptors()
    for count in range(len(whole) + 1):
        for read in (False, True):
            reader, writer = await proxy.open()
            writer.write(whole[:count])
            if read and count >= len(GREETING):
                await reader.readexactly(2)
            if how == "FIN":
                writer.write_eof()
                await reader.read()
            else:
                writer.transport.abort()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
    await nothing_left(proxy)
    proxy.writers.clear()
    del reader, writer
    while open_descriptors() > before:  # noqa: ASYNC110 - the test's own transports and targets close when they can
        await asyncio.sleep(0.01)
    assert all(isinstance(error, PeerClosed | ConnectionError) for error in proxy.errors)


async def test_target_that_refuses_at_once_is_told(run_proxy: RunProxy, loopback: str) -> None:
    proxy = await run_proxy()
    with bind_tcp(loopback, 0, backlog=None) as bound:
        reader, writer = await proxy.open()
        writer.write(GREETING + request(bound.getsockname()[:2]))
        assert (await reader.read())[2:4] == b"\x05\x05"
    await nothing_left(proxy)
    [error] = proxy.errors
    assert isinstance(error, OSError)
    assert error.errno == errno.ECONNREFUSED


async def test_target_that_never_answers_costs_its_time_out_and_the_client_is_told(
    run_proxy: RunProxy, loopback: str, full_backlog: int
) -> None:
    proxy = await run_proxy(timeout=0.3)
    reader, writer = await proxy.open()
    writer.write(GREETING + request((loopback, full_backlog)))
    assert (await reader.read())[2:4] == b"\x05\x06"
    await nothing_left(proxy)
    [error] = proxy.errors
    assert str(error).endswith("no answer within 0.3 s")


async def test_target_that_answers_late_gets_what_was_sent_ahead(run_proxy: RunProxy, loopback: str) -> None:
    proxy = await run_proxy()
    loop = asyncio.get_running_loop()
    with listener_with_full_queue(loopback) as listener, contextlib.ExitStack() as cleanup:
        reader, writer = await proxy.open()
        writer.write(GREETING + request(listener.getsockname()[:2]))
        assert await reader.readexactly(2) == b"\x05\x00"
        writer.write(b"ahead")
        writer.write_eof()
        listener.setblocking(False)
        data = b""
        while not data:  # those that filled the queue say nothing
            accepted, _ = await loop.sock_accept(listener)
            cleanup.enter_context(accepted)
            accepted.setblocking(False)
            with contextlib.suppress(TimeoutError):
                data = await asyncio.wait_for(loop.sock_recv(accepted, 100), 0.3)
        assert data == b"ahead"
        assert await loop.sock_recv(accepted, 1) == b""
        accepted.close()
        assert len(await reader.read()) == reply_size(proxy) - 2
    await nothing_left(proxy)


@pytest.mark.parametrize("room", [0, 1])
async def test_without_a_descriptor_for_the_target_the_client_is_told(
    run_proxy: RunProxy, run_target: RunTarget, room: int
) -> None:
    proxy, target = await run_proxy(), await run_target(echo)
    reader, writer = await proxy.open()
    writer.write(GREETING)
    assert await reader.readexactly(2) == b"\x05\x00"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_descriptors() + 8, 64), hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        for _ in range(room):
            os.close(held.pop())
        writer.write(request(target))
        answer = await reader.readexactly(2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)
    assert answer == (b"\x05\x00" if room else b"\x05\x01")
    writer.close()
    await nothing_left(proxy)


@pytest.mark.parametrize("nth", [1, 2])
async def test_socket_that_the_kernel_does_not_watch_is_served_all_the_same(
    run_proxy: RunProxy, run_target: RunTarget, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    proxy, target = await run_proxy(), await run_target(echo)
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
    writer.write(GREETING)
    assert await reader.readexactly(2) == b"\x05\x00"
    writer.write(request(target) + b"ping")
    answer = await reader.readexactly(reply_size(proxy) - 2 + 4)
    assert answer[-4:] == b"ping"
    writer.close()
    await nothing_left(proxy)


async def test_cut_connection_is_reset_wherever_it_stands(run_proxy: RunProxy, run_target: RunTarget) -> None:
    proxy, target = await run_proxy(), await run_target(echo)
    for sent, expected in ((GREETING, 2), (GREETING + request(target) + b"x", reply_size(proxy) + 1)):
        reader, writer = await proxy.open()
        writer.write(sent)
        await reader.readexactly(expected)
        proxy.server.cut("a test")
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
    await nothing_left(proxy)
    assert not proxy.errors


async def test_drain_waits_for_a_tunnel_and_then_cuts_it(run_proxy: RunProxy, run_target: RunTarget) -> None:
    proxy, target = await run_proxy(), await run_target(echo)
    reader, writer = await proxy.open()
    writer.write(GREETING + request(target) + b"x")
    await reader.readexactly(reply_size(proxy) + 1)
    draining = asyncio.create_task(proxy.server.drain(30))
    await asyncio.sleep(0)
    writer.write(b"y")
    assert await reader.readexactly(1) == b"y", "a live connection goes on"
    writer.write_eof()
    assert await reader.read() == b""
    assert await draining == 0
    reader, writer = await _again(proxy, target)
    assert await proxy.server.drain(0) == 1
    with pytest.raises(ConnectionResetError):
        await reader.readexactly(1)


async def _again(proxy: Proxy, target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    proxy.server.start()
    reader, writer = await proxy.open()
    writer.write(GREETING + request(target) + b"x")
    await reader.readexactly(reply_size(proxy) + 1)
    return reader, writer


async def test_access_log_says_the_same_of_a_tunnel(run_target: RunTarget, loopback: str, way: str) -> None:
    target = await run_target(echo)
    records: list[AccessRecord] = []
    connector = Connector(SystemResolver(), _Everything())
    layer, service = AccessLogLayer(records.append), Socks5Server(connector)
    with bind_tcp(loopback, 0) as listener:
        server = TcpServer(listener, layer(service) if way == "coroutine" else stack(layer, service))
        server.start()
        port = listener.getsockname()[1]
        reader, writer = await asyncio.open_connection(*listener.getsockname()[:2])
        client = writer.get_extra_info("sockname")[:2]
        writer.write(GREETING + request(target) + b"hello")
        writer.write_eof()
        await reader.read()
        writer.close()
        assert await server.drain(5) == 0
    [record] = records
    assert record.client is not None
    assert record.listener is not None
    assert (str(record.client.ip), record.client.port) == client
    assert record.listener.port == port
    assert str(record.target) == (f"[{target[0]}]:{target[1]}" if ":" in target[0] else f"{target[0]}:{target[1]}")
    handshake = len(GREETING + request(target))
    assert (record.reason, record.received, record.error) == ("eof", handshake + 5, "")
    assert record.sent == (24 if ":" in loopback else 12) + 5
    assert record.relay == "copy"


def _password(user: str, password: str) -> bytes:
    return b"\x01%b%b" % (
        bytes((len(user),)) + user.encode(),
        bytes((len(password),)) + password.encode(),
    )


async def test_known_password_has_no_task_and_a_wrong_one_is_refused(
    run_proxy: RunProxy, run_target: RunTarget, way: str
) -> None:
    target = await run_target(echo)
    users = StaticUsers({"tom": "secret"})
    proxy = await run_proxy(make=lambda connector: Socks5Server(connector, auth=users))
    greeting = b"\x05\x01\x02"
    reader, writer = await proxy.open()
    writer.write(greeting + _password("tom", "secret") + request(target) + b"x")
    assert await reader.readexactly(4) == b"\x05\x02\x01\x00"
    assert (await reader.readexactly(reply_size(proxy) - 2 + 1))[-1:] == b"x"
    assert proxy.server._connections == {} or way == "coroutine"
    writer.close()
    for user, password in (("tom", "wrong"), ("eve", "secret"), ("tom", "")):
        reader, writer = await proxy.open()
        writer.write(greeting + _password(user, password) + request(target))
        assert await reader.read() == b"\x05\x02\x01\x01"
        writer.close()
    await nothing_left(proxy)
    assert [type(error) for error in proxy.errors] == [AuthFailed] * 3
    assert [extensions.get(User) for extensions in proxy.extensions] == [User("tom"), None, None, None]


async def test_password_byte_by_byte_is_the_same(run_proxy: RunProxy, run_target: RunTarget) -> None:
    target = await run_target(echo)
    users = StaticUsers({"tom": "secret"})
    proxy = await run_proxy(make=lambda connector: Socks5Server(connector, auth=users))
    for password, expected in (("secret", b"\x05\x02\x01\x00\x05\x00"), ("wrong", b"\x05\x02\x01\x01")):
        reader, writer = await proxy.open()
        for byte in b"\x05\x01\x02" + _password("tom", password) + request(target):
            writer.write(bytes([byte]))
            await asyncio.sleep(0.001)  # a segment of its own
        assert await reader.readexactly(len(expected)) == expected
        writer.close()
    await nothing_left(proxy)


def _named(name: str, port: int) -> bytes:
    return b"\x05\x01\x00\x03" + bytes((len(name),)) + name.encode() + port.to_bytes(2, "big")


async def test_known_names_are_dialled_as_a_race_would(tmp_path: Path, way: str) -> None:
    """One address, one that is denied beside it, one that refuses before it, and one that never answers."""
    hosts, conf = tmp_path / "hosts", tmp_path / "resolv.conf"
    known = ("127.0.0.1 one mixed", "127.0.0.9 mixed", "127.0.0.2 dead", "127.0.0.1 dead", "10.0.0.1 denied")
    hosts.write_text("".join(f"{line}\n" for line in known))
    conf.write_text("nameserver 127.0.0.1\noptions ndots:1\n")
    resolver = DnsResolver(hosts=str(hosts), resolv_conf=str(conf), timeout=0.3, attempts=1)
    policy = EgressPolicy.of(["127.0.0.1/32", "127.0.0.2/32"])
    service = Socks5Server(Connector(resolver, policy, attempt_delay=0.05))
    layer = AddExtensionLayer(1)
    ends: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends.append(1)
        writer.write(b"hello")
        writer.close()

    there = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = there.sockets[0].getsockname()[1]
    with bind_tcp("127.0.0.1", 0) as listener, listener_with_full_queue("127.0.0.2", port) as _silent:
        server = TcpServer(listener, layer(service) if way == "coroutine" else stack(layer, service))
        server.start()
        for name, expected in (("one", 0), ("mixed", 0), ("denied", 2), ("nobody", 4), ("dead", 0)):
            reader, writer = await asyncio.open_connection(*listener.getsockname()[:2])
            writer.write(GREETING + _named(name, port))
            assert (await reader.readexactly(4))[3] == expected, name
            if not expected:
                assert (await reader.read()).endswith(b"hello")
            writer.close()
        assert await server.drain(5) == 0
    there.close()
    await there.wait_closed()
    resolver.close()
    assert len(ends) == 3, "nobody was dialled twice"
    assert len(tunnels) == 0


class _Everything:
    def check(self, ip: object, port: int | None = None, /) -> None:
        """Everything may be dialled."""


def test_what_stands_around_a_service_is_never_passed_by() -> None:
    service = Socks5Server(Connector(SystemResolver(), _Everything()))
    assert at_once_of(service) is not None
    assert at_once_of(stack(AddExtensionLayer(1), service)) is not None
    assert at_once_of(PeekRouter((is_socks, service))) is not None

    @functools.wraps(stack(AddExtensionLayer(1), service))
    async def looks_like_it(stream: Stream) -> object:
        raise AssertionError("never called")

    class Special(Socks5Server):
        async def __call__(self, stream: Stream, /) -> Any:
            raise AssertionError("never called")

    class Careful(AddExtensionLayer):
        def __call__(self, inner: Any, /) -> Any:
            return super().__call__(inner)

    class Dialling(Connector):
        async def __call__(self, target: Any, /) -> Stream:
            raise AssertionError("never called")

    def plain(inner: Any) -> Any:
        async def serve(stream: Stream) -> object:
            return await inner(stream)

        return serve

    assert at_once_of(looks_like_it) is None
    assert at_once_of(Special(Connector(SystemResolver(), _Everything()))) is None
    assert at_once_of(Socks5Server(Dialling(SystemResolver(), _Everything()))) is None
    assert at_once_of(stack(Careful(1), service)) is None
    assert at_once_of(stack(plain, service)) is None
    assert at_once_of(stack(AddExtensionLayer(1), plain, service)) is None


@pytest.mark.parametrize("sent", [b"", GREETING])
async def test_client_that_is_silent_is_cut_by_the_time_out_of_its_stack(run_proxy: RunProxy, sent: bytes) -> None:
    proxy = await run_proxy(make=lambda connector: stack(TimeoutLayer(0.4), Socks5Server(connector)))
    reader, writer = await proxy.open()
    writer.write(sent)
    with contextlib.suppress(ConnectionResetError):
        await reader.read()
    await nothing_left(proxy)
    [error] = proxy.errors
    assert isinstance(error, HandshakeTimeout)


async def test_tunnel_has_the_time_outs_of_its_stack(run_proxy: RunProxy, run_target: RunTarget) -> None:
    target = await run_target(echo)
    proxy = await run_proxy(make=lambda connector: stack(TimeoutLayer(5, idle=0.3), Socks5Server(connector)))
    reader, writer = await proxy.open()
    writer.write(GREETING + request(target) + b"x")
    await reader.readexactly(reply_size(proxy) + 1)
    with pytest.raises(ConnectionResetError):
        await reader.readexactly(1)
    await nothing_left(proxy)
    [report] = proxy.results
    assert isinstance(report, TunnelReport)
    assert report.reason is CloseReason.IDLE_TIMEOUT


class _Fails:
    accepts = Stream

    def __call__(self, inner: Any) -> Any:
        async def serve(stream: Stream) -> Any:
            raise PeerClosed("by the coroutine")

        return serve

    def enter(self, visit: Visit) -> Entered:
        raise RuntimeError("cannot be entered")


async def test_layer_that_cannot_be_entered_has_its_coroutine_run(run_proxy: RunProxy) -> None:
    proxy = await run_proxy(make=lambda connector: stack(_Fails(), Socks5Server(connector)))
    reader, writer = await proxy.open()
    writer.write(GREETING)
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    await nothing_left(proxy)
    [error] = proxy.errors
    assert str(error) == "by the coroutine"
