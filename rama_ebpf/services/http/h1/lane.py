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
from ..message.model import Request
from .body import NO_BODY
from .heads import RequestHead
from .reader import NEED_DATA, Event

if TYPE_CHECKING:
    from .server import H1ServerConnection

__all__ = ["LINGER_BYTES", "Handover", "QuickPath"]

LINGER_BYTES: Final = 64 * 1024 * 1024
"""How much of what a client sends behind its last response is dropped."""
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
    is over, and which is ``running`` no more if there are none. ``failure`` is what has gone wrong."""

    head: RequestHead | None = None
    request: Request | None = None
    running: RunningRequest | None = None
    exchange: Exchange | None = None
    rest: memoryview | None = None
    failure: Exception | None = None


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
        self._exchange: Exchange | None = None

    async def serve(self) -> Handover:
        """Serve requests until one is the coroutine's. Raises OSError if the kernel watches no more sockets."""
        return await self._lane.park(self._begin)

    def under_way(self, failure: Exception | None = None) -> Handover:
        """Give up what is under way, if anything is: the coroutine goes on with it."""
        found = Handover(self._head, self._request, self._running, self._exchange, failure=failure)
        if self._exchange is not None:
            self._exchange.connection.lend(None)
        self._head = self._request = self._running = self._exchange = None
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
            while (data := connection.plain.read_now(_READ)) is not None:
                response = connection.received(data)
                if response is not None and connection.whole:
                    self._respond(exchange, response)
                    return
                if response is not None or connection.stuck:
                    self._lane.resume(self.under_way())
                    return
        except OSError:
            self._lane.resume(self.under_way())
        except Exception as error:  # noqa: BLE001  # the coroutine raises it
            self._lane.resume(self.under_way(error))

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
            sent = self._stream.write_now(out)
        except Exception as error:  # noqa: BLE001  # the coroutine raises it
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
