"""The framework: services, layers, streams, extensions and errors. Imports nothing else of this package."""

from .address import Authority, Endpoint, IPAddress, SocketAddress
from .auth import Authenticator, Credentials, User
from .blame import Blame, judge
from .bucket import TokenBucket
from .client import ClientAddress, HasExtensions, ListenerName, LocalAddress, TrustedPeer, client_address, local_address
from .errors import (
    AuthFailed,
    Busy,
    HandshakeTimeout,
    IdleTimeout,
    LimitExceeded,
    PeerClosed,
    PolicyDenied,
    PolicyStrike,
    ProtocolError,
    RamaError,
    StackError,
    TotalTimeout,
    TunnelTimeout,
)
from .extensions import Extensions
from .graceful import Drain
from .lifecycle import Lifecycle, Stage
from .names import NameMap
from .service import Layer, Service, service_fn, stack
from .socket_stream import SocketStream
from .stream import Stream
from .target import Target
from .wrapped import WrappedStream

__all__ = [
    "AuthFailed",
    "Authenticator",
    "Authority",
    "Blame",
    "Busy",
    "ClientAddress",
    "Credentials",
    "Drain",
    "Endpoint",
    "Extensions",
    "HandshakeTimeout",
    "HasExtensions",
    "IPAddress",
    "IdleTimeout",
    "Layer",
    "Lifecycle",
    "LimitExceeded",
    "ListenerName",
    "LocalAddress",
    "NameMap",
    "PeerClosed",
    "PolicyDenied",
    "PolicyStrike",
    "ProtocolError",
    "RamaError",
    "Service",
    "SocketAddress",
    "SocketStream",
    "StackError",
    "Stage",
    "Stream",
    "Target",
    "TokenBucket",
    "TotalTimeout",
    "TrustedPeer",
    "TunnelTimeout",
    "User",
    "WrappedStream",
    "client_address",
    "judge",
    "local_address",
    "service_fn",
    "stack",
]
