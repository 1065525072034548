"""Requests, responses and bodies: what HTTP services take and return, whatever version of HTTP carries them.

A service is ``async def app(request: Request) -> Response``. Neither message holds fields that belong to one
connection: Host, Content-Length, Transfer-Encoding, Connection and all that it nominates are the business of the
connection that carries the message (:mod:`..h1`, :mod:`..h2`). What they mean is in
attributes: :attr:`Request.authority`, :attr:`Body.length`, :attr:`Request.upgrade`.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from ....core.address import Authority
from ....core.errors import LimitExceeded
from ....core.extensions import Extensions
from ....core.stream import Stream
from .headers import Headers
from .uri import DEFAULT_PORTS, parse_authority

__all__ = ["Body", "BodyTooLarge", "Inform", "Request", "Response", "Upgrade"]

Inform = Callable[[int, Headers], Awaitable[None]]
"""Sends an interim (1xx) response to the client."""


class BodyTooLarge(LimitExceeded):
    """A body has more bytes than its reader allows."""

    kind = "body_too_large"


class Body(abc.ABC):
    """The content of a message, read once, chunk by chunk, at the reader's pace: what is not read is not fetched.

    ``length`` is the number of bytes the body has in all, None if that is known only at its end. ``trailers`` is
    set once the end is reached.
    """

    length: int | None = None
    trailers: Headers | None = None
    expects_continue: bool = False
    """The sender waits for 100 (Continue) before it sends the body; the first read sends it."""

    @property
    def ready(self) -> bool:
        """Whether :meth:`next` would return bytes without waiting."""
        return False

    def take_whole(self) -> bytes | None:
        """Return all that is left, if all of it is here and no trailers follow; else None, and nothing is taken."""
        return None

    @property
    def movable(self) -> int:
        """How many bytes :meth:`splice_to` may move: 0 unless the rest is plain bytes on a socket, of known length."""
        return 0

    def splice_to(self, pipe: int) -> int:
        """Move up to :attr:`movable` bytes into an empty pipe; return how many, 0 if :meth:`next` is to be asked."""
        return 0

    @abc.abstractmethod
    async def next(self) -> bytes:
        """Return the next 1.. bytes, or b"" at the end, then and ever after.

        Raises an error (ProtocolError, OSError, TimeoutError) if the body breaks off: a body that ends with b"" is
        complete.
        """

    async def close(self) -> None:
        """Give up what is left. Idempotent; a body that was read to its end needs no close."""
        return None

    async def read(self, limit: int) -> bytes:
        """Return the whole rest. Raises :class:`BodyTooLarge` if it has more than ``limit`` bytes."""
        if self.length is not None and self.length > limit:
            raise BodyTooLarge(f"a body of {self.length} bytes, at most {limit} are allowed")
        parts: list[bytes] = []
        size = 0
        while chunk := await self.next():
            size += len(chunk)
            if size > limit:
                raise BodyTooLarge(f"a body of more than {limit} bytes")
            parts.append(chunk)
        return b"".join(parts)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while chunk := await self.next():
            yield chunk

    @staticmethod
    def empty() -> Body:
        """A body of no bytes."""
        return _Bytes(b"")

    @staticmethod
    def of(data: bytes) -> Body:
        """A body of these bytes."""
        return _Bytes(data)

    @staticmethod
    def stream(
        chunks: AsyncIterator[bytes], length: int | None = None, close: Callable[[], Awaitable[None]] | None = None
    ) -> Body:
        """A body that an async iterator produces as it is read. ``length``, if given, must turn out to be true;
        ``close`` is awaited when the body is given up before its end."""
        return _Streamed(chunks, length, close)


class _Bytes(Body):
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.length = len(data)

    @property
    def ready(self) -> bool:
        return bool(self._data)

    def take_whole(self) -> bytes | None:
        if self.trailers is not None:
            return None
        data, self._data = self._data, b""
        return data

    async def next(self) -> bytes:
        data, self._data = self._data, b""
        return data


class _Streamed(Body):
    def __init__(
        self, chunks: AsyncIterator[bytes], length: int | None, close: Callable[[], Awaitable[None]] | None
    ) -> None:
        self._chunks = chunks
        self._close = close
        self._done = False
        self.length = length

    async def next(self) -> bytes:
        while not self._done:
            try:
                chunk = await anext(self._chunks)
            except StopAsyncIteration:
                self._done = True
                break
            if chunk:
                return chunk
        return b""

    async def close(self) -> None:
        if not self._done:
            self._done = True
            if self._close is not None:
                await self._close()


class Upgrade(Protocol):
    """What takes over a connection (h2: a stream) once the response that switches protocols has been sent."""

    async def run(self, client: Stream) -> None:
        """Speak the new protocol on ``client``; when this returns the connection is over."""

    def abandon(self) -> None:
        """The client has gone before :meth:`run`: free what is held. Idempotent; also called after run."""


@dataclass(slots=True)
class Request:
    """A request.

    ``authority`` is the host (and port, unless it is the scheme's default) as the client named it, "" if an HTTP/1.0
    client named none. ``path`` begins with ``/`` and includes the query; it is ``*`` for OPTIONS of a whole server
    and "" for CONNECT. ``absolute`` tells that the client named scheme and host in the target, as one does to a
    proxy (absolute-form; in HTTP/2 always). ``scheme`` is that of the target; ``connection_scheme`` is "https" if the
    client's connection is TLS: they differ only in what is asked of a forward proxy. ``upgrade`` is the protocol that
    the client asks to switch to, in lower case, also for RFC 8441 over h2. ``accepts_trailers`` is ``TE: trailers``.
    ``extensions`` is a fork of the connection's.
    """

    method: str
    authority: str
    path: str
    headers: Headers = field(default_factory=Headers)
    body: Body = field(default_factory=Body.empty)
    scheme: str = "http"
    version: str = "1.1"
    absolute: bool = False
    connection_scheme: str = ""
    upgrade: str | None = None
    accepts_trailers: bool = False
    extensions: Extensions = field(default_factory=Extensions)
    inform: Inform | None = None
    """Sends an interim (1xx) response to the client; None where the client's version has none (HTTP/1.0)."""

    @property
    def arrived_by(self) -> str:
        """The scheme of the client's connection: what servers behind are told of it (RFC 7239 section 5.4)."""
        return self.connection_scheme or self.scheme

    @property
    def target(self) -> Authority:
        """Host and port of :attr:`authority`, with the scheme's default port. Raises ValueError if there is none."""
        return parse_authority(self.authority, DEFAULT_PORTS.get(self.scheme))

    @property
    def url(self) -> str:
        """The absolute URI; for CONNECT the authority."""
        if self.method == "CONNECT":
            return self.authority
        return f"{self.scheme}://{self.authority}{'' if self.path == '*' else self.path}"


@dataclass(slots=True)
class Response:
    """A response. ``status`` is 200–599, or 101 with ``upgrade``.

    ``upgrade`` answers CONNECT (with a 2xx status) or an upgrade (with 101): it gets the client's stream after the
    header section was sent. ``length_if_known`` is the Content-Length of a response without a body whose request was
    HEAD, or of a 304. ``close`` makes the response the last one on its connection.
    """

    status: int
    headers: Headers = field(default_factory=Headers)
    body: Body = field(default_factory=Body.empty)
    reason: str = ""
    version: str = "1.1"
    upgrade: Upgrade | None = None
    length_if_known: int | None = None
    close: bool = False
    extensions: Extensions = field(default_factory=Extensions)

    @staticmethod
    def text(status: int, text: str, content_type: str = "text/plain; charset=utf-8") -> Response:
        """A response with a body of text."""
        return Response(status, Headers([("Content-Type", content_type)]), Body.of(text.encode()))
