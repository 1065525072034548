"""The framework: services, layers, streams, extensions and errors. Imports nothing else of this package."""

from .address import Authority, IPAddress, SocketAddress
from .auth import Authenticator, Credentials, User
from .client import ClientAddress, HasExtensions, client_address
from .errors import (
    AuthFailed,
    HandshakeTimeout,
    LimitExceeded,
    PeerClosed,
    PolicyDenied,
    ProtocolError,
    RamaError,
    StackError,
    TunnelTimeout,
)
from .extensions import Extensions
from .lifecycle import Lifecycle, Stage
from .service import Layer, Service, service_fn, stack
from .stream import SocketStream, Stream

__all__ = [
    "AuthFailed",
    "Authenticator",
    "Authority",
    "ClientAddress",
    "Credentials",
    "Extensions",
    "HandshakeTimeout",
    "HasExtensions",
    "IPAddress",
    "Layer",
    "Lifecycle",
    "LimitExceeded",
    "PeerClosed",
    "PolicyDenied",
    "ProtocolError",
    "RamaError",
    "Service",
    "SocketAddress",
    "SocketStream",
    "StackError",
    "Stage",
    "Stream",
    "TunnelTimeout",
    "User",
    "client_address",
    "service_fn",
    "stack",
]
