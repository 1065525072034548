"""Intervals of addresses, each with a value, laid out so that the kernel finds one in tens of nanoseconds.

An address space is cut where the answer changes: interval *i* reaches from ``starts[i]`` to just before ``starts[i +
1]``. An index of equal slots over the part of the space that has any cuts leads to the few intervals that a slot's
addresses fall into; a bisection finds the one. All is put into one run of 64-bit cells, the layout of ``struct table``
in ``bpf/policy.h``, which both the BPF programs and :func:`find` read.

Why not the kernel's LPM trie: at a million prefixes it takes 1.0 to 1.2 µs for a random address (a cache miss a
level), this takes a tenth. See ``docs/policy.md``.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["Table", "append_table", "find", "pair_bytes", "unpair"]

MAX_SLOTS: Final = 1 << 16
_LOW_BITS: Final = {4: 0, 6: 64}  # of an address, those that the index does not look at


@dataclass(frozen=True, slots=True)
class Table:
    """``struct table``: where one family's slots and intervals are."""

    base: int = 0
    shift: int = 0
    slots: int = 0
    slots_at: int = 0
    bounds_at: int = 0
    below: int = 0
    above: int = 0


def pair_bytes(first: Sequence[int], second: Sequence[int]) -> bytes:
    """Return cells of two 32-bit numbers each (``struct pair``)."""
    pairs = array("I", bytes(8 * len(first)))
    pairs[0::2] = array("I", first)
    pairs[1::2] = array("I", second)
    return pairs.tobytes()


def unpair(cell: int) -> tuple[int, int]:
    """Return the two numbers of a cell."""
    first, second = array("I", array("Q", (cell,)).tobytes())
    return first, second


def append_table(cells: array[int], version: int, starts: Sequence[int], values: Sequence[int]) -> Table:
    """Append a family's intervals to ``cells`` and return where they are.

    ``starts`` ascends from 0; neighbours have different values. Values are 32-bit.
    """
    count = len(starts)
    if count == 1:
        return Table(below=values[0])
    low = _LOW_BITS[version]
    shift = 0
    first, last = starts[1] >> low, starts[-1] >> low
    wanted = min(MAX_SLOTS, 2 * count)
    while (last >> shift) - (first >> shift) >= wanted:
        shift += 1
    base = first >> shift
    slots = (last >> shift) - base + 1

    heads, sizes = array("I"), array("I")
    here = bisect_left(starts, base << shift + low)  # the first interval that begins in the slot, or after it
    for slot in range(base + 1, base + slots + 1):
        at = here
        here = bisect_left(starts, slot << shift + low, at)
        if at == count or starts[at] != (slot - 1) << shift + low:
            at -= 1  # the slot's first addresses belong to an interval that began before
        if here - at == 1:
            heads.append(values[at])
            sizes.append(0)
        else:
            heads.append(at)
            sizes.append(here - at)

    slots_at = len(cells)
    cells.frombytes(pair_bytes(heads, sizes))
    bounds_at = len(cells)
    if version == 4:
        cells.frombytes(pair_bytes(starts, values))
    else:
        bounds = array("Q", bytes(24 * count))
        half = (1 << 64) - 1
        bounds[0::3] = array("Q", [start >> 64 for start in starts])
        bounds[1::3] = array("Q", [start & half for start in starts])
        tail = array("Q")
        tail.frombytes(pair_bytes(values, array("I", bytes(4 * count))))
        bounds[2::3] = tail
        cells.extend(bounds)
    return Table(base, shift, slots, slots_at, bounds_at, values[0], values[-1])


def find(cell: Callable[[int], int], table: Table, version: int, address: int) -> int:
    """Return the value of the interval that holds ``address``, as the BPF function ``find_interval`` does.

    ``cell(i)`` reads cell *i*.
    """
    slot = (address >> _LOW_BITS[version] >> table.shift) - table.base
    if slot < 0:
        return table.below
    if slot >= table.slots:
        return table.above
    at, count = unpair(cell(table.slots_at + slot))
    if not count:
        return at
    while count > 1:
        half = count // 2
        if _start(cell, table, version, at + half) <= address:
            at += half
        count -= half
    if version == 4:
        return unpair(cell(table.bounds_at + at))[1]
    return unpair(cell(table.bounds_at + 3 * at + 2))[0]


def _start(cell: Callable[[int], int], table: Table, version: int, index: int) -> int:
    if version == 4:
        return unpair(cell(table.bounds_at + index))[0]
    at = table.bounds_at + 3 * index
    return cell(at) << 64 | cell(at + 1)
