"""What a tunnel owes its peers at each end that it may come to, the same by every relay."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from rama_ebpf.core.address import SocketAddress
from rama_ebpf.core.poller import Poller
from rama_ebpf.core.socket_stream import SocketStream
from rama_ebpf.core.stream import Stream
from rama_ebpf.relay import (
    CloseReason,
    DirectionOutcome,
    RelayKind,
    RelayOptions,
    TunnelLimits,
    TunnelReport,
    relay,
    tunnels,
)
from rama_ebpf.relay.choice import Choice
from rama_ebpf.relay.engine import Engine

from .flows import open_descriptors, relay_by, running, tcp_pair

LINGER_RST = struct.pack("ii", 1, 0)

pytestmark = [pytest.mark.root, pytest.mark.ebpf]


class Ends:
    """A client and an upstream, and the relay's ends of their connections."""

    def __init__(self, pair: Callable[[], tuple[socket.socket, socket.socket]] = tcp_pair) -> None:
        self.client, self.client_near = pair()
        self.upstream, self.upstream_near = pair()
        self.client.setblocking(False)
        self.upstream.setblocking(False)

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self.client, self.upstream, self.client_near, self.upstream_near):
            sock.close()


async def receive(sock: socket.socket, count: int) -> bytes:
    """Read exactly ``count`` bytes, or what comes before EOF."""
    data = b""
    while len(data) < count:
        chunk = await asyncio.get_running_loop().sock_recv(sock, min(count - len(data), 1 << 20))
        if not chunk:
            break
        data += chunk
    return data


async def send(sock: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, data)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RST)
    sock.close()


async def push_until_held(sock: socket.socket) -> int:
    """Write until nothing has been taken for a while; return how many bytes went out."""
    loop, total, chunk = asyncio.get_running_loop(), 0, bytes(65536)
    while True:
        try:
            total += sock.send(chunk)
        except BlockingIOError:
            writable = loop.create_future()
            loop.add_writer(sock.fileno(), lambda w=writable: w.done() or w.set_result(None))
            try:
                await asyncio.wait_for(writable, 0.5)
            except TimeoutError:
                return total
            finally:
                loop.remove_writer(sock.fileno())


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """The process may open nothing more for the length of a block."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + 50, limits[1]))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        with suppress(OSError):
            while True:
                stack.callback(os.close, os.dup(0))
        yield


async def test_half_close_leaves_the_other_direction_open(kind: RelayKind) -> None:
    with Ends() as ends:
        async with running(relay_by(kind), ends.client_near, ends.upstream_near) as tunnel:
            await send(ends.client, b"request")
            ends.client.shutdown(socket.SHUT_WR)
            assert await receive(ends.upstream, 100) == b"request"
            await send(ends.upstream, b"reply" * 20_000)
            ends.upstream.shutdown(socket.SHUT_WR)
            assert await receive(ends.client, 200_000) == b"reply" * 20_000
            report = await tunnel
    assert (report.reason, report.to_upstream, report.to_client) == (CloseReason.EOF, 7, 100_000)
    assert (report.upward, report.downward) == (DirectionOutcome.EOF, DirectionOutcome.EOF)


@pytest.mark.parametrize("who", ["client", "upstream"])
async def test_reset_is_passed_on_as_reset(kind: RelayKind, who: str) -> None:
    with Ends() as ends:
        culprit, victim = (ends.client, ends.upstream) if who == "client" else (ends.upstream, ends.client)
        async with running(relay_by(kind), ends.client_near, ends.upstream_near) as tunnel:
            await send(culprit, b"x" * 1000)
            await receive(victim, 1000)
            reset(culprit)
            report = await tunnel
            with pytest.raises(ConnectionResetError):
                await receive(victim, 1)
    assert report.reason is (CloseReason.CLIENT_RESET if who == "client" else CloseReason.UPSTREAM_RESET)
    first, second = (report.upward, report.downward) if who == "client" else (report.downward, report.upward)
    assert (first, second) == (DirectionOutcome.SOURCE_LOST, DirectionOutcome.CUT)


async def test_reset_is_noticed_while_the_other_side_does_not_read(kind: RelayKind) -> None:
    with Ends() as ends:
        async with running(relay_by(kind), ends.client_near, ends.upstream_near) as tunnel:
            await push_until_held(ends.client)
            reset(ends.client)
            assert (await tunnel).reason is CloseReason.CLIENT_RESET
            with pytest.raises(ConnectionResetError):
                await receive(ends.upstream, 1 << 40)


async def test_reset_after_half_close_is_passed_on(kind: RelayKind) -> None:
    with Ends() as ends:
        async with running(relay_by(kind), ends.client_near, ends.upstream_near) as tunnel:
            await send(ends.client, b"request")
            ends.client.shutdown(socket.SHUT_WR)
            assert await receive(ends.upstream, 8) == b"request"
            reset(ends.client)
            report = await tunnel
            with pytest.raises(BrokenPipeError):
                await send(ends.upstream, b"reply")
    assert (report.reason, report.upward) == (CloseReason.CLIENT_RESET, DirectionOutcome.EOF)
    assert report.downward is DirectionOutcome.SINK_LOST


async def test_stalled_reader_holds_the_sender(kind: RelayKind) -> None:
    """What is in flight is bounded by socket buffers, and arrives whole when the reader goes on."""
    with Ends() as ends:
        for sock in (ends.client, ends.client_near, ends.upstream, ends.upstream_near):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 128 * 1024)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 * 1024)
        async with running(relay_by(kind), ends.client_near, ends.upstream_near) as tunnel:
            sent = await push_until_held(ends.client)
            assert sent <= 4 << 20
            ends.client.shutdown(socket.SHUT_WR)
            assert len(await receive(ends.upstream, sent + 1)) == sent
            ends.upstream.shutdown(socket.SHUT_WR)
            assert (await tunnel).to_upstream == sent


async def test_bytes_queued_behind_a_stall_need_no_new_event(kind: RelayKind) -> None:
    """All the sender's bytes are with the relay before the reader reads, and nothing comes after them."""
    data = bytes(range(256)) * 6000
    with Ends() as ends:
        ends.client_near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        for sock in (ends.upstream, ends.upstream_near):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        async with running(relay_by(kind), ends.client_near, ends.upstream_near):
            await send(ends.client, data)
            await asyncio.sleep(0.1)  # the reader stalls
            assert await receive(ends.upstream, len(data)) == data


