"""The wire relay as a worker has it: the kernel translates packets, another process holds the sockets.

A worker has no privilege to do so. It hands the two sockets of a tunnel over *before* it tells the client that it is
connected, when both legs are quiet, and says what it has to say once the pair is watched. From the acknowledgement of
that on its own TCP sees nothing more. Whatever is refused, or comes too early, goes on by another relay.

A tunnel that survives is told with its *story* (:mod:`.wire_story`). When this process ends, or lets go of it, it goes
on without an owner, until a worker adopts it: this one, too, may be given such tunnels.

docs/wire.md has the whole walk.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from ..core.address import SocketAddress
from ..core.per_loop import PerLoop
from ..core.socket_stream import SocketStream
from ..core.stream import Stream
from ..kernel.wire import PairReader
from .direction import DirectionOwner
from .host import RelayHost
from .options import RelayOptions, TunnelLimits
from .paths import Pair, Refusal
from .registry import FlowSnapshot
from .report import CloseReason, DirectionOutcome, TunnelReport
from .wire_messages import Answer, Ask, Reply, Request, receive, send
from .wire_story import Story

__all__ = ["Wire", "WireTunnel", "join"]

log = logging.getLogger(__name__)

_BEGIN_SECONDS: Final = 0.25
"""How long the other process may take until a pair is watched; later it begins nothing."""
_ANSWER_SECONDS: Final = 0.5
_DECISION_SECONDS: Final = 5.0
"""How long it may take to say whose a pair is: nobody can go on before."""
_REST_SECONDS: Final = 1.0
"""For how long it is not asked when it has not answered."""
_QUIET_SECONDS: Final = 5.0
"""How long the ends may take to acknowledge what the proxy has said."""
_MOST_OWED: Final = 16 * 1024
_QUEUE_BYTES: Final = 1 << 20
_IDLE_CHECKS: Final = 4
_NO_ANSWER: Final = "the process that holds it does not answer"
_NUMBERS: Final = (1 << 31) - 1
"""What is above is the other process's: for tunnels that it gives us."""


