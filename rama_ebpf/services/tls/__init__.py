"""TLS: look at a ClientHello, route and judge by it, pass through, terminate, originate, intercept."""

from .alert import Alert, AlertError, NotTls
from .client_hello import ClientHello, ClientHelloParser
from .fingerprint import Ja3, Ja4
from .match import TlsAction, TlsDenied, TlsMatch, TlsPolicyLayer, TlsRoute, TlsRouter, TlsRule, TlsStrike
from .names import NameMap, NameSet
from .passthrough import TlsPassthrough
from .peek import TlsPeekLayer, peek_client_hello

__all__ = [
    "Alert",
    "AlertError",
    "ClientHello",
    "ClientHelloParser",
    "Ja3",
    "Ja4",
    "NameMap",
    "NameSet",
    "NotTls",
    "TlsAction",
    "TlsDenied",
    "TlsMatch",
    "TlsPassthrough",
    "TlsPeekLayer",
    "TlsPolicyLayer",
    "TlsRoute",
    "TlsRouter",
    "TlsRule",
    "TlsStrike",
    "peek_client_hello",
]