async def test_idle_tunnel_is_reset_after_its_time_out(kind: RelayKind) -> None:
    loop = asyncio.get_running_loop()
    with Ends() as ends:
        limits = TunnelLimits(idle=0.6)
        async with running(relay_by(kind, limits), ends.client_near, ends.upstream_near) as tunnel:
            for _ in range(6):  # twice the time-out, but never idle for so long
                await send(ends.client, b"ping")
                await receive(ends.upstream, 4)
                await asyncio.sleep(0.2)  # less than the time-out
            assert not tunnel.done()
            await send(ends.client, b"last")
            last = loop.time()
            report = await tunnel
            assert loop.time() - last >= 0.6
            for sock in (ends.client, ends.upstream):
                with pytest.raises(ConnectionResetError):
                    await receive(sock, 100)
    assert (report.reason, report.upward) == (CloseReason.IDLE_TIMEOUT, DirectionOutcome.CUT)


async def test_total_time_out_ends_a_busy_tunnel(kind: RelayKind) -> None:
    with Ends() as ends:
        limits = TunnelLimits(idle=None, total=0.5)
        async with running(relay_by(kind, limits), ends.client_near, ends.upstream_near) as tunnel:
            while not tunnel.done():
                try:
                    await send(ends.client, b"ping")
                    await receive(ends.upstream, 4)
                except ConnectionError:
                    break
            report = await tunnel
    assert report.reason is CloseReason.TOTAL_TIMEOUT
    assert report.age >= 0.5


async def test_cancelled_tunnel_is_reset_and_reported(kind: RelayKind) -> None:
    with Ends() as ends:
        client = SocketStream(ends.client_near)
        client.extensions.add(RelayOptions(kind))
        task = asyncio.create_task(relay(client, SocketStream(ends.upstream_near)))
        await send(ends.client, b"ping")
        await receive(ends.upstream, 4)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for sock in (ends.client, ends.upstream):
            with pytest.raises(ConnectionResetError):
                await receive(sock, 1)
        report = client.extensions.require(TunnelReport)
        assert (report.reason, report.to_upstream, client.bytes_received) == (CloseReason.CUT, 4, 4)
        assert len(tunnels) == 0


