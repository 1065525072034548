"""Time-outs of a connection: its handshake, its silence and its age, live tunnels included."""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from ..core.at_once import Entered, Visit, entered_by
from ..core.errors import HandshakeTimeout, IdleTimeout, TotalTimeout
from ..core.first_bytes import FirstBytes
from ..core.lifecycle import Lifecycle, Stage
from ..core.service import Output, Service
from ..core.stream import Stream
from ..relay.options import TunnelLimits

__all__ = ["TimeoutLayer"]


_SAY_SECONDS: Final = 0.5
"""So much sooner than it is cut a protocol may end a handshake by itself."""
_SAY_PART: Final = 0.1
"""At most this part of the handshake's time."""
_FOREVER: Final = 365 * 86400.0


class TimeoutLayer:
    """Bounds a connection in time; every argument is seconds, None means no bound.

    ``handshake``: from the call until the protocol says that it is established (:class:`Lifecycle`); a service
    without a handshake wants None here. ``idle``: no byte in either direction, from then on. ``total``: age since
    the call. Once the connection is a tunnel the relay enforces idle and total, with what is left of the total.

    Raises :class:`HandshakeTimeout`, :class:`IdleTimeout` or :class:`TotalTimeout`; a relay that ran into its limits
    says so in its report instead.
    """

    accepts = Stream

    def __init__(
        self, handshake: float | None = 10.0, *, idle: float | None = 300.0, total: float | None = None
    ) -> None:
        for name, seconds in (("handshake", handshake), ("idle", idle), ("total", total)):
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{name} must be above 0 seconds or None, not {seconds}")
        self.handshake = handshake
        self.idle = idle
        self.total = total

    def first_bytes(self, inner: FirstBytes | None) -> FirstBytes | None:
        """First bytes are judged as inside: what is refused by them needs nothing of this layer."""
        return inner

    def __call__(self, inner: Service[Stream, Output], /) -> Service[Stream, Output]:
        async def serve(stream: Stream, /) -> Output:
            watch = entered_by(stream, self) or _Watch(self, stream)
            assert isinstance(watch, _Watch)
            timeout = asyncio.timeout(None)
            try:
                async with timeout:
                    watch.begin(timeout)
                    return await inner(stream)
            except TimeoutError as error:
                if timeout.expired() and watch.error is not None:
                    raise watch.error from error
                raise
            finally:
                watch.leave(None)

        return serve

    def enter(self, visit: Visit) -> Entered:
        """In callbacks (:mod:`rama_ebpf.core.at_once`); whoever is late is the coroutine's."""
        watch = _Watch(self, visit.stream)
        watch.begin(_Alarm(visit))
        return watch


class _Clock(Protocol):
    """What ends a connection at a time of the loop: an :class:`asyncio.Timeout`, or an :class:`_Alarm`."""

    def when(self) -> float | None: ...

    def reschedule(self, when: float | None) -> None: ...

    def expired(self) -> bool: ...


