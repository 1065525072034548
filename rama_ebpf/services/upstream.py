"""Ways out through other proxies, named by URL: hops for a :class:`~rama_ebpf.core.chain.ProxyChainLayer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

from ..core.address import Authority, IPAddress
from ..core.auth import Credentials, User
from ..core.chain import Hop, ProxyChainLayer
from ..core.errors import PolicyDenied
from ..core.service import Service
from ..core.stream import Stream
from ..core.target import Target
from .connect import ConnectError, Egress, ResolveError, Resolver
from .http.proxy.tunnel_client import HttpTunnelClient
from .resolver import resolve_for, source_of
from .socks5.client import Socks5Client
from .tls import ClientTls, TlsConnector

__all__ = ["ResolveLayer", "UserEgressLayer", "parse_chain", "parse_hop"]

_DEFAULT_PORTS: Final = {"socks5": 1080, "socks5h": 1080, "http": 80, "https": 443}


def parse_hop(url: str, *, tls: ClientTls | None = None, timeout: float = 10.0) -> Hop:
    """Return the hop that ``url`` names: ``socks5://``, ``http://`` (CONNECT) or ``https://`` (CONNECT inside TLS), as
    ``scheme://user:password@host:port`` with percent-encoding in user and password.

    Names of targets are resolved by the proxy, as ``socks5h://`` says elsewhere; for resolving them here see
    :class:`ResolveLayer`. ``tls`` are the settings towards an ``https://`` proxy, ``timeout`` (seconds) bounds a
    handshake. Raises ValueError; its text holds no password.
    """
    try:
        parts = urlsplit(url)
        proxy = _authority(parts)
    except ValueError as error:
        raise ValueError(f"proxy URL: {error}") from None
    credentials = None
    if parts.username is not None:
        credentials = Credentials(unquote(parts.username), unquote(parts.password or ""))
    return _HOPS[parts.scheme](proxy, credentials, tls, timeout)


def parse_chain(urls: Sequence[str], *, tls: ClientTls | None = None, timeout: float = 10.0) -> ProxyChainLayer:
    """Return the layer that goes through all these proxies, the first one being the nearest to us."""
    return ProxyChainLayer(*(parse_hop(url, tls=tls, timeout=timeout) for url in urls))


def _authority(parts: SplitResult) -> Authority:
    if parts.scheme not in _DEFAULT_PORTS:
        raise ValueError(f"the scheme must be one of {', '.join(_DEFAULT_PORTS)}, not {parts.scheme!r}")
    if not parts.hostname:
        raise ValueError("it names no host")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("a proxy has no path, query or fragment")
    port = _DEFAULT_PORTS[parts.scheme] if parts.port is None else parts.port
    return Authority.of(parts.hostname, port)


def _socks5(proxy: Authority, credentials: Credentials | None, tls: ClientTls | None, timeout: float) -> Hop:
    return lambda inner: Socks5Client(inner, proxy, credentials=credentials, timeout=timeout)


def _http(proxy: Authority, credentials: Credentials | None, tls: ClientTls | None, timeout: float) -> Hop:
    return lambda inner: HttpTunnelClient(inner, proxy, credentials=credentials, timeout=timeout)


def _https(proxy: Authority, credentials: Credentials | None, tls: ClientTls | None, timeout: float) -> Hop:
    def hop(inner: Service[Authority, Stream]) -> Service[Authority, Stream]:
        secured = TlsConnector(inner, tls, handshake_timeout=timeout)
        return HttpTunnelClient(secured, proxy, credentials=credentials, timeout=timeout)

    return hop


_HOPS: Final[dict[str, Callable[[Authority, Credentials | None, ClientTls | None, float], Hop]]] = {
    "socks5": _socks5,
    "socks5h": _socks5,
    "http": _http,
    "https": _https,
}


class ResolveLayer:
    """Around a connector that has names resolved far away: resolves them here, and lets ``egress`` judge the address.

    Without it a chain's last proxy resolves, and then no policy of ours can know where a connection ends. The allowed
    addresses are asked for in order until one can be connected to. Raises :class:`PolicyDenied`,
    :class:`~.connect.ResolveError` or what the connector inside raises for the last one.
    """

    accepts = Authority
    provides = Authority

    def __init__(self, resolver: Resolver, egress: Egress) -> None:
        self._resolver = resolver
        self._egress = egress

    def __call__(self, inner: Service[Authority, Stream]) -> Service[Authority, Stream]:
        async def connect(target: Authority, /) -> Stream:
            failure: PolicyDenied | ConnectError | None = None
            ips = (
                [target.ip]
                if target.ip is not None
                else await resolve_for(self._resolver, str(target.host), source_of(target))
            )
            for ip in ips:
                try:
                    self._egress.check(ip, target.port)
                    return await inner(_at(target, ip))
                except ConnectError as error:
                    failure = error
                except PolicyDenied as error:
                    failure = failure or error
            raise failure or ResolveError(f"{target.host} has no address")

        return connect


class UserEgressLayer:
    """Around a connector: each authenticated user's targets are judged by the policy that ``egress(user)`` returns,
    besides the connector's own. None is no policy of the user's own, and nobody without a user has one. Names are
    resolved here, and what was judged is what is dialled. Raises as :class:`ResolveLayer` does."""

    accepts = Authority
    provides = Authority

    def __init__(self, resolver: Resolver, egress: Callable[[User], Egress | None]) -> None:
        self._resolver = resolver
        self._egress = egress

    def __call__(self, inner: Service[Authority, Stream], /) -> Service[Authority, Stream]:
        async def connect(target: Authority, /) -> Stream:
            user = target.extensions.get(User) if isinstance(target, Target) else None
            policy = None if user is None else self._egress(user)
            if policy is None:
                return await inner(target)
            return await ResolveLayer(self._resolver, policy)(inner)(target)

        return connect


def _at(target: Authority, ip: IPAddress) -> Authority:
    if isinstance(target, Target):
        return Target(ip, target.port, target.extensions)
    return Authority(ip, target.port)
