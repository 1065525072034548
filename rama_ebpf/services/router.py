"""One port for several protocols: looking at a client's first bytes and handing the stream, still unread, on.

The routes' matchers (:mod:`.protocols`) are asked in order and a later one is not heard while an earlier one still
cannot tell, so that the outcome depends on the bytes alone and not on how they were cut into segments.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final

from ..core.at_once import AtOnce, Session, Visit, at_once_of
from ..core.blame import speaks_another_protocol
from ..core.client import client_address
from ..core.errors import HandshakeTimeout, PeerClosed, ProtocolError
from ..core.first_bytes import FirstBytes, Refused
from ..core.service import Service, check_fit, needs_of_all
from ..core.shares import Held, ShareExceeded, SourceShare
from ..core.stream import MAX_UNREAD, Stream
from .protocols import PeekMatcher, is_http, is_socks, is_tls
from .refusal import TurnAway

__all__ = ["PeekMatcher", "PeekRouter", "is_http", "is_socks", "is_tls"]


_LEFT: Final = Refused("peer_closed", "closed without a word", reset=True)
_STRAY: Final = Refused("wrong_protocol", "the first bytes are of no protocol that is served here", reset=True)
_NOISE: Final = Refused("protocol", "the first bytes are of no protocol that is served here", reset=True)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """An extension: what ``router`` has chosen in callbacks, by bytes that may have been used since."""

    router: PeekRouter
    service: Service[Stream, Any]


class PeekRouter:
    """A service that hands a stream, with every byte unread, to the first route whose matcher says yes::

        PeekRouter((is_socks, Socks5Server(connector)), (is_http, proxy), fallback=refuse)

    What no matcher takes goes to ``fallback``, and so does, with ``fail_open``, what could not be told: a client that
    is silent for ``timeout`` seconds or ends its stream before (as one does that waits for the server to speak
    first), or ``limit`` bytes on which a matcher still has not decided. Otherwise these raise
    :class:`HandshakeTimeout`, :class:`PeerClosed` and :class:`ProtocolError`. ``undecided`` bounds how many clients of
    one source may leave it open at a time; what is above that is turned away (:class:`ShareExceeded`).
    """

    accepts = Stream

    def __init__(
        self,
        *routes: tuple[PeekMatcher, Service[Stream, Any]],
        fallback: Service[Stream, Any] | None = None,
        fail_open: bool = False,
        timeout: float = 10.0,
        limit: int = 1024,
        undecided: SourceShare | None = None,
    ) -> None:
        if not routes:
            raise ValueError("a router needs at least one route")
        if fail_open and fallback is None:
            raise ValueError("fail_open needs a fallback")
        if timeout <= 0:
            raise ValueError(f"timeout must be positive, not {timeout}")
        if not 1 <= limit <= MAX_UNREAD:
            raise ValueError(f"limit must be 1-{MAX_UNREAD} bytes, not {limit}")
        services = [service for _, service in routes] + ([] if fallback is None else [fallback])
        for service in services:
            check_fit(self, Stream, service)
        self.needs = needs_of_all(services)
        self._routes = routes
        self._fallback = fallback
        self._fail_open = fail_open
        self._timeout = timeout
        self._limit = limit
        self._undecided = SourceShare(Held.HANDSHAKES, 0) if undecided is None else undecided
        self._turn_away = TurnAway()
        # With these first bytes nothing that follows makes a difference: no matcher takes back what it has decided.
        self._noise = frozenset(
            byte
            for byte in range(256)
            if not speaks_another_protocol(bytes((byte,)))
            and all(matcher(bytes((byte,))) is False for matcher, _ in routes)
        )
        self.first_bytes = FirstBytes(self._refuse_beforehand) if fallback is None else None
        self.at_once = AtOnce(self, self._begin) if type(self).__call__ is PeekRouter.__call__ else None

    def _refuse_beforehand(self, data: bytes) -> Refused | None:
        if not data:
            return _LEFT
        if data[0] in self._noise:
            return _NOISE
        for matcher, _service in self._routes:
            if matcher(data) is not False:
                return None
        return _STRAY if speaks_another_protocol(data) else _NOISE

    def _begin(self, visit: Visit) -> Session | None:
        stream = visit.stream
        service = self._ask(stream.buffered) if stream.buffered else None
        if service is not None:
            stream.extensions.add(_Chosen(self, service))
            way = at_once_of(service)
            if way is not None:
                return visit.into(way)
        visit.take_over()
        return None

    async def __call__(self, stream: Stream, /) -> Any:
        try:
            service = await self._choose(stream)
        except (HandshakeTimeout, PeerClosed, ProtocolError):
            if self._fallback is None or not self._fail_open:
                raise
            service = self._fallback
        return await service(stream)

    async def _choose(self, stream: Stream) -> Service[Stream, Any]:
        for chosen in stream.extensions.all(_Chosen):
            if chosen.router is self:
                return chosen.service
        if stream.buffered and (verdict := self._ask(stream.buffered)) is not None:
            return verdict
        client = client_address(stream)
        try:
            with self._undecided.hold(None if client is None else client.ip):
                async with asyncio.timeout(self._timeout):
                    return await self._read_on(stream)
        except TimeoutError as error:
            raise HandshakeTimeout(f"protocol not clear within {self._timeout} s") from error
        except ShareExceeded as error:
            await self._turn_away(stream, error.retry_after)
            raise

    async def _read_on(self, stream: Stream) -> Service[Stream, Any]:
        while True:
            if len(stream.buffered) >= self._limit:
                raise ProtocolError(f"protocol not clear from {self._limit} bytes")
            if not await stream.fill(self._limit):
                raise PeerClosed(f"client closed after {len(stream.buffered)} bytes, its protocol not clear")
            verdict = self._ask(stream.buffered)
            if verdict is not None:
                return verdict

    def _ask(self, data: bytes) -> Service[Stream, Any] | None:
        """Return where the stream goes, None if more bytes are needed."""
        for matcher, service in self._routes:
            verdict = matcher(data)
            if verdict is None:
                return None
            if verdict:
                return service
        if self._fallback is None:
            kind = "wrong_protocol" if speaks_another_protocol(data) else None
            raise ProtocolError(f"first bytes {data[:8].hex(' ')} are of no protocol that is served here", kind=kind)
        return self._fallback
