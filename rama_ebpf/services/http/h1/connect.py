"""CONNECT in callbacks (:mod:`rama_ebpf.core.at_once`): the first request of a connection, and the tunnel it becomes.

The reader is that of every request. What is no whole CONNECT to an address, and whatever cannot be decided at once, is
the coroutine's from its first byte. Where dialling has begun, or has failed, the coroutine goes on from there
(:class:`BegunConnect`): it alone says how things go wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ....core.at_once import Visit
from ....core.errors import RamaError
from ....core.lifecycle import Lifecycle, Stage
from ....core.poller import SPECIAL
from ....core.request_log import RequestLog, RequestMeter, Upstream
from ....core.socket_stream import SocketStream
from ....relay import Tunnel as Relayed
from ....relay import begin_relay, relays_at_once
from ...connect import Dialling
from ...reaching import Reaching
from ..exchange.date import http_date
from ..exchange.quick import Dial
from ..exchange.running import RunningRequest
from ..exchange.served import Served
from ..exchange.tunnel import Tunnel
from ..message.errors import HttpError, MalformedMessage
from ..message.headers import Headers
from ..message.model import Request, Response
from .heads import RequestHead
from .reader import Role, StrictConnection, reader
from .writer import MessageWriter

__all__ = ["BegunConnect", "ConnectSession", "begin_connect", "begins_connect"]

_CONNECT: Final = b"CONNECT "


@dataclass(eq=False, slots=True)
class BegunConnect:
    """An extension: how far callbacks have come with the first request on ``stream``. Without ``dialling``, ``failure``
    is why nothing has begun."""

    stream: SocketStream
    strict: StrictConnection
    head: RequestHead
    request: Request
    dial: Dial
    running: RunningRequest | None = None
    dialling: Dialling | None = None
    failure: Exception | None = None

    async def answer(self, request: Request) -> Response:
        """Answer the request as its service would have."""
        dialling, self.dialling = self.dialling, None
        if dialling is None:
            assert self.failure is not None
            raise self.failure
        upstream = await self.dial.connector.finish(self.dial.target, dialling)
        request.extensions.add(Upstream(upstream.peer, kept=False))
        return Response(200, upgrade=Tunnel(upstream, self.dial.limits))


def begins_connect(data: bytes) -> bool:
    """Whether a connection that begins with ``data`` may be for :func:`begin_connect`."""
    return data.startswith(_CONNECT)


def begin_connect(served: Served, dial_of: Callable[[Request], Dial | None], visit: Visit) -> ConnectSession | None:
    """Serve a visit whose whole first request is here, or let a task serve it."""
    stream = visit.stream
    data = stream.buffered
    if data.startswith(_CONNECT) and relays_at_once(stream.extensions):
        strict = reader(Role.SERVER, served.limits)
        try:
            head = strict.receive_head(data)
            if type(head) is RequestHead:
                if strict.take_body() is None:
                    strict.next_event()  # its end
                request = _request(served, head, stream)
                dial = dial_of(request)
                if dial is not None:
                    return _dial(visit, BegunConnect(stream, strict, head, request, dial), len(data))
        except (MalformedMessage, HttpError, ValueError):
            pass  # the coroutine meets it as well, and answers
    visit.take_over()
    return None


def _dial(visit: Visit, begun: BegunConnect, size: int) -> ConnectSession | None:
    dial = begun.dial
    try:
        begun.dialling = dial.connector.begin(dial.target, begun.request.extensions)
        if begun.dialling is None:
            visit.take_over()  # a name that is to be asked for: the coroutine begins anew
            return None
    except (RamaError, OSError) as error:
        begun.failure = error
    begun.stream.consume(size)
    return ConnectSession(visit, begun)


class ConnectSession:
    """The callbacks of one CONNECT."""

    __slots__ = ("_begun", "_reaching", "_tunnel", "_visit")

    def __init__(self, visit: Visit, begun: BegunConnect) -> None:
        self._visit = visit
        self._begun = begun
        self._reaching: Reaching | None = None
        self._tunnel: Relayed | None = None
        visit.session = self
        extensions = visit.stream.extensions
        lifecycle = extensions.get(Lifecycle)
        if lifecycle is not None:
            lifecycle.reached(Stage.ESTABLISHED)
        if extensions.get(RequestLog) is not None or extensions.get(RequestMeter) is not None:
            self._run()
        if begun.dialling is None:
            visit.take_over()  # it has failed
            return
        try:
            self._go_on(begun, begun.dialling)
        except Exception as error:  # noqa: BLE001 - the coroutine raises it
            self._fail(error)

    def expired(self) -> None:
        """The connect takes too long."""
        if self._reaching is not None:
            self._reaching.expired()

    def stop(self) -> None:
        """A task takes over."""
        begun = self._begun
        begun.stream.tell(None)
        if begun.dialling is not None and begun.dialling.stream is not None:
            begun.dialling.stream.tell(None)
        begun.stream.extensions.add(begun)

    def cut(self) -> None:
        """Abort everything."""
        if self._tunnel is not None:
            self._tunnel.cut()  # and so the visit ends
            return
        begun = self._begun
        if begun.dialling is not None and begun.dialling.stream is not None:
            begun.dialling.stream.abort()
        begun.stream.abort()
        self._ended()

    # -- callbacks: nothing may be raised ----------------------------------------------------------------------

    def _client_ready(self, events: int) -> None:
        if events & SPECIAL and self._tunnel is None:
            self._visit.take_over()  # it may be gone: the coroutine finds out, and goes on
        # Else it sends ahead, and that waits in the socket.

    # -- the way of a request ----------------------------------------------------------------------------------

    def _run(self) -> RunningRequest:
        begun, extensions = self._begun, self._visit.stream.extensions
        stream = begun.stream
        stream.local  # noqa: B018 - asked for now: at the end there is no socket any more
        begun.running = RunningRequest(
            begun.request,
            stream,
            lambda: (stream.bytes_received, stream.bytes_sent),
            extensions.get(RequestLog),
            extensions.get(RequestMeter),
        )
        return begun.running

    def _go_on(self, begun: BegunConnect, dialling: Dialling) -> None:
        dial, visit, upstream = begun.dial, self._visit, dialling.stream
        assert upstream is not None
        if upstream.is_connected:
            self._connected(upstream)
            return
        if begun.running is None:
            self._run()  # it takes its time, and is to be seen meanwhile
        try:
            self._reaching = Reaching(visit, dial.connector, dial.target, dialling, self._connected, self._fail)
            begun.stream.tell(self._client_ready, poller=visit.poller)
        except OSError:
            visit.take_over()  # the kernel watches no more sockets: the coroutine knows another way

    def _connected(self, upstream: SocketStream) -> None:
        visit, begun = self._visit, self._begun
        stream = begun.stream
        try:
            stream.poll(visit.poller)
            upstream.poll(visit.poller)
        except OSError:
            visit.take_over()  # as above
            return
        out = _granted(http_date())
        sent = stream.write_now(out)
        if sent < len(out):
            if sent:
                stream.abort()  # a part of an answer cannot be taken back
            visit.take_over()
            return
        begun.dialling = None
        extensions = begun.request.extensions
        running = begun.running
        if running is not None:
            extensions.add(Upstream(upstream.peer, kept=False))
            running.responded(200)
            running.became_tunnel()
        stream.extensions.adopt(extensions)
        if trailing := begun.strict.trailing:
            stream.unread(trailing)
        self._tunnel = begin_relay(stream, upstream, self._ended, visit.poller, begun.dial.limits)

    def _ended(self) -> None:
        """Tunnel or visit are over, in order or cut."""
        visit, running = self._visit, self._begun.running
        try:
            if running is not None:
                running.ended(visit.error)
        finally:
            visit.end()

    def _fail(self, error: Exception) -> None:
        """Let the coroutine raise ``error``, and tell the client."""
        begun = self._begun
        if begun.dialling is not None and begun.dialling.stream is not None:
            begun.dialling.stream.abort()
        begun.dialling = None
        begun.failure = error
        self._visit.take_over()


def _request(served: Served, head: RequestHead, stream: SocketStream) -> Request:
    return Request(
        method=head.method,
        authority=head.authority,
        path=head.target.path,
        headers=head.headers,
        scheme=head.target.scheme or served.scheme,
        connection_scheme=served.scheme,
        version=head.version,
        absolute=bool(head.target.scheme),
        upgrade=head.upgrade,
        accepts_trailers=head.accepts_trailers,
        extensions=stream.extensions.fork(),
    )


@functools.lru_cache(4)
def _granted(date: str) -> bytes:
    return MessageWriter().switch(200, "", Headers(), [b"Date: %b\r\n" % date.encode("ascii")])
