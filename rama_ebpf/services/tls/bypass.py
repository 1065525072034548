"""Which TLS is passed through an interception unopened: what the operator has named, at servers that have proven it.

The server name in a ClientHello is the client's to choose, and so is the target it asks a proxy for. So one alone opens
nothing, and the server behind has to show a good certificate for the name. That of TLS 1.3 is encrypted, so the
connection on which it is shown is given up, and the client's handshake is made on another.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace

from ...core.address import Authority, SocketAddress
from ...core.errors import RamaError
from ...core.names import NameSet
from ...core.service import Service
from ...core.socket_stream import SocketStream
from ...core.stream import Stream
from .errors import CertificateRejected, HandshakeFailed
from .originate import ClientTls
from .stream import TlsStream

__all__ = ["Bypass", "Rejections"]

log = logging.getLogger(__name__)

_PROVEN: int = 4096


class Rejections:
    """Remembers which clients have refused our certificate for which name, for ``ttl`` seconds each.

    An alert about the certificate is a refusal. Some libraries (Python's asyncio is one) hang up without a word
    instead, but so does who has lost interest: that counts at the ``hang_ups``-th time in a row.

    A client is its address: what one application with a pinned certificate refuses must not be hidden from view for
    everybody else. At most ``limit`` pairs are kept, the oldest is forgotten first. Each that begins is logged.
    """

    def __init__(
        self,
        *,
        ttl: float = 3600.0,
        hang_ups: int = 3,
        limit: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ttl = ttl
        self._hang_ups = hang_ups
        self._limit = limit
        self._clock = clock
        self._seen: OrderedDict[tuple[Hashable, str], tuple[int, float]] = OrderedDict()

    def refused(self, client: Hashable, name: str) -> None:
        """Remember that ``client`` refuses our certificate for ``name``."""
        self._remember(client, name, self._hang_ups)

    def hung_up(self, client: Hashable, name: str) -> None:
        """Count a client that has seen our certificate for ``name`` and closed without a word."""
        count, until = self._seen.get((client, name), (0, 0.0))
        self._remember(client, name, count + 1 if self._clock() < until else 1)

    def accepted(self, client: Hashable, name: str) -> None:
        """Forget what was counted against ``client``: it has accepted our certificate for ``name``."""
        self._seen.pop((client, name), None)

    def remembers(self, client: Hashable, name: str) -> bool:
        """Whether ``client`` has refused our certificate for ``name`` lately."""
        count, until = self._seen.get((client, name), (0, 0.0))
        return count >= self._hang_ups and self._clock() < until

    def _remember(self, client: Hashable, name: str, count: int) -> None:
        if count == self._hang_ups and not self.remembers(client, name):
            text = "%s refuses our certificate for %s, which is passed through to it unopened for %g s"
            log.warning(text, client, name, self._ttl)
        self._seen.pop((client, name), None)
        self._seen[client, name] = count, self._clock() + self._ttl
        if len(self._seen) > self._limit:
            self._seen.popitem(last=False)


class Bypass:
    """Decides for tunnels, and has servers prove themselves.

    ``names`` are patterns. ``upstream`` says whom to trust, and ``connector`` leads to a target once more; without it
    the tunnel's peer is dialled again, which has to be the server itself. What was proven holds for ``ttl`` seconds.
    Without ``verify`` nothing is proven: for servers whose authority nobody knows.
    """

    def __init__(
        self,
        names: Iterable[str],
        upstream: ClientTls,
        *,
        connector: Service[Authority, Stream] | None = None,
        verify: bool = True,
        timeout: float = 10.0,
        ttl: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._names = NameSet(names)
        self._upstream = upstream
        self._connector = connector
        self._verify = verify
        self._timeout = timeout
        self._ttl = ttl
        self._clock = clock
        self._context: ssl.SSLContext | None = None
        if verify and upstream.reads_files:
            self._context = replace(upstream, alpn=()).context()  # privileges may be given up later
        self._proven: OrderedDict[tuple[Authority | SocketAddress | None, str], float] = OrderedDict()

    def wants(self, target: Authority | None, name: str) -> bool:
        """Whether a tunnel is to be passed through: if ``name`` is on the list, and so is the target that the client
        asked for. A target that is an address stands for no name, but the certificate will."""
        if name not in self._names:
            return False
        return target is None or target.ip is not None or str(target.host).lower().removesuffix(".") in self._names

    async def prove(self, target: Authority | None, upstream: Stream, name: str) -> Stream:
        """Return a connection to the server of a tunnel, which has shown a certificate for ``name``, now or lately:
        ``upstream``, or the one in its place if it was used up by that.

        Raises :class:`CertificateRejected` or :class:`HandshakeFailed` if it does not.
        """
        if not self._verify:
            return upstream
        key = target if self._connector is not None and target is not None else upstream.peer, name
        if self._proven.get(key, 0.0) > self._clock():
            return upstream
        try:
            context = self._context
            if context is None:
                context = self._context = replace(self._upstream, alpn=()).context()
            tls = await TlsStream.connect(upstream, context, server_name=name, timeout=self._timeout)
            self._upstream.check_pins(tls.parameters.peer_certificate, name)
        except CertificateRejected as error:
            raise CertificateRejected(f"{name} is to be passed through, and its server is another: {error}") from error
        finally:
            upstream.abort()
        try:
            again = await self._connect(target, upstream)
        except (RamaError, OSError) as error:
            raise HandshakeFailed(
                f"cannot connect to {name} once more, after it has shown its certificate: {error}"
            ) from error
        self._proven.pop(key, None)
        self._proven[key] = self._clock() + self._ttl
        if len(self._proven) > _PROVEN:
            self._proven.popitem(last=False)
        return again

    async def _connect(self, target: Authority | None, upstream: Stream) -> Stream:
        if self._connector is not None and target is not None:
            return await self._connector(target)
        if upstream.peer is None or not isinstance(upstream, SocketStream):
            raise OSError("give the interceptor a connector")
        sock = socket.socket(upstream.peer.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        stream = SocketStream.connecting(sock, upstream.peer)
        async with asyncio.timeout(self._timeout):
            await stream.connected()
        return stream
