"""The one element of the map ``gate``: which set is in force, and where in it things are. ``struct gate`` in Python."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, field
from typing import cast

from . import abi

__all__ = ["EMPTY_TABLE", "LAST_REVISION", "GateState", "SetHead", "owner_number"]

EMPTY_TABLE = bytes(abi.TABLE.size)
LAST_REVISION = 1 << 62
"""No policy has a higher one: what says so was not written by this software."""


def owner_number(instance: str) -> int:
    """Return the number by which a record names the instance that it belongs to."""
    return _checksum(instance.encode())


def _checksum(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), sys.byteorder)


@dataclass(frozen=True, slots=True)
class SetHead:
    """``struct set_head``. Limits are (emission, tolerance) in nanoseconds; ``tables`` are packed ``struct table``;
    ``checksum`` is of all that the programs read of the set, and ``chain_items`` says how much of it there is."""

    default: int = abi.constants()["ACTION_ALLOW"]
    per_source: tuple[int, int] = (0, 0)
    overall: tuple[int, int] = (0, 0)
    tables: tuple[bytes, bytes] = (EMPTY_TABLE, EMPTY_TABLE)
    document_at: int = 0
    document_size: int = 0
    chain_items: int = 0
    checksum: int = 0

    def pack(self) -> bytes:
        return abi.SET_HEAD.pack(
            self.default,
            self.chain_items,
            *self.per_source,
            *self.overall,
            *self.tables,
            self.document_at,
            self.document_size,
            self.checksum,
        )

    @classmethod
    def unpack(cls, raw: bytes) -> SetHead:
        default, items, *limits, table4, table6, at, size, checksum = abi.SET_HEAD.unpack(raw)
        emission, tolerance, all_emission, all_tolerance = limits
        both = ((emission, tolerance), (all_emission, all_tolerance))
        return cls(default, *both, (table4, table6), at, size, items, checksum)


@dataclass(frozen=True, slots=True)
class GateState:
    """``struct gate``. ``deadline`` is CLOCK_BOOTTIME nanoseconds, 0 for none."""

    revision: int = 0
    deadline: int = 0
    active: int = 0
    fallback: int = 0
    flags: int = 0
    failsafe_ports: tuple[int, ...] = ()
    runtime: tuple[int, int] = (0, 0)
    """For IPv4 and IPv6, which prefix lengths the runtime layer has: bit n for length n of the IPv4-mapped form."""
    sets: tuple[SetHead, SetHead] = field(default=(SetHead(), SetHead()))
    source_lengths: tuple[int, int] = (32, 64)
    """How many bits of an IPv4 and of an IPv6 address stand for a source, to strikes and the bans that follow."""
    ban_lengths: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """For IPv4 and IPv6, which prefix lengths bans have, in the IPv4-mapped form, the longest first."""
    failsafe_list: int = 0
    """Which of the two lists of the failsafe is in force."""
    owner: int = 0
    """The instance that it belongs to, :func:`owner_number`."""
    is_sealed: bool = True
    """Whether only this software has written it. What is written over a record that somebody else has changed is not
    sealed either, until it is put in order."""

    def in_force(self, now: int) -> int:
        """Which of the two sets the programs use at ``now``."""
        return self.fallback if self.deadline and now >= self.deadline else self.active

    def pack(self) -> bytes:
        words = [bits >> shift & (1 << 64) - 1 for bits in self.runtime for shift in (0, 64, 128)]
        ports = (*self.failsafe_ports, *(0,) * 8)[:8]
        fixed = (self.revision, self.deadline, self.active, self.fallback, self.flags, *ports, *self.source_lengths)
        more = (self.failsafe_list, 0, self.owner)
        bans = map(_pack_lengths, self.ban_lengths)
        packed = abi.GATE.pack(*fixed, *more, *words, self.sets[0].pack(), self.sets[1].pack(), *bans, 0)
        seal = _seal(packed) if self.is_sealed else 0
        return packed[:-8] + seal.to_bytes(8, sys.byteorder)

    @classmethod
    def unpack(cls, raw: bytes) -> GateState:
        fields = abi.GATE.unpack(raw)
        revision, deadline, active, fallback, flags = cast("tuple[int, int, int, int, int]", fields[:5])
        ports = tuple(port for port in fields[5:13] if port)
        sources = cast("tuple[int, int]", fields[13:15])
        which, _, owner = cast("tuple[int, int, int]", fields[15:18])
        a, b, c, d, e, f = cast("tuple[int, int, int, int, int, int]", fields[18:24])
        runtime = (a | b << 64 | c << 128, d | e << 64 | f << 128)
        sets = (SetHead.unpack(fields[24]), SetHead.unpack(fields[25]))
        bans = (_unpack_lengths(fields[26]), _unpack_lengths(fields[27]))
        # As the programs read them, whatever somebody else has written there.
        active, fallback, which = active & 1, fallback & 1, which & 1
        known = (revision, deadline, active, fallback, flags, ports, runtime, sets, sources, bans)
        return cls(*known, which, owner, is_sealed=fields[28] == _seal(raw))


def _seal(packed: bytes) -> int:
    return _checksum(packed[:-8]) or 1


def _pack_lengths(lengths: tuple[int, ...]) -> bytes:
    """Exact addresses have the first place for themselves: no other ban's mask is ever moved for one of theirs."""
    exact = 128 if 128 in lengths else 0
    others = sorted((length for length in lengths if length != 128), reverse=True)
    rows = [(128, exact), *((length, length) for length in others)]
    packed = b"".join(
        abi.BAN_MASK.pack(((1 << 128) - (1 << 128 - bits)).to_bytes(16, "big"), length) for bits, length in rows
    )
    return packed.ljust(abi.BAN_MASK.size * abi.constants()["MAX_BAN_LENGTHS"], b"\0")


def _unpack_lengths(raw: bytes) -> tuple[int, ...]:
    return tuple(length for _, length in abi.BAN_MASK.iter_unpack(raw) if 0 < length <= 128)
