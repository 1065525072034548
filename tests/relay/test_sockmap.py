"""The relay in the kernel: what only it can get wrong."""

from __future__ import annotations

import asyncio
import random
import re
import select
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from rama_ebpf.kernel import bpf
from rama_ebpf.kernel.abi import source_dir
from rama_ebpf.kernel.splice import DirectionSlot, SpliceMaps
from rama_ebpf.relay import CloseReason, RelayKind, TunnelReport
from rama_ebpf.relay.engine import Engine
from rama_ebpf.relay.sockmap import RECEIVE_BUFFER, Sockmap

from .flows import expected, open_descriptors, plan, relay_by, run_flow, running
from .test_tunnel import Ends, push_until_held, receive, reset, send

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

FLOWS = 150
TALKS = 75
AT_ONCE = 25


def entries(maps: SpliceMaps) -> int:
    """How many sockets and cookies are in the maps."""
    count = 0
    for name, size in (("slots", 8), ("relayed", 4)):
        key = None
        while (key := bpf.map_next_key(maps.fds[name], key, size)) is not None:
            count += 1
    return count


@pytest.mark.parametrize("credit", [1, 1 << 16, 1 << 18])
async def test_random_flows_arrive_exactly_whatever_the_credit(splice_maps: SpliceMaps, credit: int) -> None:
    """A small credit makes the kernel hand flows back and take them over again and again."""
    sockmap = Sockmap(splice_maps.fds, credit=credit)
    Engine.current().use_sockmap(sockmap)
    turn = asyncio.Semaphore(AT_ONCE)
    seeds = random.Random(f"credit {credit}").sample(range(1 << 30), FLOWS)

    async def one(seed: int) -> TunnelReport:
        async with turn:
            flow = plan(seed, largest=6_000_000)
            report = await run_flow(flow, relay_by(RelayKind.SOCKMAP))
            if not flow.resets:
                assert (report.to_upstream, report.to_client) == (flow.client.size, flow.upstream.size)
            return report

    reports = await asyncio.gather(*(one(seed) for seed in seeds))
    assert {report.relay for report in reports} == {"sockmap"}
    assert sum(report.spills for report in reports) > 0
    assert len(sockmap) == 0
    assert entries(splice_maps) == 0
    assert not sockmap.refused


async def converse(rng: random.Random, here: socket.socket, there: socket.socket, sizes: list[int]) -> None:
    """Send messages from one socket to the other, some before the one before has come, and check every byte."""

    async def write() -> None:
        sent = 0
        for size in sizes:
            while size:
                count = min(size, rng.randrange(1, 100_000))
                await asyncio.get_running_loop().sock_sendall(here, expected(sent, count))
                sent, size = sent + count, size - count
            if rng.random() < 0.7:
                await asyncio.sleep(0.002 * rng.random())
        here.shutdown(socket.SHUT_WR)

    received = 0
    writing = asyncio.create_task(write())
    while data := await asyncio.get_running_loop().sock_recv(there, 1 << 18):
        assert data == expected(received, len(data))
        received += len(data)
        if rng.random() < 0.02:
            await asyncio.sleep(0.02)
    await writing
    assert received == sum(sizes)


