"""What RFC 9110 and 9112 ask of a proxy between a request's arrival and its departure, and of the way back.

The connections on both sides have taken care of framing, Host and hop-by-hop fields; here are the rest: Via, the
credentials that are for us, Max-Forwards, and a bound on loops.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from typing import Final

from ..exchange.quick import Marks
from ..h1.writer import NOT_A_REQUESTS, NOT_A_RESPONSES
from ..message.errors import HttpError
from ..message.headers import Headers, Written
from ..message.model import Body, Request, Response
from ..message.websocket import check_opening

__all__ = ["DEFAULT_UPGRADES", "MAX_HOPS", "answer_max_forwards", "forwardable", "marks", "onward", "returned"]

MAX_HOPS: Final = 32
"""How many proxies a request may have passed, by its Via, before it is taken to run in a circle (508)."""

DEFAULT_UPGRADES: Final = frozenset({"websocket"})

# Never told to anyone but us (RFC 9110 section 11.7), nor the answers to it.
_PROXY_CREDENTIALS: Final = frozenset({b"proxy-authorization"})
_PROXY_CHALLENGES: Final = frozenset({b"proxy-authenticate", b"proxy-authentication-info"})
_NOT_ONWARD: Final = _PROXY_CREDENTIALS | NOT_A_REQUESTS
_NOT_BACK: Final = _PROXY_CHALLENGES | NOT_A_RESPONSES
_SECRET_IN_TRACE: Final = ("authorization", "cookie", "proxy-authorization")
_NUMBER: Final = re.compile(r"[0-9]{1,9}")


def forwardable(request: Request, via: str | None, upgrades: Collection[str]) -> Request:
    """Return the request as it goes on.

    ``via`` is our pseudonym (None: we do not show), ``upgrades`` the protocols that it may ask to switch to: a
    switch to another is not asked for, as if we did not know it (``h2c`` would take what follows out of our sight).
    Raises :class:`HttpError`: 508 in a loop, 501 for a ``:protocol`` (RFC 8441 section 4) that is not among them, and
    what a bad opening handshake of WebSocket gets (RFC 6455 section 4.2.1).
    """
    upgrade = request.upgrade if request.upgrade in upgrades else None
    if request.upgrade is not None and request.version == "2" and upgrade is None:
        raise HttpError(501, "the protocol of this CONNECT is not known here")
    if upgrade == "websocket":
        check_opening(request)
    headers, hops = request.headers._passed_on(_PROXY_CREDENTIALS, _own_via(request.version, via))
    _check_hops(hops)
    if request.method in ("TRACE", "OPTIONS"):
        limit = _max_forwards(request)
        if limit is not None:
            headers.set("Max-Forwards", str(limit - 1))
    return Request(
        request.method,
        request.authority,
        request.path,
        headers,
        request.body,
        request.scheme,
        request.version,
        request.absolute,
        request.connection_scheme,
        upgrade,
        request.accepts_trailers,
        request.extensions,
        request.inform,
    )


def onward(request: Request, via: str | None) -> Written:
    """Return the fields of a GET or HEAD without a body and without an upgrade as they go on over HTTP/1.1: what
    :func:`forwardable` would make of them. Raises :class:`HttpError`: 508 in a loop."""
    written = request.headers._written(_NOT_ONWARD, _own_via(request.version, via))
    if written.hops:
        _check_hops(written.hops)
    return written


def marks(via: str | None) -> Marks:
    """Return what :func:`returned` does, for who writes the fields of responses at once."""
    return Marks(_NOT_BACK, {version: _own_via(version, via) for version in ("1.0", "1.1", "2")})


def _check_hops(hops: int) -> None:
    if hops >= MAX_HOPS:
        raise HttpError(508, "the request has passed too many proxies", proxy_error="proxy_loop_detected")


def returned(response: Response, via: str | None) -> Response:
    """Mark a response on its way back to the client, in place, and return it."""
    response.headers, _ = response.headers._passed_on(_PROXY_CHALLENGES, _own_via(response.version, via))
    return response


def answer_max_forwards(request: Request) -> Response | None:
    """Return our own answer to TRACE or OPTIONS if Max-Forwards is 0 (RFC 9110 section 7.6.2), else None."""
    if request.method not in ("TRACE", "OPTIONS") or _max_forwards(request) != 0:
        return None
    if request.method == "OPTIONS":
        allow = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE, CONNECT"
        return Response(200, Headers([("Allow", allow)]))
    headers = request.headers.copy()
    headers.remove(*_SECRET_IN_TRACE)
    lines = [f"{request.method} {request.url} HTTP/{request.version}", f"Host: {request.authority}"]
    lines += [f"{name}: {value}" for name, value in headers]
    echo = "\r\n".join([*lines, "", ""]).encode("latin-1")
    return Response(200, Headers([("Content-Type", "message/http")]), Body.of(echo))


def _max_forwards(request: Request) -> int | None:
    value = request.headers.get("max-forwards")
    if value is None or _NUMBER.fullmatch(value) is None:
        return None
    return int(value)


@functools.lru_cache(64)
def _own_via(version: str, via: str | None) -> bytes | None:
    return None if via is None else f"{version} {via}".encode("latin-1")
