"""PROXY headers, byte for byte."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest

from rama_ebpf.core import SocketAddress
from rama_ebpf.services.proxy_protocol import (
    Command,
    ProxyHeader,
    ProxyProtocolError,
    Tlv,
    TlvType,
    encode_v1,
    encode_v2,
    parse,
)
from rama_ebpf.services.proxy_protocol.header import MAX_V2_LENGTH, crc32c

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
V4 = SocketAddress(ip_address("192.0.2.1"), 56324), SocketAddress(ip_address("198.51.100.7"), 443)
V6 = SocketAddress(ip_address("2001:db8::1"), 1), SocketAddress(ip_address("2001:db8::2"), 65535)
V4_BLOCK = bytes([192, 0, 2, 1, 198, 51, 100, 7]) + struct.pack("!HH", 56324, 443)


def v2(command: int = 0x21, family: int = 0x11, body: bytes = V4_BLOCK, length: int | None = None) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(body) if length is None else length) + body


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


@pytest.mark.parametrize(
    ("data", "header"),
    [
        (b"PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\n", ProxyHeader(1, Command.PROXY, *V4)),
        (b"PROXY TCP6 2001:db8::1 2001:db8::2 1 65535\r\n", ProxyHeader(1, Command.PROXY, *V6)),
        (b"PROXY UNKNOWN\r\n", ProxyHeader(1, Command.PROXY)),
        (b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", ProxyHeader(1, Command.PROXY)),
        (b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:198.51.100.7 56324 443\r\n", ProxyHeader(1, Command.PROXY, *V4)),
        (v2(), ProxyHeader(2, Command.PROXY, *V4)),
        (v2(0x20), ProxyHeader(2, Command.LOCAL)),
        (v2(0x20, 0xFF, b"what it says does not matter"), ProxyHeader(2, Command.LOCAL)),
        (v2(family=0, body=b""), ProxyHeader(2, Command.PROXY)),
        (v2(family=0, body=tlv(1, b"h2")), ProxyHeader(2, Command.PROXY, tlvs=(Tlv(1, b"h2"),))),
        (
            v2(body=V4_BLOCK + tlv(2, b"a.test") + tlv(4, b"padding") + tlv(0xEA, b"\x01vpce")),
            ProxyHeader(2, Command.PROXY, *V4, tlvs=(Tlv(2, b"a.test"), Tlv(0xEA, b"\x01vpce"))),
        ),
        (
            v2(family=0x31, body=b"/run/a".ljust(108, b"\0") + b"/run/b".ljust(108, b"\0")),
            ProxyHeader(2, Command.PROXY, unix=(b"/run/a", b"/run/b")),
        ),
    ],
)
def test_a_header_is_read_at_every_split_and_nothing_behind_it_is_consumed(data: bytes, header: ProxyHeader) -> None:
    for cut in range(len(data)):
        assert parse(data[:cut]) is None
    assert parse(data) == (header, len(data))
    assert parse(data + b"GET / HTTP/1.1\r\n") == (header, len(data))


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"P0",
        b"\r\n\r\n\0\r\nQUIT\r",
        b"proxy TCP4 1.2.3.4 1.2.3.4 1 1\r\n",
        b"PROXY  TCP4 1.2.3.4 1.2.3.4 1 1\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1 \r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1 x\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 01 1\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 65536 1\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 -1 1\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 \xb2 1\r\n",
        b"PROXY TCP4 01.2.3.4 1.2.3.4 1 1\r\n",
        b"PROXY TCP4 1.2.3 1.2.3.4 1 1\r\n",
        b"PROXY TCP4 ::1 ::1 1 1\r\n",
        b"PROXY TCP6 1.2.3.4 1.2.3.4 1 1\r\n",
        b"PROXY TCP6 fe80::1%eth0 ::1 1 1\r\n",
        b"PROXY UDP4 1.2.3.4 1.2.3.4 1 1\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1\n" + b"x" * 90,
        b"PROXY \r\n",
        b"PROXY UNKNOWN" + b"x" * 100,
        v2(0x11),
        v2(0x31),
        v2(0x22),
        v2(0x2F),
        v2(family=0x12),
        v2(family=0x10),
        v2(family=0x01),
        v2(family=0x41),
        v2(family=0x32, body=bytes(216)),
        v2(body=V4_BLOCK[:-1]),
        v2(family=0x21),
        v2(family=0x31, body=bytes(215)),
        v2(length=MAX_V2_LENGTH + 1),
        v2(body=V4_BLOCK + b"\x01"),
        v2(body=V4_BLOCK + b"\x01\x00"),
        v2(body=V4_BLOCK + b"\x01\x00\x05abcd"),
        v2(body=V4_BLOCK + tlv(3, b"\0\0\0\0")),
        v2(body=V4_BLOCK + tlv(3, b"\0\0\0")),
        v2(body=V4_BLOCK + tlv(5, b"x" * 129)),
    ],
)
def test_what_is_not_exactly_a_header_is_refused(data: bytes) -> None:
    with pytest.raises(ProxyProtocolError):
        parse(data)


def test_crc32c_has_the_published_check_values() -> None:
    # RFC 3720 appendix B.4, and the usual check value.
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43


def test_a_checksum_is_verified_and_one_flipped_bit_is_seen() -> None:
    header = encode_v2(*V4, tlvs=(Tlv(TlvType.AUTHORITY, b"a.test"),), checksum=True)
    found = parse(header)
    assert found is not None
    assert found[0].source == V4[0]
    assert found[0].tlv(TlvType.AUTHORITY) == b"a.test"
    checksum_type = len(header) - 7  # a checksum that became another extension cannot be missed
    for index in set(range(16, len(header))) - {checksum_type}:
        damaged = bytearray(header)
        damaged[index] ^= 4
        with pytest.raises(ProxyProtocolError):
            parse(bytes(damaged))


def test_two_checksums_are_refused() -> None:
    with pytest.raises(ProxyProtocolError):
        parse(v2(body=V4_BLOCK + tlv(3, bytes(4)) + tlv(3, bytes(4))))


@pytest.mark.parametrize(
    ("addresses", "line"),
    [
        (V4, b"PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\n"),
        (V6, b"PROXY TCP6 2001:db8::1 2001:db8::2 1 65535\r\n"),
        ((V4[0], V6[1]), b"PROXY TCP6 ::ffff:192.0.2.1 2001:db8::2 56324 65535\r\n"),
        ((V4[0], None), b"PROXY UNKNOWN\r\n"),
    ],
)
def test_version_1_is_written_as_specified(
    addresses: tuple[SocketAddress | None, SocketAddress | None], line: bytes
) -> None:
    written = encode_v1(*addresses)
    assert written.replace(b"::ffff:c000:201", b"::ffff:192.0.2.1") == line
    assert parse(written) is not None


def test_version_2_is_written_as_specified() -> None:
    assert encode_v2(*V4) == v2()
    assert encode_v2(None, None, command=Command.LOCAL) == v2(0x20, 0, b"")
    assert encode_v2(*V6)[12:16] == b"\x21\x21\x00\x24"
    assert parse(encode_v2(V4[0], V6[1])) == (ProxyHeader(2, Command.PROXY, V4[0], V6[1]), 52)
