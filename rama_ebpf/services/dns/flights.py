"""One look-up a name, whoever asks; each source with its fair share; dropped when nobody waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Hashable, Iterable
from typing import Any, Final

from ...core.address import IPAddress
from ...core.errors import Busy
from ...core.fair_slots import FairSlots, Ticket
from .errors import ResolveTimeout
from .lookup import Lookup

__all__ = ["Deliver", "Flights", "Observe", "Work"]

Deliver = Callable[[Iterable[IPAddress]], None]
Work = Callable[[str, Deliver], Coroutine[Any, Any, None]]
Observe = Callable[[str, float], None]
"""Called with the outcome of each look-up and its seconds."""


class _Flight:
    """A name in hand. ``tickets`` are the callers' wishes to run it; the first that gets a slot does."""

    def __init__(self) -> None:
        self.tickets: dict[Lookup, Ticket | None] = {}
        self.holder: Ticket | None = None
        self.task: asyncio.Task[None] | None = None
        self.addresses: list[IPAddress] = []


class Flights:
    """Does ``work`` for names that are asked for: once for all that ask for a name at the same time.

    ``work`` delivers addresses as they arrive, and raises :class:`~.errors.ResolveError` if there are none. Each
    caller waits for at most ``timeout`` seconds, its time in the queue of ``slots`` included. Work is cancelled when
    its last caller has left; what is not ``stoppable`` keeps its slot until it has ended.
    """

    def __init__(
        self, work: Work, slots: FairSlots, *, timeout: float, stoppable: bool, observe: Observe | None = None
    ) -> None:
        self._work = work
        self._slots = slots
        self._timeout = timeout
        self._stoppable = stoppable
        self._observe: Final[Observe] = observe or (lambda _outcome, _seconds: None)
        self._flights: dict[str, _Flight] = {}

    def join(self, name: str, source: Hashable) -> Lookup:
        """Return the look-up of ``name`` for ``source``; it fails with :class:`Busy` if the queue is full."""
        flight = self._flights.setdefault(name, _Flight())
        lookup = Lookup(flight.addresses)
        flight.tickets[lookup] = None
        if flight.task is None:
            # Also where another source waits with this name for its turn: ours may come sooner.
            ticket = self._slots.request(source, lambda ticket: self._start(name, flight, ticket))
            if ticket is None:
                self._remove(name, flight, lookup)
                self._observe("busy", 0.0)
                return Lookup.failed(Busy(f"too many names are being looked up: no room for {name!r}"))
            flight.tickets[lookup] = ticket
        started = time.monotonic()
        timer = asyncio.get_running_loop().call_later(self._timeout, self._expire, name, flight, lookup)

        def leave(left: Lookup) -> None:
            timer.cancel()
            self._observe(left.outcome, time.monotonic() - started)
            self._remove(name, flight, left)

        lookup.leave = leave
        return lookup

    def close(self) -> None:
        """Drop everything in hand."""
        for flight in list(self._flights.values()):
            if flight.task is not None:
                flight.task.cancel()

    def _start(self, name: str, flight: _Flight, ticket: Ticket) -> None:
        if flight.task is not None:  # another source's turn came first, and there is nothing left to do
            asyncio.get_running_loop().call_soon(ticket.end)
            return

        def deliver(addresses: Iterable[IPAddress]) -> None:
            flight.addresses += addresses
            for lookup in flight.tickets:
                lookup.add(flight.addresses)

        flight.holder = ticket
        flight.task = asyncio.get_running_loop().create_task(self._work(name, deliver))
        flight.task.add_done_callback(lambda task: self._finished(name, flight, task))

    def _finished(self, name: str, flight: _Flight, task: asyncio.Task[None]) -> None:
        if self._flights.get(name) is flight:
            del self._flights[name]
        failure = ResolveTimeout("the resolver is closed") if task.cancelled() else task.exception()
        for lookup in flight.tickets:
            lookup.end(failure)
        assert flight.holder is not None
        flight.holder.end()

    def _expire(self, name: str, flight: _Flight, lookup: Lookup) -> None:
        if flight.task is None:
            lookup.end(Busy(f"too many names are being looked up: {name!r} had no turn within {self._timeout:g} s"))
        else:
            lookup.end(ResolveTimeout(f"no answer for {name!r} within {self._timeout:g} s"))

    def _remove(self, name: str, flight: _Flight, lookup: Lookup) -> None:
        ticket = flight.tickets.pop(lookup)
        if ticket is not None and ticket is not flight.holder:
            ticket.end()
        if flight.tickets or (flight.task is not None and not self._stoppable):
            return
        if self._flights.get(name) is flight:
            del self._flights[name]
        if flight.task is not None:
            flight.task.cancel()
