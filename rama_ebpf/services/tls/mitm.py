"""Interception: decrypting a client's TLS with a certificate of our own, after the server behind has proven itself."""

from __future__ import annotations

import contextlib
import itertools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from ...core.address import Authority
from ...core.client import client_address
from ...core.service import Service
from ...core.shares import SourceShare
from ...core.stream import Stream
from ...relay import Move, TunnelReport
from .alert import Alert
from .bypass import Bypass, Rejections
from .ca import LeafIssuer
from .client_hello import ClientHello
from .errors import CertificateRejected, HandshakeFailed
from .limit import HandshakeLimit
from .originate import ClientTls
from .stream import TlsStream

__all__ = ["Intercepted", "TlsInterceptor"]

_FEW_PROTOCOLS: Final = 4


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

    Names in ``bypass`` are passed through unopened, where the client asked for that name as target too, or for an
    address, and the server has a good certificate for it (``connector`` and ``verify_bypass``: see
    :class:`.bypass.Bypass`). With ``rejections`` so are those that the client has refused our certificate for; the
    connection in which it does so is lost, its next one is not. That leaves to clients what is seen, so by default
    nothing is learned.
    ``handshake_timeout`` (seconds) bounds each of the handshakes; ``max_handshakes`` and ``handshakes`` how many are
    under way at once, altogether and of one source.
    """

    def __init__(
        self,
        issuer: LeafIssuer,
        upstream: ClientTls | None = None,
        *,
        bypass: Iterable[str] = (),
        connector: Service[Authority, Stream] | None = None,
        verify_bypass: bool = True,
        inspect: Callable[[Intercepted], Awaitable[TunnelReport]] | None = None,
        rejections: Rejections | None = None,
        handshake_timeout: float = 10.0,
        max_handshakes: int = 1000,
        handshakes: SourceShare | None = None,
        ragged_eof: bool = False,
    ) -> None:
        self._issuer = issuer
        self._upstream = upstream if upstream is not None else ClientTls(alpn=("h2", "http/1.1"))
        self._bypass = Bypass(
            bypass, self._upstream, connector=connector, verify=verify_bypass, timeout=handshake_timeout
        )
        self._inspect = inspect
        self._rejections = rejections
        self._timeout = handshake_timeout
        self._handshakes = HandshakeLimit(max_handshakes, handshakes)
        self._ragged_eof = ragged_eof
        self._contexts: dict[tuple[str, ...], ssl.SSLContext] = {}
        protocols = self._upstream.alpn
        self._context(protocols)  # what is wrong with the settings shows now
        if self._upstream.reads_files and len(protocols) <= _FEW_PROTOCOLS:
            # A process that gives up its privileges cannot read them later.
            for count in range(len(protocols)):
                for some in itertools.combinations(protocols, count):
                    self._context(some)

    async def handle(self, client: Stream, upstream: Stream, move: Move, hello: ClientHello, name: str) -> TunnelReport:
        """Intercept a client that has sent ``hello``, still unread, to the server ``name``.

        Raises :class:`CertificateRejected` or :class:`HandshakeFailed` if either handshake fails, after the client
        has been sent an alert.
        """
        address = client_address(client)
        source = None if address is None else address.ip
        target, rejections = client.extensions.get(Authority), self._rejections
        learned = rejections is not None and rejections.remembers(source, name)
        if learned or self._bypass.wants(target, name):
            async with self._handshakes.hold(client):
                upstream = await self._prove(client, upstream, target, name)
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
                if error.rejected_our_certificate and rejections is not None:
                    rejections.refused(source, name)
                raise
            except ConnectionError:
                if rejections is not None:
                    rejections.hung_up(source, name)
                raise
            if rejections is not None:
                rejections.accepted(source, name)
        if self._inspect is None:
            return await move(client_side, server_side)
        report = await self._inspect(Intercepted(client_side, server_side, name, move))
        await client_side.close()
        await server_side.close()
        return report

    async def _prove(self, client: Stream, upstream: Stream, target: Authority | None, name: str) -> Stream:
        async with _refusals_told(client):
            return await self._bypass.prove(target, upstream, name)

    async def _originate(self, client: Stream, upstream: Stream, hello: ClientHello, name: str) -> TlsStream:
        offered = tuple(protocol for protocol in self._upstream.alpn if protocol.encode() in hello.alpn)
        async with _refusals_told(client):
            stream = await TlsStream.connect(
                upstream,
                self._context(offered),
                server_name=name,
                timeout=self._timeout,
                ragged_eof=self._ragged_eof,
            )
            self._upstream.check_pins(stream.parameters.peer_certificate, name)
        return stream

    def _context(self, alpn: tuple[str, ...]) -> ssl.SSLContext:
        """One context for each selection of our protocols: there are few, whatever clients offer."""
        context = self._contexts.get(alpn)
        if context is None:
            context = self._contexts[alpn] = replace(self._upstream, alpn=alpn).context()
        return context


@contextlib.asynccontextmanager
async def _refusals_told(client: Stream) -> AsyncIterator[None]:
    """Tell the client, by an alert, that we refuse the upstream, or that it refuses us."""
    try:
        yield
    except CertificateRejected:
        await client.close_after(Alert.BAD_CERTIFICATE.record)
        raise
    except HandshakeFailed:
        await client.close_after(Alert.HANDSHAKE_FAILURE.record)
        raise
