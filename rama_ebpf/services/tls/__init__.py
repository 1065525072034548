"""TLS: look at a ClientHello, route and judge by it, pass through, terminate, originate, intercept."""

from .alert import Alert
from .bypass import Rejections
from .ca import CertificateAuthority, Leaf, LeafIssuer
from .certs import CertificateStore, ClientAuth, KeyPair, SelectContext, ServerTls, certificate_names
from .client_hello import ClientHello, ClientHelloParser
from .errors import AlertError, CertificateRejected, HandshakeFailed, NotTls, TlsError, TlsTruncated
from .fingerprint import Ja3, Ja4
from .match import TlsAction, TlsDenied, TlsMatch, TlsPolicyLayer, TlsRoute, TlsRouter, TlsRule, TlsStrike
from .mitm import Intercepted, TlsInterceptor
from .originate import ClientTls, TlsConnector, spki_sha256
from .passthrough import TlsPassthrough
from .peek import TlsPeekLayer, peek_client_hello
from .stream import TlsParameters, TlsStream
from .terminate import TlsTerminateLayer
from .tickets import TicketKeys
from .tunnel import TlsTunnelLayer

__all__ = [
    "Alert",
    "AlertError",
    "CertificateAuthority",
    "CertificateRejected",
    "CertificateStore",
    "ClientAuth",
    "ClientHello",
    "ClientHelloParser",
    "ClientTls",
    "HandshakeFailed",
    "Intercepted",
    "Ja3",
    "Ja4",
    "KeyPair",
    "Leaf",
    "LeafIssuer",
    "NotTls",
    "Rejections",
    "SelectContext",
    "ServerTls",
    "TicketKeys",
    "TlsAction",
    "TlsConnector",
    "TlsDenied",
    "TlsError",
    "TlsInterceptor",
    "TlsMatch",
    "TlsParameters",
    "TlsPassthrough",
    "TlsPeekLayer",
    "TlsPolicyLayer",
    "TlsRoute",
    "TlsRouter",
    "TlsRule",
    "TlsStream",
    "TlsStrike",
    "TlsTerminateLayer",
    "TlsTruncated",
    "TlsTunnelLayer",
    "certificate_names",
    "peek_client_hello",
    "spki_sha256",
]
