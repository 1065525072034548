from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator, Sequence
from ipaddress import ip_address

import pytest

from rama_ebpf.core import Authority, IPAddress, PolicyDenied, SocketAddress, SocketStream
from rama_ebpf.core.poller import Poller
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.services.connect import ConnectError, Connector, ResolveError
from rama_ebpf.services.socket_options import KeepAlive, SocketOptions
from rama_ebpf.services.tcp import bind_tcp

from ..relay.flows import open_descriptors

LOOPBACK = EgressPolicy.of(["127.0.0.0/8", "::1/128"])


class Table:
    """A resolver over a fixed table."""

    def __init__(self, **names: Sequence[str]) -> None:
        self.names = names
        self.asked = 0

    async def resolve(self, name: str) -> Sequence[IPAddress]:
        self.asked += 1
        return [ip_address(text) for text in self.names[name]]


@pytest.fixture
def port() -> Iterator[int]:
    """A port on which 127.0.0.1 and ::1 listen, and 127.0.0.66 exists but never answers a SYN."""
    with contextlib.ExitStack() as cleanup:
        listener = cleanup.enter_context(bind_tcp("127.0.0.1", 0))
        number = int(listener.getsockname()[1])
        cleanup.enter_context(bind_tcp("::1", number))
        silent = cleanup.enter_context(bind_tcp("127.0.0.66", number, backlog=0))
        full = cleanup.enter_context(socket.create_connection(silent.getsockname()))
        assert full.getpeername() == silent.getsockname()
        yield number


def connector(*addresses: str, **changes: object) -> Connector:
    arguments: dict[str, object] = {"resolver": Table(target=addresses), "egress": LOOPBACK, "timeout": 30.0}
    return Connector(**{**arguments, **changes})  # type: ignore[arg-type]


async def dialled(connect: Connector, port: int) -> str:
    stream = await connect(Authority.of("target", port))
    peer = stream.peer
    assert peer is not None
    await stream.close()
    return str(peer.ip)


async def test_a_silent_address_delays_only_for_a_moment_and_leaves_no_socket(port: int) -> None:
    before = open_descriptors()
    assert await dialled(connector("127.0.0.66", "127.0.0.1", attempt_delay=0.05), port) == "127.0.0.1"
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert open_descriptors() == before


async def test_a_refused_address_is_followed_by_the_next_at_once(port: int) -> None:
    # With an attempt delay beyond the test's own time-out only a failure can bring on the next address.
    assert await dialled(connector("127.0.0.67", "127.0.0.1", attempt_delay=600), port) == "127.0.0.1"


async def test_the_families_take_turns(port: int) -> None:
    addresses = ("127.0.0.66", "127.0.0.66", "127.0.0.66", "::1")
    assert await dialled(connector(*addresses, attempt_delay=0.05), port) == "::1"


async def test_a_denied_address_is_never_dialled_even_if_a_name_has_it(port: int) -> None:
    egress = EgressPolicy.of(["127.0.0.0/8"], deny=["127.0.0.1/32"])
    with bind_tcp("127.0.0.68", port):
        assert await dialled(connector("127.0.0.1", "127.0.0.68", egress=egress), port) == "127.0.0.68"
    with pytest.raises(PolicyDenied):
        await dialled(connector("127.0.0.1", "10.0.0.1", egress=egress), port)


async def test_the_address_that_was_checked_is_dialled_not_a_second_answer(port: int) -> None:
    table = Table(target=["127.0.0.1"])
    await dialled(connector(resolver=table), port)
    assert table.asked == 1


async def test_all_attempts_together_are_bounded(port: int) -> None:
    addresses = ("127.0.0.66",) * 8
    with pytest.raises(ConnectError, match="no answer within") as failed:
        await dialled(connector(*addresses, attempt_delay=0.01, timeout=0.2), port)
    assert failed.value.errno == errno.ETIMEDOUT


async def test_the_last_failure_is_told() -> None:
    with bind_tcp("127.0.0.1", 0) as closed:
        number = closed.getsockname()[1]
    with pytest.raises(ConnectError, match="refused") as failed:
        await dialled(connector("127.0.0.67", "127.0.0.1"), number)
    assert failed.value.errno == errno.ECONNREFUSED


async def test_a_name_without_addresses() -> None:
    with pytest.raises(ResolveError, match="no address"):
        await dialled(connector(), 1)


async def test_cancelled_while_racing_leaves_no_socket(port: int) -> None:
    before = open_descriptors()
    connecting = asyncio.create_task(dialled(connector(*("127.0.0.66",) * 4, attempt_delay=0.01), port))
    while open_descriptors() < before + 4:  # noqa: ASYNC110  no event tells of a socket
        await asyncio.sleep(0.001)
    connecting.cancel()
    await asyncio.gather(connecting, return_exceptions=True)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert open_descriptors() == before


async def test_source_address_and_options_are_set(port: int) -> None:
    options = SocketOptions(keepalive=KeepAlive(30, 5, 3), user_timeout=20.5, interface="lo", dscp=10, mark=7)
    stream = await connector("127.0.0.1", source_v4="127.0.5.5", options=options)(Authority.of("target", port))
    assert isinstance(stream, SocketStream)
    sock = stream.socket
    assert sock.getsockname()[0] == "127.0.5.5"
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20500),
        (socket.IPPROTO_IP, socket.IP_TOS, 40),
        (socket.SOL_SOCKET, 36, 7),
    ):
        assert sock.getsockopt(level, option) == value
    await stream.close()


async def test_an_interface_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConnectError, match="socket option interface = b'no-such-if'"):
        await dialled(connector("127.0.0.1", options=SocketOptions(interface="no-such-if")), 1)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="dscp must be 0-63"):
        SocketOptions(dscp=64)
    with pytest.raises(ValueError, match="attempt_delay"):
        connector(attempt_delay=0)


async def test_a_target_on_this_host_is_connected_without_waiting(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        stream = SocketStream.connecting(sock, SocketAddress(ip_address("127.0.0.1"), port))
        assert stream.is_connected
        assert stream.local is not None
        assert stream.local.port == sock.getsockname()[1]
        stream.abort()


async def test_a_target_that_does_not_answer_is_waited_for(port: int) -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    stream = SocketStream.connecting(sock, SocketAddress(ip_address("127.0.0.66"), port))
    assert not stream.is_connected
    waiting = asyncio.create_task(stream.connected())
    await asyncio.sleep(0.05)  # nothing happens
    assert not waiting.done()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert stream.closed
    assert sock.fileno() == -1


async def test_a_connection_that_the_kernel_does_not_watch_is_not_taken_for_connected(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "no more watches")

    monkeypatch.setattr(Poller.current(), "add", refuse)
    with pytest.raises(ConnectError, match="no answer within"):
        await connector("127.0.0.66", timeout=0.2)(Authority.of("target", port))
    assert await dialled(connector("127.0.0.1"), port) == "127.0.0.1"


async def test_a_target_that_refuses_later_is_told_as_such(port: int) -> None:
    """Not at once as on this host, but as the answer to a SYN that was waited for."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    stream = SocketStream.connecting(sock, SocketAddress(ip_address("127.0.0.66"), port))
    waiting = asyncio.create_task(stream.connected())
    await asyncio.sleep(0)  # it waits
    sock.shutdown(socket.SHUT_RDWR)  # what a reset does to it
    with pytest.raises(OSError):
        await waiting
    assert stream.closed
