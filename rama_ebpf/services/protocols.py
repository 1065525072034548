"""Telling a client's protocol by its first bytes. Sans-I/O.

A matcher is asked about the bytes that have come so far and answers True (it is this protocol), False (it is not) or
None (more bytes are needed).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

__all__ = ["PeekMatcher", "is_http", "is_socks", "is_tls"]

PeekMatcher = Callable[[bytes], bool | None]

_METHOD: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,24} ")
_METHOD_START: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{0,24}")


def is_socks(data: bytes) -> bool | None:
    """SOCKS4, SOCKS4a or SOCKS5: the first byte is the version."""
    return data[0] in (4, 5) if data else None


def is_tls(data: bytes) -> bool | None:
    """A TLS record of a handshake (RFC 8446 section 5.1): type 22 and a legacy version of major number 3."""
    if not b"\x16\x03".startswith(data[:2]):
        return False
    return True if len(data) >= 2 else None


def is_http(data: bytes) -> bool | None:
    """A method and a space (RFC 9112 section 3), empty lines before it ignored (section 2.2); HTTP/2's preface too."""
    data = data.lstrip(b"\r\n")
    if _METHOD.match(data):
        return True
    return None if _METHOD_START.fullmatch(data) else False