class _Alarm:
    """Has a task take over at a time of the loop, which finds that the time has come."""

    __slots__ = ("_timer", "_visit")

    def __init__(self, visit: Visit) -> None:
        self._visit = visit
        self._timer: asyncio.TimerHandle | None = None

    def when(self) -> float | None:
        """When it is due."""
        return None if self._timer is None else self._timer.when()

    def reschedule(self, when: float | None) -> None:
        """Be due then, or never."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if when is None else self._visit.poller.loop.call_at(when, self._visit.take_over)

    def expired(self) -> bool:
        """Never: it does not end anything itself."""
        return False


class _Watch:
    """One connection's deadlines: a single clock that is moved as the connection goes through its stages."""

    def __init__(self, layer: TimeoutLayer, stream: Stream) -> None:
        self._layer = layer
        self._stream = stream
        self._lifecycle = Lifecycle.of(stream.extensions)
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._moved = -1
        self._moved_at = self._started
        self._idle_timer: asyncio.TimerHandle | None = None
        self._stopped = False
        self._left: float | None = None
        self.error: Exception | None = None
        self._timeout: _Clock | None = None

    def begin(self, timeout: _Clock) -> None:
        """Let ``timeout`` end the connection: from the start, or from where another one has stood."""
        before, self._timeout = self._timeout, timeout
        if before is not None:
            timeout.reschedule(before.when())
            before.reschedule(None)
            return
        layer, lifecycle = self._layer, self._lifecycle
        lifecycle.watch(self._reached)
        lifecycle.watch_owed(self._owe)
        if lifecycle.stage is Stage.ACCEPTED and layer.handshake is not None:
            self._expire_at(self._started + layer.handshake, HandshakeTimeout(f"no handshake in {layer.handshake} s"))
        else:
            self._established()

    def leave(self, _error: BaseException | None, /) -> None:
        """It has ended."""
        self._stopped = True
        if isinstance(self._timeout, _Alarm):
            self._timeout.reschedule(None)
        if self._idle_timer is not None:
            self._idle_timer.cancel()

    def _expire_at(self, when: float, error: Exception) -> None:
        # The total bounds every stage: whatever else is due, it is due no later.
        total = self._layer.total
        if total is not None and self._started + total <= when:
            when, error = self._started + total, TotalTimeout(f"connection lived for {total} s")
        self.error = error
        if isinstance(error, HandshakeTimeout) and self._layer.handshake is not None:
            self._lifecycle.due = when - min(_SAY_SECONDS, self._layer.handshake * _SAY_PART)
        assert self._timeout is not None
        self._timeout.reschedule(None if when == float("inf") else when)

    def _owe(self, owed: bool) -> None:
        """Stop the clock of the handshake while the client waits for us."""
        assert self._timeout is not None
        if self._stopped or self._timeout.expired() or not isinstance(self.error, HandshakeTimeout):
            return
        now = self._loop.time()
        when = self._timeout.when()
        if owed and when is not None:
            self._left = max(when - now, 0.0)
            self._expire_at(now + _FOREVER, self.error)
        elif not owed and self._left is not None:
            self._expire_at(now + self._left, self.error)
            self._left = None

    def _reached(self, stage: Stage) -> None:
        assert self._timeout is not None
        if self._stopped or self._timeout.expired():
            return
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if stage is Stage.TUNNEL:
            self._hand_over()
        else:
            self._established()

    def _established(self) -> None:
        self._expire_at(float("inf"), TotalTimeout(""))
        if self._layer.idle is not None:
            self._check_idle()

    def _check_idle(self) -> None:
        # A few looks at the counters per idle period instead of a timer that every byte moves: a silent connection is
        # cut after 1 to 1.25 periods.
        idle, now = self._layer.idle, self._loop.time()
        assert idle is not None
        moved = self._stream.bytes_received + self._stream.bytes_sent
        if moved != self._moved:
            self._moved, self._moved_at = moved, now
        elif now - self._moved_at >= idle:
            self._expire_at(now, IdleTimeout(f"no byte moved for {idle} s"))
            return
        self._idle_timer = self._loop.call_later(idle / 4, self._check_idle)

    def _hand_over(self) -> None:
        """From here on the relay counts, because it alone knows what moves inside the kernel."""
        assert self._timeout is not None
        self._timeout.reschedule(None)
        layer, extensions = self._layer, self._stream.extensions
        left = None if layer.total is None else max(self._started + layer.total - self._loop.time(), 0.001)
        limits = TunnelLimits(idle=layer.idle, total=left)
        earlier = extensions.get(TunnelLimits)
        if earlier is not None:
            limits = TunnelLimits(_least(limits.idle, earlier.idle), _least(limits.total, earlier.total))
        extensions.add(limits)


def _least(a: float | None, b: float | None) -> float | None:
    return a if b is None else b if a is None else min(a, b)