@pytest.mark.parametrize("stalled", [False, True])
async def test_bytes_read_before_the_hand_over_come_first(kind: RelayKind, stalled: bool) -> None:
    with Ends() as ends:
        client, upstream = SocketStream(ends.client_near), SocketStream(ends.upstream_near)
        client.extensions.add(RelayOptions(kind))
        filled = 0
        if stalled:
            upstream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            filled = await push_until_held(upstream.socket)
        await send(ends.client, b"first|second|")
        await client.peek(13)
        client.consume(6)
        await send(ends.client, b"third")
        task = asyncio.create_task(relay(client, upstream))
        ends.client.shutdown(socket.SHUT_WR)
        assert await receive(ends.upstream, filled + 100) == bytes(filled) + b"second|third"
        ends.upstream.close()
        await task


async def test_hand_over_in_the_middle_of_a_segment(kind: RelayKind) -> None:
    """A protocol has read the first bytes of a segment, the others are still in the socket's queue."""
    with Ends() as ends:
        client = SocketStream(ends.client_near)
        client.extensions.add(RelayOptions(kind))
        await send(ends.client, b"greeting" + b"x" * 5000)
        assert await client.read_exactly(8) == b"greeting"
        task = asyncio.create_task(relay(client, SocketStream(ends.upstream_near)))
        await send(ends.client, b"y" * 5000)
        assert await receive(ends.upstream, 10_000) == b"x" * 5000 + b"y" * 5000
        ends.client.close()
        ends.upstream.close()
        report = await task
        assert (report.reason, report.to_upstream) == (CloseReason.EOF, 10_000)


async def test_urgent_byte_stays_in_its_place(kind: RelayKind) -> None:
    """RFC 6093 section 6: urgent data is to be read in line; splice(2) alone would stop before it for good."""
    with Ends() as ends:
        async with running(relay_by(kind), ends.client_near, ends.upstream_near) as tunnel:
            await send(ends.client, b"a" * 100_000)
            ends.client.send(b"before!", socket.MSG_OOB)
            await send(ends.client, b"after")
            assert (await receive(ends.upstream, 100_012))[100_000:] == b"before!after"
            ends.client.send(b"!", socket.MSG_OOB)
            assert await receive(ends.upstream, 1) == b"!"
            await send(ends.client, b"b" * 100_000)
            ends.client.shutdown(socket.SHUT_WR)
            assert await receive(ends.upstream, 200_000) == b"b" * 100_000
            ends.upstream.close()
            assert (await tunnel).reason is CloseReason.EOF


async def test_unix_sockets_are_relayed(kind: RelayKind) -> None:
    with Ends(socket.socketpair) as ends:
        async with running(relay_by(kind), ends.client_near, ends.upstream_near) as tunnel:
            data = bytes(range(256)) * 4000
            sending = asyncio.create_task(send(ends.client, data))
            assert await receive(ends.upstream, len(data)) == data
            await sending
            ends.client.close()
            ends.upstream.close()
            assert (await tunnel).to_upstream == len(data)


async def test_unix_messages_with_descriptors_leave_nothing_behind() -> None:
    """A read of a Unix socket ends after a message with a descriptor, though more bytes are there."""
    with Ends(socket.socketpair) as ends:
        for _ in range(10):
            socket.send_fds(ends.client, [b"message"], [0])
        async with running(relay_by(RelayKind.COPY), ends.client_near, ends.upstream_near):
            assert await receive(ends.upstream, 70) == b"message" * 10


@pytest.mark.parametrize("kind", [RelayKind.SPLICE, RelayKind.AUTO])
async def test_without_descriptors_for_pipes_bytes_are_copied(kind: RelayKind) -> None:
    with Ends() as ends:
        async with running(relay_by(kind), ends.client_near, ends.upstream_near) as tunnel:
            await send(ends.client, b"ping")
            await receive(ends.upstream, 4)
            pipes = Engine.current().pipes
            pipes.clear()
            refused = pipes.refused
            with no_descriptors_left():
                data = bytes(range(256)) * 8000
                sending = asyncio.create_task(send(ends.client, data))
                assert await receive(ends.upstream, len(data)) == data
                await sending
            assert pipes.refused > refused
            assert Engine.current().refused()["no pipe to be had"] == pipes.refused
            ends.client.close()
            ends.upstream.close()
            assert (await tunnel).reason is CloseReason.EOF


async def test_refused_registration_falls_back_to_copy() -> None:
    with Ends() as ends:
        client, upstream = SocketStream(ends.client_near), SocketStream(ends.upstream_near)
        Poller.current().add(ends.upstream_near.fileno(), lambda _events: None)  # so the kernel says EEXIST
        task = asyncio.create_task(relay(client, upstream))
        await send(ends.client, b"ping")
        assert await receive(ends.upstream, 4) == b"ping"
        ends.client.close()
        ends.upstream.close()
        report = await task
        assert (report.relay, report.reason) == ("copy", CloseReason.EOF)
        assert "File exists" in report.why
        assert Engine.current().refused() == {"the kernel watches no more sockets": 1}


