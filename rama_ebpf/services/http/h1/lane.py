"""Requests in callbacks (:mod:`rama_ebpf.core.lane`): from a kept client connection over a kept upstream one and back.

What is no plain request, no plain response, or not ready is the coroutine's; it goes on from where the callbacks have
stopped, with the same objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from ....core.lane import Lane
from ....core.socket_stream import SocketStream
from ..exchange.quick import Exchange, ResponseBegun
from ..exchange.running import RunningRequest
from ..message.errors import HttpError
from ..message.model import Request, Response
from .body import NO_BODY
from .heads import RequestHead
from .reader import NEED_DATA, Event

if TYPE_CHECKING:
    from .server import H1ServerConnection

__all__ = ["LINGER_BYTES", "Handover", "QuickPath"]

LINGER_BYTES: Final = 64 * 1024 * 1024
"""How much of what a client sends behind its last response is dropped."""
_READS_PER_TURN: Final = 8
_WORTH_MOVING: Final = 128 * 1024
"""Bytes that are left of a body for which the coroutine is worth it (:mod:`.bulk`)."""
_DROPPED: Final = 4096
_DROPS_PER_TURN: Final = 64

_READ: Final = 64 * 1024
_GONE: Final = 0x008 | 0x010 | 0x2000  # EPOLLERR, EPOLLHUP, EPOLLRDHUP
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "QUERY"})
"""Those of which a proxy has nothing else to do than to pass them on."""
_MOST: Final = 16 * 1024
"""Bytes of a request's body that goes on in one write with its header section."""
_ODD: Final = frozenset({204, 304, 426})
"""Statuses whose responses have no body, or fields of the connection."""


class Handover(NamedTuple):
    """What the coroutine gets: a request's ``head`` that it must serve (None: the client has closed), and how far
    that has come: an ``exchange`` under way; or ``rest``, bytes of a response to be written, behind which the request
    is over, and which is ``running`` no more if there are none; or a ``response``, and if that has begun ``unsent``,
    what is to be sent of it next. ``failure`` is what has gone wrong."""

    head: RequestHead | None = None
    request: Request | None = None
    running: RunningRequest | None = None
    exchange: Exchange | None = None
    rest: memoryview | None = None
    failure: Exception | None = None
    response: Response | None = None
    unsent: bytes | None = None


