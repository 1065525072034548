"""What both sides of an HTTP/2 connection share: one reader, one writer, and channels with flow control end to end.

The reader gives every byte to the frame guard and then to h2, and sorts the events into channels. What a channel has
received is acknowledged when its consumer takes it, so a slow consumer closes the peer's window and nothing else.
The writer sends what h2 has queued; who sends DATA waits while too much is queued, and the reader too, so a peer that
does not read cannot make us hold its answers.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import time
from typing import Any, Final

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import hyperframe.frame

from ....core.errors import PeerClosed, ProtocolError
from ....core.stream import Stream
from ..message.errors import HttpError, MalformedMessage
from ..message.limits import HttpLimits, HttpTimeouts
from .channel import Channel, StreamWasReset
from .engine import EngineConnection, StreamMalformed
from .fields import read_trailers
from .guard import FloodDetected, FrameGuard

__all__ = ["H2Connection", "H2Error"]

log = logging.getLogger(__name__)

_READ: Final = 64 * 1024
_QUEUE_HIGH: Final = 256 * 1024
_CONNECTION_WINDOW: Final = 1024 * 1024
_STREAM_WINDOW: Final = 128 * 1024
_PROBE_SECONDS: Final = 10.0

_Settings = h2.settings.SettingCodes
_Codes = h2.errors.ErrorCodes


class H2Error(ProtocolError):
    """The connection is over because its peer broke the rules of HTTP/2."""

    kind = "h2"


class H2Connection(abc.ABC):
    """The common part of a server's and a client's connection. :meth:`run` reads until it is over."""

    def __init__(
        self,
        stream: Stream,
        *,
        client: bool,
        limits: HttpLimits,
        timeouts: HttpTimeouts,
        streams: int,
        extended_connect: bool = False,
    ) -> None:
        self.stream = stream
        self.limits = limits
        self.timeouts = timeouts
        self.channels: dict[int, Channel] = {}
        self.closing = False
        """No new streams: we or the peer said GOAWAY."""
        self._client = client
        self.h2 = EngineConnection(
            h2.config.H2Configuration(client_side=client, header_encoding=None, validate_outbound_headers=False)
        )
        self.h2.local_settings = h2.settings.Settings(
            client=client,
            initial_values={
                _Settings.MAX_CONCURRENT_STREAMS: streams,
                _Settings.INITIAL_WINDOW_SIZE: _STREAM_WINDOW,
                _Settings.MAX_HEADER_LIST_SIZE: limits.head,
                _Settings.ENABLE_CONNECT_PROTOCOL: int(extended_connect),
                **({_Settings.ENABLE_PUSH: 0} if client else {}),
            },
        )
        self.guard = FrameGuard(server=not client, header_bytes=2 * limits.head, clock=time.monotonic)
        self._queue = bytearray()
        self._queued = asyncio.Event()
        self._finishing = False
        self._drained = asyncio.Event()
        self._drained.set()
        self._idle_since = 0.0
        self._unfinished_since: float | None = None
        self._deadline: asyncio.Timeout | None = None
        self._reader: asyncio.Task[None] | None = None
        self._client = client
        self._emptied: asyncio.Event | None = None

    # -- life --------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Queue the preface and our settings; comes before :meth:`run`."""
        self.h2.initiate_connection()
        if not self._client:
            self.h2.accept_any_number_of_streams()
        # The limit on what a header block may unpack to is ours to answer with 431; h2's ends the connection.
        self.h2.decoder.max_header_list_size = 4 * self.limits.head
        self.h2.increment_flow_control_window(_CONNECTION_WINDOW - 65535)
        self.flush()

    async def run(self) -> None:
        """Read and write until the connection is over. Raises :class:`H2Error` or :class:`FloodDetected` after the
        peer has been told, OSError if the transport fails; returns if it ended in order."""
        writer = asyncio.create_task(self._write())
        reader = self._reader = asyncio.create_task(self._read())
        failure: BaseException | None = None
        try:
            done, _ = await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            failure = next((task.exception() for task in done if not task.cancelled()), None)
        finally:
            self.closing = True
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            gone = failure if isinstance(failure, Exception) else PeerClosed("the HTTP/2 connection is over")
            self._fail(gone)
            await self._finish(writer)
        if failure is not None:
            raise failure

    @property
    def running(self) -> bool:
        """Whether :meth:`run` has begun."""
        return self._reader is not None

    def stop_reading(self) -> None:
        """End :meth:`run` in order."""
        if self._reader is not None:
            self._reader.cancel()

    async def _finish(self, writer: asyncio.Task[None]) -> None:
        """Let what is queued, a GOAWAY above all, still be written."""
        self._finishing = True
        self._queued.set()
        await asyncio.wait({writer}, timeout=self.timeouts.linger)
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        self._idle_since = loop.time()
        while True:
            await self.drained()
            deadline = self._deadline = asyncio.timeout_at(self._read_deadline())
            try:
                async with deadline:
                    data = await self.stream.read(_READ)
            except PeerClosed:
                data = b""  # TLS that ends without close_notify: what was asked for was complete, or its stream is not
            except TimeoutError:
                if not deadline.expired():
                    raise
                self.go_away(_Codes.NO_ERROR)
                return
            finally:
                self._deadline = None
            if not data:
                await self._after_end()
                return
            self._receive(data)
            if self.closing and not self.channels:
                return

    async def _after_end(self) -> None:
        """The peer has ended its side. A server's client may still wait for its responses (RFC 9113 section 5.1 knows
        half-closed streams; a connection can be, too), however late they come, unless it has gone altogether."""
        self.closing = True
        for channel in list(self.channels.values()):
            if self._client or not channel.received_end:
                channel.on_error(PeerClosed("the peer closed before the end of the stream"))
        if self._client or not self.channels:
            return
        self._emptied = asyncio.Event()
        watch: list[asyncio.Task[Any]] = [
            asyncio.create_task(self._emptied.wait()),
            asyncio.create_task(self._gone()),
        ]
        try:
            done: set[asyncio.Task[Any]] = set()
            while not done and not self._over:
                # One that has closed altogether answers with a reset; one that still reads has no answer to give.
                self.h2.ping(bytes(8))
                self.flush()
                done, _ = await asyncio.wait(watch, timeout=_PROBE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in watch:
                task.cancel()
            await asyncio.gather(*watch, return_exceptions=True)

    async def _gone(self) -> None:
        with contextlib.suppress(OSError):  # reset: gone as well
            await self.stream.reset_by_peer()

    def _read_deadline(self) -> float | None:
        """When to give up waiting for bytes: never while streams are served, for they have time-outs of their own."""
        if self._unfinished_since is not None and (self.guard.in_header_block or not self.channels):
            return self._unfinished_since + self.timeouts.head
        return None if self.channels else self._idle_since + self.timeouts.idle

    def _receive(self, data: bytes) -> None:
        try:
            for event in self.h2.receive_data(self.guard.receive(data)):
                self._dispatch(event)
            if self.guard.last_stream is not None:
                self.closing = True
                self.on_go_away(self.guard.last_stream)
        except FloodDetected as flood:
            self.go_away(_Codes.ENHANCE_YOUR_CALM)
            self._fail(flood)
            raise
        except h2.exceptions.ProtocolError as error:
            self.flush()  # h2 has queued the GOAWAY
            failure = H2Error(f"the peer broke the rules of HTTP/2: {error}")
            self._fail(failure)
            raise failure from error
        self.flush()
        now = asyncio.get_running_loop().time()
        if not self.guard.unfinished:
            self._unfinished_since = None
        elif self._unfinished_since is None:
            self._unfinished_since = now

    def _fail(self, error: Exception) -> None:
        """End all streams, before one of them asks h2 for what it does not do any more."""
        for channel in list(self.channels.values()):
            channel.on_error(error)

    def _dispatch(self, event: h2.events.Event) -> None:
        match event:
            case StreamMalformed(stream_id=stream_id):
                self._malformed(stream_id, event)
            case h2.events.DataReceived(stream_id=stream_id, data=data, flow_controlled_length=flow):
                assert stream_id is not None
                assert flow is not None
                channel = self.channels.get(stream_id)
                if channel is None or channel.error is not None or not data:
                    self.acknowledge(stream_id, flow)
                else:
                    channel.on_data(bytes(data), flow)
            case h2.events.StreamEnded(stream_id=stream_id):
                if channel := self.channels.get(stream_id or 0):
                    channel.on_end()
            case h2.events.TrailersReceived(stream_id=stream_id, headers=fields):
                self._trailers(stream_id or 0, fields or [])
            case h2.events.StreamReset(stream_id=stream_id, error_code=code):
                self.guard.reset()
                if channel := self.channels.get(stream_id or 0):
                    self.on_reset(channel, StreamWasReset(int(code or 0)))
            case h2.events.WindowUpdated(stream_id=stream_id):
                for channel in list(self.channels.values()) if not stream_id else [self.channels.get(stream_id)]:
                    if channel is not None:
                        channel.on_room()
            case h2.events.RemoteSettingsChanged():
                for channel in list(self.channels.values()):
                    channel.on_room()
                self.on_event(event)
            case _:
                self.on_event(event)

    def _malformed(self, stream_id: int, event: StreamMalformed) -> None:
        self.acknowledge(stream_id, event.flow)
        log.info("%s: stream %d is malformed: %s", self.stream.peer, stream_id, event.why)
        if channel := self.channels.get(stream_id):
            self.on_reset(channel, MalformedMessage("what came on the stream is not a message of HTTP/2"))
        self.guard.reset()

    def _trailers(self, stream_id: int, fields: object) -> None:
        channel = self.channels.get(stream_id)
        if channel is None:
            return
        try:
            channel.trailers = read_trailers(fields, self.limits)  # type: ignore[arg-type]
        except MalformedMessage as error:
            self.refuse(channel, error)

    @abc.abstractmethod
    def on_event(self, event: h2.events.Event) -> None:
        """Handle an event that only one side knows."""

    @abc.abstractmethod
    def on_go_away(self, last_stream: int) -> None:
        """The peer will process no stream above ``last_stream``; may be called again."""

    def on_reset(self, channel: Channel, error: StreamWasReset | MalformedMessage) -> None:
        """The peer reset a stream, or made us reset it."""
        channel.on_error(error)

    def refuse(self, channel: Channel, error: HttpError) -> None:
        """End a stream whose message is malformed."""
        channel.on_error(error)
        self.reset_stream(channel.id, _Codes.PROTOCOL_ERROR)

    # -- for channels ------------------------------------------------------------------------------------------

    def acknowledge(self, stream_id: int, flow: int) -> None:
        """Give the peer back ``flow`` bytes of its windows."""
        if flow and not self._over:
            self.h2.acknowledge_received_data(flow, stream_id)
            self.flush()

    def reset_stream(self, stream_id: int, code: int) -> None:
        """Send RST_STREAM, unless the stream is closed already."""
        if not self._over:
            try:
                self.h2.reset_stream(stream_id, code)
            except h2.exceptions.StreamClosedError:
                return
            self.flush()

    def forget(self, channel: Channel) -> None:
        """Nobody will use this channel again."""
        self.channels.pop(channel.id, None)
        channel.drop_received()
        if not self.channels:
            if self._emptied is not None:
                self._emptied.set()
            self._idle_since = asyncio.get_running_loop().time()
            if self._deadline is not None:
                deadline = self._read_deadline() if not self.closing else self._idle_since
                self._deadline.reschedule(deadline)

    def go_away(self, code: int) -> None:
        """Take no new streams from now on; with an error code, end the connection."""
        self.closing = True
        if self._over:
            return
        if code == _Codes.NO_ERROR:
            # h2 would take it for the end of the streams under way, too.
            frame = hyperframe.frame.GoAwayFrame(0, self.h2.highest_inbound_stream_id, code)
            self.flush(frame.serialize())
        else:
            self.h2.close_connection(code)
            self.flush()

    @property
    def _over(self) -> bool:
        return self.h2.state_machine.state is h2.connection.ConnectionState.CLOSED

    # -- writing -----------------------------------------------------------------------------------------------

    def flush(self, more: bytes = b"") -> None:
        """Hand what h2 has queued, and ``more`` behind it, to the writer."""
        data = self.h2.data_to_send() + more
        if data:
            self._queue += data
            self._queued.set()
            if len(self._queue) > _QUEUE_HIGH:
                self._drained.clear()

    async def drained(self) -> None:
        """Wait while much is queued that the peer has not taken."""
        if not self._drained.is_set():
            async with asyncio.timeout(self.timeouts.write):
                await self._drained.wait()

    async def _write(self) -> None:
        while True:
            await self._queued.wait()
            self._queued.clear()
            data = bytes(self._queue)
            self._queue.clear()
            async with asyncio.timeout(self.timeouts.write):
                await self.stream.write(data)
            if len(self._queue) <= _QUEUE_HIGH:
                self._drained.set()
            if self._finishing and not self._queue:
                return
