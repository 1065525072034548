"""ICMP errors about translated packets: told to who has sent the packet, in its own terms, unless they are forged."""

from __future__ import annotations

import socket
import struct

import pytest

from rama_ebpf.kernel.wire import NOTICE, STATE, Leg, Pair, WireKey
from rama_ebpf.relay.wire_errors import translated_error

DELTA = 500
SENT, ACKED = 1500, 1200
"""What the client has sent and the target has acknowledged, in the target's numbers."""


def key(source: str, sport: int, target: str, dport: int) -> WireKey:
    v6 = ":" in source
    family = socket.AF_INET6 if v6 else socket.AF_INET
    one, other = (socket.inet_pton(family, name).rjust(16, b"\0") for name in (source, target))
    return WireKey(one, other, sport.to_bytes(2, "big"), dport.to_bytes(2, "big"), v6)


KEYS = {
    False: (key("198.18.0.9", 40_000, "198.18.0.1", 1080), key("198.18.1.2", 80, "198.18.1.1", 50_000)),
    True: (key("2001:db8::9", 40_000, "2001:db8::1", 1080), key("2001:db8:1::2", 80, "2001:db8:1::1", 50_000)),
}
FLOWS = ({"seq": DELTA}, {"seq": -DELTA})
PAIR = Pair(0, 0, Leg(0, 0, 0, 0, SENT - DELTA, 0, 0), Leg(0, 0, 0, ACKED, 0, 0, 0))


def about(v6: bool, seq: int, mtu: int) -> bytes:
    """A router on the way to the target says that a packet was too big."""
    ports = struct.pack("!HHI", 50_000, 80, seq)
    if v6:
        icmp = struct.pack("!BBHI", 2, 0, 0, mtu)
        quoted = struct.pack("!IHBB", 6 << 28, 100, 6, 64) + KEYS[True][1].target + KEYS[True][1].source + ports
    else:
        icmp = struct.pack("!BBHHH", 3, 4, 0, 0, mtu)
        quoted = struct.pack("!BBHHHBBH", 0x45, 0, 1300, 0, 0x4000, 64, 6, 0)
        quoted += KEYS[False][1].target[-4:] + KEYS[False][1].source[-4:] + ports
    return NOTICE.pack(7, 1, STATE["NOTICE_ERROR"], v6, 0, (icmp + quoted).ljust(STATE["WIRE_NOTICE_BYTES"], b"\0"))


def mtu_of(v6: bool, icmp: bytes) -> int:
    return int(struct.unpack_from("!I" if v6 else "!H", icmp, 4 if v6 else 6)[0])


@pytest.mark.parametrize("v6", [False, True], ids=["IPv4", "IPv6"])
def test_sender_is_told_by_its_own_names_and_number(v6: bool) -> None:
    answer = translated_error(about(v6, 1300, 1400), KEYS[v6], FLOWS, PAIR)
    assert answer is not None
    sent, icmp = answer
    client = KEYS[v6][0]
    assert sent == client.reverse
    assert mtu_of(v6, icmp) == 1400
    ends = icmp[-8:]
    assert (ends[:2], ends[2:4], struct.unpack("!I", ends[4:])[0]) == (client.sport, client.dport, 1300 - DELTA)
    size = 16 if v6 else 4
    assert icmp[-8 - 2 * size : -8] == client.source[-size:] + client.target[-size:]


@pytest.mark.parametrize("v6", [False, True], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("seq", [ACKED - 1, SENT + 1, 0, (1 << 31) + ACKED, (1 << 32) - 1])
def test_error_about_what_is_not_under_way_reaches_nobody(v6: bool, seq: int) -> None:
    """RFC 5927 section 4.1."""
    assert translated_error(about(v6, seq, 1400), KEYS[v6], FLOWS, PAIR) is None


@pytest.mark.parametrize("seq", [ACKED, SENT])
def test_edges_of_what_is_under_way_are_believed(seq: int) -> None:
    assert translated_error(about(False, seq, 1400), KEYS[False], FLOWS, PAIR) is not None


@pytest.mark.parametrize(("v6", "least"), [(False, 552), (True, 1280)], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("mtu", [0, 1, 68, 551])
def test_absurd_mtu_does_not_make_segments_tiny(v6: bool, least: int, mtu: int) -> None:
    answer = translated_error(about(v6, 1300, mtu), KEYS[v6], FLOWS, PAIR)
    assert answer is not None
    assert mtu_of(v6, answer[1]) == least


def test_error_of_the_other_family_reaches_nobody() -> None:
    assert translated_error(about(True, 1300, 1400), KEYS[False], FLOWS, PAIR) is None
