"""One port for several protocols: looking at a client's first bytes and handing the stream, still unread, on.

A matcher is asked about the bytes that have come so far and answers True (it is this protocol), False (it is not) or
None (more bytes are needed). The routes are asked in order and a later one is not heard while an earlier one still
cannot tell, so that the outcome depends on the bytes alone and not on how they were cut into segments.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any, Final

from ..core.blame import speaks_another_protocol
from ..core.errors import HandshakeTimeout, PeerClosed, ProtocolError
from ..core.service import Service
from ..core.stream import MAX_UNREAD, Stream

__all__ = ["PeekMatcher", "PeekRouter", "is_http", "is_socks", "is_tls"]

PeekMatcher = Callable[[bytes], bool | None]

_METHOD: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,24} ")
_METHOD_START: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{0,24}")


def is_socks(data: bytes) -> bool | None:
    """SOCKS4, SOCKS4a or SOCKS5: the first byte is the version."""
    return data[0] in (4, 5) if data else None


def is_tls(data: bytes) -> bool | None:
    """A TLS record of a handshake (RFC 8446 section 5.1): type 22 and a legacy version of major number 3."""
    if not b"\x16\x03".startswith(data[:2]):
        return False
    return True if len(data) >= 2 else None


def is_http(data: bytes) -> bool | None:
    """A method and a space (RFC 9112 section 3), empty lines before it ignored (section 2.2); HTTP/2's preface too."""
    data = data.lstrip(b"\r\n")
    if _METHOD.match(data):
        return True
    return None if _METHOD_START.fullmatch(data) else False


class PeekRouter:
    """A service that hands a stream, with every byte unread, to the first route whose matcher says yes::

        PeekRouter((is_socks, Socks5Server(connector)), (is_http, proxy), fallback=refuse)

    What no matcher takes goes to ``fallback``, and so does, with ``fail_open``, what could not be told: a client that
    is silent for ``timeout`` seconds or ends its stream before (as one does that waits for the server to speak
    first), or ``limit`` bytes on which a matcher still has not decided. Otherwise these raise
    :class:`HandshakeTimeout`, :class:`PeerClosed` and :class:`ProtocolError`.
    """

    accepts = Stream

    def __init__(
        self,
        *routes: tuple[PeekMatcher, Service[Stream, Any]],
        fallback: Service[Stream, Any] | None = None,
        fail_open: bool = False,
        timeout: float = 10.0,
        limit: int = 1024,
    ) -> None:
        if not routes:
            raise ValueError("a router needs at least one route")
        if fail_open and fallback is None:
            raise ValueError("fail_open needs a fallback")
        if timeout <= 0:
            raise ValueError(f"timeout must be positive, not {timeout}")
        if not 1 <= limit <= MAX_UNREAD:
            raise ValueError(f"limit must be 1-{MAX_UNREAD} bytes, not {limit}")
        self._routes = routes
        self._fallback = fallback
        self._fail_open = fail_open
        self._timeout = timeout
        self._limit = limit

    async def __call__(self, stream: Stream, /) -> Any:
        try:
            service = await self._choose(stream)
        except (HandshakeTimeout, PeerClosed, ProtocolError):
            if self._fallback is None or not self._fail_open:
                raise
            service = self._fallback
        return await service(stream)

    async def _choose(self, stream: Stream) -> Service[Stream, Any]:
        try:
            async with asyncio.timeout(self._timeout):
                while True:
                    verdict = self._ask(stream.buffered)
                    if verdict is not None:
                        return verdict
                    if len(stream.buffered) >= self._limit:
                        raise ProtocolError(f"protocol not clear from {self._limit} bytes")
                    if not await stream.fill(self._limit):
                        raise PeerClosed(f"client closed after {len(stream.buffered)} bytes, its protocol not clear")
        except TimeoutError as error:
            raise HandshakeTimeout(f"protocol not clear within {self._timeout} s") from error

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
