"""The server's side of an HTTP/2 connection (RFC 9113): each stream a request, served by a task of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final

import h2.errors
import h2.events

from ....core.errors import PeerClosed, RamaError
from ....core.lifecycle import Lifecycle, Stage
from ....core.request_log import RequestLog, RequestMeter
from ....core.stream import Stream
from ..exchange.date import http_date
from ..exchange.gateway import error_response
from ..exchange.pace import Pace
from ..exchange.running import RunningRequest, note_refusal
from ..exchange.served import Served
from ..message.errors import ConnectionDropped, HttpError, MalformedMessage
from ..message.headers import Headers
from ..message.model import Body, Request, Response
from .channel import Channel, StreamWasReset
from .connection import H2Connection, H2Error
from .fields import Fields, H2RequestHead, read_request, response_fields, trailer_fields
from .guard import FloodDetected
from .stream import H2Stream

__all__ = ["H2_PREFACE", "H2ServerConnection"]

log = logging.getLogger(__name__)

H2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_STREAMS: Final = 100
_SURPLUS: Final = 4096
"""How many streams above the limit are refused, before the limit is known, without being held against the client."""
_LINGER_BYTES: Final = 4 * 1024 * 1024
_Codes = h2.errors.ErrorCodes


class H2ServerConnection(H2Connection):
    """Serves the streams of one connection as ``served`` says. ``date`` returns the Date field."""

    def __init__(
        self,
        stream: Stream,
        served: Served,
        *,
        extended_connect: bool = True,
        date: Callable[[], str] = http_date,
    ) -> None:
        super().__init__(
            stream,
            client=False,
            limits=served.limits,
            timeouts=served.timeouts,
            streams=_STREAMS,
            extended_connect=extended_connect,
        )
        self._served = served
        self._date = date
        self._settled = False
        self._lifecycle = Lifecycle.of(stream.extensions)
        self._refusals = 0
        self._tasks: dict[asyncio.Task[None], Channel] = {}

    def drain(self) -> None:
        """Finish the requests that are being served, and take no others."""
        if not self.running:
            self.closing = True
            return
        self.go_away(_Codes.NO_ERROR)
        if not self.channels:
            self.stop_reading()

    async def serve(self) -> None:
        """Serve until either side closes. Raises as :meth:`run`; the stream has been closed then."""
        refused: H2Error | FloodDetected | None = None
        self.open()
        try:
            await self.run()
        except (H2Error, FloodDetected) as error:
            refused = error
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self.stream.close_after(timeout=self.timeouts.linger, max_discard=_LINGER_BYTES)
        if refused is not None:
            raise refused

    # -- told by the reader ------------------------------------------------------------------------------------

    def on_event(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            assert event.stream_id is not None
            self._begin(event.stream_id, list(event.headers or []))
        elif isinstance(event, h2.events.SettingsAcknowledged):
            self._settled = True
        elif isinstance(event, h2.events.RemoteSettingsChanged):
            self._lifecycle.reached(Stage.ESTABLISHED)  # with its preface (RFC 9113 section 3.4)

    def _read_deadline(self) -> float | None:
        deadline, due = super()._read_deadline(), self._lifecycle.due
        if self._lifecycle.stage is not Stage.ACCEPTED or due is None or deadline is None:
            return deadline
        return min(deadline, due)  # it would be cut without a word

    def _begin(self, stream_id: int, fields: Fields) -> None:
        # Tasks outlive a reset by a moment: they count, or reset streams would make room for more work (rapid reset).
        if self.closing or len(self._tasks) >= 2 * _STREAMS:
            self.reset_stream(stream_id, _Codes.REFUSED_STREAM)
            return
        if len(self.channels) >= _STREAMS <= sum(channel.error is None for channel in self.channels.values()):
            self._refuse_surplus(stream_id)
            return
        channel = self.channels[stream_id] = Channel(self, stream_id)
        self._lifecycle.reached(Stage.ESTABLISHED)
        task = asyncio.get_running_loop().create_task(self._serve(channel, fields))
        self._tasks[task] = channel
        task.add_done_callback(self._ended)

    def _refuse_surplus(self, stream_id: int) -> None:
        """RFC 9113 section 5.1.2: a client that does not know our limit yet loses nothing by having passed it."""
        self._refusals += 1
        if self._settled or self._refusals > _SURPLUS:
            self.guard.reset()
        self.reset_stream(stream_id, _Codes.REFUSED_STREAM)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.forget(self._tasks.pop(task))
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: a stream failed", self.stream.peer, exc_info=error)

    def on_go_away(self, last_stream: int) -> None:
        pass  # it names streams that we would open, and a server opens none

    def on_reset(self, channel: Channel, error: StreamWasReset | MalformedMessage) -> None:
        super().on_reset(channel, error)
        for task, served in self._tasks.items():
            if served is channel:
                task.cancel()

    # -- one request -------------------------------------------------------------------------------------------

    async def _serve(self, channel: Channel, fields: Fields) -> None:
        try:
            head = read_request(fields, self.limits)
            if channel.exhausted and head.length:
                raise MalformedMessage("a Content-Length without content")
            if self.limits.body is not None and (head.length or 0) > self.limits.body:
                raise HttpError(413, "the body is too large")
        except MalformedMessage as error:
            log.info("%s: refused a request: %s", self.stream.peer, error)
            if error.status == 400:
                self.refuse(channel, error)
            else:
                await self._refuse_with(channel, error)
            return
        except HttpError as error:
            await self._refuse_with(channel, error)
            return
        try:
            await self._exchange(channel, head)
            await self._decline_rest(channel)
        except asyncio.CancelledError:
            channel.reset(_Codes.CANCEL)
            raise
        except ConnectionDropped as error:
            log.info("%s: %s", self.stream.peer, error)
            channel.reset(_Codes.REFUSED_STREAM)  # nothing was done: the client may try again
        except (RamaError, OSError) as error:
            log.info("%s: %s %s broke off: %s", self.stream.peer, head.method, head.path, error)
            channel.reset(_Codes.INTERNAL_ERROR)
        except Exception:
            channel.reset(_Codes.INTERNAL_ERROR)
            raise

    async def _refuse_with(self, channel: Channel, error: HttpError) -> None:
        try:
            await self._respond(channel, error_response(error, self._served.name), bodiless=False)
            await self._decline_rest(channel)
        except (RamaError, OSError) as broken:  # what came behind the request may have ended the stream already
            log.info("%s: the refusal (%d) cannot be sent: %s", self.stream.peer, error.status, broken)
            channel.reset(_Codes.INTERNAL_ERROR)

    async def _exchange(self, channel: Channel, head: H2RequestHead) -> None:
        tunnel = head.method == "CONNECT"
        request = self._request(channel, head, Body.empty() if tunnel else _RequestBody(self, channel, head))
        running = RunningRequest(
            request,
            self.stream,
            lambda: (channel.bytes_received, channel.bytes_sent),
            self.stream.extensions.get(RequestLog),
            self.stream.extensions.get(RequestMeter),
        )
        try:
            await self._answer(channel, head, request, running)
        except BaseException as error:
            running.ended(error)
            raise
        running.ended()

    async def _answer(self, channel: Channel, head: H2RequestHead, request: Request, running: RunningRequest) -> None:
        response = await self._served.answer(request, self.stream.peer)
        try:
            if head.protocol is not None and response.upgrade is None and response.status < 300:
                # RFC 8441 section 5: to the client any success would say that the tunnel is open.
                await response.body.close()
                error = HttpError(502, "the server did not switch protocols", proxy_error="http_upgrade_failed")
                note_refusal(request, error)
                response = error_response(error, self._served.name)
            running.responded(response.status)
            if response.upgrade is not None:
                running.became_tunnel()
                await self._switch(channel, request, response)
            else:
                await self._respond(channel, response, bodiless=head.method == "HEAD")
        finally:
            await response.body.close()
            if response.upgrade is not None:
                response.upgrade.abandon()

    def _request(self, channel: Channel, head: H2RequestHead, body: Body) -> Request:
        async def inform(status: int, headers: Headers) -> None:
            channel.send_headers(response_fields(Response(status, headers), length=None), interim=True)

        return Request(
            # RFC 8441: an upgrade comes as CONNECT with a :protocol; what it asks for is what GET with Upgrade does.
            method=head.method if head.protocol is None else "GET",
            authority=head.authority,
            path=head.path,
            headers=head.headers,
            body=body,
            scheme=head.scheme or self._served.scheme,
            connection_scheme=self._served.scheme,
            version="2",
            absolute=True,
            upgrade=head.protocol,
            accepts_trailers=head.accepts_trailers,
            extensions=self.stream.extensions.fork(),
            inform=inform,
        )

    async def _respond(self, channel: Channel, response: Response, *, bodiless: bool) -> None:
        bodiless = bodiless or response.status in (204, 304)
        length = response.length_if_known if bodiless else response.body.length
        if "date" not in response.headers:
            response.headers.add("Date", self._date())
        empty = bodiless or response.body.length == 0
        channel.send_headers(response_fields(response, length=length), end=empty)
        if not empty:
            while chunk := await response.body.next():
                await channel.send(chunk)
            trailers = response.body.trailers
            channel.end(None if trailers is None else trailer_fields(trailers))

    async def _decline_rest(self, channel: Channel) -> None:
        """The response is complete, and the rest of the request is not wanted (RFC 9113 section 8.1).

        A client may take a reset that comes together with the response for the loss of it (curl 7.88): it has a moment
        to read that and to end its side.
        """
        if channel.received_end or channel.error is not None:
            return
        dropped = 0
        with contextlib.suppress(TimeoutError, RamaError, OSError):
            async with asyncio.timeout(self.timeouts.linger):
                while dropped < _LINGER_BYTES and (data := await channel.receive()):
                    dropped += len(data)
        channel.reset(_Codes.NO_ERROR)

    async def _switch(self, channel: Channel, request: Request, response: Response) -> None:
        assert response.upgrade is not None
        channel.send_headers(response_fields(response, length=None))
        stream = H2Stream(self, channel, request.extensions)
        await response.upgrade.run(stream)
        await stream.close()


class _RequestBody(Body):
    def __init__(self, connection: H2ServerConnection, channel: Channel, head: H2RequestHead) -> None:
        self._connection = connection
        self._channel = channel
        self._pace = Pace(connection.timeouts, client=True)
        self._told = False
        self.length = 0 if channel.exhausted else head.length
        self.expects_continue = head.expects_continue and self.length != 0

    async def next(self) -> bytes:
        if self.expects_continue and not self._told and not self._channel.ready:
            self._told = True
            if self._channel.sent_headers:
                raise PeerClosed("a body that was not asked for before the response")
            self._channel.send_headers([(b":status", b"100")], interim=True)
        try:
            data = await self._channel.receive(self._pace)
        except PeerClosed:
            raise
        except TimeoutError as error:
            raise HttpError(408, "the request's body did not come in time") from error
        self._pace.received += len(data)
        limit = self._connection.limits.body
        if limit is not None and self._pace.received > limit:
            raise HttpError(413, "the body is too large")
        if not data:
            self.trailers = self._channel.trailers
        return data
