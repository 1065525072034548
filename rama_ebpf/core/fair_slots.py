"""A bound on what runs at once, shared fairly: each source has its share and its own queue, and queues take turns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

__all__ = ["FairSlots", "Ticket"]


class Ticket:
    """A wish to run. ``start`` is called once, at once or later; :meth:`end` must be called when it is over."""

    __slots__ = ("_slots", "running", "source", "start")

    def __init__(self, slots: FairSlots, source: Hashable, start: Callable[[Ticket], None]) -> None:
        self._slots = slots
        self.source = source
        self.start = start
        self.running = False

    def end(self) -> None:
        """Give the slot to the next, or leave the queue. Idempotent."""
        self._slots._end(self)


class FairSlots:
    """At most ``total`` run at once, at most ``share`` of one source, and at most ``waiting`` of one source wait.

    A source of None (nobody in particular: the server's own work) is bound by ``total`` only. 0 means no bound.
    Everything is one callback of the event loop; nothing here waits.
    """

    def __init__(self, total: int, share: int, waiting: int) -> None:
        self._total = total or 1 << 62
        self._share = share or 1 << 62
        self._waiting = waiting
        self._running: dict[Hashable, int] = {}
        self._count = 0
        self._queues: OrderedDict[Hashable, OrderedDict[Ticket, None]] = OrderedDict()

    def request(self, source: Hashable, start: Callable[[Ticket], None]) -> Ticket | None:
        """Start at once if there is room, else queue. Returns None, and never starts, if the source's queue is full."""
        ticket = Ticket(self, source, start)
        if self._has_room(source):
            self._run(ticket)
            return ticket
        queue = self._queues.setdefault(source, OrderedDict())
        if len(queue) >= self._waiting:
            return None
        queue[ticket] = None
        return ticket

    def _has_room(self, source: Hashable) -> bool:
        return self._count < self._total and (source is None or self._running.get(source, 0) < self._share)

    def _run(self, ticket: Ticket) -> None:
        ticket.running = True
        self._count += 1
        self._running[ticket.source] = self._running.get(ticket.source, 0) + 1
        ticket.start(ticket)

    def _end(self, ticket: Ticket) -> None:
        source = ticket.source
        if not ticket.running:
            queue = self._queues.get(source)
            if queue is not None:
                queue.pop(ticket, None)
                if not queue:
                    del self._queues[source]
            return
        ticket.running = False
        self._count -= 1
        left = self._running[source] - 1
        if left:
            self._running[source] = left
        else:
            del self._running[source]
        for candidate in list(self._queues):
            if self._count >= self._total:
                break
            if self._has_room(candidate):
                queue = self._queues[candidate]
                following, _ = queue.popitem(last=False)
                if queue:
                    self._queues.move_to_end(candidate)  # the next turn is another source's
                else:
                    del self._queues[candidate]
                self._run(following)
