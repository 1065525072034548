"""Bodies that come over HTTP/1.1, taken from their connection as they are read."""

from __future__ import annotations

import asyncio
import logging
from typing import Final, Protocol

from ..exchange.pace import Pace
from ..message.errors import HttpError, MalformedMessage
from ..message.limits import HttpTimeouts
from ..message.model import Body
from .heads import RequestHead, ResponseHead
from .reader import NEED_DATA, Content, End, Event

__all__ = ["NO_BODY", "RequestBody", "ResponseBody"]

log = logging.getLogger(__name__)

_DRAIN: Final = 64 * 1024
"""How many bytes of a body that the service did not want are read to keep the connection."""


class _Carrier(Protocol):
    """The connection of a body."""

    @property
    def movable(self) -> int: ...

    def splice_to(self, pipe: int) -> int: ...

    async def read_content(self, pace: Pace) -> Content | End: ...


class _Sender(_Carrier, Protocol):
    """The client's connection."""

    continued: bool

    async def send_continue(self) -> None: ...


class _Receiver(_Carrier, Protocol):
    """The upstream's connection."""

    @property
    def complete(self) -> bool: ...

    @property
    def released(self) -> bool: ...

    def receive_content(self, data: bytes) -> None: ...

    def next_content(self) -> Event: ...

    async def finish(self) -> None: ...

    async def abort(self) -> None: ...


class _PacedBody(Body):
    """What bodies of both directions share: the kernel may move their bytes, and the pace is of all bytes."""

    _connection: _Carrier
    _pace: Pace

    def splice_to(self, pipe: int) -> int:
        try:
            count = self._connection.splice_to(pipe)
        except OSError:
            return 0  # next() will meet it too, and can wait
        self._pace.received += count
        return count


class RequestBody(_PacedBody):
    """A request's body, taken from the connection as it is read; without a ``head`` there is none."""

    def __init__(self, connection: _Sender, head: RequestHead | None, timeouts: HttpTimeouts) -> None:
        self._connection: _Sender = connection
        self._pace = Pace(timeouts, client=True)
        self._done = head is None
        self._error: Exception | None = None
        self.length = 0 if head is None else head.length
        self.expects_continue = head is not None and head.expects_continue

    @property
    def movable(self) -> int:
        return 0 if self._done or self._error is not None or self._unasked else self._connection.movable

    async def next(self) -> bytes:
        if self._error is not None:
            raise self._error
        if self._done:
            return b""
        if self.expects_continue:
            await self._connection.send_continue()
        try:
            event = await self._connection.read_content(self._pace)
        except TimeoutError as error:
            self._error = HttpError(408, "the request's body did not come in time", close=True)
            raise self._error from error
        except (MalformedMessage, OSError) as error:
            self._error = error
            raise
        if isinstance(event, Content):
            return event.data
        self._done = True
        self.trailers = event.trailers
        return b""

    @property
    def over(self) -> bool:
        """Whether all of it was read."""
        return self._done

    @property
    def worth_draining(self) -> bool:
        """Whether the connection may live on though the service has not read all of the body: the rest is short. Of
        a chunked one nobody knows."""
        if self._done:
            return True
        if self._error is not None or self._unasked or self.length is None:
            return False
        return self.length - self._pace.received <= _DRAIN

    @property
    def _unasked(self) -> bool:
        # A client that was never told to continue may send its body or may not: nobody knows what comes next.
        return self.expects_continue and not self._connection.continued

    async def drain(self, timeout: float) -> None:
        """Read and drop a short rest."""
        if not self.worth_draining:
            return
        start = self._pace.received
        try:
            async with asyncio.timeout(timeout):
                while not self._done and self._pace.received - start <= _DRAIN:
                    await self.next()
        except (HttpError, TimeoutError, OSError) as error:
            log.debug("the rest of a body could not be dropped: %s", error)


class _Nobody:
    """Who sends no body; it is never asked."""

    movable = 0
    continued = True

    def splice_to(self, pipe: int) -> int:
        return 0

    async def read_content(self, pace: Pace) -> Content | End:
        return End(None)

    async def send_continue(self) -> None:
        return None


