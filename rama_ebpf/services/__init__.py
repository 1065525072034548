"""The services: what serves a client, and what connects to a target. ``docs/services.md`` has a line on each."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .connect import ConnectError as ConnectError
    from .connect import Connector as Connector
    from .forward import Forward as Forward
    from .http import Body as Body
    from .http import ForwardProxy as ForwardProxy
    from .http import Headers as Headers
    from .http import HttpError as HttpError
    from .http import HttpInspector as HttpInspector
    from .http import HttpProxy as HttpProxy
    from .http import HttpServer as HttpServer
    from .http import Request as Request
    from .http import Response as Response
    from .http import Route as Route
    from .http import Routes as Routes
    from .proxy import mixed_proxy as mixed_proxy
    from .proxy_protocol import ProxyHeader as ProxyHeader
    from .proxy_protocol import ProxyProtocolConnector as ProxyProtocolConnector
    from .proxy_protocol import ProxyProtocolLayer as ProxyProtocolLayer
    from .router import PeekRouter as PeekRouter
    from .router import is_http as is_http
    from .router import is_socks as is_socks
    from .router import is_tls as is_tls
    from .socks5 import Socks5Client as Socks5Client
    from .socks5 import Socks5Server as Socks5Server
    from .socks5 import UdpAssociator as UdpAssociator
    from .socks5 import UserLimits as UserLimits
    from .tcp import TcpServer as TcpServer
    from .tcp import bind_tcp as bind_tcp
    from .tls import CertificateAuthority as CertificateAuthority
    from .tls import CertificateStore as CertificateStore
    from .tls import ClientHello as ClientHello
    from .tls import ClientTls as ClientTls
    from .tls import Ja4 as Ja4
    from .tls import KeyPair as KeyPair
    from .tls import LeafIssuer as LeafIssuer
    from .tls import ServerTls as ServerTls
    from .tls import TlsAction as TlsAction
    from .tls import TlsConnector as TlsConnector
    from .tls import TlsInterceptor as TlsInterceptor
    from .tls import TlsMatch as TlsMatch
    from .tls import TlsPassthrough as TlsPassthrough
    from .tls import TlsPeekLayer as TlsPeekLayer
    from .tls import TlsPolicyLayer as TlsPolicyLayer
    from .tls import TlsRoute as TlsRoute
    from .tls import TlsRouter as TlsRouter
    from .tls import TlsRule as TlsRule
    from .tls import TlsTerminateLayer as TlsTerminateLayer
    from .tls import TlsTunnelLayer as TlsTunnelLayer
    from .udp import UdpServer as UdpServer
    from .udp import bind_udp as bind_udp
    from .unix import UnixConnector as UnixConnector
    from .unix import bind_unix as bind_unix
    from .upstream import ResolveLayer as ResolveLayer
    from .upstream import UserEgressLayer as UserEgressLayer
    from .upstream import parse_chain as parse_chain
    from .upstream import parse_hop as parse_hop

__all__ = [
    "Body",
    "CertificateAuthority",
    "CertificateStore",
    "ClientHello",
    "ClientTls",
    "ConnectError",
    "Connector",
    "Forward",
    "ForwardProxy",
    "Headers",
    "HttpError",
    "HttpInspector",
    "HttpProxy",
    "HttpServer",
    "Ja4",
    "KeyPair",
    "LeafIssuer",
    "PeekRouter",
    "ProxyHeader",
    "ProxyProtocolConnector",
    "ProxyProtocolLayer",
    "Request",
    "ResolveLayer",
    "Response",
    "Route",
    "Routes",
    "ServerTls",
    "Socks5Client",
    "Socks5Server",
    "TcpServer",
    "TlsAction",
    "TlsConnector",
    "TlsInterceptor",
    "TlsMatch",
    "TlsPassthrough",
    "TlsPeekLayer",
    "TlsPolicyLayer",
    "TlsRoute",
    "TlsRouter",
    "TlsRule",
    "TlsTerminateLayer",
    "TlsTunnelLayer",
    "UdpAssociator",
    "UdpServer",
    "UnixConnector",
    "UserEgressLayer",
    "UserLimits",
    "bind_tcp",
    "bind_udp",
    "bind_unix",
    "is_http",
    "is_socks",
    "is_tls",
    "mixed_proxy",
    "parse_chain",
    "parse_hop",
]

_HOMES: Final = {
    ".connect": ("ConnectError", "Connector"),
    ".forward": ("Forward",),
    ".http": (
        "Body",
        "ForwardProxy",
        "Headers",
        "HttpError",
        "HttpInspector",
        "HttpProxy",
        "HttpServer",
        "Request",
        "Response",
        "Route",
        "Routes",
    ),
    ".proxy": ("mixed_proxy",),
    ".proxy_protocol": ("ProxyHeader", "ProxyProtocolConnector", "ProxyProtocolLayer"),
    ".router": ("PeekRouter", "is_http", "is_socks", "is_tls"),
    ".socks5": ("Socks5Client", "Socks5Server", "UdpAssociator", "UserLimits"),
    ".tcp": ("TcpServer", "bind_tcp"),
    ".tls": (
        "CertificateAuthority",
        "CertificateStore",
        "ClientHello",
        "ClientTls",
        "Ja4",
        "KeyPair",
        "LeafIssuer",
        "ServerTls",
        "TlsAction",
        "TlsConnector",
        "TlsInterceptor",
        "TlsMatch",
        "TlsPassthrough",
        "TlsPeekLayer",
        "TlsPolicyLayer",
        "TlsRoute",
        "TlsRouter",
        "TlsRule",
        "TlsTerminateLayer",
        "TlsTunnelLayer",
    ),
    ".udp": ("UdpServer", "bind_udp"),
    ".unix": ("UnixConnector", "bind_unix"),
    ".upstream": ("ResolveLayer", "UserEgressLayer", "parse_chain", "parse_hop"),
}


def __getattr__(name: str) -> object:
    """Import a name when it is asked for: most programs need few."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
