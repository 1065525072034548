"""One HTTP/1.1 connection to an upstream, as far as nothing has to be waited for: what callbacks do with it."""

from __future__ import annotations

import abc
import re
from collections.abc import Callable
from typing import Final, NamedTuple

from ....core.address import Authority
from ....core.deadline import Deadline
from ....core.request_log import Upstream
from ....core.socket_stream import SocketStream
from ....core.stream import Stream
from ...connect import BeginsAtOnce
from ..exchange.absolute import ToProxy
from ..exchange.pace import Pace
from ..exchange.quick import ResponseBegun
from ..exchange.upload import Upload
from ..message.errors import HttpError, MalformedMessage, unanswered
from ..message.limits import HttpLimits, HttpTimeouts
from ..message.model import Body, Request, Response
from ..message.websocket import KEY, new_key
from .body import ResponseBody
from .heads import ResponseHead
from .reader import NEED_DATA, Content, End, Event, Role, WholeResponse, reader

__all__ = ["Dialled", "PlainConnection", "response_of"]

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class Dialled(NamedTuple):
    """Who is connecting a stream, and to what."""

    connector: BeginsAtOnce
    target: Authority


class PlainConnection(abc.ABC):
    """What :class:`~.client.H1ClientConnection` does without waiting. Callbacks have it (:meth:`lend`) from
    :meth:`begin_plain` on; what they cannot do is for the coroutine, which goes on by
    :meth:`~.client.H1ClientConnection.receive`."""

    def __init__(
        self,
        stream: Stream,
        *,
        limits: HttpLimits,
        timeouts: HttpTimeouts,
        released: Callable[..., None],
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

    @abc.abstractmethod
    async def read_content(self, pace: Pace) -> Content | End:
        """Return the next piece of the current response's body."""

    @abc.abstractmethod
    async def finish(self) -> None:
        """The response was read to its end: make ready for another request, or close."""

    @abc.abstractmethod
    async def abort(self) -> None:
        """Close at once. Idempotent."""

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
        return response_of(head, Body.of(self.content))

    def _partly_received(self, head: ResponseHead, content: bytes | None) -> None:
        self.persistent = head.persistent
        body = self._body = ResponseBody(self, head, self._timeouts, content)
        self._begun = response_of(head, body)
        if content is None and body.look() and self._strict.reusable and not body.trailers:
            self._now_free()

    def close_now(self) -> bool:
        """As :meth:`close`, if that need not wait for anything; else return False."""
        if not isinstance(self.stream, SocketStream):
            return False
        self._deadline.close()
        self.stream.close_now()
        return True

    def release(self) -> None:
        """The current response is over."""
        if not self._over:
            self._over = True
            if not self.reusable:
                self._deadline.close()
            self._released(self)

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


def response_of(head: ResponseHead, body: Body) -> Response:
    """Return a response with this header section and body."""
    # The header section may be remembered; what becomes of the response is not.
    return Response(
        head.status,
        head.headers.copy(),
        body,
        reason=head.reason,
        version=head.version,
        length_if_known=head.declared,
    )
