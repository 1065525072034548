"""PROXY protocol versions 1 and 2, in (a layer) and out (a connector)."""

from .connector import ProxyProtocolConnector
from .header import (
    Command,
    ProxyHeader,
    ProxyProtocolError,
    Tlv,
    TlvType,
    encode_v1,
    encode_v2,
    parse,
)
from .layer import ProxyProtocolLayer

__all__ = [
    "Command",
    "ProxyHeader",
    "ProxyProtocolConnector",
    "ProxyProtocolError",
    "ProxyProtocolLayer",
    "Tlv",
    "TlvType",
    "encode_v1",
    "encode_v2",
    "parse",
]
