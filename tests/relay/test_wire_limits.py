"""What bounds tunnels of the wire relay, and a worker that breaks its protocol."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from rama_ebpf.control.wire import WireRelay
from rama_ebpf.core.socket_stream import SocketStream
from rama_ebpf.kernel.privileges import CAP_BPF, CAP_NET_ADMIN, UserIds
from rama_ebpf.process import Nursery
from rama_ebpf.relay import CloseReason, RelayKind, TunnelLimits, TunnelReport, tunnels
from rama_ebpf.relay.wire import Wire
from rama_ebpf.relay.wire_messages import Answer, Ask, Reply, Request, receive, send

from ..lab import PATIENCE
from .flows import relay_by, tcp_pair
from .wire_relay import an_instance, wire_relay

pytestmark = [pytest.mark.root, pytest.mark.ebpf]


@pytest.fixture
async def listener() -> AsyncIterator[socket.socket]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock


@pytest.fixture
async def held(listener: socket.socket) -> AsyncIterator[WireRelay]:
    async with wire_relay(listener) as relay:
        yield relay


async def tunnel(
    listener: socket.socket, limits: TunnelLimits, act: Callable[[socket.socket, socket.socket], None]
) -> TunnelReport:
    """A tunnel that was taken over, with which ``act`` is called; return how it ended.

    A busy machine makes one of two hand-shakes last many times longer than the other: then it is refused, and another
    is tried.
    """
    for _ in range(20):
        report = await _tunnel(listener, limits, act)
        if report.relay == "wire":
            break
    return report


async def _tunnel(
    listener: socket.socket, limits: TunnelLimits, act: Callable[[socket.socket, socket.socket], None]
) -> TunnelReport:
    (client, accepted), (near, target) = tcp_pair(listener=listener), tcp_pair()
    loop = asyncio.get_running_loop()
    with client, target:
        for sock in (client, target):
            sock.setblocking(False)
        relay = relay_by(RelayKind.WIRE, limits, b"reply")
        task = asyncio.create_task(_run(relay(SocketStream(accepted), SocketStream(near))))
        assert await loop.sock_recv(client, 100) == b"reply"
        await loop.sock_sendall(client, b"first")
        assert await loop.sock_recv(target, 100) == b"first"
        async with asyncio.timeout(20):
            while not (len(tunnels) or task.done()):  # noqa: ASYNC110  nobody tells
                await asyncio.sleep(0.01)
            act(client, target)
            report = await task
        for sock in (client, target):
            with pytest.raises(ConnectionResetError):
                await loop.sock_recv(sock, 1)
    return report


async def _run(running: object) -> TunnelReport:
    report = await running  # type: ignore[misc]
    assert isinstance(report, TunnelReport)
    return report


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (TunnelLimits(idle=0.2), CloseReason.IDLE_TIMEOUT),
        (TunnelLimits(idle=None, total=0.3), CloseReason.TOTAL_TIMEOUT),
    ],
    ids=["idle", "total"],
)
async def test_time_outs_reset_both_ends(
    held: WireRelay, listener: socket.socket, limits: TunnelLimits, reason: CloseReason
) -> None:
    report = await tunnel(listener, limits, lambda client, target: None)
    assert (report.relay, report.reason, report.to_upstream) == ("wire", reason, 5)


async def test_process_that_hangs_is_done_without_and_found_again(held: WireRelay, listener: socket.socket) -> None:
    assert held.pid is not None
    os.kill(held.pid, signal.SIGSTOP)
    try:
        (client, accepted), (near, target) = tcp_pair(listener=listener), tcp_pair()
        relay, loop = relay_by(RelayKind.WIRE, TunnelLimits(), b"reply"), asyncio.get_running_loop()
        with client, target:
            for sock in (client, target):
                sock.setblocking(False)
            task = asyncio.create_task(_run(relay(SocketStream(accepted), SocketStream(near))))
            assert await loop.sock_recv(client, 100) == b"reply"
            await loop.sock_sendall(client, b"first")
            assert await loop.sock_recv(target, 100) == b"first"
        report = await task
        assert (report.relay, report.why) == ("copy", "no wire: the process that holds it does not answer")
    finally:
        os.kill(held.pid, signal.SIGCONT)
    wire = Wire.current()
    async with asyncio.timeout(20):
        while asyncio.get_running_loop().time() < wire._rests_until:  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.05)
    report = await tunnel(listener, TunnelLimits(), lambda client, target: tunnels.cut(lambda flow: True) and None)
    assert report.relay == "wire"


async def test_cut_from_outside_resets_both_ends(held: WireRelay, listener: socket.socket) -> None:
    report = await tunnel(listener, TunnelLimits(), lambda client, target: tunnels.cut(lambda flow: True) and None)
    assert (report.relay, report.reason) == ("wire", CloseReason.CUT)


def status_of(pid: int | None) -> dict[str, str]:
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return dict(line.split(":", 1) for line in text.splitlines())


async def test_process_that_holds_it_keeps_two_capabilities(held: WireRelay) -> None:
    status = status_of(held.pid)
    both = 1 << CAP_BPF | 1 << CAP_NET_ADMIN
    assert [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")] == [
        both,
        both,
        0,
        0,
        0,
    ]
    assert (status["NoNewPrivs"].strip(), status["Seccomp"].strip()) == ("1", "2")
    assert "0" not in status["Uid"].split()


async def test_host_that_lacks_something_is_refused_by_name(listener: socket.socket, tmp_path: Path) -> None:
    """A compiler without headers stands for whatever a kernel may lack."""
    refused = asyncio.Event()
    async with Nursery() as nursery:
        instance = an_instance()
        relay = WireRelay(
            instance,
            nursery,
            lambda: [],
            workers=1,
            user=UserIds.of_workers(),
            kernel_headers=tmp_path / "none",
            on_change=lambda: relay.status.state == "refused" and refused.set(),
        )
        wire = Wire.current()
        wire.use(relay.descriptors(wanted=True)["wire"])
        try:
            async with asyncio.timeout(60 * PATIENCE):
                await refused.wait()
            assert "BCC failed" in relay.status.why
            (client, accepted), (near, target) = tcp_pair(listener=listener), tcp_pair()
            with client, target:
                task = asyncio.create_task(
                    _run(relay_by(RelayKind.WIRE, None, b"reply")(SocketStream(accepted), SocketStream(near)))
                )
                client.setblocking(False)
                assert await asyncio.get_running_loop().sock_recv(client, 100) == b"reply"
            report = await task
            assert (report.relay, report.why) == ("copy", "no wire: it is not ready (rama-ebpf status says why)")
        finally:
            wire.close()
            relay.close()
    shutil.rmtree(instance.run_dir)


async def test_worker_that_breaks_the_protocol_loses_its_tunnels_and_nobody_else_does(
    held: WireRelay, listener: socket.socket
) -> None:
    """One process can have one channel: so another process is a hostile worker here."""
    door = held.descriptors(wanted=True)["wire"]
    pid = os.fork()
    if not pid:
        os._exit(_hostile(door))
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    report = await tunnel(listener, TunnelLimits(), lambda client, target: tunnels.cut(lambda flow: True) and None)
    assert report.relay == "wire"
    assert not Wire.current().refusal


def _hostile(door: int) -> int:
    """Say one wrong thing on each of several channels; return 0 if each was closed for it, or refused."""
    entry = socket.socket(fileno=os.dup(door))
    null = os.open("/dev/null", os.O_RDONLY)
    unconnected, unix = socket.socket(), socket.socketpair()[0]
    send(entry, b"no socket", (null,))
    send(entry, b"nothing at all")
    closes = [(b"", ()), (b"x", ()), (b"\xff" * 21, ()), (Request(Ask.TAKE, 1).pack(), (null, null)), (bytes(600), ())]
    for message, fds in closes[1:]:
        ours = _channel(entry)
        send(ours, message, fds)
        if receive(ours, 1)[0]:
            return 1
    for pair in ((unconnected, unconnected), (unix, unix)):
        ours = _channel(entry)
        send(ours, Request(Ask.TAKE, 7, (1 << 30, 0)).pack(), (pair[0].fileno(), pair[1].fileno()))
        if Reply.unpack(receive(ours, 1)[0]).answer is not Answer.REFUSED:
            return 2
        for number in (7, 8):
            send(ours, Request(Ask.CUT, number).pack())
            send(ours, Request(Ask.GIVE_UP, number).pack())
    return 0


def _channel(entry: socket.socket) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(20)
    with theirs:
        send(entry, b"\0", (theirs.fileno(),))
    data, fds = receive(ours, 1)
    assert Reply.unpack(data).answer is Answer.WELCOME
    for fd in fds:
        os.close(fd)
    return ours
