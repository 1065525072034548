"""The client's side of one HTTP/1.1 connection: sends a request, returns its response, one pair at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final

import h11

from ...core.errors import PeerClosed
from ...core.stream import Stream
from .errors import HttpError, MalformedMessage
from .heads import ResponseHead
from .limits import HttpLimits, HttpTimeouts
from .model import Body, Request, Response
from .pace import Pace
from .strict import NEED_DATA, Content, End, Role, StrictConnection
from .tunnel import Tunnel

__all__ = ["H1ClientConnection", "NoResponse"]

log = logging.getLogger(__name__)

_READ: Final = 64 * 1024
_SAYS_LENGTH_ZERO: Final = frozenset({"POST", "PUT", "PATCH"})


class NoResponse(HttpError):
    """The upstream closed the connection without a byte of a response: on a kept connection worth another try."""

    def __init__(self) -> None:
        super().__init__(502, "the upstream closed without a response", proxy_error="connection_terminated")


class _BodyFailed(Exception):
    """Reading the request's body failed with ``error``."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class H1ClientConnection:
    """Sends requests on ``stream``, one at a time.

    ``released`` is called once per response, when its body was read to the end or given up; :attr:`reusable` then
    says whether another request may be sent. A connection that is not reusable has been closed by then.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        limits: HttpLimits,
        timeouts: HttpTimeouts,
        released: Callable[[H1ClientConnection], None],
    ) -> None:
        self.stream = stream
        self.reusable = False
        self._timeouts = timeouts
        self._released = released
        self._strict = StrictConnection(Role.CLIENT, limits)
        self._upload: asyncio.Task[None] | None = None
        self._progress = 0.0
        self._continue = asyncio.Event()
        self._waits_to_continue = False
        self._over = False

    @property
    def quiet(self) -> bool:
        """Nothing came since the last response; a byte or EOF here means that the connection is not to be used."""
        return self._strict.quiet and self.stream.quiet()

    async def send(self, request: Request) -> Response:
        """Send ``request`` and return the response, whose body is still to be read.

        The request's body goes on being sent while the response is read. Raises :class:`HttpError` (502, 504), or
        what reading the request's body raised; the connection is closed then.
        """
        self.reusable = False
        self._over = False
        self._continue.clear()
        self._waits_to_continue = False
        try:
            await self._write(self._head(request))
            if request.body.length == 0:
                await self._write(self._strict.send(h11.EndOfMessage()))
            else:
                self._upload = asyncio.create_task(self._send_body(request.body))
            head = await self._response_head(request)
            if self._waits_to_continue:
                await self._stop_upload()  # the final response came instead of 100 (Continue)
        except _BodyFailed as failed:
            await self.abort()
            raise failed.error from None
        except MalformedMessage as error:
            await self.abort()
            raise HttpError(502, "the upstream's response is malformed", proxy_error="http_protocol_error") from error
        except OSError as error:
            await self.abort()
            if isinstance(error, TimeoutError):
                raise HttpError(504, "the upstream did not answer", proxy_error="http_response_timeout") from error
            raise NoResponse from error
        except BaseException:
            await self.abort()
            raise
        return await self._response(request, head)

    async def abort(self) -> None:
        """Close at once. Idempotent."""
        self.stream.abort()
        await self._stop_upload()
        self.release()

    def release(self) -> None:
        """The current response is over."""
        if not self._over:
            self._over = True
            self._released(self)

    # -- request -----------------------------------------------------------------------------------------------

    def _head(self, request: Request) -> list[bytes]:
        fields = [(b"Host", request.authority.encode("ascii")), *request.headers.raw]
        options: list[bytes] = []
        if request.accepts_trailers:
            options.append(b"TE")
            fields.append((b"TE", b"trailers"))
        if request.upgrade is not None:
            options.append(b"Upgrade")
            fields.append((b"Upgrade", request.upgrade.encode("ascii")))
        if options:
            fields.append((b"Connection", b", ".join(options)))
        length = request.body.length
        if length is None:
            fields.append((b"Transfer-Encoding", b"chunked"))
        elif length > 0 or request.method in _SAYS_LENGTH_ZERO:
            fields.append((b"Content-Length", str(length).encode()))
        if request.body.expects_continue and length != 0:
            fields.append((b"Expect", b"100-continue"))
        target = request.authority if request.method == "CONNECT" else request.path
        return self._strict.send(h11.Request(method=request.method, target=target, headers=fields))

    async def _send_body(self, body: Body) -> None:
        """Send ``body``. A failure of the upstream ends this quietly: a response may have come before it, and
        reading says what became of it. A failure of the body itself is raised, and ends the connection."""
        if body.expects_continue:
            self._waits_to_continue = True
            # RFC 9110 section 10.1.1: 100 (Continue) is not to be waited for indefinitely.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timeouts.expect_continue):
                    await self._continue.wait()
            self._waits_to_continue = False
        while True:
            try:
                chunk = await body.next()
            except Exception as error:
                self.stream.abort()
                raise _BodyFailed(error) from error
            event = h11.Data(data=chunk) if chunk else h11.EndOfMessage(headers=_trailers(body))
            try:
                await self._write(self._strict.send(event))
            except OSError as error:
                log.debug("upstream %s takes no more of the request: %s", self.stream.peer, error)
                return
            self._progress = asyncio.get_running_loop().time()
            if not chunk:
                return

    async def _stop_upload(self) -> None:
        if self._upload is not None:
            self._upload.cancel()
            # What it raised has been seen, or belongs to a client that is being refused for it.
            await asyncio.gather(self._upload, return_exceptions=True)

    async def _write(self, chunks: list[bytes]) -> None:
        async with asyncio.timeout(self._timeouts.write):
            await self.stream.write(*chunks)

    # -- response ----------------------------------------------------------------------------------------------

    async def _response_head(self, request: Request) -> ResponseHead:
        if self._upload is None:
            async with asyncio.timeout(self._timeouts.response):
                return await self._read_head(request)
        loop = asyncio.get_running_loop()
        self._progress = loop.time()
        reading = loop.create_task(self._read_head(request))
        waiting: set[asyncio.Task[ResponseHead] | asyncio.Task[None]] = {reading, self._upload}
        try:
            while not reading.done():
                left = self._progress + self._timeouts.response - loop.time()
                if left <= 0:
                    raise TimeoutError("neither request nor response moves")
                await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if self._upload.done():
                    self._upload.result()  # the client's failure, not the upstream's
                    waiting.discard(self._upload)
            return reading.result()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read_head(self, request: Request) -> ResponseHead:
        while True:
            event = await self._event()
            if not isinstance(event, ResponseHead):
                raise PeerClosed("the upstream closed without a response")
            if event.status >= 200 or event.status == 101:
                return event
            if event.status == 100:
                self._continue.set()
                if not request.body.expects_continue:
                    continue
            if request.inform is not None:
                await request.inform(event.status, event.headers)

    async def _event(self) -> object:
        while (event := self._strict.next_event()) is NEED_DATA:
            await self._fill()
        return event

    async def _fill(self) -> None:
        self._strict.receive(await self.stream.read(_READ))

    async def read_content(self, pace: Pace | None) -> Content | End | None:
        """Return the next piece of the current response's body; without ``pace`` None if that needs waiting."""
        while (event := self._strict.next_event()) is NEED_DATA:
            if pace is None:
                return None
            await pace.wait(self._fill)
        assert isinstance(event, Content | End)
        return event

    async def _response(self, request: Request, head: ResponseHead) -> Response:
        body: Body = Body.empty()
        upgrade: Tunnel | None = None
        if head.status == 101 or (request.method == "CONNECT" and head.status < 300):
            if head.status == 101 and (head.upgrade is None or head.upgrade != request.upgrade):
                await self.abort()
                raise HttpError(502, "the upstream switched protocols unasked", proxy_error="http_upgrade_failed")
            self.stream.unread(self._strict.trailing)
            upgrade = Tunnel(self.stream, over=self.release)
        else:
            body = await _ResponseBody.begin(self, head, self._timeouts)
        return Response(
            head.status,
            head.headers,
            body,
            reason=head.reason,
            version=head.version,
            upgrade=upgrade,
            length_if_known=head.declared,
        )

    async def finish(self) -> None:
        """The response was read to its end: make ready for another request, or close."""
        uploaded = self._upload is None or (self._upload.done() and not self._upload.cancelled())
        if self._strict.reusable and uploaded:
            self._upload = None
            self._strict.next_cycle()
            self.reusable = True
            self.release()
        elif uploaded:
            await self.stream.close()
            self.release()
        else:
            await self.abort()


