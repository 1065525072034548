"""The requests that are being served, for ``rama-ebpf flows`` and, at their end, for the access log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final, cast

from ....core.auth import User
from ....core.client import ClientAddress, client_address
from ....core.errors import PolicyDenied
from ....core.notes import Note
from ....core.request_log import (
    Refusal,
    RequestLog,
    RequestMeter,
    RequestRecord,
    RouteName,
    Upstream,
    error_reason,
    explained,
)
from ....core.stream import Stream
from ....relay.registry import FlowSnapshot
from ....relay.report import TunnelReport
from ..message.errors import HttpError
from ..message.model import Request

__all__ = ["RunningRequest", "note_refusal", "running"]

_SHOWN_TARGET: Final = 512
_FIRST_ERROR: Final = 400


class RunningRequest:
    """One request from the end of its header section to the end of its response, or of the tunnel that it became.

    ``counted`` returns how many bytes came from the client for it by now, and how many went there; ``log`` and
    ``meter`` are those of the connection, if it has them.
    """

    __slots__ = ("_counted", "_first_byte", "_log", "_meter", "_request", "_started", "_status", "_stream")

    def __init__(
        self,
        request: Request,
        stream: Stream,
        counted: Callable[[], tuple[int, int]],
        log: RequestLog | None,
        meter: RequestMeter | None,
    ) -> None:
        self._stream = stream
        self._counted = counted
        self._log = log
        self._meter = meter
        self.begin(request)

    def begin(self, request: Request) -> None:
        """It is another request from here on, behind the end of the one before: connections that serve one at a time
        need one of these."""
        self._request = request
        self._started = time.monotonic()
        self._first_byte: float | None = None
        self._status = 0
        running.add(self)

    def responded(self, status: int) -> None:
        """The response begins."""
        self._status = status
        if self._log is not None or self._meter is not None:
            self._first_byte = time.monotonic() - self._started

    def became_tunnel(self) -> None:
        """From here on it is shown as a tunnel; its record comes at the tunnel's end."""
        running.discard(self)

    def ended(self, error: BaseException | None = None) -> None:
        """It is over; ``error`` is what broke it off, if anything did."""
        running.discard(self)
        if self._meter is not None:
            route = self._request.extensions.get(RouteName)
            total = time.monotonic() - self._started
            self._meter.tell("none" if route is None else route.name, self._status, self._first_byte, total)
        log = self._log
        if log is not None and (not log.failures_only or error is not None or self._status >= _FIRST_ERROR):
            log.tell(self._record(error), error)

    def snapshot(self) -> FlowSnapshot:
        """What ``rama-ebpf flows`` shows of it."""
        request = self._request
        upstream = request.extensions.get(Upstream)
        user = request.extensions.get(User)
        received, sent = self._counted()
        return FlowSnapshot(
            client_address(self._stream),
            None if upstream is None else upstream.address,
            "http",
            f"{request.method} {_shown(request)}",
            received,
            sent,
            0,
            time.monotonic() - self._started,
            "" if user is None else user.name,
        )

    def _record(self, error: BaseException | None) -> RequestRecord:
        request = self._request
        told = request.extensions.latest().get
        refusal = cast("Refusal | None", told(Refusal))
        report = cast("TunnelReport | None", told(TunnelReport))
        user = cast("User | None", told(User))
        upstream = cast("Upstream | None", told(Upstream))
        client = cast("ClientAddress | None", told(ClientAddress))
        if error is not None:
            reason, text = error_reason(error), explained(error)
        elif refusal is not None:
            reason, text = refusal.kind, refusal.text
        elif report is not None:
            reason, text = report.reason.value, ""
        else:
            reason, text = ("done" if self._status < _FIRST_ERROR else f"http_{self._status}"), ""
        received, sent = self._counted()
        return RequestRecord(
            client=None if client is None else client.address,
            listener=self._stream.local,
            user="" if user is None else user.name,
            method=request.method,
            target=_shown(request),
            status=self._status,
            upstream=upstream,
            reason=reason,
            received=received,
            sent=sent,
            first_byte=self._first_byte,
            total=time.monotonic() - self._started,
            rule="" if refusal is None else refusal.rule,
            relay="" if report is None else report.relay,
            error=text,
            notes=() if told(Note) is None else tuple(request.extensions.all(Note)),
        )


class _Running:
    """All that run in this process."""

    def __init__(self) -> None:
        self._live: set[RunningRequest] = set()
        self.add: Callable[[RunningRequest], None] = self._live.add
        self.discard: Callable[[RunningRequest], None] = self._live.discard

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[FlowSnapshot]:
        for request in list(self._live):
            yield request.snapshot()


running: Final = _Running()
"""The requests that this process serves."""


def note_refusal(request: Request, error: Exception) -> None:
    """Leave for the record why a request is refused with ``error``."""
    kind = error_reason(error)
    if isinstance(error, HttpError) and error.kind == HttpError.kind:
        kind = error.proxy_error or f"http_{error.status}"
    rule = error.rule if isinstance(error, PolicyDenied) else ""
    request.extensions.add(Refusal(kind, rule, explained(error)))


def _shown(request: Request) -> str:
    """The target without its query: that is where forms and APIs put secrets."""
    shown = request.url.partition("?")[0]
    return shown if len(shown) <= _SHOWN_TARGET else shown[:_SHOWN_TARGET] + "…"
