"""The framework: services, layers, streams, extensions and errors. Imports nothing else of this package."""

from .address import Authority, IPAddress, SocketAddress
from .errors import (
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
from .service import Layer, Service, service_fn, stack
from .stream import SocketStream, Stream

__all__ = [
    "Authority",
    "Extensions",
    "HandshakeTimeout",
    "IPAddress",
    "Layer",
    "LimitExceeded",
    "PeerClosed",
    "PolicyDenied",
    "ProtocolError",
    "RamaError",
    "Service",
    "SocketAddress",
    "SocketStream",
    "StackError",
    "Stream",
    "TunnelTimeout",
    "service_fn",
    "stack",
]
