"""A coarse timer wheel: thousands of time-outs behind one timer of the event loop."""

from __future__ import annotations

import asyncio
import logging
from typing import Generic, Protocol, TypeVar

from .poller import Poller

__all__ = ["Timed", "TimerWheel", "WheelTimer"]

log = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U", bound="Timed")


class TimerWheel(Generic[T]):
    """Items by the time at which they are due, rounded up to whole slots of ``resolution`` seconds.

    Adding and removing cost one set operation each. The caller supplies the clock: every time here is in seconds of
    whatever monotonic clock it uses.
    """

    def __init__(self, resolution: float) -> None:
        self.resolution = resolution
        self._slots: dict[int, set[T]] = {}

    def add(self, item: T, when: float) -> int:
        """Make ``item`` due at ``when``, up to one slot later but never earlier; return the slot for :meth:`remove`."""
        slot = int(when / self.resolution) + 1
        items = self._slots.get(slot)
        if items is None:
            self._slots[slot] = {item}
        else:
            items.add(item)
        return slot

    def remove(self, item: T, slot: int) -> None:
        """Forget ``item``. Does nothing if it has come due already."""
        items = self._slots.get(slot)
        if items is not None:
            items.discard(item)
            if not items:
                del self._slots[slot]

    def take_due(self, now: float) -> list[T]:
        """Remove and return every item that is due at ``now``, earliest slot first."""
        due: list[T] = []
        for slot in sorted(slot for slot in self._slots if slot * self.resolution <= now):
            due.extend(self._slots.pop(slot))
        return due

    def next_due(self) -> float | None:
        """Return when the earliest slot is due, None if the wheel is empty."""
        return min(self._slots) * self.resolution if self._slots else None


class Timed(Protocol):
    """An item of a :class:`WheelTimer`. Whoever makes it sets ``slot`` to None, and leaves it alone then."""

    slot: int | None

    def check_time(self, now: float, /) -> float | None:
        """The time that was asked for has come; ``now`` is that of the loop. Return when to be called again, None for
        never."""


class WheelTimer(Generic[U]):
    """A wheel with the one timer that it needs of the event loop of ``poller``."""

    def __init__(self, poller: Poller, resolution: float) -> None:
        self._poller = poller
        self._wheel: TimerWheel[U] = TimerWheel(resolution)
        self._timer: asyncio.TimerHandle | None = None
        self._when = 0.0

    def add(self, item: U, when: float) -> None:
        """Let ``item`` check its time at ``when``, a time of the loop, or up to a slot later."""
        item.slot = self._wheel.add(item, when)
        if self._timer is None or when < self._when:
            self._arm()

    def remove(self, item: U) -> None:
        """Forget ``item``, if it is there."""
        if item.slot is not None:
            self._wheel.remove(item, item.slot)
            item.slot = None

    def stop(self) -> None:
        """Let the timer go; nothing is in the wheel."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self.stop()
        when = self._wheel.next_due()
        if when is not None:
            self._when = when
            self._timer = self._poller.loop.call_at(when, self._look)

    def _look(self) -> None:
        self._timer = None
        now = self._poller.loop.time()
        for item in self._wheel.take_due(now):
            if item.slot is None:
                continue  # an earlier one has ended it
            item.slot = None
            try:
                again = item.check_time(now)
            except Exception:
                log.exception("%r failed when its time had come", item)  # the others' time has come as well
                continue
            if again is not None:
                item.slot = self._wheel.add(item, again)
        if self._timer is None:
            self._arm()
