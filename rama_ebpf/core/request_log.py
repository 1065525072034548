"""One record a request: who asked for what, who answered, how it ended. For protocols that carry several requests.

A layer around the connection (:class:`~rama_ebpf.layers.access_log.AccessLogLayer`) adds a :class:`RequestLog` to its
extensions; the protocol's server tells it each request. What is known inside of the server is left among the request's
extensions: the :class:`~rama_ebpf.core.auth.User`, a :class:`Refusal`, the :class:`Upstream`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from .address import SocketAddress
from .errors import RamaError
from .logfmt import logfmt, quoted
from .notes import Note

__all__ = [
    "REFUSAL_FIELD",
    "Refusal",
    "RequestLog",
    "RequestMeter",
    "RequestRecord",
    "RouteCount",
    "RouteName",
    "Upstream",
    "error_reason",
    "explained",
]


@dataclass(frozen=True, slots=True)
class Refusal:
    """An extension: the request was not served, or not to its end. ``kind`` is a word, ``rule`` what decided, ``text``
    for the log's readers, with all causes: clients are told less."""

    kind: str
    rule: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Upstream:
    """An extension: who was asked, and whether over a connection that was ``kept`` from an earlier request."""

    address: SocketAddress | None
    kept: bool


REFUSAL_FIELD: Final = "Refusal-Id"
"""The field of a response that refuses: what ``rama-ebpf why`` is asked with."""

_MOST_ROUTES: Final = 1000
"""How many routes are told apart, whatever an application calls them."""


@dataclass(frozen=True, slots=True)
class RouteName:
    """An extension: which route of the configuration the request took. Names are the operator's and few, never the
    client's."""

    name: str


