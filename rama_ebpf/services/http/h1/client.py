"""The client's side of one HTTP/1.1 connection: sends a request, returns its response, one pair at a time."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from ....core.errors import PeerClosed
from ...connect import ConnectError, Dialling
from ..exchange.pace import Pace
from ..exchange.tunnel import Tunnel
from ..exchange.upload import BodyFailed, Upload
from ..message.errors import HttpError, MalformedMessage, NoResponse, malformed_response, unanswered
from ..message.model import Body, Request, Response
from ..message.websocket import ACCEPT, accept_for
from .body import ResponseBody
from .bulk import move, worth_moving
from .heads import ResponseHead
from .reader import NEED_DATA, Content, End, Event
from .upstream import PlainConnection, response_of

__all__ = ["H1ClientConnection"]

log = logging.getLogger(__name__)

_READ: Final = 64 * 1024


class H1ClientConnection(PlainConnection):
    """Sends requests on ``stream``, one at a time.

    ``released`` is called once per response, when its body was read to the end or given up; :attr:`reusable` then
    says whether another request may be sent. A connection that is not reusable has been closed by then. Without
    ``keep`` the upstream is told that there will be one request only; ``lenient`` takes what old servers send
    (:class:`~..message.limits.OriginOptions`). With ``dial`` the stream may not be connected yet: then only
    :meth:`begin_plain` and what follows it may be used.
    """

    async def send(self, request: Request) -> Response:
        """Send ``request`` and return the response, whose body is still to be read.

        The request's body goes on being sent while the response is read. Raises :class:`HttpError` (502, 504), or
        what reading the request's body raised; the connection is closed then.
        """
        self.reusable = False
        self._over = False
        if request.body.length == 0:
            return await self._send_head_only(request)
        self._upload = upload = Upload(
            request.body,
            lambda data: self._send_content(request.body, data),
            self.stream.abort,
            self._timeouts,
            move=lambda last: self._move_content(request.body, last),
        )
        try:
            await self._write(self._head(request))
            return await self._response(request, await upload.respond(self._read_head(request, upload)))
        except BodyFailed as failed:
            await self.abort()
            raise failed.error from None
        except (MalformedMessage, OSError) as error:
            await self.abort()
            raise _told(error) from error
        except BaseException:
            await self.abort()
            raise

    async def _send_head_only(self, request: Request) -> Response:
        """:meth:`send` for the many requests without a body: one write, one deadline."""
        try:
            self.begin(request)
        except BaseException:
            await self.abort()
            raise
        return await self.receive(request)

    async def _finish_dial(self, request: Request) -> None:
        dial = self._dial
        if dial is not None:
            await dial.connector.finish(dial.target, Dialling(self.plain))
            self._send_first(request, self._unsent)

    async def receive(self, request: Request) -> Response:
        """Return the response to a request that :meth:`begin` has begun to send. Raises as :meth:`send`, and what
        connecting raises."""
        try:
            await self._finish_dial(request)
            if isinstance(self._failure, ConnectError):
                raise self._failure
        except BaseException:
            await self.abort()
            raise
        deadline = self._deadline
        deadline.start(self._timeouts.response)
        try:
            if self._failure is not None:
                raise self._failure
            if self._begun is not None and self._body is not None:
                await self._body.settle()
                return self._begun
            if self._unsent:
                await self._write_unsent(request)
            head = await self._read_head(request, None)
            deadline.stop()
            return await self._response(request, head)
        except asyncio.CancelledError as error:
            expired = deadline.expired()
            await self.abort()
            if expired:
                raise unanswered() from error
            raise
        except (MalformedMessage, OSError) as error:
            await self.abort()
            raise _told(error) from error
        except BaseException:
            await self.abort()
            raise
        finally:
            deadline.stop()

    async def _write_unsent(self, request: Request) -> None:
        try:
            await self.stream.write(self._unsent)
        except OSError as error:
            if not request.body.length:
                raise
            # A response may have come before it, and reading tells what became of it. No other request goes out.
            log.debug("an upstream takes no more of a request: %s", error)
            self._strict.writer.last = True

    async def close(self) -> None:
        """Close a kept connection in order."""
        self._deadline.close()
        await self.stream.close()

    async def abort(self) -> None:
        """Close at once. Idempotent."""
        self._deadline.close()
        self.stream.abort()
        if self._upload is not None:
            await self._upload.stop()
        self.release()

    async def _move_content(self, body: Body, last: int) -> int:
        if not worth_moving(body, last):
            return 0
        async with asyncio.timeout(self._timeouts.write):
            return await move(body, self.stream, self._strict.writer.skip)

    async def _send_content(self, body: Body, data: bytes) -> None:
        if data:
            await self._write(self._strict.writer.content(data))
        else:
            await self._write(self._strict.writer.end(body.trailers))

    async def _write(self, data: bytes) -> None:
        sent = self.stream.write_now(data)
        if sent < len(data):
            async with asyncio.timeout(self._timeouts.write):
                await self.stream.write(memoryview(data)[sent:])

    async def _read_head(self, request: Request, upload: Upload | None) -> ResponseHead:
        while True:
            event: Event = self._head_read or NEED_DATA
            self._head_read = None
            if event is NEED_DATA:
                while (event := self._strict.next_event()) is NEED_DATA:
                    await self._fill()
            if not isinstance(event, ResponseHead):
                raise PeerClosed("the upstream closed without a response")
            if event.status >= 200 or event.status == 101:
                return event
            if event.status == 100 and upload is not None:
                upload.proceed()
            if request.inform is not None:
                await request.inform(event.status, event.headers)

    async def _fill(self) -> None:
        self._strict.receive(await self.stream.read(_READ))

    async def read_content(self, pace: Pace) -> Content | End:
        """Return the next piece of the current response's body."""
        while (event := self._strict.next_event()) is NEED_DATA:
            await pace.wait(self._fill)
        assert isinstance(event, Content | End)
        return event

    async def _response(self, request: Request, head: ResponseHead) -> Response:
        if head.status == 407 and self._proxy is not None:
            raise self._refused()
        self.persistent = head.persistent
        body: Body = Body.empty()
        upgrade: Tunnel | None = None
        if head.status == 101 or (request.method == "CONNECT" and head.status < 300):
            if head.status == 101:
                self._check_switch(request, head)
            self.stream.unread(self._strict.trailing)
            upgrade = Tunnel(self.stream, over=self.release)
        else:
            body = await ResponseBody.begin(self, head, self._timeouts)
        response = response_of(head, body)
        response.upgrade = upgrade
        return response

    def _check_switch(self, request: Request, head: ResponseHead) -> None:
        fits = head.upgrade is not None and head.upgrade == request.upgrade
        if self._key is not None:
            fits = fits and head.headers.get(ACCEPT) == accept_for(self._key)
            head.headers.remove(ACCEPT)
        if not fits:
            raise HttpError(502, "the upstream switched to another protocol", proxy_error="http_upgrade_failed")

    async def finish(self) -> None:
        """The response was read to its end: make ready for another request, or close."""
        if self._upload is not None and not self._upload.complete:
            await self.abort()
        elif self._strict.reusable:
            self._strict.next_cycle()
            self.reusable = True
            self.release()
        else:
            await self.stream.close()
            self.release()


def _told(error: MalformedMessage | OSError) -> Exception:
    """What the client is to learn of a failure of the upstream."""
    if isinstance(error, MalformedMessage):
        return malformed_response()
    return unanswered() if isinstance(error, TimeoutError) else NoResponse()
