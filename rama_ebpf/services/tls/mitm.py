"""Interception: decrypting a client's TLS with a certificate of our own, after the server behind has proven itself."""

from __future__ import annotations

import ssl
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterable
from dataclasses import dataclass, replace

from ...core.client import client_address
from ...core.names import NameSet
from ...core.shares import SourceShare
from ...core.stream import Stream
from ...relay import Move, TunnelReport
from .alert import Alert
from .ca import LeafIssuer
from .client_hello import ClientHello
from .errors import CertificateRejected, HandshakeFailed
from .limit import HandshakeLimit
from .originate import ClientTls
from .stream import TlsStream

__all__ = ["Intercepted", "Rejections", "TlsInterceptor"]


class Rejections:
    """Remembers which clients have refused our certificate for which name, for ``ttl`` seconds each.

    An alert about the certificate is a refusal. Some libraries (Python's asyncio is one) hang up without a word
    instead, but so does who has lost interest: that counts at the ``hang_ups``-th time in a row.

    A client is its address: what one application with a pinned certificate refuses must not be hidden from view for
    everybody else. At most ``limit`` pairs are kept, the oldest is forgotten first.
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
        self._seen.pop((client, name), None)
        self._seen[client, name] = count, self._clock() + self._ttl
        if len(self._seen) > self._limit:
            self._seen.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Intercepted:
    """A decrypted tunnel: both ends in plaintext, speaking the same ALPN protocol; ``name`` is the server's."""

    client: TlsStream
    upstream: TlsStream
    name: str
    move: Move
    """Relays what is left, when the inspection has seen enough: ``await tunnel.move(tunnel.client, …)``."""


class TlsInterceptor:
    """Puts itself into a TLS connection between a client and an upstream that is already connected.

    First the upstream proves itself, by ``upstream`` (trust, client certificate, pins, protocols in order); a
    client is never shown a good certificate for a bad server. Then the client gets a leaf of ``issuer`` with that
    server's names and validity and the protocol that was agreed on there. ``inspect`` gets both ends; without it
    their bytes are relayed.

    Names in ``bypass`` are passed through unopened, and so are those that the client has refused our certificate for
    (``rejections``); the connection in which it does so is lost, its next one is not. ``handshake_timeout`` (seconds)
    bounds each of the two handshakes; ``max_handshakes`` and ``handshakes`` how many are under way at once, altogether
    and of one source.
    """

    def __init__(
        self,
        issuer: LeafIssuer,
        upstream: ClientTls | None = None,
        *,
        bypass: Iterable[str] = (),
        inspect: Callable[[Intercepted], Awaitable[TunnelReport]] | None = None,
        rejections: Rejections | None = None,
        handshake_timeout: float = 10.0,
        max_handshakes: int = 1000,
        handshakes: SourceShare | None = None,
        ragged_eof: bool = False,
    ) -> None:
        self._issuer = issuer
        self._upstream = upstream if upstream is not None else ClientTls(alpn=("h2", "http/1.1"))
        self._bypass = NameSet(bypass)
        self._inspect = inspect
        self._rejections = rejections if rejections is not None else Rejections()
        self._timeout = handshake_timeout
        self._handshakes = HandshakeLimit(max_handshakes, handshakes)
        self._ragged_eof = ragged_eof
        self._contexts: dict[tuple[str, ...], ssl.SSLContext] = {}
        self._context(self._upstream.alpn)  # what is wrong with the settings shows now

    async def handle(self, client: Stream, upstream: Stream, move: Move, hello: ClientHello, name: str) -> TunnelReport:
        """Intercept a client that has sent ``hello``, still unread, to the server ``name``.

        Raises :class:`CertificateRejected` or :class:`HandshakeFailed` if either handshake fails, after the client
        has been sent an alert.
        """
        address = client_address(client)
        source = None if address is None else address.ip
        if name in self._bypass or self._rejections.remembers(source, name):
            return await move(client, upstream)
        async with self._handshakes.hold(client):
            server_side = await self._originate(client, upstream, hello, name)
            certificate = server_side.parameters.peer_certificate
            assert certificate is not None  # a server without one fails the handshake
            agreed = server_side.parameters.alpn
            context = self._issuer.mirroring(certificate, name, () if agreed is None else (agreed,))
            try:
                client_side = await TlsStream.accept(
                    client, context, server_name=hello.server_name, timeout=self._timeout, ragged_eof=self._ragged_eof
                )
            except HandshakeFailed as error:
                if error.rejected_our_certificate:
                    self._rejections.refused(source, name)
                raise
            except ConnectionError:
                self._rejections.hung_up(source, name)
                raise
            self._rejections.accepted(source, name)
        if self._inspect is None:
            return await move(client_side, server_side)
        report = await self._inspect(Intercepted(client_side, server_side, name, move))
        await client_side.close()
        await server_side.close()
        return report

    async def _originate(self, client: Stream, upstream: Stream, hello: ClientHello, name: str) -> TlsStream:
        offered = tuple(protocol for protocol in self._upstream.alpn if protocol.encode() in hello.alpn)
        try:
            stream = await TlsStream.connect(
                upstream,
                self._context(offered),
                server_name=name,
                timeout=self._timeout,
                ragged_eof=self._ragged_eof,
            )
            self._upstream.check_pins(stream.parameters.peer_certificate, name)
        except CertificateRejected:
            await client.close_after(Alert.BAD_CERTIFICATE.record)
            raise
        except HandshakeFailed:
            await client.close_after(Alert.HANDSHAKE_FAILURE.record)
            raise
        return stream

    def _context(self, alpn: tuple[str, ...]) -> ssl.SSLContext:
        """One context for each selection of our protocols: there are few, whatever clients offer."""
        context = self._contexts.get(alpn)
        if context is None:
            context = self._contexts[alpn] = replace(self._upstream, alpn=alpn).context()
        return context