NO_BODY: Final = RequestBody(_Nobody(), None, HttpTimeouts())
"""The body of a request that has none; it refers to no connection."""


class ResponseBody(_PacedBody):
    """A response's body; ``content`` is the whole of it where that was read already."""

    def __init__(
        self, connection: _Receiver, head: ResponseHead, timeouts: HttpTimeouts, content: bytes | None = None
    ) -> None:
        self._connection: _Receiver = connection
        self._pace = Pace(timeouts, client=False)
        self._ahead = Content(content) if content else None
        self._over = content is not None
        self._error: Exception | None = None
        self.length = head.length

    @classmethod
    async def begin(cls, connection: _Receiver, head: ResponseHead, timeouts: HttpTimeouts) -> ResponseBody:
        """Look at what came with the header section: a short body is over at once, and its connection free."""
        body = cls(connection, head, timeouts)
        body.look()
        await body.settle()
        return body

    def look(self) -> bool:
        """Take what has come of it; return whether that was all. :meth:`settle` belongs behind it."""
        try:
            event = self._connection.next_content()
            if isinstance(event, Content):
                self._ahead = event
                self._pace.received += len(event.data)
                event = self._connection.next_content() if self._connection.complete else NEED_DATA
        except MalformedMessage as error:
            self._broke(error)
            return False
        if isinstance(event, End):
            self._over = True
            self.trailers = event.trailers
        return self._over

    @property
    def over(self) -> bool:
        """Whether nothing more will be read of it; it may have broken off."""
        return self._over

    @property
    def failed(self) -> bool:
        """Whether it has broken off."""
        return self._error is not None

    def broke_off(self, error: OSError) -> None:
        """The upstream was lost."""
        self._broke(error)

    def take_ahead(self) -> bytes:
        """Take what was read of it and not asked for yet."""
        ahead, self._ahead = self._ahead, None
        return b"" if ahead is None else ahead.data

    def take(self, data: bytes) -> list[bytes]:
        """Take ``data`` that came from the upstream, b"" at its end, and return the content in it. Afterwards it may be
        :attr:`over`."""
        pieces: list[bytes] = []
        try:
            self._connection.receive_content(data)
            while isinstance(event := self._connection.next_content(), Content):
                self._pace.received += len(event.data)
                pieces.append(event.data)
        except MalformedMessage as error:
            self._broke(error)
            return pieces
        if isinstance(event, End):
            self._over = True
            self.trailers = event.trailers
        return pieces

    async def settle(self) -> None:
        """Free the connection of a body that is over."""
        if self._error is not None:
            await self._connection.abort()
        elif self._over and not self._connection.released:
            await self._connection.finish()

    def _broke(self, error: Exception) -> None:
        self._over = True
        self._error = HttpError(502, f"the upstream's response broke off: {error}", close=True)
        self._error.__cause__ = error

    def take_whole(self) -> bytes | None:
        if not self._over or self._error is not None or self.trailers:
            return None
        ahead, self._ahead = self._ahead, None
        return b"" if ahead is None else ahead.data

    @property
    def ready(self) -> bool:
        return self._ahead is not None

    @property
    def movable(self) -> int:
        return 0 if self._over or self._ahead is not None else self._connection.movable

    async def next(self) -> bytes:
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            return ahead.data
        if self._error is not None:
            raise self._error
        event = None if self._over else await self._read()
        if self._error is not None:
            raise self._error
        return event.data if isinstance(event, Content) else b""

    async def _read(self) -> Content | End | None:
        try:
            event = await self._connection.read_content(self._pace)
        except (MalformedMessage, OSError) as error:
            self._broke(error)
            await self._connection.abort()
            return None
        if isinstance(event, Content):
            self._pace.received += len(event.data)
        elif isinstance(event, End):
            self._over = True
            self.trailers = event.trailers
            await self._connection.finish()
        return event

    async def close(self) -> None:
        if not self._over:
            self._over = True
            await self._connection.abort()
