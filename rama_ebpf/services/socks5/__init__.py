"""SOCKS5 (RFC 1928, RFC 1929), SOCKS4 and SOCKS4a."""

from .machine import Request, ServerMachine
from .replies import reply_for
from .server import Socks5Server
from .wire import Command, Method, Reply

__all__ = [
    "Command",
    "Method",
    "Reply",
    "Request",
    "ServerMachine",
    "Socks5Server",
    "reply_for",
]
