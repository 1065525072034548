"""HTTP server: a transport service that turns a stream into requests for an HTTP service."""

from __future__ import annotations

from ...core.graceful import Drain
from ...core.service import Service
from ...core.stream import Stream
from .h1_server import H1ServerConnection
from .limits import HttpLimits, HttpTimeouts
from .model import Request, Response

__all__ = ["HttpServer"]


class HttpServer:
    """Serves HTTP on the streams it is given: ``stack(..., HttpServer(app))``.

    ``service`` is ``async def app(request: Request) -> Response``, or a stack that ends in one. What it raises
    becomes a response: :class:`~.errors.HttpError` its own, errors of connecting 502, 503 or 504, a bug 500.
    ``scheme`` is that of the streams, "http" or "https". ``name`` stands in Proxy-Status of error responses.
    """

    accepts = Stream

    def __init__(
        self,
        service: Service[Request, Response],
        *,
        scheme: str = "http",
        name: str = "rama-ebpf",
        limits: HttpLimits | None = None,
        timeouts: HttpTimeouts | None = None,
    ) -> None:
        self._service = service
        self._scheme = scheme
        self._name = name
        self._limits = HttpLimits() if limits is None else limits
        self._timeouts = HttpTimeouts() if timeouts is None else timeouts
        self._live: set[H1ServerConnection] = set()
        self._draining = False

    async def __call__(self, stream: Stream, /) -> None:
        connection = H1ServerConnection(
            stream,
            self._service,
            scheme=self._scheme,
            name=self._name,
            limits=self._limits,
            timeouts=self._timeouts,
        )
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

    def drain(self) -> None:
        """Close idle connections, and the others after the request they are serving."""
        self._draining = True
        for connection in list(self._live):
            connection.drain()