class QuickPath:
    """The callbacks of one client connection."""

    def __init__(
        self, server: H1ServerConnection, stream: SocketStream, quick: Callable[[Request], Exchange | None]
    ) -> None:
        self._server = server
        self._strict = server.strict
        self._stream = stream
        self._quick = quick
        self._any_scheme = server.any_scheme
        self._lane: Lane[Handover] = Lane()
        self._head: RequestHead | None = None
        self._request: Request | None = None
        self._running: RunningRequest | None = None
        self._left: int | None = None
        self._poured: Response | None = None
        self._exchange: Exchange | None = None

    async def serve(self) -> Handover:
        """Serve requests until one is the coroutine's. Raises OSError if the kernel watches no more sockets."""
        return await self._lane.park(self._begin)

    def under_way(self, failure: Exception | None = None, unsent: bytes = b"") -> Handover:
        """Give up what is under way, if anything is: the coroutine goes on with it."""
        begun = None if self._poured is None else unsent
        found = Handover(self._head, self._request, self._running, self._exchange, None, failure, self._poured, begun)
        if self._exchange is not None:
            self._exchange.connection.lend(None)
        self._head = self._request = self._running = self._exchange = self._poured = None
        return found

    def _begin(self) -> None:
        self._lane.lend(self._stream, self._client_ready)
        self._go_on()

    # -- called by the poller and the loop: nothing may be raised, or the task would stay parked ------------------

    def _client_ready(self, events: int) -> None:
        if not self._lane.open:
            return  # the task will read it
        try:
            if self._left is not None:
                self._drop()
            elif self._exchange is None:
                data = self._stream.read_now(_READ)
                if data is not None:
                    self._on_event(self._strict.receive_request(data))
            elif events & _GONE:
                # It has gone, or has ended its side: the coroutine finds out which, and goes on.
                self._lane.resume(self.under_way())
            # Else it sends ahead, and that waits in the socket.
        except Exception as error:  # noqa: BLE001  # the coroutine raises it
            self._lane.resume(self.under_way(error))

    def _go_on(self) -> None:
        try:
            event = self._strict.next_event()
            if type(event) is RequestHead and event.length == 0:
                self._strict.next_event()  # its end
            self._on_event(event)
        except Exception as error:  # noqa: BLE001  # the coroutine raises it
            self._lane.resume(self.under_way(error))

    # -- the end of the connection -----------------------------------------------------------------------------

    @property
    def ends(self) -> bool:
        """Whether the client has had its last response, and its end is waited for."""
        return self._left is not None

    def _end(self) -> None:
        """The client has its last response. What it still sends is dropped until it closes: a reset, which unread bytes
        would bring about, could overtake the response (RFC 1122 section 4.2.2.13)."""
        self._left = LINGER_BYTES
        self._server.waits_for_end()
        try:
            self._stream.write_eof_now()
        except OSError:
            self._lane.resume(Handover())  # it has gone
            return
        self._drop()

    def _drop(self) -> None:
        if not self._lane.open:
            return
        left = self._left
        assert left is not None
        try:
            for _ in range(_DROPS_PER_TURN):
                data = self._stream.read_now(_DROPPED)
                if data is None:
                    return
                left -= len(data)
                if not data or left <= 0:
                    self._lane.resume(Handover())
                    return
        except OSError:
            self._lane.resume(Handover())
            return
        finally:
            self._left = left
        self._server.loop.call_soon(self._drop)  # others want their turn

    # -- the client --------------------------------------------------------------------------------------------

    def _on_event(self, event: Event) -> None:
        """Go on from an event in what was received. Raises :class:`MalformedMessage`, OSError."""
        server, strict, stream = self._server, self._strict, self._stream
        while True:
            if type(event) is RequestHead:
                self._start(event)
                return
            if event is not NEED_DATA:  # it has closed
                self._lane.resume(Handover())
                return
            quiet = strict.quiet
            if quiet and server.draining:
                self._lane.resume(Handover())
                return
            server.waits(quiet)
            data = stream.read_now(_READ) if stream.maybe_readable else None
            if data is None:
                return
            event = strict.receive_request(data)

    def _start(self, head: RequestHead) -> None:
        server, lane = self._server, self._lane
        content = b""
        if head.upgrade is not None or head.method not in _METHODS or head.expects_continue:
            lane.resume(Handover(head))
            return
        if head.length != 0:
            taken = self._strict.take_body() if (head.length or _MOST + 1) <= _MOST else None
            if taken is None:
                lane.resume(Handover(head))
                return
            content = taken
        request = server.request_of(head, content)
        try:
            exchange = self._quick(request) if self._any_scheme or server.may_be_quick(request) else None
        except HttpError:
            exchange = None  # the coroutine meets it as well, and answers
        if exchange is None:
            lane.resume(Handover(head, request))
            return
        connection = exchange.connection
        self._head, self._request, self._exchange = head, request, exchange
        self._running = server.begin(request)
        sent = connection.begin_plain(request, exchange.host, exchange.onward.lines, content)
        if not (sent or connection.dials):
            lane.resume(self.under_way())
            return
        server.waits_for_upstream(connection.patience)
        try:
            connection.lend(self._upstream_ready)
        except OSError:
            lane.resume(self.under_way())

    # -- the upstream ------------------------------------------------------------------------------------------

    def _upstream_ready(self) -> None:
        exchange = self._exchange
        if exchange is None or not self._lane.open:
            return
        connection = exchange.connection
        try:
            if connection.dials:
                sent = connection.dialled(exchange.request)
                if sent is False:
                    self._lane.resume(self.under_way())
                if not sent:
                    return
                self._server.waits_for_upstream(connection.patience)
            for _ in range(_READS_PER_TURN):
                try:
                    data = connection.plain.read_now(_READ)
                except OSError as error:
                    self._upstream_lost(exchange, error)
                    return
                if data is None:
                    return
                if self._poured is not None:
                    if not self._pour(exchange, data):
                        return
                    continue
                response = connection.received(data)
                if response is not None and connection.whole:
                    self._respond(exchange, response)
                    return
                if response is not None:
                    if not self._begin_to_pour(exchange, response):
                        return
                elif connection.stuck:
                    self._lane.resume(self.under_way())
                    return
            self._server.loop.call_soon(self._upstream_ready)  # others want their turn
        except Exception as error:  # noqa: BLE001  # the coroutine raises it
            self._lane.resume(self.under_way(error))

    def _upstream_lost(self, exchange: Exchange, error: OSError) -> None:
        body = exchange.connection.body
        if self._poured is not None and body is not None:
            body.broke_off(error)  # an end that was read behind it would look like one in order
            exchange.connection.abort_now()
        self._lane.resume(self.under_way())

    # A response that comes in pieces goes on in pieces, until the client does not take one.

    def _begin_to_pour(self, exchange: Exchange, begun: ResponseBegun) -> bool:
        """Send a response as far as it is here; return false if the coroutine goes on."""
        server, head, running, body = self._server, self._head, self._running, exchange.connection.body
        assert head is not None
        assert running is not None
        connection = exchange.connection
        # Where much is left splice(2) is quicker, which the coroutine knows.
        if body is None or body.over or connection.movable >= _WORTH_MOVING:
            self._lane.resume(self.under_way())
            return False
        response = exchange.finish(connection.response(begun))
        out = server.responses.begin(head, response, draining=server.draining) if connection.carries(response) else None
        if out is None:
            self._lane.resume(self.under_way()._replace(response=response))
            return False
        self._poured = response
        running.responded(begun.status)
        server.waits_for_upstream(connection.body_seconds)
        ahead = body.take_ahead()
        return self._send(out + self._strict.writer.content(ahead) if ahead else out)

    def _pour(self, exchange: Exchange, data: bytes) -> bool:
        """Send what has come of a body; return false if that was all, or the coroutine goes on."""
        server, body, writer = self._server, exchange.connection.body, self._strict.writer
        assert body is not None
        out = b"".join([writer.content(piece) for piece in body.take(data)])
        if body.failed:
            exchange.connection.abort_now()
            self._lane.resume(self.under_way(unsent=out))
            return False
        if not body.over:
            server.waits_for_upstream(exchange.connection.body_seconds)
            return not out or self._send(out)
        head, request, running = self._head, self._request, self._running
        assert head is not None
        assert running is not None
        out += writer.end(body.trailers if head.accepts_trailers else None)
        exchange.connection.lend(None)
        exchange.connection.finish_now()
        self._head = self._request = self._running = self._exchange = self._poured = None
        self._sent(head, request, running, out)
        return False

    def _send(self, out: bytes) -> bool:
        try:
            sent = self._stream.write_now(out)
        except OSError as error:
            self._lane.resume(self.under_way(error))
            return False
        if sent < len(out):
            self._lane.resume(self.under_way(unsent=out[sent:]))
            return False
        return True

    def _respond(self, exchange: Exchange, response: ResponseBegun) -> None:
        server, head, request, running = self._server, self._head, self._request, self._running
        assert head is not None
        assert running is not None
        connection = exchange.connection
        connection.lend(None)
        self._head = self._request = self._running = self._exchange = None
        try:
            content, marks = connection.content, exchange.marks
            if marks is not None and content is not None and head.method != "HEAD" and response.status not in _ODD:
                out = self._strict.writer.plain_response(
                    response.status,
                    response.reason,
                    response.headers._written(marks.dropped, marks.via[response.version]),
                    content,
                    close=server.draining or self._strict.last,
                    date=server.date,
                )
                if exchange.answered is not None:
                    exchange.answered()
            else:
                told = exchange.finish(connection.response(response))
                out = server.responses.whole(head, NO_BODY, told, draining=server.draining)
            running.responded(response.status)
        except Exception as error:  # noqa: BLE001  # the coroutine raises it
            self._lane.resume(Handover(head, request, running, failure=error))
            return
        self._sent(head, request, running, out)

    def _sent(self, head: RequestHead, request: Request | None, running: RunningRequest, out: bytes) -> None:
        """Send the last of a response."""
        server = self._server
        try:
            sent = self._stream.write_now(out) if out else 0
        except OSError as error:
            self._lane.resume(Handover(head, request, running, failure=error))
            return
        if sent < len(out):
            self._lane.resume(Handover(head, request, running, rest=memoryview(out)[sent:]))
        elif not server.over(running):
            self._end()
        elif self._strict.quiet:
            self._on_event(NEED_DATA)
        else:
            server.loop.call_soon(self._go_on)  # a client whose next request is always there lets others go first
