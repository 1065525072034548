"""PROXY protocol on the way in: the layer that reads a header before the service inside sees the stream."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network, ip_network

from ...core.client import ClientAddress, LocalAddress, TrustedPeer
from ...core.errors import HandshakeTimeout, LimitExceeded, PeerClosed
from ...core.service import Output, Service
from ...core.stream import Stream
from .header import MAX_V2_LENGTH, ProxyHeader, ProxyProtocolError, UntrustedProxy, parse

__all__ = ["ProxyProtocolLayer"]


class ProxyProtocolLayer:
    """Reads the PROXY header of connections from ``trusted`` networks (CIDR text).

    There is no guessing. A trusted peer must send a header, and the connection ends without one. What any other peer
    sends is never taken for a header: with ``require`` (the default) its connection ends before a byte of it is
    read, without it the connection is served as the peer's own. A peer without an address (a Unix socket) is local
    and trusted. ``timeout`` is in seconds.

    The header is added to the stream's extensions as :class:`ProxyHeader`, its source as
    :class:`~rama_ebpf.core.client.ClientAddress`, the address that policy judges from there on, and its destination
    as :class:`~rama_ebpf.core.client.LocalAddress`. Raises :class:`ProxyProtocolError`, and
    :class:`HandshakeTimeout` if the header does not come in time.
    """

    accepts = Stream
    provides = Stream

    def __init__(self, trusted: Iterable[str], *, require: bool = True, timeout: float = 3.0) -> None:
        self._trusted: tuple[IPv4Network | IPv6Network, ...] = tuple(ip_network(text) for text in trusted)
        self._require = require
        self._timeout = timeout

    def __call__(self, inner: Service[Stream, Output], /) -> Service[Stream, Output]:
        async def serve(stream: Stream, /) -> Output:
            if self._trusts(stream):
                if stream.peer is not None:
                    stream.extensions.add(TrustedPeer(stream.peer.ip))
                try:
                    async with asyncio.timeout(self._timeout):
                        header = await _read(stream)
                except TimeoutError as error:
                    raise HandshakeTimeout(f"no PROXY header within {self._timeout} s") from error
                stream.extensions.add(header)
                if header.source is not None and header.destination is not None:
                    stream.extensions.add(ClientAddress(header.source))
                    stream.extensions.add(LocalAddress(header.destination))
            elif self._require:
                raise UntrustedProxy(f"{stream.peer} is not among the networks whose PROXY header is trusted")
            return await inner(stream)

        return serve

    def _trusts(self, stream: Stream) -> bool:
        peer = stream.peer
        return peer is None or any(peer.ip in network for network in self._trusted)


async def _read(stream: Stream) -> ProxyHeader:
    while (found := parse(stream.buffered)) is None:
        try:
            if not await stream.fill(16 + MAX_V2_LENGTH):
                if not stream.buffered:
                    raise PeerClosed("the peer connected and closed without a PROXY header")  # a health check
                raise ProxyProtocolError("the connection ended within the PROXY header")
        except LimitExceeded as error:
            raise ProxyProtocolError("the PROXY header does not end") from error
    header, length = found
    stream.consume(length)
    return header
