"""Random flows through a relay: both peers are real sockets, every byte is checked at both ends.

A :class:`Plan` is drawn from a seeded generator, so a failing flow is repeated by its seed. The bytes of a direction
are a window into one random block whose length is a prime, so that no loss, repetition or exchange of segments goes
unseen.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from rama_ebpf.core.poller import Poller
from rama_ebpf.core.socket_stream import SocketStream
from rama_ebpf.relay import RelayKind, RelayOptions, TunnelLimits, TunnelReport, relay

BLOCK_SIZE = 1_048_573
_BLOCK = random.Random(20).randbytes(BLOCK_SIZE) * 2
MAX_SIZE = 12_000_000


def expected(offset: int, count: int) -> memoryview:
    """The ``count`` (at most BLOCK_SIZE) bytes that stand at ``offset`` of every direction that starts at zero."""
    start = offset % BLOCK_SIZE
    return memoryview(_BLOCK)[start : start + count]


@dataclass(frozen=True)
class Side:
    """What one peer does. Sizes in bytes, times in seconds."""

    start: int
    """Where in the block its stream starts."""
    size: int
    writes: tuple[int, int]
    """Smallest and largest write."""
    speaks_after: int
    """It writes nothing before it has read so many bytes (-1: before it has read EOF)."""
    stall_at: int
    """It stops reading after so many bytes, for ``stall``."""
    stall: float
    reset_at: int | None
    """It resets the connection when it has written so many bytes."""


@dataclass(frozen=True)
class Plan:
    seed: int
    client: Side
    upstream: Side
    buffers: tuple[int, ...]
    """SO_SNDBUF and SO_RCVBUF of the four sockets from client to upstream, 0 for the kernel's own choice."""

    @property
    def resets(self) -> bool:
        return self.client.reset_at is not None or self.upstream.reset_at is not None


def _size(rng: random.Random, largest: int) -> int:
    kind = rng.random()
    if kind < 0.1:
        return 0
    if kind < 0.5:
        return rng.randrange(1, 5000)
    if kind < 0.95:
        return int(largest ** rng.uniform(0.5, 1.0))
    return rng.randrange(largest)


def _side(rng: random.Random, size: int, other: int, speaks_after: int, resets: bool, pause: float) -> Side:
    smallest = rng.choice([1, 64, 1000, 16_000])
    largest = max(smallest, rng.choice([64, 1500, 65_536, 500_000]))
    if size > 2000 * (smallest + largest) // 2:
        smallest, largest = size // 1000, 500_000  # not more than some thousand writes
    return Side(
        start=rng.randrange(BLOCK_SIZE),
        size=size,
        writes=(smallest, largest),
        speaks_after=speaks_after,
        stall_at=rng.randrange(other + 1),
        stall=rng.uniform(0.001, pause) if rng.random() < 0.3 else 0.0,
        reset_at=rng.randrange(size + 1) if resets else None,
    )


def plan(seed: int, *, largest: int = MAX_SIZE, pause: float = 0.3) -> Plan:
    """Draw a flow: sizes up to ``largest`` each way, stalls up to ``pause`` seconds."""
    rng = random.Random(seed)
    buffers = tuple(rng.choice([0, 0, 0, 65_536]) for _ in range(4))
    if any(buffers):
        largest //= 4  # a window below one segment of loopback waits for delayed ACKs
    up, down = _size(rng, largest), _size(rng, largest)
    order = rng.choice(["both", "client first", "server first", "after client's EOF", "after server's EOF"])
    client_after = min(down, 100) if order == "server first" else -1 if order == "after server's EOF" else 0
    upstream_after = min(up, 100) if order == "client first" else -1 if order == "after client's EOF" else 0
    who_resets = rng.choice(["client", "upstream"]) if rng.random() < 0.1 else ""
    return Plan(
        seed,
        _side(rng, up, down, client_after, who_resets == "client", pause),
        _side(rng, down, up, upstream_after, who_resets == "upstream", pause),
        buffers,
    )


class Wrong(AssertionError):
    """Bytes were lost, repeated, exchanged or cut off."""


