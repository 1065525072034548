"""Queues that take turns: each source has its own, and none has to wait for another's flood."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["Turns"]

T = TypeVar("T")


class Turns(Generic[T]):
    """Items by source; :meth:`take` goes round the sources. At most ``most`` items wait."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lines: OrderedDict[Hashable, deque[T]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, source: Hashable, item: T) -> T | None:
        """Queue ``item``. Where all places are taken, return the newest item of the source that has most waiting, which
        waits no longer."""
        line = self._lines.get(source)
        if line is None:
            line = self._lines[source] = deque()
        line.append(item)
        self._count += 1
        if self._count <= self._most:
            return None
        crowd = max(self._lines, key=lambda one: len(self._lines[one]))
        return self._from(crowd, newest=True)

    def take(self) -> T:
        """Return the oldest item of the source whose turn it is. Raises StopIteration if nothing waits."""
        source = next(iter(self._lines))
        self._lines.move_to_end(source)
        return self._from(source, newest=False)

    def _from(self, source: Hashable, *, newest: bool) -> T:
        line = self._lines[source]
        item = line.pop() if newest else line.popleft()
        self._count -= 1
        if not line:
            del self._lines[source]
        return item
