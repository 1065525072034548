"""The server's side of one HTTP/1.1 connection: reads requests, calls the service, writes responses, in turn."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from ....core.deadline import Deadline
from ....core.errors import HandshakeTimeout, PeerClosed
from ....core.lifecycle import Lifecycle, Stage
from ....core.request_log import RequestLog, RequestMeter
from ....core.service import Service
from ....core.socket_stream import SocketStream
from ....core.stream import Stream
from ...connect import ConnectError
from ..exchange.date import http_date
from ..exchange.disconnect import DisconnectWatch
from ..exchange.pace import Pace
from ..exchange.quick import quick_of
from ..exchange.running import RunningRequest
from ..exchange.served import Served
from ..exchange.tunnel import Tunnel
from ..message.errors import HttpError, MalformedMessage
from ..message.headers import Headers
from ..message.model import Body, Request, Response
from .body import NO_BODY, RequestBody
from .connect import BegunConnect
from .heads import RequestHead
from .lane import LINGER_BYTES, Handover, QuickPath
from .reader import NEED_DATA, Closed, Content, End, Role, reader
from .response import ResponseSender

__all__ = ["H1ServerConnection"]

log = logging.getLogger(__name__)

_READ: Final = 64 * 1024
_DROPPED: Final = 4096


class H1ServerConnection:
    """Serves the requests of one connection as ``served`` says, from where callbacks have ``begun``. ``date`` returns
    the Date field."""

    def __init__(
        self,
        stream: Stream,
        served: Served,
        begun: BegunConnect | None = None,
        *,
        date: Callable[[], str] = http_date,
    ) -> None:
        self._stream = stream
        self._served = served
        self.any_scheme = served.forward
        """Whether the service takes targets of any scheme."""
        self._received = self._sent = 0
        loop = self._loop = asyncio.get_running_loop()  # once: it asks for the process's id each time (Python 3.11)
        self._log = stream.extensions.get(RequestLog)
        self._meter = stream.extensions.get(RequestMeter)
        timeouts = self._timeouts = served.timeouts
        self._begun = begun
        self.strict = reader(Role.SERVER, served.limits) if begun is None else begun.strict
        self.responses = ResponseSender(stream, self.strict, timeouts, date)
        self.date = date
        self._running: RunningRequest | None = None
        quick = quick_of(served.service) if isinstance(stream, SocketStream) else None
        self._path = QuickPath(self, stream, quick) if quick is not None and isinstance(stream, SocketStream) else None
        self._waits_for: str | None = None
        self._watch = DisconnectWatch(stream, loop, delay=timeouts.watch)
        self._deadline = Deadline(loop)
        self._idle = False
        self.draining = False
        """Whether no other request is to be taken."""
        self._established = begun is not None
        self._lifecycle = Lifecycle.of(stream.extensions)
        self.continued = False
        """Whether the current request's client was told to send its body."""

    def drain(self) -> None:
        """Finish the request that is being served, if any, and take no other."""
        self.draining = True
        if self._idle:
            self._deadline.hurry()

    async def serve(self) -> None:
        """Serve until either side closes. Raises :class:`MalformedMessage` after it has been answered and the stream
        closed, and OSError or what a service raised too late for a response; the caller then aborts the stream."""
        strict, begun = self.strict, self._begun
        try:
            if begun is not None and not await self._serve_head(begun.head, begun.request, begun.running, begun.answer):
                return
            while await (self._serve_one() if self._path is None else self._serve_quickly(self._path)):
                if not strict.quiet:
                    # A client whose next request is always there must not keep the others waiting.
                    await asyncio.sleep(0)
        except MalformedMessage as error:
            log.debug("%s: refused a message: %s", self._stream.peer, error)  # the connection's end says it as well
            if strict.may_respond:
                with self._lifecycle.owed():  # no time-out of the handshake cuts what it is told
                    await self._linger(error.wire)
            raise
        finally:
            self._deadline.close()
            self._watch.close()
            # Nothing is to refer to itself: garbage that has to be looked for makes other clients wait.
            self._path = self._running = None

    async def _serve_one(self) -> bool:
        """Serve one request; return whether the connection can take another."""
        head = await self._read_head()
        return False if head is None else await self._serve_head(head)

    async def _serve_head(
        self,
        head: RequestHead,
        request: Request | None = None,
        running: RunningRequest | None = None,
        service: Service[Request, Response] | None = None,
        begun: bytes | None = None,
    ) -> bool:
        """Serve the request with this head, or go on with it from where callbacks have left it: they may have ``begun``
        to send the response, of which this is to be sent next."""
        body = NO_BODY
        if request is None and head.length == 0:
            self.strict.next_event()  # its end, unless callbacks have had it
            request = self.request_of(head)
        elif request is None:
            body = RequestBody(self, head, self._timeouts)
            request = self._request(head, body)
        if running is None:
            running = self.begin(request)
        try:
            upgraded = await self._exchange(head, body, request, running, service, begun)
        except BaseException as error:
            running.ended(error)
            raise
        running.ended()
        return await self._keep(body, upgraded)

    async def _keep(self, body: RequestBody, upgraded: bool) -> bool:
        """Behind a request: return whether the connection can take another."""
        self._received, self._sent = self._stream.bytes_received, self._stream.bytes_sent
        if not body.over and not self.strict.last:
            await body.drain(self._timeouts.linger)
        if self.strict.reusable:
            self.strict.next_cycle()
            return True
        if not upgraded:
            await self._linger()
        return False

    # -- the callback path (.quick) ----------------------------------------------------------------------------

    async def _serve_quickly(self, path: QuickPath) -> bool:
        """Let callbacks serve requests, and do what they cannot; return whether the connection can take another."""
        deadline = self._deadline
        if self.draining and self.strict.quiet:
            return False
        self._waits_for = None
        deadline.start(self._within(self._timeouts.idle))
        self.waits(self.strict.quiet)
        try:
            found = await path.serve()
        except asyncio.CancelledError as error:
            found = path.under_way()
            expired = deadline.expired()
            if found.exchange is not None and found.running is not None and not expired:
                await found.exchange.connection.abort()
                found.running.ended(error)
            if not expired:
                raise
            if path.ends:
                await self._stream.close()
                return False
            if found.exchange is None:
                if self._idle:
                    return await self._give_up()
                raise MalformedMessage("the request's header section did not come in time", 408) from error
            if found.unsent is None:
                failure = found.exchange.connection.late()
            else:
                failure = HttpError(502, "the upstream's response broke off: no byte in time", close=True)
            await found.exchange.connection.abort()
            found = found._replace(failure=failure)
        except OSError as error:
            log.debug("%s: no callbacks: %s", self._stream.peer, error)
            self._path = None
            return True
        finally:
            deadline.stop()
            self._idle = False
        return await self._take_over(found)

    async def _take_over(self, found: Handover) -> bool:
        """Go on with a request where callbacks have stopped."""
        if found.failure is not None and found.exchange is None:
            if found.running is not None:
                found.running.ended(found.failure)
            raise found.failure
        if found.head is None:
            return False
        if found.rest is not None:
            return await self._write_rest(found.rest, found.running)
        exchange = found.exchange
        if exchange is None:
            return await self._serve_head(found.head, found.request)
        response = found.response
        if found.failure is not None and found.unsent is not None:
            # Too late for another response.
            await exchange.connection.abort()
            assert found.running is not None
            found.running.ended(found.failure)
            raise found.failure
        if found.failure is not None and not isinstance(found.failure, HttpError):
            await exchange.connection.abort()

        async def answer(request: Request) -> Response:
            try:
                if response is not None and found.failure is None:
                    return response
                if found.failure is not None:
                    raise found.failure
                return exchange.finish(await exchange.connection.receive(exchange.request))
            except (HttpError, ConnectError) as error:
                return await exchange.recover(request, error)

        return await self._serve_head(found.head, found.request, found.running, answer, found.unsent)

    async def _write_rest(self, rest: memoryview, running: RunningRequest | None) -> bool:
        """Write what is left of a response; ``running`` is its request, None if that has ended."""
        if running is not None:
            try:
                await self.responses.write(bytes(rest))
            except BaseException as error:
                running.ended(error)
                raise
            running.ended()
        return await self._keep(NO_BODY, upgraded=False)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop."""
        return self._loop

    def waits(self, idle: bool) -> None:
        """The client is waited for: for a request, or for the rest of its header section."""
        wanted = "a request" if idle else "a head"
        if self._waits_for == wanted:
            return
        self._waits_for = wanted
        self._idle = idle
        seconds = self._timeouts.idle if idle else self._timeouts.head
        self._deadline.prolong(seconds if self._established else self._within(seconds))

    def waits_for_upstream(self, seconds: float) -> None:
        """The upstream is waited for: its connection, or its response."""
        self._waits_for = "an upstream"
        self._idle = False
        self._deadline.prolong(seconds)

    def waits_for_end(self) -> None:
        """The client has its last response, and is to close."""
        self._waits_for = "the end"
        self._idle = False
        self._deadline.prolong(self._timeouts.linger)

    def request_of(self, head: RequestHead, content: bytes = b"") -> Request:
        """Return the request of a head whose body, of which the end was read, is ``content``."""
        return self._request(head, Body.of(content) if content else NO_BODY)

    def may_be_quick(self, request: Request) -> bool:
        """Whether the service may be asked to decide at once."""
        return self._served.is_for(request)

    def begin(self, request: Request) -> RunningRequest:
        """A request is to be served from here on."""
        self.continued = False
        running = self._running
        if running is None:
            running = self._running = RunningRequest(request, self._stream, self._counted, self._log, self._meter)
        else:
            running.begin(request)
        return running

    def over(self, running: RunningRequest) -> bool:
        """A request's response was written; return whether the connection can take another."""
        running.ended()
        self._received, self._sent = self._stream.bytes_received, self._stream.bytes_sent
        if not self.strict.reusable:
            return False
        self.strict.next_cycle()
        self._waits_for = None
        return True

    def _counted(self) -> tuple[int, int]:
        """Bytes from and to the client since the request before."""
        return self._stream.bytes_received - self._received, self._stream.bytes_sent - self._sent

    async def _exchange(
        self,
        head: RequestHead,
        body: RequestBody,
        request: Request,
        running: RunningRequest,
        service: Service[Request, Response] | None,
        begun: bytes | None,
    ) -> bool:
        """Answer a request, by ``service`` if one is given; return whether the connection was switched to another
        protocol, which is over."""
        watch = self._watch
        watch.enter()
        try:
            response = await self._served.answer(request, self._stream.peer, service)
            try:
                if begun is not None:
                    await self.responses.go_on(begun, head, response.body)
                    return False
                running.responded(response.status)
                if response.upgrade is None:
                    await self.responses.send(head, body, response, draining=self.draining)
                    return False
                running.became_tunnel()
                await self._switch(head, request, response)
                return True
            finally:
                await response.body.close()
                if response.upgrade is not None:
                    response.upgrade.abandon()
        except asyncio.CancelledError as error:
            if watch.reads:
                await watch.leave()
            if watch.gone():
                raise PeerClosed("the client closed before its response was complete") from error
            raise
        finally:
            watch.forget()
            if watch.reads:
                await watch.leave()

    # -- reading -----------------------------------------------------------------------------------------------

    async def fill(self) -> None:
        """Read once from the client."""
        self.strict.receive(await self._watch.read(_READ))

    def _within(self, seconds: float) -> float:
        """How long to wait for a request: for the first not longer than until the connection would be cut without a
        word."""
        due = None if self._established else self._lifecycle.due
        return seconds if due is None else max(0.0, min(seconds, due - self._loop.time()))

    async def _give_up(self) -> bool:
        """No request has come. Before the first of a handshake in time that ends it, in order: it may be a browser's
        connection in reserve. Raises :class:`~rama_ebpf.core.errors.HandshakeTimeout` then; else returns False."""
        if self._established or self.draining or self._lifecycle.due is None:
            return False
        with self._lifecycle.owed():
            await self._linger()
        raise HandshakeTimeout("no request came in the time for the handshake")

    async def _read_head(self) -> RequestHead | None:
        """Return the next request's head; None if there will be none."""
        strict, deadline = self.strict, self._deadline
        event = strict.next_event()
        if event is NEED_DATA:
            self._idle = strict.quiet
            if self._idle and self.draining:
                return None
            deadline.start(self._within(self._timeouts.idle if self._idle else self._timeouts.head))
            try:
                while event is NEED_DATA:
                    strict.receive(await self._stream.read(_READ))
                    event = strict.next_event()
                    if self._idle and event is NEED_DATA:
                        self._idle = False
                        deadline.start(self._within(self._timeouts.head))
            except asyncio.CancelledError as error:
                if not deadline.expired():
                    raise
                if self._idle:
                    await self._give_up()
                    return None
                raise MalformedMessage("the request's header section did not come in time", 408) from error
            except PeerClosed:
                if not self._idle:
                    raise
                return None  # TLS that ends without close_notify between two requests: nothing is cut short
            finally:
                deadline.stop()
                self._idle = False
        if isinstance(event, Closed):
            return None
        assert isinstance(event, RequestHead)
        return event

    def _request(self, head: RequestHead, body: Body) -> Request:
        if not self._established:
            self._established = True
            self._lifecycle.reached(Stage.ESTABLISHED)
        return Request(
            method=head.method,
            authority=head.authority,
            path=head.target.path,
            headers=head.headers.copy(),  # the head may be remembered; what layers do to the request is not
            body=body,
            scheme=head.target.scheme or self._served.scheme,
            connection_scheme=self._served.scheme,
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
        return self.strict.movable if isinstance(self._stream, SocketStream) else 0

    def splice_to(self, pipe: int) -> int:
        """Move bytes of the current request's body into a pipe, without waiting; return how many. Raises OSError."""
        assert isinstance(self._stream, SocketStream)
        count = self._stream.splice_to(pipe, self.strict.movable)
        if count:
            self.strict.skip(count)
        return count

    async def read_content(self, pace: Pace) -> Content | End:
        """Return the next piece of the current request's body."""
        while (event := self.strict.next_event()) is NEED_DATA:
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
            if not self.strict.may_respond:
                raise PeerClosed("a body that was not asked for before the response")
            await self._inform(100, Headers())

    async def _inform(self, status: int, headers: Headers) -> None:
        if status == 100:
            self.continued = True
        await self.responses.write(self.strict.writer.interim(status, headers))

    async def _switch(self, head: RequestHead, request: Request, response: Response) -> None:
        assert response.upgrade is not None
        extra = self.responses.date_line(response.headers)
        if response.status == 101:
            assert head.upgrade is not None
            extra += [b"Connection: Upgrade\r\n", b"Upgrade: %b\r\n" % head.upgrade.encode("ascii")]
        answer = self.strict.writer.switch(response.status, response.reason, response.headers, extra)
        if isinstance(response.upgrade, Tunnel):
            response.upgrade.answer_with(answer)
        else:
            await self.responses.write(answer)
        await self._watch.leave()
        self._stream.unread(self.strict.trailing)
        self._stream.extensions.adopt(request.extensions)
        await response.upgrade.run(self._stream)

    async def _linger(self, last: bytes = b"") -> None:
        """As :meth:`Stream.close_after`, on this connection's one deadline."""
        stream, deadline = self._stream, self._deadline
        deadline.start(self._timeouts.linger)
        try:
            if last:
                await stream.write(last)
            await stream.write_eof()
            left = LINGER_BYTES
            while left > 0 and (data := await stream.read(_DROPPED)):
                left -= len(data)
        except asyncio.CancelledError:
            if not deadline.expired():
                raise
        except OSError as error:
            log.debug("%s: gone before its connection was closed: %s", stream.peer, error)
        finally:
            deadline.stop()
            await stream.close()
