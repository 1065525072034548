"""The client's side of SOCKS4 and 4a: one request, one reply of eight bytes. Sans-I/O."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Final

from ...core.address import Authority
from ...core.errors import ProtocolError

__all__ = ["REPLY_BYTES", "read_reply", "request_bytes"]

REPLY_BYTES: Final = 8
_NAME_FOLLOWS: Final = b"\0\0\0\1"


def request_bytes(target: Authority, user: str) -> bytes:
    """Return the request to connect to ``target``. Raises ValueError for one that SOCKS4 cannot say."""
    head = b"\4\1" + target.port.to_bytes(2, "big")
    ident = user.encode()
    if b"\0" in ident:
        raise ValueError("a user name with NUL")
    if isinstance(target.host, str):
        name = target.host.encode("idna") if not target.host.isascii() else target.host.encode()
        if not 1 <= len(name) <= 255 or b"\0" in name:
            raise ValueError("a name that SOCKS4a cannot say")
        return head + _NAME_FOLLOWS + ident + b"\0" + name + b"\0"
    if not isinstance(target.host, IPv4Address):
        raise ValueError("SOCKS4 knows no IPv6")
    return head + target.host.packed + ident + b"\0"


def read_reply(data: bytes) -> int:
    """Return the code of a reply (90: granted) of :data:`REPLY_BYTES` bytes. Raises :class:`ProtocolError`."""
    if data[0] != 0:
        raise ProtocolError(f"server answers with version {data[0]:#04x}: it speaks no SOCKS4")
    return data[1]
