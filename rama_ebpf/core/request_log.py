"""One record a request: who asked for what, who answered, how it ended. For protocols that carry several requests.

A layer around the connection (:class:`~rama_ebpf.layers.access_log.AccessLogLayer`) adds a :class:`RequestLog` to its
extensions; the protocol's server tells it each request. What is known inside of the server is left among the request's
extensions: the :class:`~rama_ebpf.core.auth.User`, a :class:`Refusal`, the :class:`Upstream`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from .address import SocketAddress
from .errors import RamaError
from .logfmt import logfmt, quoted
from .notes import Note

__all__ = ["Refusal", "RequestLog", "RequestRecord", "Upstream", "error_reason", "explained"]


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


@dataclass(frozen=True, slots=True)
class RequestRecord:
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
    notes: tuple[Note, ...] = field(default=())

    def __str__(self) -> str:
        """Return the record as logfmt."""
        parts = [f"client={self.client or 'unix'}"]
        if self.listener is not None:
            parts.append(f"listener={self.listener}")
        if self.user:
            parts.append(f"user={quoted(self.user)}")
        parts.append(f"method={quoted(self.method)}")
        if self.target:
            parts.append(f"target={quoted(self.target)}")
        if self.status:
            parts.append(f"status={self.status}")
        if self.upstream is not None:
            parts.append(f"upstream={self.upstream.address or 'unix'}")
            if self.upstream.kept:
                parts.append("kept=yes")
        parts.append(f"reason={quoted(self.reason)}")
        if self.rule:
            parts.append(f"rule={quoted(self.rule)}")
        parts.append(f"received={self.received} sent={self.sent}")
        if self.first_byte is not None:
            parts.append(f"first_byte={self.first_byte:.3f}")
        parts.append(f"total={self.total:.3f}")
        rest = [("relay", self.relay), *((note.key, note.value) for note in self.notes), ("error", self.error)]
        if self.relay or self.error or self.notes:
            parts.append(logfmt(rest))
        return " ".join(parts)


class RequestLog:
    """Where the requests of one connection are told. ``sink`` is called with each record."""

    __slots__ = ("_sink", "lines", "told")

    def __init__(self, sink: Callable[[RequestRecord], None]) -> None:
        self._sink = sink
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
