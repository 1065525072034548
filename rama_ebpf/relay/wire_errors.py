"""ICMP errors about packets of the wire relay, as the end that sent the packet has to see them.

An error quotes the packet as it was translated. What is quoted to its sender are that one's own addresses and sequence
number; a number that was not under way is a forgery (RFC 5927 section 4.1), and is dropped.

Reference: RFC 792, RFC 1191, RFC 4443, RFC 8201.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final, cast

from ..kernel.wire import NOTICE, STATE, Pair, WireKey

__all__ = ["translated_error"]

_SMALLEST_MTU: Final = {False: 552, True: 1280}
"""RFC 1191 section 3 allows 68, which no path has that is not under attack: Linux's own bound (``min_pmtu``)."""
_MASK: Final = 0xFFFFFFFF
_UNREACHABLE, _FRAGMENTATION_NEEDED = 3, 4
_TOO_BIG_V6: Final = 2


def translated_error(
    record: bytes, keys: tuple[WireKey, WireKey], flows: tuple[Mapping[str, object], Mapping[str, object]], pair: Pair
) -> tuple[WireKey, bytes] | None:
    """Return the addresses between which an ICMP error is to be sent, and the error, its checksum zero; None for one
    that nobody is to see. ``record`` is a ``struct wire_notice``."""
    _, leg, kind, v6, _, body = NOTICE.unpack_from(record)
    if bool(v6) != keys[0].v6:
        return None
    header = 48 if v6 else 28  # the quoted IP header, and eight bytes of TCP
    quoted = body[8 : 8 + header]
    if kind == STATE["NOTICE_TOO_BIG"]:
        # It quotes what came, untouched: it goes back to where that came from.
        mtu = struct.unpack_from("=I", body, 4)[0]
        return keys[leg].reverse, _too_big(v6, mtu) + quoted
    # It quotes what was sent to this leg's end, and so goes to the other one, by its own names.
    sender = keys[not leg]
    other = (pair.client, pair.target)[not leg]
    acked = (pair.client, pair.target)[leg].acked
    (seq,) = struct.unpack_from("!I", quoted, header - 4)
    delta = cast("int", flows[not leg]["seq"])
    under_way = (seq - acked) & _MASK, (other.sent + delta - acked) & _MASK
    if under_way[0] > under_way[1] or under_way[1] > _MASK // 2:
        return None
    icmp = body[:8]
    if v6 and icmp[0] == _TOO_BIG_V6:
        icmp = _too_big(v6, max(struct.unpack_from("!I", body, 4)[0], _SMALLEST_MTU[True]))
    elif not v6 and icmp[1] == _FRAGMENTATION_NEEDED:
        icmp = _too_big(v6, max(struct.unpack_from("!H", body, 6)[0], _SMALLEST_MTU[False]))
    ports = sender.sport + sender.dport + struct.pack("!I", (seq - delta) & _MASK)
    size = 16 if v6 else 4
    addresses = sender.source[-size:] + sender.target[-size:]
    at = 8 if v6 else 12
    return sender.reverse, icmp[:2] + b"\0\0" + icmp[4:] + quoted[:at] + addresses + ports


def _too_big(v6: int, mtu: int) -> bytes:
    if v6:
        return struct.pack("!BBHI", _TOO_BIG_V6, 0, 0, mtu)
    return struct.pack("!BBHHH", _UNREACHABLE, _FRAGMENTATION_NEEDED, 0, 0, mtu)