class WireTunnel:
    """A tunnel that the kernel translates; ``done`` is set when it has ended. ``story`` says whose it is, and whether
    it ``survives``."""

    __slots__ = (
        *("_active_at", "_final", "_limits", "_loop", "_number", "_pair", "_seen", "_started", "_timer", "_wire"),
        *("done", "source", "survives", "target", "user"),
    )

    def __init__(self, wire: Wire, number: int, pair: int, story: Story, *, survives: bool) -> None:
        self._wire = wire
        self._number = number
        self._pair = pair
        self._limits = story.limits
        self._loop = asyncio.get_running_loop()
        self._active_at = self._loop.time()
        self._started = self._active_at - (time.monotonic() - story.began)
        self._seen = 0
        self._final: tuple[int, int] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.survives = survives
        self.source: SocketAddress | None = story.source
        self.target: SocketAddress | None = story.dialled
        self.user = story.user
        self.done: asyncio.Future[CloseReason] = self._loop.create_future()
        self._check_time()

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes that the upstream, and the client, have acknowledged."""
        return self._wire.moved(self._pair) if self._final is None else self._final

    def snapshot(self) -> FlowSnapshot:
        age = self._loop.time() - self._started
        return FlowSnapshot(self.source, self.target, "wire", "configured", *self.moved, 0, age, self.user)

    def cut(self) -> None:
        self._cut(CloseReason.CUT)

    async def end(self) -> CloseReason:
        """Wait for its end."""
        return await self.done

    def report(self) -> TunnelReport:
        """Say how the tunnel went; for one that has ended."""
        reason = self.done.result()
        outcome = DirectionOutcome.EOF if reason is CloseReason.EOF else DirectionOutcome.CUT
        age = self._loop.time() - self._started
        return TunnelReport(reason, *self.moved, age, "wire", "configured", outcome, outcome)

    def let_go(self) -> None:
        """It goes on without us."""
        self.ended(CloseReason.LEFT, self.moved)

    def ended(self, reason: CloseReason, moved: tuple[int, int]) -> None:
        """It is over; both ends know."""
        if self.done.done():
            return
        self._final = moved
        if self._timer is not None:
            self._timer.cancel()
        self.done.set_result(reason)

    def _cut(self, reason: CloseReason) -> None:
        if not self.done.done():
            moved = self.moved
            self._wire.cut(self._number)
            self.ended(reason, moved)

    def _check_time(self) -> None:
        """End the tunnel if a time-out has passed; else look again when one may have."""
        limits, now, when = self._limits, self._loop.time(), None
        if limits.total is not None:
            when = self._started + limits.total
            if now >= when:
                self._cut(CloseReason.TOTAL_TIMEOUT)
                return
        if limits.idle is not None:
            moved = sum(self.moved)
            if moved != self._seen:
                self._seen, self._active_at = moved, now
            elif now >= self._active_at + limits.idle:
                self._cut(CloseReason.IDLE_TIMEOUT)
                return
            look = min(now + limits.idle / _IDLE_CHECKS, self._active_at + limits.idle)
            when = look if when is None else min(when, look)
        if when is not None:
            self._timer = self._loop.call_at(when, self._check_time)


class Wire:
    """This event loop's tunnels by the wire relay. ``refused`` counts, by reason, those that had to go another way."""

    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()
        self.refusal = "it is not set up"
        """Why there is none; empty if there is."""
        self._door: socket.socket | None = None
        self._channel: socket.socket | None = None
        self._pairs: PairReader | None = None
        self._numbers = itertools.count(1)
        self._begun: dict[int, asyncio.Queue[Reply]] = {}
        """What was heard of tunnels that are not taken over yet."""
        self._tunnels: dict[int, WireTunnel] = {}
        self._loop = asyncio.get_running_loop()
        self._rests_until = 0.0
        self._adopts: Callable[[WireTunnel, Story], None] | None = None
        self._leaves = False

    @staticmethod
    def current() -> Wire:
        """Return the one of the running event loop; the first call makes it."""
        return _current()

    def use(self, door: int, adopts: Callable[[WireTunnel, Story], None] | None = None) -> None:
        """Ask for the relay, by a descriptor of the door, which stays the caller's. ``adopts`` is called with each
        tunnel that had no owner and is ours now; without it none are asked for."""
        self._adopts = adopts
        self._door = socket.socket(fileno=os.dup(door))
        self._door.setblocking(False)
        self._connect()

    def _connect(self) -> None:
        assert self._door is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            for sock in (ours, theirs):
                sock.setblocking(False)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _QUEUE_BYTES)
            try:
                send(self._door, b"\0", (theirs.fileno(),))
            except OSError as error:
                ours.close()
                self.refusal = f"the process that holds the wire relay is not to be reached: {error.strerror}"
                return
        self.refusal = "it is not ready (rama-ebpf status says why)"
        self._channel = ours
        self._loop.add_reader(ours.fileno(), self._hear)

    def let_go(self) -> None:
        """Own nothing more that survives us, now and later: it goes on."""
        self._leaves = True
        self._ask(Ask.LET_GO, 0)
        for tunnel in list(self._tunnels.values()):
            if tunnel.survives:
                tunnel.let_go()

    def close(self) -> None:
        """Give everything up; what tunnels there are is reset by the other process, but for those that survive."""
        if self._channel is not None:
            self._loop.remove_reader(self._channel.fileno())
            self._channel.close()
            self._channel = None
        if self._pairs is not None:
            self._pairs.close()
            self._pairs = None
        if self._door is not None:
            self._door.close()
            self._door = None

    # -- take-over ---------------------------------------------------------------------------------------------------

    async def take(self, client: Stream, upstream: Stream, reply: bytes, limits: TunnelLimits) -> WireTunnel | str:
        """Have a tunnel taken over, or return why it is not; ``reply`` has been sent to the client in either case.

        Raises OSError if an end is lost; then both streams are aborted, and when the caller is cancelled.
        """
        try:
            if not (isinstance(client, SocketStream) and isinstance(upstream, SocketStream)):
                return await self._refuse(client, reply, "an end is not a plain socket")
            return await self._take(client, upstream, reply, limits)
        except BaseException:
            client.abort()
            upstream.abort()
            raise

    async def _refuse(self, client: Stream, reply: bytes, why: str) -> str:
        self.refused[f"no wire: {why}"] += 1
        if reply:
            await client.write(reply)
        return why

    async def _take(
        self, client: SocketStream, upstream: SocketStream, reply: bytes, limits: TunnelLimits
    ) -> WireTunnel | str:
        to_client, to_target = reply + upstream.buffered, client.buffered
        if self._channel is None or self._pairs is None:
            return await self._refuse(client, reply, self.refusal)
        if self._loop.time() < self._rests_until:
            return await self._refuse(client, reply, _NO_ANSWER)
        if client.is_unix or upstream.is_unix:
            return await self._refuse(client, reply, "an end is not a plain socket")
        if max(len(to_client), len(to_target)) > _MOST_OWED:
            return await self._refuse(client, reply, "it has too much to say")
        number = next(self._numbers) & _NUMBERS
        story = Story.of(client, upstream.peer, limits, len(to_client), time.monotonic())
        options = client.extensions.get(RelayOptions)
        packed = story.pack() if options is not None and options.survive else b""
        begun = self._begun[number] = asyncio.Queue()
        try:
            deadline = time.monotonic_ns() + int(_BEGIN_SECONDS * 1e9)
            request = Request(Ask.TAKE, number, (len(to_client), len(to_target)), deadline, packed)
            send(self._channel, request.pack(), (client.socket.fileno(), upstream.socket.fileno()))
            answer = await self._answer(begun, _ANSWER_SECONDS)
            if answer is None:
                raise TimeoutError
        except OSError:
            del self._begun[number]
            self._rests_until = self._loop.time() + _REST_SECONDS  # not every client is to wait for it
            self._ask(Ask.CUT, number)  # it may be watched already
            return await self._refuse(client, reply, _NO_ANSWER)
        except BaseException:
            del self._begun[number]
            self._ask(Ask.CUT, number)
            raise
        if answer.answer is not Answer.WATCHED:
            del self._begun[number]
            return await self._refuse(client, reply, answer.text or "it was cut meanwhile")
        try:
            taken = await self._wait(begun, number, client, upstream, to_client, to_target)
        except BaseException:
            del self._begun[number]
            self._ask(Ask.CUT, number)
            raise
        if not taken:
            del self._begun[number]
            return await self._refuse(client, b"", "an end spoke before it was taken over")
        tunnel = self._own(number, answer.value, story, survives=bool(packed))
        for stream in (client, upstream):
            sock, _ = stream.detach()
            sock.close()  # the other process has it, too
        del self._begun[number]
        while not begun.empty():
            self._heard(begun.get_nowait())
        if self._leaves:
            self.let_go()
        return tunnel

    def _own(self, number: int, pair: int, story: Story, *, survives: bool) -> WireTunnel:
        tunnel = self._tunnels[number] = WireTunnel(self, number, pair, story, survives=survives)
        tunnel.done.add_done_callback(lambda _: self._tunnels.pop(number, None))
        return tunnel

    async def _wait(
        self,
        begun: asyncio.Queue[Reply],
        number: int,
        client: SocketStream,
        upstream: SocketStream,
        to_client: bytes,
        to_target: bytes,
    ) -> bool:
        """Say what there is to say, and wait until the pair is taken over; false if it never will be.

        Raises OSError if an end is lost, and where nobody answers any more: then it cannot be told whose it is.
        """
        client.consume(len(client.buffered))
        upstream.consume(len(upstream.buffered))
        if to_target:
            await upstream.write(to_target)
        if to_client:
            await client.write(to_client)
        for seconds in (_QUIET_SECONDS, _DECISION_SECONDS):
            answer = await self._answer(begun, seconds)
            if answer is None:
                self._ask(Ask.GIVE_UP, number)
            elif answer.answer is Answer.TAKEN:
                return True
            elif answer.answer is Answer.SPOILED:
                return False
            else:
                raise ConnectionAbortedError(errno.ECONNABORTED, f"cut by the wire relay: {answer.text}")
        raise ConnectionAbortedError(errno.ECONNABORTED, _NO_ANSWER)

    async def _answer(self, begun: asyncio.Queue[Reply], seconds: float) -> Reply | None:
        """Return the next answer, None if there is none in time. What came in time counts, also where this process was
        held up and reads it late: the pair may be taken already, and who went another way would lose bytes."""
        try:
            async with asyncio.timeout(seconds):
                return await begun.get()
        except TimeoutError:
            if self._channel is not None:
                self._hear()
            return None if begun.empty() else begun.get_nowait()

    # -- the other process -------------------------------------------------------------------------------------------

    def cut(self, number: int) -> None:
        """Have both ends of a tunnel reset."""
        self._ask(Ask.CUT, number)

    def moved(self, pair: int) -> tuple[int, int]:
        """Bytes that a pair has moved to upstream and client."""
        return (0, 0) if self._pairs is None else self._pairs[pair].moved

    def _ask(self, ask: Ask, number: int) -> None:
        if self._channel is None:
            return
        try:
            send(self._channel, Request(ask, number).pack())
        except OSError as error:
            # It does not listen: without us all our tunnels are reset.
            log.error("the process that holds the wire relay does not listen: %s", error)
            self._lost()

    def _hear(self) -> None:
        assert self._channel is not None
        channel = self._channel
        while self._channel is channel:
            try:
                data, fds = receive(channel, 1)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            if not data:
                self._lost()
                return
            reply = Reply.unpack(data)
            if reply.answer is Answer.WELCOME:
                self._pairs = PairReader(fds[0])
                self.refusal = ""
                if self._adopts is not None and not self._leaves:
                    self._ask(Ask.ADOPT, 0)
            else:
                self._heard(reply)

    def _heard(self, reply: Reply) -> None:
        if reply.answer is Answer.ORPHAN:
            self._adopt(reply)
            return
        begun, tunnel = self._begun.get(reply.number), self._tunnels.get(reply.number)
        if begun is not None:
            begun.put_nowait(reply)
        elif tunnel is not None and reply.answer is Answer.ENDED:
            tunnel.ended(reply.reason, reply.moved)

    def _adopt(self, reply: Reply) -> None:
        if self._adopts is None or self._leaves:
            return  # we have let go of it before it was given to us
        try:
            story = Story.unpack(reply.text.encode())
        except ValueError as error:
            log.error("a tunnel cannot be adopted, its story makes no sense: %s", error)
            self._ask(Ask.CUT, reply.number)
            return
        self._adopts(self._own(reply.number, reply.value, story, survives=True), story)

    def _lost(self) -> None:
        """The other process is no more, and the kernel translates no more with it: the stack resets what comes."""
        assert self._channel is not None
        self._loop.remove_reader(self._channel.fileno())
        self._channel.close()
        self._channel = None
        for begun in self._begun.values():
            begun.put_nowait(Reply(Answer.REFUSED, text=_NO_ANSWER))
        for tunnel in list(self._tunnels.values()):
            tunnel.ended(CloseReason.ERROR, tunnel.moved)
        if self._pairs is not None:
            self._pairs.close()
            self._pairs = None
        self._connect()


_current: Final = PerLoop(Wire)


def join(_host: RelayHost, _owner: DirectionOwner, _pair: Pair, /) -> Refusal:
    """Say why not: a tunnel that gets here has been seen by somebody since it was connected."""
    return Refusal("something looks into the tunnel")
