"""What SOCKS looks like on the wire: the code points of RFC 1928, RFC 1929 and SOCKS4/4a, and the address fields."""

from __future__ import annotations

import enum
import functools
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from ...core.address import Authority, SocketAddress

__all__ = [
    "UNKNOWN_ADDRESS",
    "Command",
    "Fragment",
    "MalformedAddress",
    "Method",
    "Reply",
    "decode_address",
    "decode_datagram",
    "decode_domain",
    "encode_address",
    "encode_datagram",
]

UNKNOWN_ADDRESS: Final = SocketAddress(IPv4Address(0), 0)
"""What BND.ADDR and BND.PORT carry where there is no address to tell."""

_ATYP_IPV4: Final = 1
_ATYP_DOMAIN: Final = 3
_ATYP_IPV6: Final = 4
_SIZES: Final = {_ATYP_IPV4: 4, _ATYP_IPV6: 16}


class Method(enum.IntEnum):
    """Authentication methods (RFC 1928 section 3)."""

    NONE = 0x00
    PASSWORD = 0x02
    """Username and password, RFC 1929."""
    NO_ACCEPTABLE = 0xFF


class Command(enum.IntEnum):
    """What a client asks for (RFC 1928 section 4); SOCKS4 has the first two."""

    CONNECT = 0x01
    BIND = 0x02
    UDP_ASSOCIATE = 0x03


class Reply(enum.IntEnum):
    """The REP field (RFC 1928 section 6)."""

    SUCCEEDED = 0x00
    GENERAL_FAILURE = 0x01
    NOT_ALLOWED = 0x02
    NETWORK_UNREACHABLE = 0x03
    HOST_UNREACHABLE = 0x04
    CONNECTION_REFUSED = 0x05
    TTL_EXPIRED = 0x06
    COMMAND_NOT_SUPPORTED = 0x07
    ADDRESS_TYPE_NOT_SUPPORTED = 0x08


class MalformedAddress(ValueError):
    """An address field that RFC 1928 section 5 does not allow; ``reply`` is the code that says so."""

    def __init__(self, message: str, reply: Reply) -> None:
        super().__init__(message)
        self.reply = reply


class BadName(MalformedAddress):
    """A domain field that can be no host name."""


class Fragment(MalformedAddress):
    """A datagram whose FRAG field is not 0."""


def decode_address(data: bytes, start: int = 0) -> tuple[Authority, int] | None:
    """Read ATYP, address and port at ``data[start:]``; return the target and the offset behind it.

    Returns None if more bytes are needed. Raises :class:`MalformedAddress`. A domain that is an IP literal becomes
    that address, so that policy sees one form of it.
    """
    if len(data) <= start:
        return None
    atyp = data[start]
    if atyp == _ATYP_DOMAIN:
        if len(data) < start + 2:
            return None
        length = data[start + 1]
        if length == 0:
            raise MalformedAddress("zero-length domain name", Reply.GENERAL_FAILURE)
        begin = start + 2
    elif atyp in _SIZES:
        length = _SIZES[atyp]
        begin = start + 1
    else:
        raise MalformedAddress(f"address type {atyp:#04x} is unknown", Reply.ADDRESS_TYPE_NOT_SUPPORTED)
    end = begin + length + 2
    if len(data) < end:
        return None
    field = data[begin : end - 2]
    port = int.from_bytes(data[end - 2 : end], "big")
    if atyp == _ATYP_DOMAIN:
        return Authority.of(decode_domain(field), port), end
    return _literal(field, port), end


@functools.lru_cache(1024)
def _literal(field: bytes, port: int) -> Authority:
    """The target of 4 or 16 bytes of an address. Few targets are asked for by many."""
    return Authority(IPv4Address(field) if len(field) == 4 else IPv6Address(field), port)


def decode_domain(field: bytes) -> str:
    """Return a domain field as text. Raises :class:`MalformedAddress` for what can be no name or IP literal.

    White space and control characters could split a log line or cut the name short in a C library, and ``%`` would
    smuggle an interface into an IPv6 literal. Names beyond ASCII are taken as UTF-8; the resolver applies IDNA.
    """
    try:
        text = field.decode()
    except UnicodeDecodeError as error:
        raise BadName("domain name is not UTF-8", Reply.GENERAL_FAILURE) from error
    if not text.isprintable() or " " in text or "%" in text:
        raise BadName(f"domain name {text!r} holds a character that no name has", Reply.GENERAL_FAILURE)
    return text


def decode_datagram(data: bytes) -> tuple[Authority, int]:
    """Read the header of a client's datagram (RFC 1928 section 7); return its target and where the payload starts.

    Raises :class:`MalformedAddress` for a header that is cut short or not allowed, and :class:`Fragment` for a
    fragment: reassembly is optional, and who does not do it must drop them.
    """
    if len(data) < 4 or data[0] or data[1]:
        raise MalformedAddress("UDP header is cut short or its reserved octets are not 0", Reply.GENERAL_FAILURE)
    if data[2]:
        raise Fragment(f"fragment {data[2]:#04x}", Reply.GENERAL_FAILURE)
    found = decode_address(data, 3)
    if found is None:
        raise MalformedAddress("UDP header is cut short", Reply.GENERAL_FAILURE)
    return found


def encode_datagram(address: SocketAddress | Authority, payload: bytes) -> bytes:
    """Return ``payload`` behind the UDP header that names ``address``."""
    return b"\0\0\0" + encode_address(address) + payload


def encode_address(address: SocketAddress | Authority) -> bytes:
    """Return ATYP, address and port. Raises ValueError for a domain name that is not 1–255 octets long."""
    host = address.ip if isinstance(address, SocketAddress) else address.host
    port = address.port.to_bytes(2, "big")
    if type(host) is IPv4Address:
        return b"\x01%b%b" % (int(host).to_bytes(4, "big"), port)
    if isinstance(host, IPv6Address):
        return b"\x04%b%b" % (host.packed, port)
    assert isinstance(host, str)
    name = host.encode()
    if not 1 <= len(name) <= 255:
        raise ValueError(f"a domain name has 1-255 octets, not {len(name)}")
    return bytes((_ATYP_DOMAIN, len(name))) + name + port