@dataclass
class Peer:
    """Plays one side on a socket and checks what the other side sent."""

    sock: socket.socket
    me: Side
    other: Side
    reply: int = 0
    """Bytes that it waits for before it begins."""
    replied: asyncio.Event | None = None
    """Set when they have come; who waits for none waits for this."""
    received: int = 0
    sent: int = 0
    eof: bool = False
    error: OSError | None = None
    _progress: asyncio.Event = field(default_factory=asyncio.Event)

    async def play(self) -> None:
        self.sock.setblocking(False)
        try:
            if self.reply:
                await asyncio.get_running_loop().sock_recv(self.sock, self.reply)
                assert self.replied is not None
                self.replied.set()
            elif self.replied is not None:
                await self.replied.wait()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read())
                group.create_task(self._write())
        except* _Reset:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        finally:
            self.sock.close()

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        stalled = self.me.stall == 0
        buffer = memoryview(bytearray(256 * 1024))
        while True:
            if not stalled and self.received >= self.me.stall_at:
                stalled = True
                await asyncio.sleep(self.me.stall)
            try:
                count = await loop.sock_recv_into(self.sock, buffer)
            except OSError as error:
                self.error = error
                self._progress.set()
                return
            if not count:
                self.eof = True
                self._progress.set()
                return
            wanted = expected(self.other.start + self.received, count)
            if buffer[:count] != wanted:
                differ = [at for at in range(count) if buffer[at] != wanted[at]]
                changes = [(self.received + at, buffer[at] ^ wanted[at]) for at in differ[:4]]
                raise Wrong(f"{len(differ)} wrong bytes of {count} behind {self.received}, the first ones {changes}")
            self.received += count
            self._progress.set()

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        rng = random.Random(self.me.start)
        reset_at = self.me.reset_at
        end = self.me.size if reset_at is None else reset_at
        while not self._may_speak():
            if self.error is not None:
                return
            self._progress.clear()
            await self._progress.wait()
        try:
            while self.sent < end:
                count = min(rng.randint(*self.me.writes), end - self.sent)
                await loop.sock_sendall(self.sock, expected(self.me.start + self.sent, count))
                self.sent += count
            if reset_at is None:
                self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.error = error
        if reset_at is not None and self.error is None:
            raise _Reset

    def _may_speak(self) -> bool:
        after = self.me.speaks_after
        return self.eof if after < 0 else self.received >= after or self.eof


class _Reset(Exception):
    pass


def check(plan: Plan, client: Peer, upstream: Peer) -> None:
    """Raise :class:`Wrong` unless both peers saw what plain TCP would have shown them."""
    for name, peer, other in (("client", client, plan.upstream), ("upstream", upstream, plan.client)):
        complete = peer.received == other.size
        if plan.resets:
            # The one who reset sees anything; the other no FIN unless the stream was complete. (A reset is told once:
            # if its write saw it, its read then says EOF.)
            if peer.eof and peer.error is None and not complete and peer.me.reset_at is None:
                raise Wrong(f"seed {plan.seed}: {name} saw {peer.received} of {other.size} bytes and then a clean EOF")
        elif not (complete and peer.eof):
            raise Wrong(f"seed {plan.seed}: {name} saw {peer.received} of {other.size} bytes, {peer.error or 'EOF'}")


def tcp_pair(
    family: socket.AddressFamily = socket.AF_INET, listener: socket.socket | None = None
) -> tuple[socket.socket, socket.socket]:
    """Two ends of one TCP connection over loopback; to ``listener``, or one that is there for a moment."""
    with contextlib.ExitStack() as cleanup:
        if listener is None:
            listener = cleanup.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
            listener.listen()
        near = socket.socket(listener.family, socket.SOCK_STREAM)
        near.connect(listener.getsockname())
        far, _ = listener.accept()
        return near, far


Relay = Callable[[SocketStream, SocketStream], Awaitable[TunnelReport]]


def relay_by(kind: RelayKind, limits: TunnelLimits | None = None, reply: bytes = b"") -> Relay:
    async def run(client: SocketStream, upstream: SocketStream) -> TunnelReport:
        client.extensions.add(RelayOptions(kind))
        return await relay(client, upstream, limits, reply=reply)

    return run


async def run_flow(flow: Plan, relay: Relay, *, listener: socket.socket | None = None, reply: int = 0) -> TunnelReport:
    """Play ``flow`` through ``relay`` and check it; the client comes by ``listener``, and waits for ``reply`` bytes
    before both ends begin. Raises :class:`Wrong`."""
    family = socket.AF_INET if listener is None else listener.family
    (client_far, client_near), (upstream_near, upstream_far) = tcp_pair(listener=listener), tcp_pair(family)
    for sock, size in zip((client_far, client_near, upstream_near, upstream_far), flow.buffers, strict=True):
        if size:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    replied = asyncio.Event()
    client = Peer(client_far, flow.client, flow.upstream, reply=reply, replied=replied if reply else None)
    upstream = Peer(upstream_far, flow.upstream, flow.client, replied=replied if reply else None)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(client.play())
            group.create_task(upstream.play())
            tunnel = group.create_task(_relay(relay, client_near, upstream_near))
    except BaseExceptionGroup as error:
        raise Wrong(f"seed {flow.seed}: {error.exceptions}") from error
    check(flow, client, upstream)
    return tunnel.result()


async def _relay(relay: Relay, client: socket.socket, upstream: socket.socket) -> TunnelReport:
    return await relay(SocketStream(client), SocketStream(upstream))


@asynccontextmanager
async def running(
    relay: Relay, client: socket.socket, upstream: socket.socket
) -> AsyncIterator[asyncio.Task[TunnelReport]]:
    """A tunnel between two sockets for the length of a block; what is left of it at the end is cut."""
    task = asyncio.create_task(_relay(relay, client, upstream))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def open_descriptors() -> int:
    """How many descriptors this process holds, the poller's among them, after those of earlier tests' event loops were
    collected."""
    Poller.current()
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
