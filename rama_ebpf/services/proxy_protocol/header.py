"""The PROXY header, versions 1 and 2, read and written. Sans-I/O.

Follows "The PROXY protocol, Versions 1 & 2" (haproxy, doc/proxy-protocol.txt, 2020/03/05). Strict where the text
leaves room: numbers have no leading zeros, version 1 has single blanks, lengths must agree, unknown families end
the connection, a checksum that is present must be right and unique.
"""

from __future__ import annotations

import enum
import re
import struct
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from ...core.address import IPAddress, SocketAddress, mapped, unmap
from ...core.errors import ProtocolError

__all__ = [
    "MAX_V2_LENGTH",
    "Command",
    "ProxyHeader",
    "ProxyProtocolError",
    "Tlv",
    "TlvType",
    "UntrustedProxy",
    "crc32c",
    "encode_v1",
    "encode_v2",
    "parse",
]

MAX_V2_LENGTH: Final = 4096
"""Upper bound in bytes of what a version 2 header may carry behind its first 16 bytes; 536 is the least allowed."""

_SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_V1_PREFIX: Final = b"PROXY "
_V1_MAX: Final = 107
_PORT: Final = re.compile(r"0|[1-9][0-9]{0,4}")
_UNIX_SIZE: Final = 108
_AF_UNSPEC, _AF_INET, _AF_INET6, _AF_UNIX = range(4)
_STREAM: Final = 1


class ProxyProtocolError(ProtocolError):
    """A header that is missing, malformed or contradicts itself. The protocol has no reply: the connection ends."""

    kind = "proxy_protocol"


class UntrustedProxy(ProxyProtocolError):
    """A peer that nobody trusts to name its clients, where a header is required."""

    kind = "untrusted_proxy"


class Command(enum.Enum):
    """What a header is for."""

    LOCAL = 0
    """The proxy's own connection, such as a health check: the transport's addresses are the real ones."""
    PROXY = 1
    """A connection on behalf of a client."""


class TlvType(enum.IntEnum):
    """Types of version 2 extensions that have a registered meaning (section 2.2)."""

    ALPN = 0x01
    AUTHORITY = 0x02
    CRC32C = 0x03
    NOOP = 0x04
    UNIQUE_ID = 0x05
    SSL = 0x20
    SSL_VERSION = 0x21
    SSL_CN = 0x22
    SSL_CIPHER = 0x23
    SSL_SIG_ALG = 0x24
    SSL_KEY_ALG = 0x25
    NETNS = 0x30


@dataclass(frozen=True, slots=True)
class Tlv:
    """One extension: ``type`` 0–255 (see :class:`TlvType`) and up to 65535 bytes."""

    type: int
    value: bytes


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """What a PROXY header says. ``source`` and ``destination`` are None for :attr:`Command.LOCAL`, for an unknown
    protocol and for Unix sockets, whose paths are in ``unix``."""

    version: int
    command: Command
    source: SocketAddress | None = None
    destination: SocketAddress | None = None
    tlvs: tuple[Tlv, ...] = ()
    unix: tuple[bytes, bytes] | None = None

    def tlv(self, kind: int) -> bytes | None:
        """Return the value of the first extension of this type, or None."""
        return next((tlv.value for tlv in self.tlvs if tlv.type == kind), None)


def parse(data: bytes) -> tuple[ProxyHeader, int] | None:
    """Read a header at the beginning of ``data``: return it and its length, or None if more bytes are needed.

    Raises :class:`ProxyProtocolError` as soon as it is certain that no valid header can come of it.
    """
    if data[:12] == _SIGNATURE[: len(data)]:
        return _parse_v2(data) if len(data) >= 16 else None
    if data[:6] == _V1_PREFIX[: len(data)]:
        return _parse_v1(data) if len(data) >= 6 else None
    raise ProxyProtocolError("no PROXY header")


# -- version 1 -------------------------------------------------------------------------------------------------


def _parse_v1(data: bytes) -> tuple[ProxyHeader, int] | None:
    end = data.find(b"\r\n", 0, _V1_MAX)
    if end < 0:
        if len(data) >= _V1_MAX:
            raise ProxyProtocolError("a version 1 header without an end")
        return None
    try:
        words = data[:end].decode("ascii").split(" ")
        if words[1] == "UNKNOWN":
            return ProxyHeader(1, Command.PROXY), end + 2
        _, family, source_ip, destination_ip, source_port, destination_port = words
        source = SocketAddress(_ip(family, source_ip), _port(source_port))
        destination = SocketAddress(_ip(family, destination_ip), _port(destination_port))
    except (ValueError, IndexError) as error:
        raise ProxyProtocolError("a malformed version 1 header") from error
    return ProxyHeader(1, Command.PROXY, source, destination), end + 2


def _ip(family: str, text: str) -> IPAddress:
    if family == "TCP4":
        return IPv4Address(text)
    if family != "TCP6" or "%" in text:
        raise ValueError("not a family, or an address with a zone")
    return unmap(IPv6Address(text))


def _port(text: str) -> int:
    if _PORT.fullmatch(text) is None or int(text) > 65535:
        raise ValueError("not a port")
    return int(text)


def encode_v1(source: SocketAddress | None, destination: SocketAddress | None) -> bytes:
    """Return a version 1 header for a TCP connection; UNKNOWN if an address is not known."""
    if source is None or destination is None:
        return b"PROXY UNKNOWN\r\n"
    family, source_ip, destination_ip = _same_family(source.ip, destination.ip)
    return f"PROXY TCP{family} {source_ip} {destination_ip} {source.port} {destination.port}\r\n".encode("ascii")


