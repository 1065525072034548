"""HTTP inside an intercepted TLS connection: served to the client, and asked of the very server it meant."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import AsyncExitStack
from typing import Final

from ....core.errors import HandshakeTimeout
from ....core.service import Layer, stack
from ....core.stream import Stream
from ....relay import CloseReason, TunnelReport
from ...protocols import is_http
from ...tls.mitm import Intercepted
from ..exchange.tunnel import Tunnel
from ..h1.client import H1ClientConnection
from ..h2.client import H2ClientConnection
from ..message.errors import ConnectionDropped, NoResponse
from ..message.limits import HttpLimits, HttpTimeouts
from ..message.model import Request, Response
from ..server import HttpServer
from .duties import DEFAULT_UPGRADES, forwardable, returned

__all__ = ["HttpInspector"]

_METHOD: Final = 64

_Send = Callable[[Request], Awaitable[Response]]


class HttpInspector:
    """What a :class:`~rama_ebpf.services.tls.mitm.TlsInterceptor` inspects with: HTTP/1.1 and HTTP/2 pass through
    ``layers`` (outermost first), anything else is relayed::

        TlsInterceptor(issuer, inspect=HttpInspector([HarLayer(recorder)]))

    The client's connection and the upstream's belong together: no other server is ever asked, whatever a request
    names, and when one ends so does the other. ``via`` is our pseudonym, None not to show in Via.
    """

    def __init__(
        self,
        layers: Collection[Layer] = (),
        *,
        via: str | None = "rama-ebpf",
        upgrades: Collection[str] = DEFAULT_UPGRADES,
        limits: HttpLimits | None = None,
        timeouts: HttpTimeouts | None = None,
    ) -> None:
        self._layers = tuple(layers)
        self._via = via
        self._upgrades = upgrades
        self._limits = HttpLimits() if limits is None else limits
        self._timeouts = HttpTimeouts() if timeouts is None else timeouts

    async def __call__(self, tunnel: Intercepted) -> TunnelReport:
        alpn = tunnel.client.parameters.alpn
        if alpn not in ("h2", "http/1.1") and not await self._begins_as_http(tunnel):
            return await tunnel.move(tunnel.client, tunnel.upstream)
        started = time.monotonic()
        async with AsyncExitStack() as cleanup:
            extended_connect = False
            if alpn == "h2":
                upstream = self._h2_upstream(tunnel, cleanup)
                # What we let the client do must be what the server can.
                extended_connect = await upstream.extended_connect()
                send = _over_h2(upstream)
            else:
                send = self._over_h1(tunnel)

            async def origin(request: Request) -> Response:
                response = await send(forwardable(request, self._via, self._upgrades))
                if isinstance(response.upgrade, Tunnel):
                    response.upgrade.move_by(tunnel.move)
                return returned(response, self._via)

            server = HttpServer(
                stack(*self._layers, origin),
                scheme="https",
                forward=True,  # what a target means is for the server that the client has connected to
                extended_connect=extended_connect,
                name=self._via or "proxy",
                limits=self._limits,
                timeouts=self._timeouts,
            )
            await server(tunnel.client)
        return TunnelReport(
            CloseReason.EOF,
            tunnel.upstream.bytes_sent,
            tunnel.client.bytes_sent,
            time.monotonic() - started,
            "http",
            "intercepted",
        )

    def _over_h1(self, tunnel: Intercepted) -> _Send:
        upstream = H1ClientConnection(
            tunnel.upstream, limits=self._limits, timeouts=self._timeouts, released=lambda _: None
        )
        used = False

        async def send(request: Request) -> Response:
            nonlocal used
            if used and not upstream.reusable:
                raise ConnectionDropped("the upstream has closed its connection")
            try:
                response = await upstream.send(request)
            except NoResponse as error:
                if used:
                    # The server closed a kept connection, as it may: the client is to see just that, and try again.
                    raise ConnectionDropped("the upstream has closed its connection") from error
                raise
            used = True
            response.close = response.close or not upstream.persistent
            return response

        return send

    def _h2_upstream(self, tunnel: Intercepted, cleanup: AsyncExitStack) -> H2ClientConnection:
        upstream = H2ClientConnection(
            tunnel.upstream, limits=self._limits, timeouts=self._timeouts, ended=lambda _: None
        )
        upstream.start()
        cleanup.push_async_callback(upstream.retire)
        return upstream

    async def _begins_as_http(self, tunnel: Intercepted) -> bool:
        """Whether the client speaks first, and HTTP. Nothing is consumed. Raises :class:`HandshakeTimeout`: who says
        nothing, or half a method, is not let past the layers for that."""
        if not await _client_speaks_first(tunnel.client, tunnel.upstream, self._timeouts.idle):
            return False
        try:
            async with asyncio.timeout(self._timeouts.head):
                while (verdict := is_http(tunnel.client.buffered)) is None:
                    if not await tunnel.client.fill(_METHOD):
                        return False
        except TimeoutError as error:
            raise HandshakeTimeout(f"protocol not clear within {self._timeouts.head} s") from error
        return verdict


def _over_h2(upstream: H2ClientConnection) -> _Send:
    async def send(request: Request) -> Response:
        try:
            return await upstream.send(request)
        except NoResponse as error:
            if upstream.closing:
                raise ConnectionDropped("the upstream has closed its connection") from error
            raise

    return send


async def _client_speaks_first(client: Stream, upstream: Stream, timeout: float) -> bool:
    loop = asyncio.get_running_loop()
    waiting = [loop.create_task(client.fill()), loop.create_task(upstream.fill())]
    try:
        done, _ = await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    if not done and not client.buffered:
        raise HandshakeTimeout(f"neither side has spoken within {timeout} s")
    return bool(client.buffered)
