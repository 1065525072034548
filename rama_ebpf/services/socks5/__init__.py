"""SOCKS5 (RFC 1928, RFC 1929), SOCKS4 and SOCKS4a."""

from .associate import Association, AssociationReport, Drop, UdpAssociator
from .bind import Binder
from .client import BoundPort, Socks5Client, UdpSocket
from .machine import Request, ServerMachine
from .replies import reply_for
from .server import ReplyTiming, Socks5Server, UserLimits
from .wire import Command, Method, Reply

__all__ = [
    "Association",
    "AssociationReport",
    "Binder",
    "BoundPort",
    "Command",
    "Drop",
    "Method",
    "Reply",
    "ReplyTiming",
    "Request",
    "ServerMachine",
    "Socks5Client",
    "Socks5Server",
    "UdpAssociator",
    "UdpSocket",
    "UserLimits",
    "reply_for",
]