class RequestMeter:
    """Counts the requests of a listener by route, cheaply: who adds it to connections takes what was counted now and
    then. Among the extensions of connections."""

    __slots__ = ("_routes", "_watcher")

    SLOW: Final = (0.1, 1.0, 10.0)
    """Seconds: how many requests took longer is counted."""

    def __init__(self, watcher: Callable[[], None]) -> None:
        self._routes: dict[str, RouteCount] = {}
        self._watcher = watcher

    def tell(self, route: str, status: int, first_byte: float | None, total: float) -> None:
        """A request has ended; ``status`` is 0 if no response began. ``watcher`` is called at the first one since
        :meth:`take`."""
        count = self._routes.get(route)
        if count is None and len(self._routes) >= _MOST_ROUTES:
            count = self._routes.setdefault("other", RouteCount())
        elif count is None:
            count = self._routes[route] = RouteCount()
            if len(self._routes) == 1:
                self._watcher()
        count.statuses[status // 100] += 1
        count.seconds += total
        count.first_byte += first_byte or 0.0
        if total > 0.1:
            for number, seconds in enumerate(self.SLOW):
                count.slow[number] += total > seconds

    def take(self) -> dict[str, RouteCount]:
        """Return what was counted since this was asked for last, by route."""
        taken, self._routes = self._routes, {}
        return taken


class RouteCount:
    """What was counted of one route: requests by the first digit of their status, sums of seconds, and those slower
    than each of :attr:`RequestMeter.SLOW`."""

    __slots__ = ("first_byte", "seconds", "slow", "statuses")

    def __init__(self) -> None:
        self.statuses = [0] * 10
        self.seconds = 0.0
        self.first_byte = 0.0
        self.slow = [0] * len(RequestMeter.SLOW)


class RequestRecord(NamedTuple):
    """What is known of a request at its end.

    ``target`` is its URL without the query, in which secrets travel; the target of CONNECT. ``status`` is 0 if no
    response began. ``received`` and ``sent`` are bytes from and to the client, ``first_byte`` and ``total`` seconds
    from the end of the request's header section to the first byte and to the end of the response, or of the tunnel.
    """

    client: SocketAddress | None
    listener: SocketAddress | None
    user: str
    method: str
    target: str
    status: int
    upstream: Upstream | None
    reason: str
    received: int
    sent: int
    first_byte: float | None
    total: float
    rule: str = ""
    relay: str = ""
    error: str = ""
    notes: tuple[Note, ...] = ()

    def fields(self) -> dict[str, object]:
        """Return what is known, by name, for logs in JSON."""
        found: dict[str, object] = {
            "client": str(self.client or "unix"),
            "listener": None if self.listener is None else str(self.listener),
            "user": self.user,
            "method": self.method,
            "target": self.target,
            "status": self.status or None,
            "upstream": None if self.upstream is None else str(self.upstream.address or "unix"),
            "kept": None if self.upstream is None else self.upstream.kept,
            "reason": self.reason,
            "rule": self.rule,
            "received": self.received,
            "sent": self.sent,
            "first_byte": None if self.first_byte is None else round(self.first_byte, 3),
            "total": round(self.total, 3),
            "relay": self.relay,
            "error": self.error,
            **{note.key: note.value for note in self.notes},
        }
        return {name: value for name, value in found.items() if value not in ("", None)}

    def __str__(self) -> str:
        """Return the record as logfmt."""
        user = f" user={quoted(self.user)}" if self.user else ""
        listener = "" if self.listener is None else f" listener={self.listener}"
        target = f" target={quoted(self.target)}" if self.target else ""
        status = f" status={self.status}" if self.status else ""
        upstream = ""
        if self.upstream is not None:
            upstream = f" upstream={self.upstream.address or 'unix'}{' kept=yes' if self.upstream.kept else ''}"
        rule = f" rule={quoted(self.rule)}" if self.rule else ""
        first_byte = "" if self.first_byte is None else f" first_byte={self.first_byte:.3f}"
        line = (
            f"client={self.client or 'unix'}{listener}{user} method={quoted(self.method)}{target}{status}{upstream}"
            f" reason={quoted(self.reason)}{rule} received={self.received} sent={self.sent}{first_byte}"
            f" total={self.total:.3f}"
        )
        if self.relay or self.error or self.notes:
            rest = [("relay", self.relay), *((note.key, note.value) for note in self.notes), ("error", self.error)]
            line = f"{line} {logfmt(rest)}"
        return line


class RequestLog:
    """Where the requests of one connection are told. ``sink`` is called with each record, or with those of requests
    that failed alone (``failures_only``). ``new_id`` makes an id for each refusal, which the client is told
    (:data:`REFUSAL_FIELD`) and the record has among its notes."""

    __slots__ = ("_sink", "failures_only", "lines", "new_id", "told")

    def __init__(
        self,
        sink: Callable[[RequestRecord], None],
        *,
        failures_only: bool = False,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self._sink = sink
        self.failures_only = failures_only
        self.new_id = new_id
        self.lines = 0
        """How many requests were told."""
        self.told: BaseException | None = None
        """The error that ended the latest one, if any: it will end the connection as well."""

    def tell(self, record: RequestRecord, error: BaseException | None) -> None:
        """A request has ended."""
        self.lines += 1
        self.told = error
        self._sink(record)


def error_reason(error: BaseException) -> str:
    """Return in a word why something ended with ``error``: its kind, ``cut``, or what it is."""
    if isinstance(error, RamaError):
        return error.kind
    if isinstance(error, asyncio.CancelledError):
        return f"cut: {error.args[0]}" if error.args else "cut"
    if isinstance(error, OSError):
        return "client_reset" if isinstance(error, ConnectionError) else "io_error"
    return f"failed: {type(error).__name__}"


def explained(error: BaseException) -> str:
    """Return the text of an error and of those that caused it."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(texts) < 8:
        text = str(cause) or type(cause).__name__
        if not any(text in known for known in texts):
            texts.append(text)
        cause = cause.__cause__
    return ": ".join(texts)
