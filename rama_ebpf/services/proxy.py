"""The proxy that is served without a configuration: SOCKS4, 4a and 5, HTTP and TLS by server name, on one port."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..core.address import Authority
from ..core.at_once import AtOnce, Session, Visit
from ..core.auth import Authenticator
from ..core.service import Service, stack
from ..core.shares import SourceShare
from ..core.stream import Stream
from ..relay import TunnelLimits
from .http import DEFAULT_UPGRADES, HttpLimits, HttpProxy, HttpTimeouts
from .http.layers import ProxyAuthLayer
from .protocols import PeekMatcher, is_http, is_socks, is_tls
from .router import PeekRouter
from .socks5 import Binder, Socks5Server, UdpAssociator
from .tls import TlsPassthrough, TlsPeekLayer

__all__ = ["mixed_proxy"]


def mixed_proxy(
    connector: Service[Authority, Stream],
    *,
    auth: Authenticator | None = None,
    udp: UdpAssociator | None = None,
    binder: Binder | None = None,
    handshake_timeout: float = 10.0,
    tunnel_limits: TunnelLimits | None = None,
    http_timeouts: HttpTimeouts | None = None,
    http_limits: HttpLimits | None = None,
    http_upgrades: Collection[str] = DEFAULT_UPGRADES,
    handshakes: SourceShare | None = None,
) -> Service[Stream, Any]:
    """Return a service that tells its clients' protocols apart by their first bytes.

    SOCKS clients get CONNECT, and UDP ASSOCIATE and BIND where ``udp`` and ``binder`` serve them; HTTP clients a
    forward proxy with CONNECT; a TLS client is passed through, undecrypted, to port 443 of the server name in its
    ClientHello. With ``auth`` SOCKS5 and HTTP clients must prove a user, and SOCKS4 and TLS clients, which cannot, are
    turned away.
    ``handshake_timeout`` (seconds) bounds each protocol's handshake, ``tunnel_limits`` every tunnel;
    ``http_limits`` and ``http_timeouts`` are those of HTTP, by default with ``handshake_timeout`` for a request's
    header section; ``http_upgrades`` are the protocols that it may switch to.
    ``handshakes`` bounds how many clients of one source may leave open what they speak, or be within a ClientHello.
    """
    socks = Socks5Server(
        connector, auth=auth, socks4=auth is None, udp=udp, binder=binder, handshake_timeout=handshake_timeout
    )
    http = HttpProxy(
        connector,
        layers=() if auth is None else (ProxyAuthLayer(auth),),
        upgrades=http_upgrades,
        tunnel_limits=tunnel_limits,
        limits=http_limits,
        timeouts=HttpTimeouts(head=handshake_timeout) if http_timeouts is None else http_timeouts,
    )
    routes: list[tuple[PeekMatcher, Service[Stream, Any]]] = [(is_socks, socks), (is_http, http)]
    if auth is None:
        tls = stack(TlsPeekLayer(timeout=handshake_timeout, handshakes=handshakes), TlsPassthrough(connector, port=443))
        routes.append((is_tls, tls))
    router = PeekRouter(*routes, timeout=handshake_timeout, undecided=handshakes)

    async def mixed(stream: Stream) -> Any:
        if tunnel_limits is not None:
            stream.extensions.add(tunnel_limits)
        return await router(stream)

    def begin(visit: Visit) -> Session | None:
        if tunnel_limits is not None:
            visit.stream.extensions.add(tunnel_limits)
        assert router.at_once is not None
        return visit.into(router.at_once)

    mixed.at_once = AtOnce(mixed, begin)  # type: ignore[attr-defined]
    mixed.first_bytes = router.first_bytes  # type: ignore[attr-defined]  # functions take attributes; mypy knows none
    return mixed