class Shouting(Stream):
    """A stream that is no socket: what is read from it is in capitals."""

    def __init__(self, inner: SocketStream) -> None:
        super().__init__(inner.extensions)
        self._inner = inner

    async def _receive(self, max_bytes: int) -> bytes:
        return (await self._inner.read(max_bytes)).upper()

    async def write(self, *chunks: bytes | bytearray | memoryview) -> None:
        await self._inner.write(*chunks)

    async def write_eof(self) -> None:
        await self._inner.write_eof()

    async def close(self) -> None:
        await self._inner.close()

    def abort(self) -> None:
        self._inner.abort()

    @property
    def peer(self) -> SocketAddress | None:
        return self._inner.peer

    @property
    def local(self) -> SocketAddress | None:
        return self._inner.local


async def test_stream_that_is_no_socket_is_copied() -> None:
    with Ends() as ends:
        client = Shouting(SocketStream(ends.client_near))
        task = asyncio.create_task(relay(client, SocketStream(ends.upstream_near)))
        await send(ends.client, b"quiet")
        assert await receive(ends.upstream, 5) == b"QUIET"
        [flow] = tunnels
        assert (flow.relay, flow.why, flow.to_upstream) == ("copy", "not a plain socket", 5)
        assert tunnels.cut(lambda flow: True) == 1
        assert (await task).reason is CloseReason.CUT
        with pytest.raises(ConnectionResetError):
            await receive(ends.client, 1)


async def test_live_tunnels_are_listed_and_can_be_cut() -> None:
    with Ends() as ends, Ends() as others:
        async with (
            running(relay_by(RelayKind.AUTO), ends.client_near, ends.upstream_near) as tunnel,
            running(relay_by(RelayKind.AUTO), others.client_near, others.upstream_near) as other,
        ):
            await send(ends.client, b"ping")
            await receive(ends.upstream, 4)
            await send(others.client, b"x" * 1_000_000)
            await receive(others.upstream, 1_000_000)
            flows = {flow.to_upstream: flow.as_json() for flow in tunnels}
            source = str(SocketAddress.from_sockaddr(ends.client.getsockname()))
            target = str(SocketAddress.from_sockaddr(ends.upstream.getsockname()))
            assert (flows[4]["source"], flows[4]["target"]) == (source, target)
            assert (flows[4]["relay"], flows[1_000_000]["relay"]) == ("copy", "splice")
            assert tunnels.cut(lambda flow: str(flow.source) == source) == 1
            assert (await tunnel).reason is CloseReason.CUT
            assert not other.done()
            with pytest.raises(ConnectionResetError):
                await receive(ends.client, 1)


async def test_bulk_flow_lets_others_have_their_turn(kind: RelayKind) -> None:
    """With bytes and room enough for all of it one direction moves 1 MiB, or one pipe more, and then waits."""
    with Ends() as ends:
        for sock in (ends.client_near, ends.upstream):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        ends.upstream_near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        await send(ends.client, bytes(3 << 20))
        tunnel = Engine.current().open(
            SocketStream(ends.client_near), SocketStream(ends.upstream_near), Choice(kind, ""), TunnelLimits()
        )
        tunnel.up.readable()
        assert 1 << 20 <= tunnel.up.delivered < 2 << 20
        assert len(await receive(ends.upstream, 3 << 20)) == 3 << 20
        tunnel.cut()


async def test_thousand_tunnels_leave_no_descriptor_behind() -> None:
    gc.collect()  # what tests before this one have left to the collector
    before = open_descriptors()
    for _ in range(5):
        batch = [Ends() for _ in range(200)]
        tasks = [
            asyncio.create_task(relay_by(RelayKind.SPLICE)(SocketStream(e.client_near), SocketStream(e.upstream_near)))
            for e in batch
        ]
        for ends in batch:
            await send(ends.client, b"x" * 100)
            ends.client.shutdown(socket.SHUT_WR)
            assert await receive(ends.upstream, 101) == b"x" * 100
            ends.upstream.close()
        for task in tasks:
            assert (await task).reason is CloseReason.EOF
        for ends in batch:
            ends.__exit__()
    assert open_descriptors() == before
