"""The server's side of one HTTP/1.1 connection: reads requests, calls the service, writes responses, in turn."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from email.utils import formatdate
from typing import Final

import h11

from ...core.errors import PeerClosed
from ...core.lifecycle import Lifecycle, Stage
from ...core.service import Service
from ...core.socket_stream import SocketStream
from ...core.stream import Stream
from .answer import checked_response
from .bulk import move, worth_moving
from .disconnect import DisconnectWatch
from .errors import REASONS, HttpError, MalformedMessage
from .headers import Headers
from .heads import RequestHead
from .limits import HttpLimits, HttpTimeouts
from .model import Body, Request, Response
from .pace import Pace
from .running import RunningRequest
from .strict import NEED_DATA, Closed, Content, End, Role, StrictConnection

__all__ = ["H1ServerConnection"]

log = logging.getLogger(__name__)

_READ: Final = 64 * 1024
_DRAIN: Final = 64 * 1024
"""How many bytes of a body that the service did not want are read to keep the connection."""
_LINGER_BYTES: Final = 64 * 1024 * 1024

# Fields that are this connection's own: a service's values would contradict what is sent.
_OWN_FIELDS: Final = ("connection", "content-length", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade")


class H1ServerConnection:
    """Serves the requests of one connection. ``scheme`` is the connection's, and that of its targets unless the
    service is a ``forward`` proxy; ``name`` stands in Proxy-Status; ``date`` returns the Date field."""

    def __init__(
        self,
        stream: Stream,
        service: Service[Request, Response],
        *,
        scheme: str,
        name: str,
        forward: bool = False,
        limits: HttpLimits,
        timeouts: HttpTimeouts,
        date: Callable[[], str] = lambda: formatdate(usegmt=True),
    ) -> None:
        self._stream = stream
        self._service = service
        self._scheme = scheme
        self._forward = forward
        self._received = self._sent = 0
        self._name = name
        self._timeouts = timeouts
        self._date = date
        self._strict = StrictConnection(Role.SERVER, limits)
        self._watch = DisconnectWatch(stream, delay=timeouts.watch)
        self._idle: asyncio.Timeout | None = None
        self._draining = False
        self.continued = False
        """Whether the current request's client was told to send its body."""

    def drain(self) -> None:
        """Finish the request that is being served, if any, and take no other."""
        self._draining = True
        if self._idle is not None:
            self._idle.reschedule(0)

    async def serve(self) -> None:
        """Serve until either side closes. Raises :class:`MalformedMessage` after it has been answered and the stream
        closed, and OSError or what a service raised too late for a response; the caller then aborts the stream."""
        try:
            while await self._serve_one():
                self._strict.next_cycle()
                await asyncio.sleep(0)  # a client whose next request is always there must not keep the others waiting
        except MalformedMessage as error:
            log.info("%s: refused a message: %s", self._stream.peer, error)
            if self._strict.may_respond:
                await self._linger(error.wire)
            raise

    async def _serve_one(self) -> bool:
        """Serve one request; return whether the connection can take another."""
        head = await self._read_head()
        if head is None:
            return False
        Lifecycle.of(self._stream.extensions).reached(Stage.ESTABLISHED)
        self.continued = False
        body = _RequestBody(self, head, self._timeouts)
        if head.length == 0:
            self._strict.next_event()  # its end
        request = self._request(head, body)
        running = RunningRequest(request, self._stream, self._counted)
        try:
            keep, upgraded = await self._exchange(head, body, request, running)
        except BaseException as error:
            running.ended(error)
            raise
        running.ended()
        self._received, self._sent = self._stream.bytes_received, self._stream.bytes_sent
        if keep and await body.drained(self._timeouts.linger) and self._strict.reusable:
            return True
        if not upgraded:
            await self._linger()
        return False

    def _counted(self) -> tuple[int, int]:
        """Bytes from and to the client since the request before."""
        return self._stream.bytes_received - self._received, self._stream.bytes_sent - self._sent

    async def _exchange(
        self, head: RequestHead, body: _RequestBody, request: Request, running: RunningRequest
    ) -> tuple[bool, bool]:
        """Return whether the connection may be kept, and whether it was switched to another protocol, which is over."""
        async with self._watch:
            response = await checked_response(
                self._service, request, self._name, self._stream.peer, forward=self._forward
            )
            try:
                running.responded(response.status)
                if response.upgrade is None:
                    return await self._respond(head, body, response), False
                running.became_tunnel()
                return await self._switch(head, request, response), True
            finally:
                await response.body.close()
                if response.upgrade is not None:
                    response.upgrade.abandon()

    # -- reading -----------------------------------------------------------------------------------------------

    async def fill(self) -> None:
        """Read once from the client."""
        self._strict.receive(await self._watch.read(_READ))

    async def _read_head(self) -> RequestHead | None:
        event = self._strict.next_event()
        if event is NEED_DATA and self._strict.quiet:
            if self._draining or not await self._wait_idle():
                return None
            event = self._strict.next_event()
        if event is NEED_DATA:
            try:
                async with asyncio.timeout(self._timeouts.head):
                    while event is NEED_DATA:
                        await self.fill()
                        event = self._strict.next_event()
            except TimeoutError as error:
                raise MalformedMessage("the request's header section did not come in time", 408) from error
        if isinstance(event, Closed):
            return None
        assert isinstance(event, RequestHead)
        return event

    async def _wait_idle(self) -> bool:
        """Wait for the first byte of a request; return False if it is time to close."""
        try:
            async with asyncio.timeout(self._timeouts.idle) as self._idle:
                await self.fill()
        except TimeoutError:
            return False
        finally:
            self._idle = None
        return True

    def _request(self, head: RequestHead, body: Body) -> Request:
        return Request(
            method=head.method,
            authority=head.authority,
            path=head.target.path,
            headers=head.headers,
            body=body,
            scheme=head.target.scheme or self._scheme,
            connection_scheme=self._scheme,
            version=head.version,
            absolute=bool(head.target.scheme),
            upgrade=head.upgrade,
            accepts_trailers=head.accepts_trailers,
            extensions=self._stream.extensions.fork(),
            inform=self._inform if head.version == "1.1" else None,
        )

    @property
    def movable(self) -> int:
        """How many bytes of the current request's body :meth:`splice_to` may move."""
        return self._strict.movable if isinstance(self._stream, SocketStream) else 0

    def splice_to(self, pipe: int) -> int:
        """Move bytes of the current request's body into a pipe, without waiting; return how many. Raises OSError."""
        assert isinstance(self._stream, SocketStream)
        count = self._stream.splice_to(pipe, self._strict.movable)
        if count:
            self._strict.moved(count)
        return count

    async def read_content(self, pace: Pace) -> Content | End:
        """Return the next piece of the current request's body."""
        while (event := self._strict.next_event()) is NEED_DATA:
            await pace.wait(self.fill)
        if isinstance(event, Content):
            pace.received += len(event.data)
            return event
        assert isinstance(event, End)
        return event

    # -- responding --------------------------------------------------------------------------------------------

    async def send_continue(self) -> None:
        """Tell the client to send its body, unless it was told. Raises :class:`PeerClosed` if it has got a final
        response instead: such a client does not send it."""
        if not self.continued:
            if not self._strict.may_respond:
                raise PeerClosed("a body that was not asked for before the response")
            await self._inform(100, Headers())

    async def _inform(self, status: int, headers: Headers) -> None:
        if status == 100:
            self.continued = True
        reason = REASONS.get(status, "").encode()
        event = h11.InformationalResponse(status_code=status, headers=_own(headers), reason=reason)
        await self._write(self._strict.send(event))

    async def _respond(self, head: RequestHead, body: _RequestBody, response: Response) -> bool:
        content = response.body
        fields = self._fields(response)
        bodiless = head.method == "HEAD" or response.status in (204, 304)
        length = response.length_if_known if bodiless else content.length
        if length is not None and response.status != 204:
            fields.append((b"Content-Length", str(length).encode()))
        close = response.close or self._draining or "close" in response.headers.tokens("connection")
        # RFC 9110 section 15.5.14: who is told that its content is too large is to stop sending it.
        close = close or not body.worth_draining or (response.status == 413 and not body.over)
        if close:
            fields.append((b"Connection", b"close"))
        elif response.status == 426 and (offered := response.headers.get("upgrade")):
            fields += [(b"Connection", b"Upgrade"), (b"Upgrade", offered.encode("latin-1"))]
        out = self._strict.send(
            h11.Response(status_code=response.status, headers=fields, reason=_reason(response.status, response.reason))
        )
        if not bodiless:
            if content.ready:
                out += self._strict.send(h11.Data(data=await content.next()))
            size = 0
            while True:
                await self._write(out)
                while worth_moving(content, size) and (size := await self._move(content)):
                    pass
                chunk = await content.next()
                size = len(chunk)
                if not size:
                    break
                out = self._strict.send(h11.Data(data=chunk))
            out = []
        chunked = length is None and not bodiless and head.version == "1.1"
        trailers = content.trailers if chunked and head.accepts_trailers else None
        out += self._strict.send(h11.EndOfMessage(headers=[] if trailers is None else trailers.raw))
        await self._write(out)
        return not close

    async def _switch(self, head: RequestHead, request: Request, response: Response) -> bool:
        assert response.upgrade is not None
        fields = self._fields(response)
        reason = _reason(response.status, response.reason)
        if response.status == 101:
            assert head.upgrade is not None
            fields += [(b"Connection", b"Upgrade"), (b"Upgrade", head.upgrade.encode())]
            out = self._strict.send(h11.InformationalResponse(status_code=101, headers=fields, reason=reason))
        else:
            out = self._strict.send(h11.Response(status_code=response.status, headers=fields, reason=reason))
        await self._write(out)
        await self._watch.stop()
        self._stream.unread(self._strict.trailing)
        self._stream.extensions.adopt(request.extensions)
        await response.upgrade.run(self._stream)
        return False

    def _fields(self, response: Response) -> list[tuple[bytes, bytes]]:
        fields = _own(response.headers)
        if "date" not in response.headers:
            # RFC 9110 section 6.6.1: who generates a response with a clock dates it; who forwards one without does.
            fields.append((b"Date", self._date().encode()))
        return fields

    async def _write(self, chunks: list[bytes]) -> None:
        if not chunks:
            return
        try:
            async with asyncio.timeout(self._timeouts.write):
                await self._stream.write(*chunks)
        except TimeoutError as error:
            raise PeerClosed(f"the client took nothing for {self._timeouts.write} s") from error

    async def _move(self, content: Body) -> int:
        try:
            async with asyncio.timeout(self._timeouts.write):
                return await move(content, self._stream, self._strict.send_beside)
        except TimeoutError as error:
            raise PeerClosed(f"the client took nothing for {self._timeouts.write} s") from error

    async def _linger(self, last: bytes = b"") -> None:
        await self._stream.close_after(last, timeout=self._timeouts.linger, max_discard=_LINGER_BYTES)


