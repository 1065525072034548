"""How many handshakes may be under way at once, altogether and of one source."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Hashable

from ...core.client import client_address, source_prefix
from ...core.errors import LimitExceeded
from ...core.shares import Held, SourceShare
from ...core.stream import Stream

__all__ = ["HandshakeLimit"]


class HandshakeLimit:
    """Admits at most ``most`` handshakes, and of one source as many as ``share`` lets in.

    Who finds all places taken gets that of the source which has most of them, if that is more than its own: a few
    sources cannot shut out the others. Else it is refused at once, for to wait in line would only hold more sockets.
    """

    def __init__(self, most: int, share: SourceShare | None = None) -> None:
        if most < 1:
            raise ValueError(f"the number of handshakes must be at least 1, not {most}")
        self._most = most
        self._share = SourceShare(Held.HANDSHAKES, 0) if share is None else share
        self._places: dict[Hashable, list[asyncio.Timeout]] = {}
        self.live = 0

    @contextlib.asynccontextmanager
    async def hold(self, stream: Stream) -> AsyncIterator[None]:
        """Hold a place for the client of ``stream``.

        Raises :class:`~rama_ebpf.core.shares.ShareExceeded` or :class:`LimitExceeded` at once where there is none,
        and LimitExceeded out of the body when its place is given to another.
        """
        client = client_address(stream)
        source = None if client is None else source_prefix(client.ip)
        with self._share.hold(None if client is None else client.ip):
            if self.live >= self._most:
                self._make_room(source)
            self.live += 1
            places = self._places.setdefault(source, [])
            clock = asyncio.timeout(None)
            places.append(clock)
            try:
                async with clock:
                    yield
            except TimeoutError as error:
                if clock.expired():
                    raise LimitExceeded("this TLS handshake had to give its place to another source") from error
                raise
            finally:
                # One that has lost its place is in the list no more.
                if clock in places:
                    self._leave(source, places, clock)

    def _make_room(self, source: Hashable) -> None:
        mine = len(self._places.get(source, ()))
        victim, places = max(self._places.items(), key=lambda item: len(item[1]))
        if len(places) <= mine + 1:
            raise LimitExceeded(f"{self.live} TLS handshakes are under way")
        oldest = places[0]
        self._leave(victim, places, oldest)
        oldest.reschedule(0)

    def _leave(self, source: Hashable, places: list[asyncio.Timeout], clock: asyncio.Timeout) -> None:
        places.remove(clock)
        self.live -= 1
        if not places:
            del self._places[source]
