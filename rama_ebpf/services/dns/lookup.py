"""One caller's look-up of one name: addresses as they arrive."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Self

from ...core.address import IPAddress

__all__ = ["RESOLUTION_DELAY", "Lookup"]

RESOLUTION_DELAY: Final = 0.05
"""Seconds for which the addresses of one family wait for those of the other (RFC 8305 section 3)."""


class Lookup:
    """Addresses of a name as they arrive: those of one family may be there long before those of the other.

    A context manager: whoever leaves it does not wait any more, and a look-up that nobody waits for is dropped.
    ``leave`` is called then, once.
    """

    def __init__(self, known: Iterable[IPAddress] = (), *, ended: bool = False) -> None:
        self.addresses: list[IPAddress] = list(known)
        self.ended = ended
        self.leave: Callable[[Lookup], None] | None = None
        self._error: BaseException | None = None
        self._taken = 0
        self._news = asyncio.Event()

    @classmethod
    def failed(cls, error: BaseException) -> Lookup:
        """Return one that has ended with ``error``."""
        lookup = cls(ended=True)
        lookup._error = error
        return lookup

    def add(self, addresses: Iterable[IPAddress]) -> None:
        """For resolvers: these have arrived."""
        fresh = [address for address in addresses if address not in self.addresses]
        if fresh:
            self.addresses += fresh
            self._news.set()

    def end(self, error: BaseException | None = None) -> None:
        """For resolvers: nothing more arrives. ``error`` is raised to the caller if nothing has arrived at all."""
        self.ended, self._error = True, error
        self._news.set()

    @property
    def outcome(self) -> str:
        """One word for metrics: ``answered``, ``dropped``, or the kind of the error."""
        if self._error is not None and not self.addresses:
            return str(getattr(self._error, "kind", "error"))
        return "answered" if self.addresses or self.ended else "dropped"

    async def more(self) -> Sequence[IPAddress]:
        """Return addresses that were not returned yet, as soon as there are any; nothing at the end.

        Raises the error of the look-up if no address has arrived at all.
        """
        while self._taken == len(self.addresses) and not self.ended:
            self._news.clear()
            await self._news.wait()
        fresh = self.addresses[self._taken :]
        self._taken = len(self.addresses)
        if not self.addresses and self._error is not None:
            raise self._error
        return fresh

    async def all(self) -> list[IPAddress]:
        """Return every address, IPv6 first. Once there are some, others have a moment left to arrive
        (:data:`RESOLUTION_DELAY`). Raises like :meth:`more`."""
        await self.more()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RESOLUTION_DELAY):
                while await self.more():
                    pass
        return sorted(self.addresses, key=lambda ip: -ip.version)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        leave, self.leave = self.leave, None
        if leave is not None:
            leave(self)