def _own(headers: Headers) -> list[tuple[bytes, bytes]]:
    if any(name in headers for name in _OWN_FIELDS):
        headers = headers.copy()
        headers.remove(*_OWN_FIELDS)
    return headers.raw


def _reason(status: int, reason: str) -> bytes:
    return (reason or REASONS.get(status, "")).encode("latin-1")


class _RequestBody(Body):
    """A request's body, taken from the connection as it is read."""

    def __init__(self, connection: H1ServerConnection, head: RequestHead, timeouts: HttpTimeouts) -> None:
        self._connection = connection
        self._pace = Pace(timeouts, client=True)
        self._done = head.length == 0
        self._error: Exception | None = None
        self.length = head.length
        self.expects_continue = head.expects_continue and not self._done

    @property
    def movable(self) -> int:
        return 0 if self._done or self._error is not None or self._unasked else self._connection.movable

    def splice_to(self, pipe: int) -> int:
        try:
            count = self._connection.splice_to(pipe)
        except OSError:
            return 0  # next() will meet it too, and can wait
        self._pace.received += count
        return count

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

    async def drained(self, timeout: float) -> bool:
        """Read and drop a short rest; return whether the end was reached."""
        if not self.worth_draining:
            return False
        start = self._pace.received
        try:
            async with asyncio.timeout(timeout):
                while not self._done and self._pace.received - start <= _DRAIN:
                    await self.next()
        except (HttpError, TimeoutError, OSError) as error:
            log.debug("the rest of a body could not be dropped: %s", error)
            return False
        return self._done
