"""Connections that are served in callbacks: from accept to the end of a tunnel without a task (docs/lane.md).

A service that can serve a connection so has an attribute ``at_once``, an :class:`AtOnce`;
:func:`~rama_ebpf.core.service.stack` hands it outwards through layers that have a method ``enter``. A server that finds
it makes a :class:`Visit` of each connection instead of a task. Whatever has to wait, or goes wrong, is a task's: the
visit is taken over, the service is called as it would have been, and its layers and itself go on from where the
callbacks have stopped. So there is one statement of how things end, and the callbacks know the plain way only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from .client import HasExtensions
from .poller import Poller
from .shortcut import shortcut_of
from .socket_stream import SocketStream
from .wheel import WheelTimer

__all__ = [
    "NOTHING",
    "AtOnce",
    "Begun",
    "Enter",
    "Entered",
    "Session",
    "Visit",
    "VisitHost",
    "at_once_of",
    "entered_by",
]


log = logging.getLogger(__name__)


class Entered(Protocol):
    """What a layer keeps of one connection."""

    def leave(self, error: BaseException | None, /) -> None:
        """The connection has ended, with ``error`` or in order. Called once, by the visit or by the layer's own
        coroutine. Must not raise."""


class _Nothing:
    __slots__ = ()

    def leave(self, error: BaseException | None, /) -> None:
        """Nothing is kept."""


NOTHING: Final[Entered] = _Nothing()
"""For a layer that keeps nothing."""


class Session(Protocol):
    """What a service does for one visit, in callbacks."""

    def expired(self) -> None:
        """The time of :meth:`Visit.start_clock` is up."""

    def stop(self) -> None:
        """Do nothing more: a task takes over. What was begun goes to the stream's extensions, bytes that were read and
        not used back into the stream."""

    def cut(self) -> None:
        """Abort everything (TCP: RST), and let the visit end."""


Begin = Callable[["Visit"], Session | None]
"""Returns None if a task has taken over, or it is over."""
Enter = Callable[["Visit"], Entered]


@dataclass(frozen=True, slots=True)
class AtOnce:
    """How ``service`` serves a connection in callbacks: ``begin`` makes a session of a visit, and may do the first of
    its work; ``layers`` are those around it and how each is entered, the outermost first. ``takes``, if given, says of
    the bytes that a client begins with whether it is worth a try.

    It is of that very service: one that only looks like it, as functools.wraps() makes them, is not passed by.
    """

    service: object
    begin: Begin
    takes: Callable[[bytes], bool] | None = None
    layers: tuple[tuple[object, Enter], ...] = ()

    def inside(self, layer: object, composed: object) -> AtOnce | None:
        """Return the same for ``composed``, which ``layer`` has made around the service, None if the layer cannot be
        entered in callbacks."""
        enter: Enter | None = shortcut_of(layer, "enter")
        return None if enter is None else replace(self, service=composed, layers=((layer, enter), *self.layers))


def at_once_of(service: object) -> AtOnce | None:
    """Return how a service serves in callbacks, None if it does not."""
    found = getattr(service, "at_once", None)
    return found if isinstance(found, AtOnce) and found.service is service else None


@dataclass(frozen=True, slots=True)
class Begun:
    """An extension: what layers have entered before a task took over."""

    entered: list[tuple[object, Entered]] = field(default_factory=list)


def entered_by(input: HasExtensions, layer: object) -> Entered | None:
    """Return what ``layer`` has entered in callbacks, for its coroutine to go on with; None if there were none."""
    begun = input.extensions.get(Begun)
    if begun is not None:
        for index, (who, found) in enumerate(begun.entered):
            if who is layer:
                del begun.entered[index]
                return found
    return None


class VisitHost(Protocol):
    """The server that a visit is to."""

    @property
    def poller(self) -> Poller: ...

    @property
    def clock(self) -> WheelTimer[Visit]: ...

    def take_over(self, visit: Visit) -> None:
        """Call the service, in a task."""

    def ended(self, visit: Visit) -> None: ...


class Visit:
    """One connection that is served in callbacks."""

    __slots__ = ("_clock", "_entered", "_error", "_host", "over", "poller", "session", "slot", "stream")

    def __init__(self, host: VisitHost, stream: SocketStream) -> None:
        self._host = host
        self._clock = host.clock
        self.poller = host.poller
        """That of the running loop."""
        self._entered: list[tuple[object, Entered]] = []
        self._error: BaseException | None = None
        self.slot: int | None = None
        self.stream = stream
        self.session: Session | None = None
        self.over = False
        """Whether callbacks have nothing more to do: it has ended, or a task has taken over."""

    @property
    def error(self) -> BaseException | None:
        """What it ends with: that of :meth:`cut`, None in order."""
        return self._error

    def begin(self, way: AtOnce) -> None:
        """Enter the layers, and begin."""
        try:
            session = self.into(way)
        except Exception:  # noqa: BLE001 - the coroutine meets it as well, and tells it in order
            self.take_over()
        else:
            if not self.over:
                self.session = session

    def into(self, way: AtOnce) -> Session | None:
        """Enter the layers of ``way``, and begin: for a service that hands the visit on. Raises what they raise."""
        for layer, enter in way.layers:
            self._entered.append((layer, enter(self)))
        return way.begin(self)

    def start_clock(self, seconds: float) -> None:
        """The session has so many seconds, or a tenth more; an earlier clock is forgotten."""
        if self.slot is not None:
            self._clock.remove(self)
        self._clock.add(self, self.poller.loop.time() + seconds)

    def stop_clock(self) -> None:
        """It has all the time it wants."""
        if self.slot is not None:
            self._clock.remove(self)

    def check_time(self, _now: float, /) -> None:
        """The clock has run down."""
        if self.session is not None and not self.over:
            self.session.expired()

    def take_over(self) -> None:
        """Let a task go on. Idempotent; does nothing after the end."""
        if self.over:
            return
        self.over = True
        self.stop_clock()
        if self.session is not None:
            self.session.stop()
        if self._entered:
            self.stream.extensions.add(Begun(self._entered))
        self._host.take_over(self)

    def end(self) -> None:
        """The connection has ended in order, or by :meth:`cut`, and its sockets are closed."""
        if self.over:
            return
        self.over = True
        self.stop_clock()
        self.session = None
        for layer, entered in reversed(self._entered):
            try:
                entered.leave(self._error)
            except Exception:
                log.exception(
                    "layer %r failed at the end of a connection", layer
                )  # the others have theirs all the same
        self._host.ended(self)

    def cut(self, why: str) -> None:
        """Abort it. ``why`` is what its log line will say."""
        if self.over:
            return
        self._error = asyncio.CancelledError(why)
        if self.session is None:
            self.stream.abort()
            self.end()
        else:
            self.session.cut()
