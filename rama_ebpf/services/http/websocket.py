"""The opening handshake of WebSocket (RFC 6455 section 4) where a proxy translates it between versions of HTTP.

HTTP/1.1 proves with a key and its hash that the server knows WebSocket; HTTP/2 (RFC 8441) has neither. So the side
that speaks HTTP/1.1 is given what the other side does not have.
"""

from __future__ import annotations

import base64
import hashlib
import os

__all__ = ["ACCEPT", "KEY", "accept_for", "new_key"]

KEY = "Sec-WebSocket-Key"
ACCEPT = "Sec-WebSocket-Accept"

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def new_key() -> str:
    """Return a fresh key: 16 random bytes in base64."""
    return base64.b64encode(os.urandom(16)).decode("ascii")


def accept_for(key: str) -> str:
    """Return what a server answers to ``key``."""
    digest = hashlib.sha1(key.encode("latin-1") + _GUID, usedforsecurity=False).digest()
    return base64.b64encode(digest).decode("ascii")
