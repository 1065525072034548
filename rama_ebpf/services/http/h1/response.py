"""Sending responses over HTTP/1.1: whether the connection lives on behind them, and as few writes as will do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ....core.errors import PeerClosed
from ....core.stream import Stream
from ..message.headers import Headers
from ..message.limits import HttpTimeouts
from ..message.model import Body, Response
from .body import NO_BODY, RequestBody
from .bulk import move, worth_moving
from .heads import RequestHead
from .reader import StrictConnection

__all__ = ["ResponseSender"]


class ResponseSender:
    """Sends the responses of one connection. ``date`` returns the Date field."""

    def __init__(
        self, stream: Stream, strict: StrictConnection, timeouts: HttpTimeouts, date: Callable[[], str]
    ) -> None:
        self._stream = stream
        self._strict = strict
        self._timeouts = timeouts
        self._date = date

    def whole(self, head: RequestHead, body: RequestBody, response: Response, *, draining: bool) -> bytes:
        """Return the bytes of a response all of which is here."""
        out, bodiless = self._head(head, body, response, draining=draining)
        whole = b"" if bodiless else response.body.take_whole()
        assert whole is not None
        writer = self._strict.writer
        return out + writer.content(whole) + writer.end(None) if whole else out + writer.end(None)

    def _head(self, head: RequestHead, body: RequestBody, response: Response, *, draining: bool) -> tuple[bytes, bool]:
        """Return a response's header section as it is sent, and whether no body follows it."""
        content, headers, status = response.body, response.headers, response.status
        bodiless = head.method == "HEAD" or status in (204, 304)
        close = (
            response.close
            or draining
            or self._strict.last
            or not body.worth_draining
            # RFC 9110 section 15.5.14: who is told that its content is too large is to stop sending it.
            or (status == 413 and not body.over)
        )
        extra: list[bytes] = []
        if status == 426 and (offered := headers.get("upgrade")):
            extra.append(b"Upgrade: %b\r\n" % offered.encode("latin-1"))
            if not close and "close" not in headers.tokens("connection"):
                extra.append(b"Connection: Upgrade\r\n")
        out = self._strict.writer.response(
            status,
            response.reason,
            headers,
            extra,
            response.length_if_known if bodiless else content.length,
            bodiless=bodiless,
            http_1_0=head.version == "1.0",
            close=close,
            date=self._date,
        )
        return out, bodiless

    async def send(self, head: RequestHead, body: RequestBody, response: Response, *, draining: bool) -> None:
        """Send a response with its body. Raises what its body or the client's connection raises."""
        content, writer = response.body, self._strict.writer
        out, bodiless = self._head(head, body, response, draining=draining)
        whole = b"" if bodiless else content.take_whole()
        if whole is not None:  # as most are: one write
            await self.write(out + (writer.content(whole) if whole else b"") + writer.end(None))
            return
        if content.ready:
            out += writer.content(await content.next())
        await self.go_on(out, head, content)

    def begin(self, head: RequestHead, response: Response, *, draining: bool) -> bytes | None:
        """Return the header section of a response whose body is to follow; None if it has none."""
        out, bodiless = self._head(head, NO_BODY, response, draining=draining)
        return None if bodiless else out

    async def go_on(self, out: bytes, head: RequestHead, content: Body) -> None:
        """Write ``out``, and the rest of a body behind it. Raises as :meth:`send`."""
        writer = self._strict.writer
        size = 0
        while True:
            await self.write(out)
            while worth_moving(content, size) and (size := await self._move(content)):
                pass
            chunk = await content.next()
            size = len(chunk)
            if not size:
                break
            out = writer.content(chunk)
        await self.write(writer.end(content.trailers if head.accepts_trailers else None))

    def date_line(self, headers: Headers) -> list[bytes]:
        """The Date field of a response that has none."""
        # RFC 9110 section 6.6.1: who generates a response with a clock dates it; who forwards one without does.
        return [] if "date" in headers else [b"Date: %b\r\n" % self._date().encode("ascii")]

    async def write(self, data: bytes) -> None:
        """Write all of ``data``. Raises :class:`PeerClosed` if the client takes nothing for too long."""
        sent = self._stream.write_now(data)
        if sent == len(data):
            return
        try:
            async with asyncio.timeout(self._timeouts.write):
                await self._stream.write(memoryview(data)[sent:])
        except TimeoutError as error:
            raise PeerClosed(f"the client took nothing for {self._timeouts.write} s") from error

    async def _move(self, content: Body) -> int:
        try:
            async with asyncio.timeout(self._timeouts.write):
                return await move(content, self._stream, self._strict.writer.skip)
        except TimeoutError as error:
            raise PeerClosed(f"the client took nothing for {self._timeouts.write} s") from error
