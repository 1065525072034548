"""Which member of a group is asked first, and which next: tiers, load, weights, latency, rendezvous hash, pins.

Rendezvous hashing (Thaler and Ravishankar 1998) by the members' *names*: when one goes only its own keys move, each to
the next in its own order, and they come back to it. The hash is keyed, so that nobody outside can choose keys that meet
on one member. Bounded load: Mirrokni, Thorup and Zadimoghaddam 2016.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from .health import Health
from .model import Choose, Group
from .ways import WayBook

__all__ = ["Board", "Chooser", "LocalBoard", "Member"]

_OVERLOAD: Final = 1.25
_REMEMBERED: Final = 4096


class Board(Protocol):
    """Where the health of ways is kept, for one process or for several."""

    def read(self, name: str, /) -> Health:
        """Return what is known; what is changed in it is not kept."""

    def change(self, name: str, change: Callable[[Health], bool], /) -> bool:
        """Change it, alone; return what ``change`` returns."""

    def live(self, name: str, /) -> int:
        """How many connections are on it."""

    def enter(self, name: str, /) -> None: ...

    def leave(self, name: str, /) -> None: ...

    def tried(self, name: str, failed: bool, /) -> None:
        """Count an attempt that has ended."""

    def pinned(self, key: bytes, now: float, /) -> bytes | None:
        """Return the 4 bytes that ``key`` (8 bytes) is pinned to."""

    def pin(self, key: bytes, member: bytes, until: float, /) -> None: ...


class LocalBoard:
    """The board of one process by itself."""

    def __init__(self) -> None:
        self._health: dict[str, Health] = {}
        self._live: dict[str, int] = {}
        self._pins: dict[bytes, tuple[bytes, float]] = {}
        self.counts: dict[str, list[int]] = {}
        """By way: attempts, and those that failed."""

    def read(self, name: str, /) -> Health:
        """See :class:`Board`."""
        return self._health.setdefault(name, Health())

    def change(self, name: str, change: Callable[[Health], bool], /) -> bool:
        """See :class:`Board`."""
        return change(self.read(name))

    def live(self, name: str, /) -> int:
        """See :class:`Board`."""
        return self._live.get(name, 0)

    def enter(self, name: str, /) -> None:
        """See :class:`Board`."""
        self._live[name] = self._live.get(name, 0) + 1

    def leave(self, name: str, /) -> None:
        """See :class:`Board`."""
        self._live[name] -= 1

    def tried(self, name: str, failed: bool, /) -> None:
        """See :class:`Board`."""
        counts = self.counts.setdefault(name, [0, 0])
        counts[0] += 1
        counts[1] += failed

    def pinned(self, key: bytes, now: float, /) -> bytes | None:
        """See :class:`Board`."""
        found = self._pins.get(key)
        return found[0] if found is not None and found[1] > now else None

    def pin(self, key: bytes, member: bytes, until: float, /) -> None:
        """See :class:`Board`."""
        if len(self._pins) >= 1 << 20 and key not in self._pins:
            self._pins.pop(next(iter(self._pins)))
        self._pins[key] = member, until


@dataclass(frozen=True, slots=True)
class Member:
    """A way at the end of groups. ``free`` says that it may be used freely, else one connection may try it."""

    name: str
    free: bool


class Chooser:
    """Orders the ways of a group. ``secret`` is the same in all workers, and after a restart."""

    def __init__(self, ways: WayBook, board: Board, secret: bytes, *, rng: Callable[[], float] = random.random) -> None:
        self._ways = ways
        self._board = board
        self._secret = secret[:64]
        self._rng = rng
        self._ranked = functools.lru_cache(_REMEMBERED)(self._rank)

    def order(self, name: str, key: bytes, now: float) -> list[Member]:
        """Return the ways to ask, the best first: those that are well, tier by tier, each with those that may be tried
        in their own places. Empty if there are none."""
        found: dict[str, Member] = {}
        self._collect(name, key, now, found)
        return list(found.values())

    def _collect(self, name: str, key: bytes, now: float, found: dict[str, Member]) -> None:
        way = self._ways[name]
        if not isinstance(way, Group):
            health = self._board.read(name)
            if health.usable():
                found.setdefault(name, Member(name, free=True))
            elif health.triable(now):
                found.setdefault(name, Member(name, free=False))
            return
        pinned = self.pinned_member(name, way, key, now)
        for tier in way.tiers:
            members = self._sorted(name, way, tier, key)
            if pinned in tier:
                members = [pinned, *(member for member in members if member != pinned)]
            for member in members:
                self._collect(member, key, now, found)

    def _sorted(self, name: str, group: Group, tier: tuple[str, ...], key: bytes) -> list[str]:
        if group.choose is Choose.ORDER or len(tier) == 1:
            return list(tier)
        weights = group.weights
        if group.choose is Choose.HASH:
            ranked = self._ranked(name, tier, key)
            loads = {member: self._load(member) for member in tier}
            total, heavy = sum(loads.values()) + 1, sum(weights.get(member, 1) for member in tier)
            if total <= len(tier):  # so few that one each is no load
                return list(ranked)
            room = {m: math.ceil(_OVERLOAD * total * weights.get(m, 1) / heavy) for m in tier}
            return sorted(ranked, key=lambda member: loads[member] >= room[member])
        if group.choose is Choose.WEIGHT:
            return sorted(tier, key=lambda member: -math.log(1.0 - self._rng()) / weights.get(member, 1))
        if group.choose is Choose.LEAST:
            return sorted(tier, key=lambda member: (self._load(member) / weights.get(member, 1), self._rng()))
        return sorted(tier, key=lambda member: (round(self._latency(member), 2), self._rng()))

    def _load(self, member: str) -> int:
        return sum(map(self._board.live, self._ways.leaves(member)))

    def _latency(self, member: str) -> float:
        known = [self._board.read(leaf).latency for leaf in self._ways.leaves(member)]
        return min(known, default=0.0)

    def _rank(self, name: str, tier: tuple[str, ...], key: bytes) -> tuple[str, ...]:
        group = self._ways[name]
        weights: Mapping[str, int] = group.weights if isinstance(group, Group) else {}
        scores: dict[str, float] = {}
        for member in tier:
            digest = hashlib.blake2b(
                member.encode() + b"\0" + key, digest_size=8, key=self._secret, person=b"way"
            ).digest()
            unit = (int.from_bytes(digest, "big") + 1) / (2**64 + 1)
            scores[member] = -weights.get(member, 1) / math.log(unit)
        return tuple(sorted(tier, key=lambda member: -scores[member]))

    # -- pins ----------------------------------------------------------------------------------------------------

    def _pin_key(self, name: str, key: bytes) -> bytes:
        return hashlib.blake2b(name.encode() + b"\0" + key, digest_size=8, key=self._secret, person=b"pin").digest()

    def _pin_value(self, member: str) -> bytes:
        return hashlib.blake2b(member.encode(), digest_size=4, key=self._secret, person=b"pinned").digest()

    def pinned_member(self, name: str, group: Group, key: bytes, now: float) -> str | None:
        """Return the member that ``key`` is pinned to in a group, None if there is no pin."""
        if group.sticky is None or not key:
            return None
        value = self._board.pinned(self._pin_key(name, key), now)
        if value is None:
            return None
        return next((member for member in group.members if self._pin_value(member) == value), None)

    def chosen(self, name: str, leaf: str, key: bytes, now: float) -> None:
        """A connection goes by ``leaf`` of the group ``name``: its key is pinned there now, if it was nowhere."""
        way = self._ways[name]
        if not isinstance(way, Group):
            return
        for member in way.members:
            if leaf in self._ways.leaves(member):
                if way.sticky is not None and key and self.pinned_member(name, way, key, now) is None:
                    self._board.pin(self._pin_key(name, key), self._pin_value(member), now + way.sticky)
                self.chosen(member, leaf, key, now)
                return