async def test_conversations_arrive_exactly_when_they_rise_to_the_kernel(
    sockmap: Sockmap, splice_maps: SpliceMaps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Handed over in the middle of what is said, with a credit that makes the kernel hand back what is long."""
    monkeypatch.setattr("rama_ebpf.relay.promotion.MESSAGES", 2)
    monkeypatch.setattr("rama_ebpf.relay.promotion.SMALL", 1 << 16)
    sockmap.credit = 1 << 16
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(seed: int) -> TunnelReport:
        rng = random.Random(seed)
        up, down = (
            [int(rng.choice([50, 3000, 3000, 3000, 200_000]) * rng.random()) + 1 for _ in range(60)] for _ in range(2)
        )
        async with turn:
            with Ends() as ends:
                async with running(relay_by(RelayKind.AUTO), ends.client_near, ends.upstream_near) as tunnel:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(converse(rng, ends.client, ends.upstream, up))
                        group.create_task(converse(rng, ends.upstream, ends.client, down))
                    report = await tunnel
        assert (report.to_upstream, report.to_client, report.reason) == (sum(up), sum(down), CloseReason.EOF)
        return report

    reports = await asyncio.gather(*(one(seed) for seed in range(TALKS)))
    risen = [report for report in reports if report.relay == "sockmap"]
    assert len(risen) > TALKS // 3
    assert sum(report.spills for report in risen) > 0
    assert entries(splice_maps) == 0


async def test_tunnel_that_talks_rises_to_the_kernel_and_bulk_does_not(sockmap: Sockmap) -> None:
    with Ends() as ends, Ends() as others:
        async with (
            running(relay_by(RelayKind.AUTO), ends.client_near, ends.upstream_near) as talk,
            running(relay_by(RelayKind.AUTO), others.client_near, others.upstream_near) as bulk,
        ):
            for _ in range(50):
                await send(ends.client, b"ping")
                assert await receive(ends.upstream, 4) == b"ping"
                await send(ends.upstream, b"pong")
                assert await receive(ends.client, 4) == b"pong"
                sending = asyncio.create_task(send(others.client, b"x" * 100_000))
                await receive(others.upstream, 100_000)
                await sending
            assert len(sockmap) == 2
            for peer in (ends.client, ends.upstream, others.client, others.upstream):
                peer.close()
            report, other = await talk, await bulk
    assert (report.relay, report.why) == ("sockmap", "auto: both peers are on this host")
    assert (report.to_upstream, report.to_client, report.reason) == (200, 200, CloseReason.EOF)
    assert (other.relay, other.to_upstream) == ("splice", 5_000_000)


def _half_close(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


def _say(sock: socket.socket) -> None:
    sock.send(b"more")


@pytest.mark.parametrize("who", ["client", "upstream"])
@pytest.mark.parametrize("does", [_half_close, reset, socket.socket.close, _say])
async def test_peer_may_do_anything_at_each_step_of_the_hand_over(
    sockmap: Sockmap,
    splice_maps: SpliceMaps,
    monkeypatch: pytest.MonkeyPatch,
    does: Callable[[socket.socket], None],
    who: str,
) -> None:
    """Before the first of the four map entries, between them, and after the last: no byte is lost, nothing is left."""
    before, update = open_descriptors(), bpf.map_update
    for step in range(5):
        with Ends() as ends:
            peer, other = (ends.client, ends.upstream) if who == "client" else (ends.upstream, ends.client)
            calls = 0

            def updating(fd: int, key: bytes, value: bytes, step: int = step, peer: socket.socket = peer) -> None:
                nonlocal calls
                if calls == step:
                    does(peer)
                calls += 1
                update(fd, key, value)
                if calls == step == 4:
                    does(peer)

            with monkeypatch.context() as patch:
                patch.setattr("rama_ebpf.relay.sockmap.bpf.map_update", updating)
                await send(peer, b"before,")
                async with running(relay_by(RelayKind.SOCKMAP), ends.client_near, ends.upstream_near) as tunnel:
                    if does is reset:
                        assert (await tunnel).reason in (CloseReason.CLIENT_RESET, CloseReason.UPSTREAM_RESET)
                        continue
                    all_of_it = b"before," + (b"more" if does is _say else b"")
                    assert await receive(other, len(all_of_it)) == all_of_it, step
                    if does is not _say:
                        assert await receive(other, 1) == b""
                    if does is not socket.socket.close:
                        sending = asyncio.create_task(send(other, bytes(1 << 20)))
                        assert len(await receive(peer, 1 << 20)) == 1 << 20
                        await sending
                    other.close()
                    peer.close()
                    assert (await tunnel).reason is CloseReason.EOF
            assert calls >= 3
    assert len(sockmap) == 0
    assert entries(splice_maps) == 0
    assert open_descriptors() == before


async def test_tunnel_that_cannot_rise_goes_on_as_it_is(sockmap: Sockmap) -> None:
    sockmap._free.clear()
    with Ends() as ends:
        async with running(relay_by(RelayKind.AUTO), ends.client_near, ends.upstream_near) as tunnel:
            for _ in range(50):
                await send(ends.client, b"ping")
                assert await receive(ends.upstream, 4) == b"ping"
            ends.client.close()
            ends.upstream.close()
            report = await tunnel
    assert (report.relay, report.why, report.to_upstream) == ("copy", "no sockmap: all slots are in use", 200)
    assert Engine.current().refused() == {"all slots are in use": 1}, "it is tried once"


def fdinfo(epoll: int) -> list[tuple[str, str]]:
    """What an epoll instance watches: descriptors and event masks (hexadecimal)."""
    return re.findall(r"tfd: *(\d+) events: *(\w+)", Path(f"/proc/self/fdinfo/{epoll}").read_text())


async def test_userspace_sleeps_while_the_kernel_moves_bytes(sockmap: Sockmap, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ends() as ends:
        async with running(relay_by(RelayKind.SOCKMAP), ends.client_near, ends.upstream_near) as tunnel:
            for _ in range(2):  # the first bytes pass, and then the kernel takes over
                await send(ends.client, b"ping")
                await receive(ends.upstream, 4)
                await send(ends.upstream, b"pong")
                await receive(ends.client, 4)
            engine = Engine.current()
            woken = 0
            run, epoll = engine.poller._run, engine.poller.fileno()

            def counting_run() -> None:
                nonlocal woken
                woken += 1
                run()

            # Whoever polls for bytes is woken in the kernel by each message, though nothing is reported.
            polled = {int(fd): int(mask, 16) for fd, mask in fdinfo(epoll)}
            for sock in (ends.client_near, ends.upstream_near):
                assert not polled[sock.fileno()] & (select.EPOLLIN | select.EPOLLPRI | select.EPOLLOUT)
            asyncio.get_running_loop().add_reader(epoll, counting_run)
            for _ in range(100):
                await send(ends.client, b"ping")
                assert await receive(ends.upstream, 4) == b"ping"
                await send(ends.upstream, b"pong")
                assert await receive(ends.client, 4) == b"pong"
            assert woken == 0
            [live] = engine.tunnels
            assert (live.snapshot().to_upstream, live.snapshot().to_client) == (408, 408)
            ends.client.close()
            ends.upstream.close()
            assert (await tunnel).reason is CloseReason.EOF


RMEM_MAX = int(Path("/proc/sys/net/core/rmem_max").read_text())


async def test_the_receive_buffers_of_a_tunnel_do_not_grow_with_its_speed(splice_maps: SpliceMaps) -> None:
    """The kernel lets that of a quick reader grow to megabytes (tcp_rmem), which all fill when the sink stalls."""
    bound = 2 * min(RECEIVE_BUFFER, RMEM_MAX)  # the kernel doubles it
    Engine.current().use_sockmap(Sockmap(splice_maps.fds, credit=1 << 16))  # so that much of it is read here
    quick = 100 << 20
    with Ends() as ends:
        ends.client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        async with running(relay_by(RelayKind.SOCKMAP), ends.client_near, ends.upstream_near) as tunnel:
            sending = asyncio.create_task(send(ends.client, bytes(quick)))
            got = 0
            while got < quick:
                got += len(await receive(ends.upstream, 1 << 20))
            await sending
            for sock in (ends.client_near, ends.upstream_near):
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == bound
            ends.client.close()
            ends.upstream.close()
            assert (await tunnel).reason is CloseReason.EOF


async def test_stalled_reader_spills_and_the_kernel_takes_over_again(splice_maps: SpliceMaps) -> None:
    Engine.current().use_sockmap(Sockmap(splice_maps.fds, credit=1 << 18))
    with Ends() as ends:
        # Else the kernel lets it grow to what tcp_wmem says, by its own estimate of the flow.
        ends.client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        async with running(relay_by(RelayKind.SOCKMAP), ends.client_near, ends.upstream_near) as tunnel:
            for _ in range(2):
                await send(ends.client, b"ping")
                await receive(ends.upstream, 4)
            sent = await push_until_held(ends.client)
            assert sent <= 8 << 20
            [live] = Engine.current().tunnels
            before = live.up.moved
            assert len(await receive(ends.upstream, sent)) == sent
            delivered = live.up.delivered
            for _ in range(3):
                await send(ends.client, b"ping")
                assert await receive(ends.upstream, 4) == b"ping"
            assert live.up.moved > before
            assert live.up.delivered <= delivered + 4, "after the first of these the kernel moves the rest"
            ends.client.close()
            ends.upstream.close()
            report = await tunnel
    assert report.spills >= 1
    assert report.to_upstream == sent + 8 + 12


@pytest.mark.parametrize("who", ["client", "upstream"])
async def test_peer_that_ended_its_stream_before_the_hand_over_is_relayed_another_way(
    sockmap: Sockmap, splice_maps: SpliceMaps, who: str
) -> None:
    with Ends() as ends:
        first, second = (ends.client, ends.upstream) if who == "client" else (ends.upstream, ends.client)
        await send(first, b"all that I have")
        first.shutdown(socket.SHUT_WR)
        async with running(relay_by(RelayKind.SOCKMAP), ends.client_near, ends.upstream_near) as tunnel:
            assert await receive(second, 100) == b"all that I have"
            await send(second, b"x" * 1_000_000)
            second.shutdown(socket.SHUT_WR)
            assert await receive(first, 1_000_001) == b"x" * 1_000_000
            report = await tunnel
    assert report.reason is CloseReason.EOF
    assert report.relay in ("copy", "splice")
    assert "ENOTSUP" in report.why
    assert sum(sockmap.refused.values()) == 1
    assert entries(splice_maps) == 0


async def test_when_all_slots_are_in_use_tunnels_go_another_way(sockmap: Sockmap) -> None:
    sockmap._free.clear()
    with Ends() as ends:
        async with running(relay_by(RelayKind.SOCKMAP), ends.client_near, ends.upstream_near) as tunnel:
            await send(ends.client, b"ping")
            assert await receive(ends.upstream, 4) == b"ping"
            ends.client.close()
            ends.upstream.close()
            report = await tunnel
    assert (report.relay, report.why) == ("copy", "no sockmap: all slots are in use")
    assert sockmap.refused == {"all slots are in use": 1}


async def test_without_the_kernels_relay_the_report_says_why() -> None:
    Engine.current().sockmap_refusal = "the self-test failed"
    with Ends() as ends:
        async with running(relay_by(RelayKind.SOCKMAP), ends.client_near, ends.upstream_near) as tunnel:
            ends.client.close()
            ends.upstream.close()
            assert (await tunnel).why == "no sockmap: the self-test failed"


@pytest.mark.parametrize("fault", ["d->next += len - 1;", "d->next += len + 1;"])
async def test_flow_that_the_kernel_cannot_follow_is_reset(tmp_path: Path, fault: str) -> None:
    """Never a clean FIN: a program that loses count, one way or the other, ends the flow on both sides."""
    for source in ("splice.c", "splice.h"):
        text = (source_dir() / source).read_text()
        assert source != "splice.c" or text.count("d->next += len;") == 1
        (tmp_path / source).write_text(text.replace("d->next += len;", fault))
    maps = SpliceMaps.load(shares=1, tunnels=4, sources=tmp_path)
    Engine.current().use_sockmap(Sockmap(maps.fds))
    with Ends() as ends:
        async with running(relay_by(RelayKind.SOCKMAP), ends.client_near, ends.upstream_near) as tunnel:
            with suppress(ConnectionError, OSError):
                for _ in range(10):
                    await send(ends.client, b"0123456789")
                    await asyncio.sleep(0.002)
                if "+ 1" in fault:  # seen at the end only, when the bytes are counted
                    ends.client.shutdown(socket.SHUT_WR)
            report = await tunnel
            with pytest.raises(ConnectionResetError):
                await receive(ends.upstream, 200)
    maps.close()
    assert report.reason is CloseReason.INTEGRITY


async def test_byte_that_passes_at_the_moment_of_the_hand_over_is_not_forgotten(
    sockmap: Sockmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has looked whether userspace watches, just before it stops to."""
    with Ends() as ends:
        watch = DirectionSlot.watch
        late = [b"late"]

        def slow_watch(slot: DirectionSlot, watching: bool) -> None:
            if not watching and slot.passed and late:
                ends.client.send(late.pop())  # over loopback the kernel's program has run when this returns
            watch(slot, watching)

        monkeypatch.setattr(DirectionSlot, "watch", slow_watch)
        async with running(relay_by(RelayKind.SOCKMAP), ends.client_near, ends.upstream_near):
            await asyncio.sleep(0.05)  # until the kernel's program watches: it tells nobody
            await send(ends.client, b"early")
            assert await receive(ends.upstream, 9) == b"earlylate"
            assert not late


WORKER = """
import asyncio, os, socket, sys, uvloop
from rama_ebpf.core.socket_stream import SocketStream
from rama_ebpf.relay import RelayKind, RelayOptions, relay
from rama_ebpf.relay.engine import Engine
from rama_ebpf.relay.sockmap import Sockmap

async def main():
    names = dict(pair.split("=") for pair in sys.argv[1].split(","))
    fds = {name: int(fd) for name, fd in names.items()}
    client, upstream = (socket.socket(fileno=int(fd)) for fd in sys.argv[2:4])
    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
    Engine.current().use_sockmap(Sockmap(fds))
    stream = SocketStream(client)
    stream.extensions.add(RelayOptions(RelayKind.SOCKMAP))
    print((await relay(stream, SocketStream(upstream))).relay)

uvloop.run(main())
"""


async def test_unprivileged_worker_needs_only_the_descriptors_and_its_death_leaves_nothing(
    splice_maps: SpliceMaps,
) -> None:
    with Ends() as ends:
        fds = ",".join(f"{name}={fd}" for name, fd in splice_maps.fds.items())
        near = [ends.client_near.fileno(), ends.upstream_near.fileno()]
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WORKER, fds, *map(str, near), pass_fds=[*splice_maps.fds.values(), *near]
        )
        ends.client_near.close()
        ends.upstream_near.close()
        for _ in range(3):
            await send(ends.client, b"ping")
            assert await receive(ends.upstream, 4) == b"ping"
        assert entries(splice_maps) == 4
        worker.kill()
        await worker.wait()
        for sock in (ends.client, ends.upstream):
            with suppress(ConnectionResetError):
                assert await receive(sock, 1) == b""
        assert entries(splice_maps) == 2, "its sockets have left the map, their cookies have not"
        Sockmap(splice_maps.fds)  # the worker that takes its place
        assert entries(splice_maps) == 0
