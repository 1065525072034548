"""A coarse timer wheel: thousands of time-outs behind one timer of the event loop."""

from __future__ import annotations

from typing import Generic, TypeVar

__all__ = ["TimerWheel"]

T = TypeVar("T")


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
        self._slots.setdefault(slot, set()).add(item)
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
