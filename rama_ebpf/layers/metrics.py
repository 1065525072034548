"""The metrics of a listener's connections."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from ..core.client import ListenerName
from ..core.lifecycle import Lifecycle, Stage
from ..core.service import Output, Service
from ..core.stream import Stream
from ..relay.report import TunnelReport
from .access_log import close_reason

__all__ = ["MetricsLayer"]

_FLUSH_SECONDS: Final = 5.0


class MetricsLayer:
    """Counts connections, handshakes, tunnels, bytes and errors; put it outermost.

    The label ``listener`` is the :class:`~rama_ebpf.core.client.ListenerName` that the server gave, else "default".
    Bytes of live connections are added every 5 s; those that move inside the kernel when their tunnel has ended.
    """

    accepts = Stream

    def __call__(self, inner: Service[Stream, Output], /) -> Service[Stream, Output]:
        listeners: dict[str, _Listener] = {}

        async def serve(stream: Stream, /) -> Output:
            told = stream.extensions.get(ListenerName)
            name = "default" if told is None else told.name
            listener = listeners.get(name)
            if listener is None:
                listener = listeners[name] = _Listener(name)
            connection = _Connection(listener, stream)
            error: BaseException | None = None
            try:
                return await inner(stream)
            except BaseException as raised:
                error = raised
                raise
            finally:
                connection.ended(error)

        return serve


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
        self._live: set[_Connection] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: _Connection) -> None:
        self._live.add(connection)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self._flush)

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

    def ended(self, error: BaseException | None) -> None:
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
