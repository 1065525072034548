"""The client's side of one HTTP/1.1 connection: sends a request, returns its response, one pair at a time."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Final, NamedTuple

from ....core.address import Authority
from ....core.deadline import Deadline
from ....core.errors import PeerClosed
from ....core.request_log import Upstream
from ....core.socket_stream import SocketStream
from ....core.stream import Stream
from ...connect import BeginsAtOnce, ConnectError
from ..exchange.absolute import ToProxy
from ..exchange.pace import Pace
from ..exchange.quick import ResponseBegun
from ..exchange.tunnel import Tunnel
from ..exchange.upload import BodyFailed, Upload
from ..message.errors import HttpError, MalformedMessage, NoResponse, malformed_response, unanswered
from ..message.limits import HttpLimits, HttpTimeouts
from ..message.model import Body, Request, Response
from ..message.websocket import ACCEPT, KEY, accept_for, new_key
from .body import ResponseBody
from .bulk import move, worth_moving
from .heads import ResponseHead
from .reader import NEED_DATA, Content, End, Event, Role, WholeResponse, reader

__all__ = ["Dialled", "H1ClientConnection"]

log = logging.getLogger(__name__)

_READ: Final = 64 * 1024
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class Dialled(NamedTuple):
    """Who is connecting a stream, and to what."""

    connector: BeginsAtOnce
    target: Authority


class H1ClientConnection:
    """Sends requests on ``stream``, one at a time.

    ``released`` is called once per response, when its body was read to the end or given up; :attr:`reusable` then
    says whether another request may be sent. A connection that is not reusable has been closed by then. Without
    ``keep`` the upstream is told that there will be one request only; ``lenient`` takes what old servers send
    (:class:`~..message.limits.OriginOptions`). With ``dial`` the stream may not be connected yet: then only
    :meth:`begin_plain` and what follows it may be used.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        limits: HttpLimits,
        timeouts: HttpTimeouts,
        released: Callable[[H1ClientConnection], None],
        keep: bool = True,
        lenient: bool = False,
        dial: Dialled | None = None,
    ) -> None:
        self.stream = stream
        self._dial = dial
        self._proxy = stream.extensions.get(ToProxy)
        self.is_plain = isinstance(stream, SocketStream) and self._proxy is None
        """Whether it is over a plain socket, so that callbacks can use it."""
        self.idle_since = 0.0
        """For the pool that keeps the connection."""
        self._taker: Callable[[], None] | None = None
        self._lent = False
        self.reusable = False
        self.persistent = True
        """The latest response lets the connection live on."""
        self.as_kept = Upstream(stream.peer, kept=True)
        """What requests after the first one on this connection are told of it."""
        self._timeouts = timeouts
        self._released = released
        self._strict = reader(Role.CLIENT, limits, lenient=lenient)
        self._keep = keep
        self._deadline = Deadline()
        self._upload: Upload | None = None
        self.whole = False
        """The latest response was complete when :meth:`received` returned it."""
        self.stuck = False
        """:meth:`received` can do no more."""
        self._unsent = b""
        self._failure: Exception | None = None
        self._head_read: Event | None = None
        self._begun: Response | None = None
        self._body: ResponseBody | None = None
        self.content: bytes | None = None
        """What the latest response has as its content, if it was here whole and had a length."""
        self._key: str | None = None
        self._over = False

    @property
    def quiet(self) -> bool:
        """Nothing came since the last response; a byte or EOF here means that the connection is not to be used."""
        return self._strict.quiet and self.stream.quiet()

    @property
    def told_quiet(self) -> bool:
        """:attr:`quiet` as far as the poller has told. What arrived before the bytes that are being looked at now was
        told before them, so this is enough for a request that has just come."""
        return self._strict.quiet and self.is_plain and (self.plain.told_quiet or self.plain.quiet())

    @property
    def plain(self) -> SocketStream:
        """The stream of a connection that :attr:`is_plain`."""
        assert isinstance(self.stream, SocketStream)
        return self.stream

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

    def begin(self, request: Request) -> bool:
        """Send ``request``, which has no body, as far as that needs no waiting; return whether it was sent. What comes
        next is for :meth:`received` or, with waiting, :meth:`receive`."""
        self._reset()
        return self._send_now(self._head(request) + self._strict.writer.end(None))

    def begin_plain(self, request: Request, host: str, lines: bytes, content: bytes = b"") -> bool:
        """:meth:`begin` for a request without an upgrade whose body is ``content``, and whose field lines were written
        by the caller: without the connection's own (:data:`~.writer.NOT_A_REQUESTS`). While it :attr:`dials` nothing is
        sent: see :meth:`dialled`."""
        self._reset()
        self._key = None
        strict = self._strict
        strict.asked(request.method)
        extra = b"" if self._keep and not request.accepts_trailers else self._own_lines(request)
        data = strict.writer.plain_request(request.method, request.path, host, lines, extra, content)
        if self._dial is None:
            return self._send_now(data)
        if not self.plain.is_connected:
            self._unsent = data
            return False
        return self._send_first(request, data)

    # -- a connection that is being made -----------------------------------------------------------------------

    @property
    def dials(self) -> bool:
        """Whether the stream is not connected yet."""
        return self._dial is not None

    @property
    def patience(self) -> float:
        """How many seconds the upstream may take for what comes next."""
        return self._timeouts.response if self._dial is None else self._dial.connector.timeout

    def late(self) -> Exception:
        """What has gone wrong when that was not enough."""
        dial = self._dial
        return unanswered() if dial is None else dial.connector.failure(dial.target, TimeoutError(), late=True)

    def dialled(self, request: Request) -> bool | None:
        """Look whether the stream is connected by now, and send what has waited for it: None if not yet, True if all of
        it has gone. False: the rest, or what has gone wrong, is for :meth:`receive`."""
        dial = self._dial
        assert dial is not None
        try:
            if not self.plain.is_connected_now():
                return None
        except OSError as error:
            self._dial = None
            self._failure = dial.connector.failure(dial.target, error)
            return False
        return self._send_first(request, self._unsent)

    def _send_first(self, request: Request, data: bytes) -> bool:
        self._dial = None
        request.extensions.add(Upstream(self.stream.peer, kept=False))
        return self._send_now(data)

    async def _finish_dial(self, request: Request) -> None:
        dial = self._dial
        if dial is not None:
            await dial.connector.finish(dial.target, self.plain)
            self._send_first(request, self._unsent)

    def _reset(self) -> None:
        self.reusable = self.whole = self.stuck = self._over = False
        self._upload = self._failure = self._head_read = self._begun = self._body = self.content = None

    def _send_now(self, data: bytes) -> bool:
        try:
            sent = self.stream.write_now(data)
        except OSError as error:
            self._failure = error
            sent = 0
        self._unsent = data[sent:]
        return not self._unsent

    def lend(self, taker: Callable[[], None] | None) -> None:
        """Let callbacks have the connection (None: no more): ``taker`` is called when something can be read, or it is
        connected. Raises OSError if the kernel watches no more sockets."""
        if not self._lent and taker is not None:
            # Once; while nobody takes it, it is told in vain.
            self.plain.tell(self._ready, writes=self._dial is not None)
            self._lent = True
        self._taker = taker

    def _ready(self, _events: int) -> None:
        if self._taker is not None:
            self._taker()

    def received(self, data: bytes) -> ResponseHead | None:
        """Take ``data`` from the upstream, b"" at its end; return the response's header section if that is complete.

        :attr:`whole` tells that its body is, too, and that the connection is free; it is :attr:`content` where that is
        known, and else :meth:`response` has it. None with :attr:`stuck` says that the rest is for :meth:`receive`, as
        a response is that is not whole."""
        strict = self._strict
        try:
            found = strict.receive_response(data)
            if isinstance(found, WholeResponse):
                if strict.reusable:
                    self.content = found.content
                    self.persistent = True
                    self._now_free()
                else:
                    self._partly_received(found.head, found.content)
                return found.head
            if found is NEED_DATA:
                return None
            if not isinstance(found, ResponseHead) or found.status < 200:
                self._head_read = found
                self.stuck = True
                return None
        except MalformedMessage as error:
            self._failure = error
            self.stuck = True
            return None
        self._partly_received(found, None)
        return found

    def _now_free(self) -> None:
        self._strict.next_cycle()
        self.reusable = self.whole = True
        self.release()

    def response(self, head: ResponseBegun) -> Response:
        """Return the response with this header section, which :meth:`received` has returned."""
        if self._begun is not None:
            return self._begun
        assert isinstance(head, ResponseHead)
        assert self.content is not None
        return _response(head, Body.of(self.content))

    def _partly_received(self, head: ResponseHead, content: bytes | None) -> None:
        self.persistent = head.persistent
        body = self._body = ResponseBody(self, head, self._timeouts, content)
        self._begun = _response(head, body)
        if content is None and body.look() and self._strict.reusable and not body.trailers:
            self._now_free()

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

    def close_now(self) -> bool:
        """As :meth:`close`, if that need not wait for anything; else return False."""
        if not isinstance(self.stream, SocketStream):
            return False
        self._deadline.close()
        self.stream.close_now()
        return True

    async def abort(self) -> None:
        """Close at once. Idempotent."""
        self._deadline.close()
        self.stream.abort()
        if self._upload is not None:
            await self._upload.stop()
        self.release()

    def release(self) -> None:
        """The current response is over."""
        if not self._over:
            self._over = True
            if not self.reusable:
                self._deadline.close()
            self._released(self)

    # -- request -----------------------------------------------------------------------------------------------

    def _head(self, request: Request) -> bytes:
        headers, body = request.headers, request.body
        self._key = None
        if request.upgrade == "websocket" and request.version == "2":
            self._key = new_key()  # the client's version of HTTP has none
            headers = headers.copy()
            headers.set(KEY, self._key)
        extra = [self._own_lines(request)]
        target = request.authority if request.method == "CONNECT" else request.path
        if self._proxy is not None:
            target = f"http://{request.authority}{'' if target == '*' else target}"
            if self._proxy.authorization is not None:
                extra.append(b"Proxy-Authorization: %b\r\n" % self._proxy.authorization.encode("ascii"))
        self._strict.asked(request.method)
        return self._strict.writer.request(
            request.method, target, request.authority, headers, extra, body.length, expect=body.expects_continue
        )

    def _own_lines(self, request: Request) -> bytes:
        """The field lines of a request that are this connection's."""
        lines = b""
        options: list[bytes] = [] if self._keep or request.upgrade is not None else [b"close"]
        if request.accepts_trailers:
            options.append(b"TE")
            lines += b"TE: trailers\r\n"
        if request.upgrade is not None:
            if _TOKEN.fullmatch(request.upgrade) is None:
                raise ValueError("a protocol that is no token")
            options.append(b"Upgrade")
            lines += b"Upgrade: %b\r\n" % request.upgrade.encode("ascii")
        if options:
            lines += b"Connection: %b\r\n" % b", ".join(options)
        return lines

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

    # -- response ----------------------------------------------------------------------------------------------

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

    @property
    def movable(self) -> int:
        """How many bytes of the current response's body :meth:`splice_to` may move."""
        return self._strict.movable if isinstance(self.stream, SocketStream) else 0

    def splice_to(self, pipe: int) -> int:
        """Move bytes of the current response's body into a pipe, without waiting; return how many. Raises OSError."""
        assert isinstance(self.stream, SocketStream)
        count = self.stream.splice_to(pipe, self._strict.movable)
        if count:
            self._strict.skip(count)
        return count

    def _refused(self) -> HttpError:
        """The proxy on the way wants another log-in than ours: nothing that our client could answer."""
        assert self._proxy is not None
        self._proxy.refused()
        return HttpError(502, "the proxy on the way refuses us", proxy_error="proxy_configuration_error")

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
        response = _response(head, body)
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

    def finish_now(self) -> None:
        """As :meth:`finish`, on a connection that callbacks have."""
        strict = self._strict
        if strict.reusable:
            strict.next_cycle()
            self.reusable = True
        else:
            self.close_now()
        self.release()

    def abort_now(self) -> None:
        """As :meth:`abort`, on a connection that callbacks have."""
        self._deadline.close()
        self.stream.abort()
        self.release()

    def carries(self, response: Response) -> bool:
        """Whether the body of ``response`` is what comes over this connection, and nothing that stands around it."""
        return response.body is self._body

    @property
    def body(self) -> ResponseBody | None:
        """That of the latest response, if it was not here whole."""
        return self._body

    @property
    def body_seconds(self) -> float:
        """How long the upstream may send nothing of a body."""
        return self._timeouts.body

    def receive_content(self, data: bytes) -> None:
        """Take bytes of the current response's body, b"" at the upstream's end."""
        self._strict.receive(data)

    def next_content(self) -> Event:
        """Return the next piece of the current response's body, its end, or NEED_DATA."""
        return self._strict.next_event()

    @property
    def released(self) -> bool:
        """Whether the current response is over."""
        return self._over

    @property
    def complete(self) -> bool:
        """Nothing of the current response is missing."""
        return self._strict.complete


def _response(head: ResponseHead, body: Body) -> Response:
    # The header section may be remembered; what becomes of the response is not.
    return Response(
        head.status,
        head.headers.copy(),
        body,
        reason=head.reason,
        version=head.version,
        length_if_known=head.declared,
    )


def _told(error: MalformedMessage | OSError) -> Exception:
    """What the client is to learn of a failure of the upstream."""
    if isinstance(error, MalformedMessage):
        return malformed_response()
    return unanswered() if isinstance(error, TimeoutError) else NoResponse()
