"""The opening handshake of WebSocket (RFC 6455 section 4) where a proxy translates it between versions of HTTP.

HTTP/1.1 proves with a key and its hash that the server knows WebSocket; HTTP/2 (RFC 8441) has neither. So the side
that speaks HTTP/1.1 is given what the other side does not have.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from typing import Final

from .errors import HttpError
from .model import Request

__all__ = ["ACCEPT", "KEY", "accept_for", "check_opening", "new_key"]

KEY = "Sec-WebSocket-Key"
ACCEPT = "Sec-WebSocket-Accept"

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_VERSION: Final = "Sec-WebSocket-Version"
_SIXTEEN_BYTES: Final = re.compile(r"[A-Za-z0-9+/]{21}[AQgw]==")


def check_opening(request: Request) -> None:
    """Raise :class:`HttpError` unless ``request`` opens a WebSocket as RFC 6455 section 4.2.1 wants it: GET, version
    13, and in HTTP/1.1 a key of 16 bytes. HTTP/2 has no key (RFC 8441 section 5), and a version that is not told there
    is for the server to miss."""
    if request.method != "GET":
        raise HttpError(400, "a WebSocket is opened by GET")
    versions = request.headers.get_all(_VERSION)
    if versions != ["13"] and (versions or request.version != "2"):
        raise HttpError(426, "only version 13 of WebSocket", headers=[(_VERSION, "13"), ("Upgrade", "websocket")])
    if request.version != "2":
        keys = request.headers.get_all(KEY)
        if len(keys) != 1 or _SIXTEEN_BYTES.fullmatch(keys[0]) is None:
            raise HttpError(400, "a WebSocket is opened with one key of 16 bytes")


def new_key() -> str:
    """Return a fresh key: 16 random bytes in base64."""
    return base64.b64encode(os.urandom(16)).decode("ascii")


def accept_for(key: str) -> str:
    """Return what a server answers to ``key``."""
    digest = hashlib.sha1(key.encode("latin-1") + _GUID, usedforsecurity=False).digest()
    return base64.b64encode(digest).decode("ascii")
