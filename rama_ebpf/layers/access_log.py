"""One line for each connection when it has ended: who, where to, why it ended, how many bytes, how long.

A protocol that carries several requests, such as HTTP, has one line for each request instead
(:mod:`~rama_ebpf.core.request_log`)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..core.address import Authority, SocketAddress
from ..core.adoption import AdoptedStream
from ..core.at_once import Entered, Visit, entered_by
from ..core.auth import User
from ..core.client import client_address
from ..core.extensions import Extensions
from ..core.first_bytes import FirstBytes, Watcher
from ..core.log_lines import log_line
from ..core.logfmt import logfmt
from ..core.notes import Note
from ..core.request_log import RequestLog, RequestRecord, error_reason
from ..core.service import Output, Service
from ..core.shares import ShareExceeded
from ..core.stream import Stream
from ..relay.report import INSTEAD, TunnelReport

__all__ = ["AccessLogLayer", "AccessRecord", "close_reason", "log_record"]

log = logging.getLogger("rama_ebpf.access")

_CROWDED_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class AccessRecord:
    """What is known of a connection at its end. ``received`` and ``sent`` are bytes from and to the client, ``age``
    is seconds; ``relay`` is how a tunnel's bytes moved, "" if there was none, and ``why_not`` why not by the relay that
    was wanted; ``notes`` is what layers have noted."""

    client: SocketAddress | None
    listener: SocketAddress | None
    user: str
    target: Authority | None
    reason: str
    received: int
    sent: int
    age: float
    relay: str = ""
    error: str = ""
    notes: tuple[Note, ...] = ()
    why_not: str = ""

    def fields(self) -> dict[str, object]:
        """Return what is known, by name, for logs in JSON."""
        found: dict[str, object] = {
            "client": str(self.client or "unix"),
            "listener": None if self.listener is None else str(self.listener),
            "user": self.user,
            "target": None if self.target is None else str(self.target),
            "reason": self.reason,
            "received": self.received,
            "sent": self.sent,
            "age": round(self.age, 3),
            "relay": self.relay,
            "error": self.error,
            **{note.key: note.value for note in self.notes},
        }
        return {name: value for name, value in found.items() if value not in ("", None)}

    def __str__(self) -> str:
        """Return the record as logfmt: ``key=value``, quoted where a peer chose the text and it needs quotes."""
        pairs: list[tuple[str, object]] = [
            ("client", self.client or "unix"),
            ("listener", self.listener),
            ("user", self.user),
            ("target", self.target),
            ("reason", self.reason),
            ("received", self.received),
            ("sent", self.sent),
            ("age", f"{self.age:.3f}"),
            ("relay", self.relay),
            ("why", self.why_not),
            *((note.key, note.value) for note in self.notes),
            ("error", self.error),
        ]
        return logfmt(pairs)


def close_reason(extensions: Extensions, error: BaseException | None) -> str:
    """Return in a word why a connection ended: an error's kind, a tunnel's close reason, ``done`` or ``cut``."""
    if error is not None:
        return error_reason(error)
    report = extensions.get(TunnelReport)
    return "done" if report is None else report.reason.value


def log_record(record: AccessRecord | RequestRecord) -> None:
    """Write the line of a record."""
    log_line(log, record)


class AccessLogLayer:
    """Calls ``sink`` with an :class:`AccessRecord` when a connection has ended, in whatever way; of one whose protocol
    tells its requests, ``request_sink`` with a :class:`~rama_ebpf.core.request_log.RequestRecord` for each instead, and
    ``sink`` only where the connection failed outside of them.

    The default sinks write one logfmt line at INFO to the logger ``rama_ebpf.access``; the record itself is its
    ``access`` attribute, for formatters of other shapes.
    """

    accepts = Stream

    def __init__(
        self,
        sink: Callable[[AccessRecord], None] = log_record,
        *,
        request_sink: Callable[[RequestRecord], None] = log_record,
        first_sink: Watcher | None = None,
        failures_only: bool = False,
        new_id: Callable[[], str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``first_sink`` is told of those who are refused by their first bytes. With ``failures_only`` only what failed
        has a record. ``new_id`` makes the ids of refusals, see :class:`~rama_ebpf.core.request_log.RequestLog`."""
        self._first_sink = first_sink
        self._failures_only = failures_only
        self._new_id = new_id
        self._sink = sink
        self._request_sink = request_sink
        self._clock = clock
        self._crowded = _Crowded(clock)

    def first_bytes(self, inner: FirstBytes | None) -> FirstBytes | None:
        """Those who are refused by their first bytes have no line: the server counts them in one a minute."""
        return inner if inner is None or self._first_sink is None else inner.watched(self._first_sink)

    def __call__(self, inner: Service[Stream, Output], /) -> Service[Stream, Output]:
        async def serve(stream: Stream, /) -> Output:
            connection = entered_by(stream, self) or _Connection(self, stream)
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
        visit.stream.local  # noqa: B018 - asked for now: at the end there is no socket any more
        return _Connection(self, visit.stream)

    def adopt(self, stream: AdoptedStream) -> Entered:
        """Write its line at its end (:mod:`rama_ebpf.core.adoption`)."""
        return _Connection(self, stream, age=time.monotonic() - stream.began)


class _Connection:
    """One connection, until its line is written."""

    __slots__ = ("_layer", "_requests", "_started", "_stream")

    def __init__(self, layer: AccessLogLayer, stream: Stream, age: float = 0.0) -> None:
        self._layer = layer
        self._stream = stream
        self._started = layer._clock() - age
        self._requests = RequestLog(layer._request_sink, failures_only=layer._failures_only, new_id=layer._new_id)
        stream.extensions.add(self._requests)

    def leave(self, error: BaseException | None, /) -> None:
        """Write it, unless its requests have had theirs."""
        layer, requests = self._layer, self._requests
        if error is None and layer._failures_only:
            return
        if not requests.lines or (error is not None and error is not requests.told):
            notes = layer._crowded.notes(error) if isinstance(error, ShareExceeded) else ()
            if notes is not None:
                layer._sink(_record(self._stream, error, layer._clock() - self._started, notes))


class _Crowded:
    """Lines of connections above what one source may hold: one a minute for each kind, or it could fill the log."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}

    def notes(self, error: ShareExceeded) -> tuple[Note, ...] | None:
        """Return what the line of this one says besides, None for no line."""
        now = self._clock()
        since, more = self._seen.get(error.kind, (float("-inf"), 0))
        if now - since < _CROWDED_SECONDS:
            self._seen[error.kind] = since, more + 1
            return None
        self._seen[error.kind] = now, 0
        return (Note("more", str(more)),) if more else ()


def _record(stream: Stream, error: BaseException | None, age: float, notes: tuple[Note, ...]) -> AccessRecord:
    extensions = stream.extensions
    user = extensions.get(User)
    report = extensions.get(TunnelReport)
    return AccessRecord(
        client=client_address(stream),
        listener=stream.local,
        user="" if user is None else user.name,
        target=extensions.get(Authority),
        reason=close_reason(extensions, error),
        received=stream.bytes_received,
        sent=stream.bytes_sent,
        age=age,
        relay="" if report is None else report.relay,
        error="" if error is None or isinstance(error, asyncio.CancelledError) else str(error),
        notes=(*extensions.all(Note), *notes),
        why_not=report.why if report is not None and report.why.startswith(INSTEAD) else "",
    )
