"""Intervals of addresses, each with a value, laid out so that the kernel finds one in tens of nanoseconds.

An address space is cut where the answer changes: interval *i* reaches from ``starts[i]`` to just before ``starts[i +
1]``. An index of equal slots over the part of the space that has any cuts leads to the few intervals that a slot's
addresses fall into; a bisection finds the one. The layout is that of ``struct table`` in ``bpf/policy.h``, which both
the BPF programs and :func:`find` read. What a look-up costs is mostly cache and TLB misses, so intervals are packed:
within a slot only the address bits below the slot's are kept, and a value takes 16 bits.

Why not the kernel's LPM trie: at a million prefixes it takes 1.0 to 1.2 µs for a random address (a cache miss a
level), this takes a fifth. See ``docs/policy.md``.
"""

from __future__ import annotations

import enum
import sys
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from . import vectors

__all__ = ["MAX_VALUE", "PAGE", "Layout", "Table", "build_table", "build_table_of_many", "find"]

PAGE: Final = 4096
"""Bytes that a program gets with one look-up; intervals begin at a page."""

MAX_VALUE: Final = 0xFFFF
MAX_SLOTS: Final = 1 << 16

_LOW, _HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)  # where an integer's halves are in memory


class Layout(enum.IntEnum):
    """How an interval is kept. ``enum layout_kind`` of policy.h."""

    SHORT = 0
    """IPv4: 32 bits, the lower 16 of the first address and the value."""
    LONG = 1
    """IPv6 without prefixes longer than /64: 64 bits, the lower 48 of the first address's upper half, and the value."""
    FULL = 2
    """IPv6: four times 64 bits, the first address's halves, the value, and nothing."""


_LAYOUT: Final = {4: Layout.SHORT, 6: Layout.LONG}
_SIZE: Final = {Layout.SHORT: 4, Layout.LONG: 8, Layout.FULL: 32}


@dataclass(frozen=True, slots=True)
class Table:
    """``struct table``: how one family's slots are numbered, and on which page its intervals begin."""

    base: int = 0
    shift: int = 0
    slots: int = 0
    page: int = 0
    below: int = 0
    above: int = 0
    layout: Layout = Layout.SHORT


def build_table(pages: bytearray, version: int, starts: Sequence[int], values: array[int]) -> tuple[Table, array[int]]:
    """Append a family's intervals to ``pages``; return the table, and its slots as pairs of numbers.

    ``starts`` ascends from 0; neighbours have different values, up to :data:`MAX_VALUE`.
    """
    count = len(starts)
    if count == 1:
        return Table(below=values[0], above=values[0]), array("I")
    low = 0 if version == 4 else 64  # bits of an address that the index does not look at
    shift = 0
    first, last = starts[1] >> low, starts[-1] >> low
    while (last >> shift) - (first >> shift) >= MAX_SLOTS:
        shift += 1
    base = first >> shift
    slots = (last >> shift) - base + 1
    # A slot is (first interval, number of intervals), or (value, 0) where all its addresses have one value.
    pairs = array("I", bytes(8 * slots))
    here = bisect_left(starts, base << shift + low)  # the first interval that begins in the slot, or after it
    for slot in range(slots):
        at = here
        begin = base + slot << shift + low
        here = bisect_left(starts, begin + (1 << shift + low), at)
        if at == count or starts[at] != begin:
            at -= 1  # the slot's first addresses belong to an interval that began before
        size = here - at
        pairs[2 * slot] = at if size > 1 else values[at]
        pairs[2 * slot + 1] = size if size > 1 else 0
    pages.extend(bytes(-len(pages) % PAGE))
    page = len(pages) // PAGE
    layout = _append_bounds(pages, version, starts, values)
    return Table(base, shift, slots, page, values[0], values[-1], layout), pairs


def build_table_of_many(pages: bytearray, version: int, places: Any, values: Any) -> tuple[Table, array[int]]:
    """:func:`build_table` for what :func:`.vectors.cut` returns."""
    count = len(places)
    first_value, last_value = int(values[0]), int(values[-1])
    if count == 1:
        return Table(below=first_value, above=first_value), array("I")
    first, last, shift = int(places[1]), int(places[-1]), 0
    while (last >> shift) - (first >> shift) >= MAX_SLOTS:
        shift += 1
    base = first >> shift
    number = (last >> shift) - base + 1
    pairs = vectors.slots(places, values, base, shift, number)
    pages.extend(bytes(-len(pages) % PAGE))
    page = len(pages) // PAGE
    pages.extend(vectors.starts_and_values(places, values, version))
    return Table(base, shift, number, page, first_value, last_value, _LAYOUT[version]), pairs


def _append_bounds(pages: bytearray, version: int, starts: Sequence[int], values: array[int]) -> Layout:
    count, half = len(starts), (1 << 64) - 1
    if version == 4:
        narrow = array("H", bytes(4 * count))
        narrow[_HIGH::2] = array("H", array("I", starts).tobytes())[_LOW::2]
        narrow[_LOW::2] = array("H", values.tobytes())[_LOW::2]
        pages.extend(narrow.tobytes())
        return Layout.SHORT
    if not any(start & half for start in starts):
        mask = (1 << 48) - 1 << 16
        pages.extend(
            array("Q", [start >> 48 & mask | value for start, value in zip(starts, values, strict=True)]).tobytes()
        )
        return Layout.LONG
    bounds = array("Q", bytes(32 * count))
    bounds[0::4] = array("Q", [start >> 64 for start in starts])
    bounds[1::4] = array("Q", [start & half for start in starts])
    bounds[2::4] = array("Q", values)
    pages.extend(bounds.tobytes())
    return Layout.FULL


def find(
    slot: Callable[[int], tuple[int, int]], read: Callable[[int, int], int], table: Table, version: int, address: int
) -> int:
    """Return the value of the interval that holds ``address``, as the BPF function ``find_interval`` does.

    ``slot(i)`` returns the two numbers of a slot, ``read(at, size)`` an unsigned integer of the pages.
    """
    index = (address >> (0 if version == 4 else 64) >> table.shift) - table.base
    if index < 0:
        return table.below
    if index >= table.slots:
        return table.above
    at, count = slot(index)
    if not count:
        return at
    begin, size = table.page * PAGE, _SIZE[table.layout]

    def key(index: int) -> int:
        where = begin + size * index
        if table.layout is Layout.FULL:
            return read(where, 8) << 64 | read(where + 8, 8)
        return read(where, size) >> 16

    kept = {Layout.SHORT: address & 0xFFFF, Layout.LONG: address >> 64 & (1 << 48) - 1, Layout.FULL: address}
    while count > 1:  # the first interval is the one that the slot begins in
        half = count // 2
        if key(at + half) <= kept[table.layout]:
            at += half
        count -= half
    if table.layout is Layout.FULL:
        return read(begin + size * at + 16, 8)
    return read(begin + size * at, size) & MAX_VALUE
