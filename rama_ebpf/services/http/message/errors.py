"""Errors that become an HTTP response."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Final

from ....core.errors import PolicyDenied, ProtocolError, RamaError

__all__ = [
    "REASONS",
    "AmbiguousMessage",
    "ClientDenied",
    "ConnectionDropped",
    "HttpError",
    "MalformedMessage",
    "NoResponse",
    "malformed_response",
    "unanswered",
]

REASONS: Final[dict[int, str]] = {status.value: status.phrase for status in HTTPStatus} | {
    # The names of RFC 9110 where Python 3.11 has older ones.
    413: "Content Too Large",
    414: "URI Too Long",
    416: "Range Not Satisfiable",
    422: "Unprocessable Content",
}
"""Reason phrases by status code."""


class HttpError(ProtocolError):
    """Ends a request with ``status`` (400–599). A service raises it, the server connection turns it into a response.

    ``proxy_error`` is an error type of RFC 9209 section 2.3, sent in Proxy-Status; ``headers`` are added to the
    response; ``close`` makes it the last one on its connection. The message is for logs *and* for the client: it
    must not repeat what the client sent.
    """

    kind = "http"

    def __init__(
        self,
        status: int,
        message: str,
        *,
        proxy_error: str = "",
        headers: Iterable[tuple[str, str]] = (),
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.proxy_error = proxy_error
        self.headers = tuple(headers)
        self.close = close
        body = self.body
        lines = [f"HTTP/1.1 {status} {REASONS.get(status, '')}", "Content-Type: text/plain; charset=utf-8"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
        self.wire = "\r\n".join(lines).encode("latin-1") + body

    @property
    def body(self) -> bytes:
        """The text that the client is shown."""
        return f"{self.status} {REASONS.get(self.status, '')}: {self}\n".encode()


class MalformedMessage(HttpError):
    """A message that is not HTTP, that two parsers could read differently, or that exceeds a size limit.

    Nothing of it is forwarded and its connection is closed: where the next message begins is not known. Most of these
    a web page can make a browser send, or an honest client by mistake: they are no strikes
    (:mod:`~rama_ebpf.core.blame`). What only an attacker sends is an :class:`AmbiguousMessage`.
    """

    kind = "http_refused"

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(status, message, close=True)


class AmbiguousMessage(MalformedMessage):
    """A message whose framing two parsers could read differently: request smuggling. Browsers frame their messages
    themselves, so no web page can make a visitor send one."""

    kind = "http_malformed"


def unanswered() -> HttpError:
    """What becomes of a request whose response does not begin in time."""
    return HttpError(504, "the upstream did not answer", proxy_error="http_response_timeout")


def malformed_response() -> HttpError:
    """What becomes of a request whose response breaks the protocol."""
    return HttpError(502, "the upstream's response is malformed", proxy_error="http_protocol_error")


class ConnectionDropped(RamaError):
    """A service raises it to close the client's connection (HTTP/2: reset the stream) without a response."""

    kind = "http_dropped"


class NoResponse(HttpError):
    """The upstream closed the connection without a byte of a response: on a kept connection worth another try."""

    def __init__(self) -> None:
        super().__init__(502, "the upstream closed without a response", proxy_error="connection_terminated")


class ClientDenied(PolicyDenied):
    """Policy refuses the client that a trusted proxy named."""
