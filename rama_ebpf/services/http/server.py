"""HTTP server: a transport service that turns a stream into requests for an HTTP service."""

from __future__ import annotations

import asyncio
from typing import Final

from ...core.at_once import AtOnce, Session, Visit
from ...core.blame import speaks_another_protocol
from ...core.first_bytes import FirstBytes, Refused
from ...core.graceful import Drain
from ...core.service import Service, check_fit, innermost
from ...core.stream import Stream
from ..tls.stream import TlsParameters
from .exchange.quick import dial_of
from .exchange.served import Served
from .h1.connect import BegunConnect, begin_connect, begins_connect
from .h1.server import H1ServerConnection
from .h2.server import H2_PREFACE, H2ServerConnection
from .message.errors import AmbiguousMessage, MalformedMessage
from .message.limits import HttpLimits, HttpTimeouts
from .message.model import Request, Response

__all__ = ["HttpServer"]


_SEPARATORS: Final = frozenset(b'"(),/:;<=>?@[\\]{} \t')
_NOISE, _STRAY = (
    Refused(error.kind, str(error), error.wire)
    for error in (AmbiguousMessage("not HTTP"), MalformedMessage("not HTTP"))
)


def refuse_what_is_not_http(data: bytes) -> Refused | None:
    """Judge the first bytes of a client that is to speak HTTP (see :mod:`rama_ebpf.core.first_bytes`): one that no
    request begins with (RFC 9112 sections 2.2 and 3)."""
    if not data or (0x20 < data[0] < 0x7F and data[0] not in _SEPARATORS) or data[0] in b"\r\n":
        return None
    return _STRAY if speaks_another_protocol(data) else _NOISE


class HttpServer:
    """Serves HTTP on the streams it is given: ``stack(..., HttpServer(app))``.

    ``service`` is ``async def app(request: Request) -> Response``, or a stack that ends in one. What it raises
    becomes a response: :class:`~.message.errors.HttpError` its own, errors of connecting 502, 503 or 504, a bug 500.
    ``name`` stands in Proxy-Status of error responses.

    A TLS stream whose ALPN is ``h2`` gets HTTP/2; with ``h2c`` so does a plain one that begins with the preface
    ("prior knowledge"). ``extended_connect`` tells HTTP/2 clients that they may open WebSockets (RFC 8441); without
    it browsers do so over HTTP/1.1. ``scheme`` is that of the connection, by default "https" on TLS streams, else
    "http"; who names another one in a target gets 421 (RFC 9110 section 7.4), unless the service is a ``forward``
    proxy, whose targets are elsewhere (by default: if it is, or was stacked around, a
    :class:`~.proxy.forward.ForwardProxy`).
    """

    accepts = Stream

    def __init__(
        self,
        service: Service[Request, Response],
        *,
        scheme: str | None = None,
        forward: bool | None = None,
        h2c: bool = False,
        extended_connect: bool = True,
        name: str = "rama-ebpf",
        limits: HttpLimits | None = None,
        timeouts: HttpTimeouts | None = None,
    ) -> None:
        check_fit(self, Request, service)
        self._service = service
        self._scheme = scheme
        self._forward = getattr(innermost(service), "forwards", False) if forward is None else forward
        self._h2c = h2c
        self._extended_connect = extended_connect
        self._name = name
        self._limits = HttpLimits() if limits is None else limits
        self._timeouts = HttpTimeouts() if timeouts is None else timeouts
        self._live: set[H1ServerConnection | H2ServerConnection] = set()
        self._draining = False
        self.first_bytes = FirstBytes(refuse_what_is_not_http)
        self._dial = dial_of(service)
        plain = type(self).__call__ is HttpServer.__call__ and self._dial is not None
        self.at_once = AtOnce(self, self._begin, begins_connect) if plain else None
        """CONNECT, if it is what a connection begins with (:mod:`.h1.connect`)."""

    async def __call__(self, stream: Stream, /) -> None:
        served = self._served(stream)
        connection: H1ServerConnection | H2ServerConnection
        if await self._speaks_h2(stream):
            connection = H2ServerConnection(stream, served, extended_connect=self._extended_connect)
        else:
            begun = stream.extensions.get(BegunConnect)
            if begun is not None and begun.stream is not stream:
                begun = None  # that of a tunnel in which this one is
            connection = H1ServerConnection(stream, served, begun)
        self._live.add(connection)
        drain = stream.extensions.get(Drain)
        unwatch = None if drain is None else drain.watch(connection.drain)
        try:
            if self._draining:
                connection.drain()
            await connection.serve()
        finally:
            if unwatch is not None:
                unwatch()
            self._live.discard(connection)

    def _begin(self, visit: Visit) -> Session | None:
        if self._draining or self._dial is None:
            visit.take_over()
            return None
        return begin_connect(self._served(visit.stream), self._dial, visit)

    async def _speaks_h2(self, stream: Stream) -> bool:
        tls = stream.extensions.get(TlsParameters)
        if tls is not None:
            return tls.alpn == "h2"
        if not self._h2c:
            return False
        try:
            async with asyncio.timeout(self._timeouts.idle):
                while H2_PREFACE.startswith(stream.buffered) and len(stream.buffered) < len(H2_PREFACE):
                    if not await stream.fill():
                        break
        except TimeoutError:
            return False
        return stream.buffered.startswith(H2_PREFACE)

    def _served(self, stream: Stream) -> Served:
        scheme = self._scheme or ("http" if TlsParameters not in stream.extensions else "https")
        return Served(self._service, scheme, self._name, self._forward, self._limits, self._timeouts)

    def drain(self) -> None:
        """Close idle connections, and the others after the request they are serving."""
        self._draining = True
        for connection in list(self._live):
            connection.drain()