class _ResponseBody(Body):
    def __init__(self, connection: H1ClientConnection, head: ResponseHead, timeouts: HttpTimeouts) -> None:
        self._connection = connection
        self._pace = Pace(timeouts)
        self._ahead: Content | None = None
        self._over = False
        self._error: Exception | None = None
        self.length = head.length

    @classmethod
    async def begin(cls, connection: H1ClientConnection, head: ResponseHead, timeouts: HttpTimeouts) -> _ResponseBody:
        """Look at what came with the header section: a short body is over at once, and its connection free."""
        body = cls(connection, head, timeouts)
        event = await body._read(None)
        if isinstance(event, Content):
            body._ahead = event
        return body

    @property
    def ready(self) -> bool:
        return self._ahead is not None

    async def next(self) -> bytes:
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            return ahead.data
        if self._error is not None:
            raise self._error
        event = None if self._over else await self._read(self._pace)
        if self._error is not None:
            raise self._error
        return event.data if isinstance(event, Content) else b""

    async def _read(self, pace: Pace | None) -> Content | End | None:
        try:
            event = await self._connection.read_content(pace)
        except (MalformedMessage, OSError) as error:
            self._over = True
            self._error = HttpError(502, f"the upstream's response broke off: {error}", close=True)
            self._error.__cause__ = error
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


def _trailers(body: Body) -> list[tuple[bytes, bytes]]:
    return [] if body.trailers is None or body.length is not None else body.trailers.raw
