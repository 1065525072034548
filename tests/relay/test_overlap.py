"""Segments that no operating system sends on request: every relay is exact or resets, and never silently wrong."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from rama_ebpf.core.socket_stream import SocketStream
from rama_ebpf.kernel.abi import source_dir
from rama_ebpf.kernel.splice import SpliceMaps
from rama_ebpf.relay import RelayKind
from rama_ebpf.relay.engine import Engine
from rama_ebpf.relay.sockmap import Sockmap
from rama_ebpf.relay.synthetic import SegmentPlan, Wire, segment_plan

from ..namespace import network_namespace
from .flows import expected, relay_by, tcp_pair

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

US, THEM = IPv4Address("198.18.0.1"), IPv4Address("198.18.0.2")
NEAR_MAC, FAR_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"
AT_ONCE = 40
KINDS = ["clean", "overlapping", "reordered"]

Serve = Callable[[socket.socket, asyncio.Event], Awaitable[bytes]]
"""Take an accepted socket to its end, set the event when the first bytes have come out behind it, and return them all.
Raises ConnectionError for a reset."""


@contextlib.contextmanager
def segments_on_veth() -> Iterator[None]:
    """A network namespace with a veth pair to whose one end segments can be sent."""
    with network_namespace(
        "link add near type veth peer name far",
        f"addr add {US}/24 dev near",
        f"link set near up address {NEAR_MAC}",
        f"link set far up address {FAR_MAC}",
        f"neigh add {THEM} lladdr {FAR_MAC} dev near",
    ):
        yield


@pytest.fixture
def veth() -> Iterator[None]:
    with segments_on_veth():
        yield


async def outcomes(serve: Serve, count: int, seed: str) -> Counter[str]:
    """Play ``count`` synthetic connections to ``serve``, and count what became of them."""
    loop = asyncio.get_running_loop()
    wire = Wire("far", bytes.fromhex(NEAR_MAC.replace(":", "")), THEM, US)
    rng = random.Random(seed)
    turn = asyncio.Semaphore(AT_ONCE)
    seen: Counter[str] = Counter()
    arrived: dict[int, asyncio.Event] = {}
    served: dict[int, asyncio.Task[bytes]] = {}

    async def accept(listener: socket.socket) -> None:
        while True:
            sock, (_, port) = await loop.sock_accept(listener)
            served[port] = asyncio.ensure_future(serve(sock, arrived[port]))

    async def one(plan: SegmentPlan, start: int, port: int) -> None:
        stream = bytes(expected(start, plan.size))
        async with turn:
            local = wire.reserve()
            arrived[local] = asyncio.Event()
            connection = await wire.connect(port, local)
            await connection.play(plan, stream, arrived[local])
            try:
                seen["exact" if await served[local] == stream else "silently wrong"] += 1
            except ConnectionError:
                seen["reset"] += 1
            connection.close()

    with socket.socket() as listener, contextlib.closing(wire):
        listener.bind((str(US), 0))
        listener.listen(256)
        listener.setblocking(False)
        accepting = asyncio.create_task(accept(listener))
        port = listener.getsockname()[1]
        plans = [segment_plan(rng, rng.choice(KINDS)) for _ in range(count)]
        await asyncio.gather(*(one(plan, rng.randrange(1 << 20), port) for plan in plans))
        accepting.cancel()
    return seen


async def read_all(sock: socket.socket, arrived: asyncio.Event) -> bytes:
    loop = asyncio.get_running_loop()
    sock.setblocking(False)
    data = bytearray()
    with sock:
        while chunk := await loop.sock_recv(sock, 65536):
            data += chunk
            arrived.set()
    return bytes(data)


def through(kind: RelayKind, used: Counter[str]) -> Serve:
    """Relay the connection to a socket of ours, and read there; count which relay it was in ``used``."""
    relay = relay_by(kind)

    async def serve(sock: socket.socket, arrived: asyncio.Event) -> bytes:
        near, far = tcp_pair()
        reading = asyncio.create_task(read_all(far, arrived))
        report = await relay(SocketStream(sock), SocketStream(near))
        used[report.relay] += 1
        return await reading

    return serve


async def test_plain_tcp_is_the_reference(veth: None) -> None:
    assert await outcomes(read_all, 300, "reference") == {"exact": 300}


@pytest.mark.parametrize("kind", [RelayKind.COPY, RelayKind.SPLICE])
async def test_user_space_relays_are_exact(veth: None, kind: RelayKind) -> None:
    assert await outcomes(through(kind, Counter()), 300, f"overlap {kind}") == {"exact": 300}


async def test_sockmap_is_exact(veth: None, splice_maps: SpliceMaps) -> None:
    Engine.current().use_sockmap(Sockmap(splice_maps.fds))
    used: Counter[str] = Counter()
    assert await outcomes(through(RelayKind.SOCKMAP, used), 2000, "overlap sockmap") == {"exact": 2000}
    assert used == {"sockmap": 2000}


@pytest.mark.parametrize("counted", [True, False])
async def test_without_the_guard_streams_are_corrupted(
    veth: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: bool
) -> None:
    """The fuzz sees what the guard is for: the same program without it corrupts streams. The comparison with TCP's
    own count at the end notices that, and resets; without it too it is silent."""
    guard = "duplicate = d->next - seq;"
    for source in ("splice.c", "splice.h"):
        text = (source_dir() / source).read_text()
        assert source != "splice.c" or text.count(guard) == 1
        (tmp_path / source).write_text(text.replace(guard, "duplicate = 0;"))
    if not counted:
        monkeypatch.setattr("rama_ebpf.relay.sockmap.SYNCED", 0)
    maps = SpliceMaps.load(shares=1, tunnels=64, sources=tmp_path)
    try:
        Engine.current().use_sockmap(Sockmap(maps.fds))
        seen = await outcomes(through(RelayKind.SOCKMAP, Counter()), 100, "no guard")
    finally:
        maps.close()
    assert seen["reset" if counted else "silently wrong"] >= 10
    assert seen["silently wrong" if counted else "reset"] == 0
