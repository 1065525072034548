"""TLS inside the tunnels of other protocols: SOCKS5, CONNECT, pass-through. Look, judge, intercept, or let it be."""

from __future__ import annotations

import asyncio

from ...core.address import Authority
from ...core.errors import HandshakeTimeout, PeerClosed
from ...core.first_bytes import FirstBytes
from ...core.service import Output, Service
from ...core.stream import Stream
from ...relay import Move, TunnelHandler, TunnelReport
from .client_hello import DEFAULT_LIMIT, ClientHello
from .errors import AlertError, NotTls
from .match import TlsPolicyLayer
from .mitm import TlsInterceptor
from .peek import add_client_hello, peek_client_hello

__all__ = ["TlsTunnelLayer"]


class TlsTunnelLayer:
    """Looks into every tunnel that the service inside opens, in whatever protocol, once its client speaks TLS::

        stack(TlsTunnelLayer(policy=rules, intercept=interceptor), Socks5Server(connector))

    The :class:`ClientHello` and fingerprints are added to the client's extensions, ``policy`` may refuse it, and
    ``intercept`` decrypts what is left. A tunnel whose server speaks first, or whose client speaks something else,
    is relayed as it is. A ClientHello that cannot be read is refused with its alert, unless ``fail_open`` has it
    relayed too.

    Nobody can wait the look out: a tunnel in which neither side says a word within ``first_byte_timeout`` seconds is
    cut, and so is a ClientHello that is not complete ``timeout`` seconds after it began.
    """

    accepts = Stream

    def __init__(
        self,
        *,
        policy: TlsPolicyLayer | None = None,
        intercept: TlsInterceptor | None = None,
        fail_open: bool = False,
        timeout: float = 10.0,
        first_byte_timeout: float = 300.0,
        limit: int = DEFAULT_LIMIT,
    ) -> None:
        self._policy = policy
        self._intercept = intercept
        self._fail_open = fail_open
        self._timeout = timeout
        self._first_byte_timeout = first_byte_timeout
        self._limit = limit

    def first_bytes(self, inner: FirstBytes | None) -> FirstBytes | None:
        """First bytes are judged as inside: what is refused by them needs nothing of this layer."""
        return inner

    def __call__(self, inner: Service[Stream, Output], /) -> Service[Stream, Output]:
        handler = TunnelHandler(self._handle)

        async def serve(stream: Stream, /) -> Output:
            stream.extensions.add(handler)
            return await inner(stream)

        return serve

    async def _handle(self, client: Stream, upstream: Stream, move: Move) -> TunnelReport:
        if not await self._client_speaks_first(client, upstream):
            return await move(client, upstream)
        try:
            hello = await peek_client_hello(client, timeout=self._timeout, limit=self._limit)
        except NotTls:
            return await move(client, upstream)
        except (AlertError, HandshakeTimeout, PeerClosed) as error:
            if self._fail_open:
                return await move(client, upstream)
            if isinstance(error, AlertError):
                await client.close_after(error.wire)
            raise
        add_client_hello(client, hello)
        if self._policy is not None:
            await self._policy.check(client)
        if self._intercept is None:
            return await move(client, upstream)
        return await self._intercept.handle(client, upstream, move, hello, _server_name(client, upstream, hello))

    async def _client_speaks_first(self, client: Stream, upstream: Stream) -> bool:
        """Wait for the first byte (or the end) of either side; nothing is consumed."""
        if client.buffered or upstream.buffered:
            return bool(client.buffered)
        loop = asyncio.get_running_loop()
        waiting = [loop.create_task(client.fill(self._limit)), loop.create_task(upstream.fill())]
        try:
            await asyncio.wait(waiting, timeout=self._first_byte_timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        for task in waiting:
            if not task.cancelled() and task.exception() is not None:
                task.result()  # a reset: raises
        if all(task.cancelled() for task in waiting):
            raise HandshakeTimeout(f"neither side spoke within {self._first_byte_timeout} s")
        return bool(client.buffered)


def _server_name(client: Stream, upstream: Stream, hello: ClientHello) -> str:
    """Whom the client believes to talk to: the name that it says, else the target it asked for, else its address."""
    if hello.server_name is not None:
        return hello.server_name
    target = client.extensions.get(Authority)
    if target is not None:
        return str(target.host)
    return str(upstream.peer.ip) if upstream.peer is not None else ""
