"""The client's side of an HTTP/2 connection: many requests at a time, each on a stream of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import h2.errors
import h2.events
import h2.exceptions

from ....core.errors import PeerClosed, RamaError
from ....core.extensions import Extensions
from ....core.stream import Stream
from ...tls.stream import TlsParameters
from ..exchange.pace import Pace
from ..exchange.tunnel import Tunnel
from ..exchange.upload import BodyFailed, Upload
from ..message.errors import HttpError, MalformedMessage, NoResponse, malformed_response, unanswered
from ..message.limits import HttpLimits, HttpTimeouts
from ..message.model import Body, Request, Response
from ..message.websocket import ACCEPT, KEY, accept_for
from .channel import Channel
from .connection import H2Connection
from .fields import Fields, H2ResponseHead, read_response, request_fields, trailer_fields
from .stream import H2Stream

__all__ = ["H2ClientConnection"]

log = logging.getLogger(__name__)

_Codes = h2.errors.ErrorCodes
_PUSH_STREAMS: Final = 0


@dataclass(slots=True)
class _Exchange:
    channel: Channel
    heads: list[H2ResponseHead] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class H2ClientConnection(H2Connection):
    """Sends requests on ``stream``; :meth:`start` begins to read, ``ended`` is called when the connection is over."""

    def __init__(
        self,
        stream: Stream,
        *,
        limits: HttpLimits,
        timeouts: HttpTimeouts,
        ended: Callable[[H2ClientConnection], None],
    ) -> None:
        super().__init__(stream, client=True, limits=limits, timeouts=timeouts, streams=_PUSH_STREAMS)
        self._ended = ended
        self._exchanges: dict[int, _Exchange] = {}
        self._settled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def available(self) -> bool:
        """Whether one more request may be sent."""
        return not self.closing and len(self.channels) < self.h2.remote_settings.max_concurrent_streams

    def start(self) -> None:
        """Begin to read and write, on the running event loop."""
        self.open()
        self._task = asyncio.get_running_loop().create_task(self._live())

    async def retire(self) -> None:
        """Take no more requests, and close when those under way are over."""
        self.go_away(_Codes.NO_ERROR)
        if not self.channels:
            self.stop_reading()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _live(self) -> None:
        try:
            await self.run()
        except (RamaError, OSError) as error:
            log.info("upstream %s: %s", self.stream.peer, error)
        finally:
            self.stream.abort()
            self._settled.set()
            self._ended(self)

    async def extended_connect(self) -> bool:
        """Whether the upstream knows RFC 8441; waits for its settings. Raises TimeoutError if they do not come."""
        async with asyncio.timeout(min(self.timeouts.head, self.timeouts.response)):
            await self._settled.wait()
        return bool(self.h2.remote_settings.enable_connect_protocol)

    # -- told by the reader ------------------------------------------------------------------------------------

    def on_event(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RemoteSettingsChanged():
                self._settled.set()
            case h2.events.ResponseReceived(stream_id=stream_id, headers=fields):
                self._head(stream_id or 0, list(fields or []))
            case h2.events.InformationalResponseReceived(stream_id=stream_id, headers=fields):
                self._head(stream_id or 0, list(fields or []))
            case _:
                pass

    def _head(self, stream_id: int, fields: Fields) -> None:
        exchange = self._exchanges.get(stream_id)
        if exchange is None:
            return
        try:
            exchange.heads.append(read_response(fields, self.limits))
            if len(exchange.heads) > self.limits.interim:
                raise MalformedMessage("too many interim responses")
        except MalformedMessage as error:
            self.refuse(exchange.channel, error)
        exchange.changed.set()

    def on_go_away(self, last_stream: int) -> None:
        for stream_id, channel in list(self.channels.items()):
            if stream_id > last_stream:
                channel.on_error(PeerClosed("the upstream did not process the request"))

    # -- requests ----------------------------------------------------------------------------------------------

    async def send(self, request: Request) -> Response:
        """Send ``request`` and return the response, whose body is still to be read. Raises as
        :meth:`H1ClientConnection.send <..h1.client.H1ClientConnection.send>` does."""
        await self._may_upgrade(request)
        if not self.available:
            raise NoResponse
        channel = Channel(self, self.h2.get_next_available_stream_id())
        self.channels[channel.id] = channel
        exchange = self._exchanges[channel.id] = _Exchange(channel)
        channel.watch(exchange.changed.set)
        tunnel = request.method == "CONNECT" or request.upgrade is not None
        upload = Upload(
            request.body,
            lambda data: self._send_content(channel, request.body, data),
            lambda: channel.reset(_Codes.CANCEL),
            self.timeouts,
        )
        try:
            channel.send_headers(self._fields(request), end=request.body.length == 0 and not tunnel)
            head = await upload.respond(self._read_head(request, exchange, upload))
            return self._response(request, head, channel, upload)
        except BaseException as error:
            channel.reset(_Codes.CANCEL)
            await upload.stop()
            self._forget(channel)
            if isinstance(error, BodyFailed):
                raise error.error from None
            if isinstance(error, MalformedMessage):
                raise malformed_response() from error
            if isinstance(error, TimeoutError):
                raise unanswered() from error
            if isinstance(error, OSError | h2.exceptions.ProtocolError):
                raise NoResponse from error
            raise

    async def _may_upgrade(self, request: Request) -> None:
        """RFC 8441 section 3: extended CONNECT is for servers that have said they know it."""
        if request.upgrade is not None and not await self.extended_connect():
            raise HttpError(502, "the upstream has no WebSocket over HTTP/2", proxy_error="http_upgrade_failed")

    def _fields(self, request: Request) -> Fields:
        # Of the target URI as the upstream knows it, which is by our connection (RFC 9110 section 7.4).
        fields = request_fields(request, "https" if TlsParameters in self.stream.extensions else "http")
        if request.upgrade is None:
            return fields
        return [(name, value) for name, value in fields if name != KEY.lower().encode("ascii")]

    async def _send_content(self, channel: Channel, body: Body, data: bytes) -> None:
        if data:
            await channel.send(data)
        else:
            channel.end(None if body.trailers is None else trailer_fields(body.trailers))

    async def _read_head(self, request: Request, exchange: _Exchange, upload: Upload) -> H2ResponseHead:
        while True:
            while not exchange.heads:
                if exchange.channel.error is not None:
                    raise exchange.channel.error
                if exchange.channel.received_end:
                    raise PeerClosed("the upstream ended the stream without a response")
                exchange.changed.clear()
                await exchange.changed.wait()
            head = exchange.heads.pop(0)
            if head.status >= 200:
                return head
            if head.status == 100:
                upload.proceed()
            if request.inform is not None:
                await request.inform(head.status, head.headers)

    def _response(self, request: Request, head: H2ResponseHead, channel: Channel, upload: Upload) -> Response:
        tunnels = request.method == "CONNECT" and 200 <= head.status < 300
        if request.upgrade is not None and 200 <= head.status < 300:
            if head.status != 200 or head.length is not None or channel.received_end:
                # RFC 8441 section 5: 200 opens the tunnel, which has no length and does not end with its header.
                raise HttpError(502, "the upstream did not switch protocols", proxy_error="http_upgrade_failed")
            tunnels = True
        if tunnels:
            stream = H2Stream(self, channel, Extensions(), over=lambda: self._forget(channel))
            status = 200 if request.upgrade is None else 101
            key = request.headers.get(KEY)
            if key is not None and request.upgrade == "websocket":
                head.headers.set(ACCEPT, accept_for(key))
            return Response(status, head.headers, version="2", upgrade=Tunnel(stream))
        bodiless = request.method == "HEAD" or head.status in (204, 304)
        return Response(
            head.status,
            head.headers,
            _ResponseBody(self, channel, upload, 0 if bodiless else head.length),
            version="2",
            length_if_known=head.length if bodiless and head.status != 204 else None,
        )

    def _forget(self, channel: Channel) -> None:
        self._exchanges.pop(channel.id, None)
        if channel.id in self.channels:
            self.forget(channel)

    async def finish(self, channel: Channel, upload: Upload) -> None:
        """A response is over, or given up."""
        if not (channel.exhausted and upload.complete):
            channel.reset(_Codes.CANCEL)
            await upload.stop()
        self._forget(channel)


class _ResponseBody(Body):
    def __init__(self, connection: H2ClientConnection, channel: Channel, upload: Upload, length: int | None) -> None:
        self._connection = connection
        self._channel = channel
        self._upload = upload
        self._pace = Pace(connection.timeouts, client=False)
        self._over = False
        self.length = length

    @property
    def ready(self) -> bool:
        return self._channel.ready

    async def next(self) -> bytes:
        if self._over:
            return b""
        try:
            data = await self._channel.receive(self._pace)
        except (MalformedMessage, OSError) as error:
            await self.close()
            raise HttpError(502, f"the upstream's response broke off: {error}", close=True) from error
        self._pace.received += len(data)
        limit = self._connection.limits.body
        if limit is not None and self._pace.received > limit:
            await self.close()
            raise HttpError(502, "the upstream's response is too large", proxy_error="http_response_body_size")
        if not data:
            self.trailers = self._channel.trailers
            await self.close()
        return data

    async def close(self) -> None:
        if not self._over:
            self._over = True
            await self._connection.finish(self._channel, self._upload)
