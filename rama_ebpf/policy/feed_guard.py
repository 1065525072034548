"""What no feed may close, whatever it says: taken out of what was read, and told.

A rule that lets nobody in takes of its feed no network that is wider than ``max_width``, none that is private or this
host's own, and nothing of ``never``: of a network around such a one the rest stays.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Final

from .prefixes import IPNetwork, Prefixes, pack_network, unpack_network

__all__ = ["NOTHING_LEFT_OUT", "PRIVATE", "LeftOut", "guarded"]

PRIVATE: Final[tuple[IPNetwork, ...]] = tuple(
    map(
        ip_network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "::/128",
            "::1/128",
            "fc00::/7",
            "fe80::/10",
        ),
    )
)
"""What is on nobody's block list by intent: RFC 1122, 1918, 6598, 3927, 4193, 4291."""

_WIDEST_V6: Final = 2
"""How many times as long the prefixes of IPv6 are than those of IPv4: /8 is as much of all that is in use as /16."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """How many networks were left out, by why."""

    wide: int = 0
    private: int = 0
    own: int = 0
    never: int = 0

    def __bool__(self) -> bool:
        return bool(self.wide or self.private or self.own or self.never)

    def __str__(self) -> str:
        own = "this host's own"
        parts = ((self.wide, "too wide"), (self.private, "private"), (self.own, own), (self.never, "never"))
        return ", ".join(f"{count} {what}" for count, what in parts if count)


NOTHING_LEFT_OUT: Final = LeftOut()


def guarded(
    prefixes: Prefixes,
    *,
    max_width: int,
    never: Sequence[IPNetwork] = (),
    own: Iterable[IPNetwork] = (),
    private: bool = False,
) -> tuple[Prefixes, LeftOut]:
    """Return what a feed may close, and what was left out. ``max_width`` is the shortest IPv4 prefix that is taken, 0
    for any; ``private`` takes private networks as others. What it costs hardly depends on how many a feed has."""
    left = dict.fromkeys(("wide", "private", "own", "never"), 0)
    closed: list[tuple[str, IPNetwork]] = [("never", network) for network in never]
    closed += [("private", network) for network in PRIVATE] if not private else []
    closed += [("own", network) for network in own]
    sides = []
    for version, shortest in ((4, max_width), (6, _WIDEST_V6 * max_width)):
        packed = prefixes.packed(version)
        mine = [(why, network) for why, network in closed if network.version == version]
        cuts = [(at, at + 1, "wide") for at in _wider_than(packed, version, shortest)]
        cuts += [(*_inside(packed, network), why) for why, network in mine]
        pieces: list[int] = []
        for at in _around(packed, [network for why, network in mine if why == "never"]):
            cuts.append((at, at + 1, "never"))
            if packed[at] & 0xFF >= shortest:
                pieces += _less(unpack_network(version, packed[at]), never)
        sides.append(_cut(packed, cuts, pieces, left))
    if not any(left.values()):
        return prefixes, LeftOut()
    return Prefixes(*sides), LeftOut(**left)


def _cut(
    packed: Sequence[int], cuts: list[tuple[int, int, str]], pieces: Iterable[int], left: dict[str, int]
) -> Iterable[int]:
    """Return packed networks without some slices, and with others; count each that goes once."""
    if not cuts:
        return packed
    kept: list[int] = list(pieces)
    done = 0
    for begin, end, why in sorted(cuts, key=lambda cut: (cut[0], list(left).index(cut[2]), cut[1])):
        begin = max(begin, done)
        if begin < end:
            kept += packed[done:begin]
            left[why] += end - begin
            done = end
    return [*kept, *packed[done:]]


def _inside(packed: Sequence[int], network: IPNetwork) -> tuple[int, int]:
    """The slice of sorted packed networks that lie inside of one."""
    begin = int(network.network_address)
    first = bisect_left(packed, begin << 8 | network.prefixlen)
    return first, bisect_left(packed, begin + network.num_addresses << 8, first)


def _wider_than(packed: Sequence[int], version: int, shortest: int) -> list[int]:
    """Where those are that have fewer bits: all are looked at, or all that there could be."""
    width = 32 if version == 4 else 128
    if shortest == 0 or not packed:
        return []
    if len(packed) < 1 << shortest:
        return [at for at, key in enumerate(packed) if key & 0xFF < shortest]
    possible = (value << (width - length + 8) | length for length in range(shortest) for value in range(1 << length))
    return [at for key in possible if (at := bisect_left(packed, key)) < len(packed) and packed[at] == key]


def _around(packed: Sequence[int], holes: Iterable[IPNetwork]) -> set[int]:
    """Where those are that lie around one of some networks."""
    found = set()
    for hole in holes:
        address, width = int(hole.network_address), hole.max_prefixlen
        for length in range(hole.prefixlen):
            key = (address >> (width - length) << (width - length)) << 8 | length
            at = bisect_left(packed, key)
            if at < len(packed) and packed[at] == key:
                found.add(at)
    return found


def _less(network: IPNetwork, holes: Iterable[IPNetwork]) -> list[int]:
    """Return what is left of a network without some networks inside of it."""
    pieces = [network]
    for hole in holes:
        if hole.version != network.version:
            continue
        rest: list[IPNetwork] = []
        for piece in pieces:
            if hole.subnet_of(piece):  # type: ignore[arg-type]
                rest += piece.address_exclude(hole)  # type: ignore[arg-type]
            elif not piece.subnet_of(hole):  # type: ignore[arg-type]
                rest.append(piece)
        pieces = rest
    return list(map(pack_network, pieces))