def _same_family(source: IPAddress, destination: IPAddress) -> tuple[int, IPAddress, IPAddress]:
    if source.version == destination.version:
        return source.version, source, destination
    # The client came by one family and our listener tells its own in the other: map IPv4 into IPv6.
    return 6, IPv6Address(mapped(source)), IPv6Address(mapped(destination))


# -- version 2 -------------------------------------------------------------------------------------------------


def _parse_v2(data: bytes) -> tuple[ProxyHeader, int] | None:
    version_command, family_protocol, length = struct.unpack_from("!BBH", data, 12)
    if version_command >> 4 != 2 or version_command & 15 > 1:
        raise ProxyProtocolError("a header of an unknown version or command")
    if length > MAX_V2_LENGTH:
        raise ProxyProtocolError(f"a version 2 header of {length} bytes")
    if len(data) < 16 + length:
        return None
    if version_command & 15 == Command.LOCAL.value:
        # Section 2.2: the receiver must discard the rest, family included.
        return ProxyHeader(2, Command.LOCAL), 16 + length
    header = data[: 16 + length]
    family, protocol = family_protocol >> 4, family_protocol & 15
    source: SocketAddress | None = None
    destination: SocketAddress | None = None
    unix: tuple[bytes, bytes] | None = None
    size = {_AF_UNSPEC: 0, _AF_INET: 12, _AF_INET6: 36, _AF_UNIX: 2 * _UNIX_SIZE}.get(family)
    if size is None or size > length or protocol != (0 if family == _AF_UNSPEC else _STREAM):
        raise ProxyProtocolError("a version 2 header for no stream protocol that we know, or too short for it")
    block = header[16 : 16 + size]
    if family == _AF_UNIX:
        unix = (block[:_UNIX_SIZE].rstrip(b"\0"), block[_UNIX_SIZE:].rstrip(b"\0"))
    elif family != _AF_UNSPEC:
        width = (size - 4) // 2
        source_port, destination_port = struct.unpack_from("!HH", block, 2 * width)
        source = SocketAddress(_packed(block[:width]), source_port)
        destination = SocketAddress(_packed(block[width : 2 * width]), destination_port)
    tlvs = _parse_tlvs(header, 16 + size)
    return ProxyHeader(2, Command.PROXY, source, destination, tlvs, unix), 16 + length


def _packed(raw: bytes) -> IPAddress:
    return IPv4Address(raw) if len(raw) == 4 else unmap(IPv6Address(raw))


def _parse_tlvs(header: bytes, offset: int) -> tuple[Tlv, ...]:
    tlvs: list[Tlv] = []
    checksum_at: int | None = None
    while offset < len(header):
        if len(header) - offset < 3:
            raise ProxyProtocolError("a truncated extension")
        kind, length = struct.unpack_from("!BH", header, offset)
        value = header[offset + 3 : offset + 3 + length]
        if len(value) < length:
            raise ProxyProtocolError("a truncated extension")
        if kind == TlvType.CRC32C:
            if checksum_at is not None or length != 4:
                raise ProxyProtocolError("a checksum twice or of a wrong size")
            checksum_at = offset + 3
        elif kind == TlvType.UNIQUE_ID and length > 128:
            raise ProxyProtocolError("a unique id of more than 128 bytes")
        if kind != TlvType.NOOP:
            tlvs.append(Tlv(kind, value))
        offset += 3 + length
    if checksum_at is not None:
        zeroed = header[:checksum_at] + bytes(4) + header[checksum_at + 4 :]
        if crc32c(zeroed) != int.from_bytes(header[checksum_at : checksum_at + 4], "big"):
            raise ProxyProtocolError("a wrong checksum")
    return tuple(tlvs)


def encode_v2(
    source: SocketAddress | None,
    destination: SocketAddress | None,
    *,
    tlvs: tuple[Tlv, ...] = (),
    command: Command = Command.PROXY,
    checksum: bool = False,
) -> bytes:
    """Return a version 2 header for a TCP connection; of family UNSPEC if an address is not known.

    ``checksum`` adds a CRC32c. Raises ValueError if it would be longer than 65551 bytes.
    """
    family = _AF_UNSPEC << 4
    block = b""
    if command is Command.PROXY and source is not None and destination is not None:
        version, source_ip, destination_ip = _same_family(source.ip, destination.ip)
        family = (_AF_INET if version == 4 else _AF_INET6) << 4 | _STREAM
        block = source_ip.packed + destination_ip.packed + struct.pack("!HH", source.port, destination.port)
    body = block + b"".join(struct.pack("!BH", tlv.type, len(tlv.value)) + tlv.value for tlv in tlvs)
    if checksum:
        body += struct.pack("!BHI", TlvType.CRC32C, 4, 0)
    if len(body) > 65535:
        raise ValueError("the extensions are too long for a PROXY header")
    header = _SIGNATURE + struct.pack("!BBH", 2 << 4 | command.value, family, len(body)) + body
    if checksum:
        header = header[:-4] + crc32c(header).to_bytes(4, "big")
    return header


# -- CRC32c ----------------------------------------------------------------------------------------------------


def crc32c(data: bytes) -> int:
    """Return the CRC32c of ``data`` (RFC 9260 appendix A: polynomial 0x1EDC6F41, reflected)."""
    table = _crc_table()
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


@cache
def _crc_table() -> tuple[int, ...]:
    table: list[int] = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)
