"""The metrics of a listener's connections."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Final

from ..core.address import SocketAddress
from ..core.adoption import AdoptedStream
from ..core.at_once import Entered, Visit, entered_by
from ..core.client import ListenerName
from ..core.first_bytes import FirstBytes, Refused
from ..core.lifecycle import Lifecycle, Stage
from ..core.request_log import RequestMeter
from ..core.service import Output, Service
from ..core.stream import Stream
from ..relay.report import TunnelReport
from .access_log import close_reason

__all__ = ["MetricsLayer"]

_FLUSH_SECONDS: Final = 5.0
_REFUSED_SECONDS: Final = 0.5
_REQUEST_SECONDS: Final = 1.0


class MetricsLayer:
    """Counts connections, handshakes, tunnels, bytes and errors; put it outermost.

    The label ``listener`` is the :class:`~rama_ebpf.core.client.ListenerName` that the server gave, else "default".
    Requests are counted by their route, which is the operator's name for it; what is no route's is ``none``.
    Bytes of live connections are added every 5 s; those that move inside the kernel when their tunnel has ended.
    Connections that are refused by their first bytes have no duration.
    """

    accepts = Stream

    def __init__(self) -> None:
        self._listeners: dict[str, _Listener] = {}

    def _listener(self, name: str | None) -> _Listener:
        name = name or "default"
        listener = self._listeners.get(name)
        if listener is None:
            listener = self._listeners[name] = _Listener(name)
        return listener

    def first_bytes(self, inner: FirstBytes | None) -> FirstBytes | None:
        """Count those who are refused by their first bytes, too."""

        def count(why: Refused, _peer: SocketAddress | None, name: str | None, received: int) -> None:
            self._listener(name).count_refused(why.kind, received)

        return None if inner is None else inner.watched(count)

    def __call__(self, inner: Service[Stream, Output], /) -> Service[Stream, Output]:

        async def serve(stream: Stream, /) -> Output:
            connection = entered_by(stream, self) or self._connection(stream)
            error: BaseException | None = None
            try:
                return await inner(stream)
            except BaseException as raised:
                error = raised
                raise
            finally:
                connection.leave(error)

        return serve

    def enter(self, visit: Visit) -> Entered:
        """In callbacks (:mod:`rama_ebpf.core.at_once`)."""
        return self._connection(visit.stream)

    def adopt(self, stream: AdoptedStream) -> Entered:
        """Count it from now on (:mod:`rama_ebpf.core.adoption`)."""
        return self._connection(stream)

    def _connection(self, stream: Stream) -> Entered:
        told = stream.extensions.get(ListenerName)
        listener = self._listener(None if told is None else told.name)
        stream.extensions.add(listener.requests)
        return _Connection(listener, stream)


class _Listener:
    """The children of the metrics for one listener, looked up once, and its live connections."""

    def __init__(self, name: str) -> None:
        # Only now: importing them fixes how values are kept, see there.
        from ..metrics import definitions

        self.name = name
        self.definitions = definitions
        self.accepted = definitions.ACCEPTED.labels(name)
        self.connections = definitions.CONNECTIONS.labels(name)
        self.handshake_seconds = definitions.HANDSHAKE_SECONDS.labels(name)
        self.connection_seconds = definitions.CONNECTION_SECONDS.labels(name)
        self.received = definitions.RECEIVED_BYTES.labels(name)
        self.sent = definitions.SENT_BYTES.labels(name)
        self.tunnels = definitions.TUNNELS.labels(name)
        self.established = definitions.HANDSHAKES.labels(name, "established")
        self.requests = RequestMeter(self._requests_begun)
        self._live: set[_Connection] = set()
        self._refused: Counter[str] = Counter()
        self._refused_bytes = 0
        self._refused_timer: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: _Connection) -> None:
        self._live.add(connection)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self._flush)

    def count_refused(self, kind: str, received: int) -> None:
        """Count a connection that was refused by its first bytes; soon, for a flood costs no more than its counting."""
        self._refused[kind] += 1
        self._refused_bytes += received
        if self._refused_timer is None:
            self._refused_timer = asyncio.get_running_loop().call_later(_REFUSED_SECONDS, self._flush_refused)

    def _flush_refused(self) -> None:
        self._refused_timer = None
        for kind, count in self._refused.items():
            self.accepted.inc(count)
            self.definitions.ERRORS.labels(self.name, kind).inc(count)
            self.definitions.HANDSHAKES.labels(self.name, kind).inc(count)
        self.received.inc(self._refused_bytes)
        self._refused.clear()
        self._refused_bytes = 0

    def _requests_begun(self) -> None:
        asyncio.get_running_loop().call_later(_REQUEST_SECONDS, self._flush_requests)

    def _flush_requests(self) -> None:
        definitions = self.definitions
        for route, count in self.requests.take().items():
            for digit, number in enumerate(count.statuses):
                if number:
                    status = f"{digit}xx" if digit else "none"
                    definitions.HTTP_REQUESTS.labels(self.name, route, status).inc(number)
            definitions.HTTP_REQUEST_SECONDS.labels(self.name, route).inc(count.seconds)
            definitions.HTTP_FIRST_BYTE_SECONDS.labels(self.name, route).inc(count.first_byte)
            for seconds, number in zip(RequestMeter.SLOW, count.slow, strict=True):
                if number:
                    definitions.HTTP_SLOW_REQUESTS.labels(self.name, route, f"{seconds:g}").inc(number)

    def remove(self, connection: _Connection) -> None:
        self._live.discard(connection)

    def _flush(self) -> None:
        self._timer = None
        for connection in self._live:
            connection.count_bytes()
        if self._live:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self._flush)


class _Connection:
    __slots__ = ("_listener", "_received", "_sent", "_stage", "_started", "_stream")

    def __init__(self, listener: _Listener, stream: Stream) -> None:
        self._listener = listener
        self._stream = stream
        self._started = time.monotonic()
        self._received = self._sent = 0
        self._stage = Stage.ACCEPTED
        if isinstance(stream, AdoptedStream):  # another process has accepted it, and counted what it had moved
            self._started, self._stage = stream.began, Stage.TUNNEL
            self._received, self._sent = stream.bytes_received, stream.bytes_sent
            listener.tunnels.inc()
        else:
            listener.accepted.inc()
        listener.connections.inc()
        listener.add(self)
        Lifecycle.of(stream.extensions).watch(self._reached)

    def _reached(self, stage: Stage) -> None:
        if self._stage is Stage.ACCEPTED:
            self._listener.established.inc()
            self._listener.handshake_seconds.observe(time.monotonic() - self._started)
        if stage is Stage.TUNNEL:
            self._listener.tunnels.inc()
        self._stage = stage

    def count_bytes(self) -> None:
        received, sent = self._stream.bytes_received, self._stream.bytes_sent
        self._listener.received.inc(received - self._received)
        self._listener.sent.inc(sent - self._sent)
        self._received, self._sent = received, sent

    def leave(self, error: BaseException | None, /) -> None:
        """It has ended."""
        listener, definitions = self._listener, self._listener.definitions
        listener.remove(self)
        listener.connections.dec()
        listener.connection_seconds.observe(time.monotonic() - self._started)
        self.count_bytes()
        # A word without the details that close_reason() adds behind a colon: labels must stay few.
        reason = close_reason(self._stream.extensions, error).partition(":")[0]
        if error is not None:
            definitions.ERRORS.labels(listener.name, reason).inc()
            if self._stage is Stage.ACCEPTED:
                definitions.HANDSHAKES.labels(listener.name, reason).inc()
        if self._stage is Stage.TUNNEL:
            listener.tunnels.dec()
            report = self._stream.extensions.get(TunnelReport)
            if report is not None:
                definitions.TUNNELS_CLOSED.labels(listener.name, report.relay, report.reason.value).inc()
