"""The same as loops over prefixes do, for millions of them at once, with numpy: parsing lines, and cutting the space.

Where numpy is not there, or prefixes are few, the loops do it (:mod:`.feed`, :mod:`.compiler`); a test holds the two
against each other. numpy is imported when it is needed first: most commands never do.
"""

from __future__ import annotations

import functools
import os
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Final

__all__ = ["MANY", "addresses_of_lines", "cut", "numpy", "slots", "starts_and_values"]

MANY: Final = 50_000
"""From so many prefixes on it is worth it."""
_LOW64: Final = (1 << 64) - 1

Array = Any
"""numpy's: where it is not installed nothing is known of it."""


@functools.cache
def numpy() -> Any:
    """Return the library, None where it is not installed. No thread of its own is started: a child that is confined
    may have none."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        import numpy as found
    except (ImportError, OSError):
        return None
    return found


# -- lines ------------------------------------------------------------------------------------------------------------


def addresses_of_lines(block: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    """Parse a block of lines: return the packed networks (``address << 8 | length``, 64 bits each) of those lines that
    are a plain IPv4 address or CIDR, and (number from 0, offset) of the others. A line ends with a line feed, the block
    too."""
    np = numpy()
    data = np.frombuffer(block, dtype=np.uint8)
    digit = (data >= 48) & (data <= 57)
    separators = np.flatnonzero(~digit).astype(np.int32)
    ends = np.flatnonzero(data[separators] == 10).astype(np.int32)  # among the separators
    begins = np.concatenate((np.zeros(1, np.int32), ends[:-1] + 1))
    counts = ends - begins  # separators within each line
    starts = np.concatenate((np.full(1, -1, np.int32), separators[ends[:-1]]))  # the byte before each line
    good = (counts == 4) | (counts == 3)
    safe = np.minimum(begins, max(0, len(separators) - 5))
    for place in range(3):
        good &= data[separators[np.minimum(safe + place, len(separators) - 1)]] == 46
    has_length = counts == 4
    good &= ~has_length | (data[separators[np.minimum(safe + 3, len(separators) - 1)]] == 47)
    good &= safe == begins
    lines = np.flatnonzero(good)
    packed = np.zeros(len(lines), np.uint64)
    right = np.ones(len(lines), bool)
    before = starts[lines]
    base = begins[lines]
    padded = np.concatenate((np.full(3, 48, np.uint8), data))  # so that the digits before a token may be looked at
    for place in range(4):
        end = separators[base + place]
        value, fine = _token(np, padded, before, end, 255)
        right &= fine
        packed = (packed << np.uint64(8)) | value
        before = end
    with_length = has_length[lines]
    length = np.full(len(lines), 32, np.uint64)
    end = separators[np.minimum(base + 4, len(separators) - 1)]
    value, fine = _token(np, padded, before, end, 32)
    right &= fine | ~with_length
    length = np.where(with_length, value, length)
    # Host bits: nothing below the prefix.
    host = (np.uint64(0xFFFFFFFF) >> np.minimum(length, np.uint64(32))) & np.uint64(0xFFFFFFFF)
    right &= (packed & host) == 0
    keys = ((packed << np.uint64(8)) | length)[right]
    bad = np.ones(len(ends), bool)
    bad[lines[right]] = False
    others = np.flatnonzero(bad)
    return keys.tobytes(), list(zip(others.tolist(), (starts[others] + 1).tolist(), strict=True))


def _token(np: Any, padded: Array, before: Array, end: Array, most: int) -> tuple[Array, Array]:
    """The number between two separators, and whether it is one as ``ipaddress`` takes it: one to three digits, no zero
    in front, not above ``most``."""
    size = end - before - 1
    ones = padded[end + 2].astype(np.uint64) - np.uint64(48)
    tens = np.where(size >= 2, padded[end + 1].astype(np.uint64) - np.uint64(48), np.uint64(0))
    hundreds = np.where(size >= 3, padded[end].astype(np.uint64) - np.uint64(48), np.uint64(0))
    value = ones + np.uint64(10) * tens + np.uint64(100) * hundreds
    first = np.where(size == 3, hundreds, tens)
    fine = (size >= 1) & (size <= 3) & (value <= most) & ((size == 1) | (first != 0))
    return np.where(fine, value, np.uint64(0)), fine


# -- intervals --------------------------------------------------------------------------------------------------------


def cut(
    sides: Sequence[Sequence[int]], version: int, rule_bits: int, chain: Callable[[int, int], int]
) -> tuple[Array, Array] | None:
    """Cut the space where the chain changes: return the first address of each interval (of IPv6 its upper 64 bits), and
    its value. ``sides`` are the packed prefixes of each rule, ascending; ``chain(parent, key)`` the value of a prefix
    inside of one of value ``parent``, by its key (``packed << rule_bits | rule``). None for IPv6 prefixes beyond /64.

    Prefixes lie inside of each other or apart. Sorted by address and length, those of a level (in nothing, in one, in
    two others …) are those that begin behind the ends of all before them, once the levels above are taken away.
    """
    np = numpy()
    firsts, lengths, rules = _columns(np, sides, version)
    if firsts is None:
        return None
    bits = 32 if version == 4 else 64
    count = len(firsts)
    shift = (bits - lengths.astype(np.uint64)).astype(np.uint64)
    full = np.uint64(0xFFFFFFFF if version == 4 else _LOW64)
    sizes = np.where(shift >= 64, full, (np.uint64(1) << np.minimum(shift, np.uint64(63))) - np.uint64(1))
    lasts = firsts + sizes
    del shift, sizes
    values = np.zeros(count, np.uint16)
    outer = np.zeros(count, np.uint16)  # the value around each
    pieces: list[tuple[Array, Array]] = []
    rest = np.arange(count, dtype=np.uint32)
    above: Array = None
    above_values: Array = None
    while len(rest):
        begin, last = firsts[rest], lasts[rest]
        reach = np.maximum.accumulate(last)
        top = np.ones(len(rest), bool)
        top[1:] = begin[1:] > reach[:-1]
        level = rest[top]
        rest = rest[~top]
        del begin, last, reach, top
        if above is None:
            parents = np.zeros(len(level), np.uint16)
        else:
            parents = above_values[np.searchsorted(above, level, side="right") - 1]
        values[level] = _values(np, parents, lengths[level], rules[level], chain, rule_bits, firsts[level], version)
        outer[level] = parents
        above, above_values = level, values[level]
        behind = lasts[level]
        inside = behind != full
        pieces.append(((behind[inside] + np.uint64(1)), parents[inside]))
    return _merged(np, firsts, values, pieces)


def _columns(np: Any, sides: Sequence[Sequence[int]], version: int) -> tuple[Array, Array, Array]:
    """All prefixes as columns, in order of address, length and rule."""
    found = []
    for index, side in enumerate(sides):
        if not len(side):
            continue
        if version == 4:
            packed = np.frombuffer(side, dtype=np.uint64) if isinstance(side, array) else np.array(side, np.uint64)
            found.append((packed >> np.uint64(8), (packed & np.uint64(0xFF)).astype(np.uint8), index))
            continue
        lengths = np.fromiter((key & 0xFF for key in side), np.uint8, len(side))
        if int(lengths.max()) > 64:
            return None, None, None
        found.append((np.fromiter((key >> 72 for key in side), np.uint64, len(side)), lengths, index))
    if not found:
        return np.zeros(0, np.uint64), np.zeros(0, np.uint8), np.zeros(0, np.uint32)
    firsts = np.concatenate([row[0] for row in found])
    lengths = np.concatenate([row[1] for row in found])
    rules = np.concatenate([np.full(len(row[0]), row[2], np.uint32) for row in found])
    if len(found) > 1:
        order = np.lexsort((rules, lengths, firsts))
        firsts, lengths, rules = firsts[order], lengths[order], rules[order]
    return firsts, lengths, rules


def _values(
    np: Any,
    parents: Array,
    lengths: Array,
    rules: Array,
    chain: Callable[[int, int], int],
    rule_bits: int,
    firsts: Array,
    version: int,
) -> Array:
    """What chain each prefix has depends on the one around it, its length and its rule: few combinations there are."""
    steps = parents.astype(np.uint64) << np.uint64(32) | lengths.astype(np.uint64) << np.uint64(rule_bits)
    steps |= rules.astype(np.uint64)
    unique, first, which = np.unique(steps, return_index=True, return_inverse=True)
    found = np.zeros(len(unique), np.uint16)
    for at in np.argsort(first):  # in the order of addresses, as the loop meets them
        step, place = int(unique[at]), int(first[at])
        address = int(firsts[place]) << (0 if version == 4 else 64)
        length, rule = step >> rule_bits & 0xFF, step & (1 << rule_bits) - 1
        found[at] = chain(step >> 32, (address << 8 | length) << rule_bits | rule)
    return found[which.reshape(-1)]


def _merged(np: Any, firsts: Array, values: Array, pieces: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Intervals: where a prefix begins, of several the innermost; where none does and some end, what is around the
    outermost. Neighbours of one value are one."""
    last_of_equals = np.ones(len(firsts), bool)
    last_of_equals[:-1] = firsts[1:] != firsts[:-1]
    places = np.concatenate([firsts[last_of_equals], *(at for at, _ in pieces), np.zeros(1, np.uint64)])
    said = np.concatenate([values[last_of_equals], *(value for _, value in pieces), np.zeros(1, np.uint16)])
    order = np.argsort(places, kind="stable")
    places, said = places[order], said[order]
    keep = np.ones(len(places), bool)
    keep[1:] = places[1:] != places[:-1]
    places, said = places[keep], said[keep]
    keep = np.ones(len(places), bool)
    keep[1:] = said[1:] != said[:-1]
    return places[keep], said[keep]


def slots(places: Array, values: Array, base: int, shift: int, count: int) -> array[int]:
    """The slots of an index over intervals, as :func:`.intervals.build_table` has them."""
    np = numpy()
    edges = (np.arange(count + 1, dtype=np.uint64) + np.uint64(base)) << np.uint64(shift)
    at = np.searchsorted(places, edges[:-1], side="left")
    if (base + count) << shift > _LOW64:  # the last slot ends with the space
        after = np.concatenate((np.searchsorted(places, edges[1:-1], side="left"), [len(places)]))
    else:
        after = np.searchsorted(places, edges[1:], side="left")
    inside = (at == len(places)) | (places[np.minimum(at, len(places) - 1)] != edges[:-1])
    begin = at - inside
    size = after - begin
    many = size > 1
    pairs = np.empty(2 * count, np.uint32)
    pairs[0::2] = np.where(many, begin, values[begin])
    pairs[1::2] = np.where(many, size, 0)
    return array("I", pairs.tobytes())


def starts_and_values(places: Array, values: Array, version: int) -> bytes:
    """Intervals packed as the layouts SHORT (IPv4) and LONG (IPv6) have them."""
    np = numpy()
    kept = np.uint64(0xFFFF if version == 4 else (1 << 48) - 1)
    packed = ((places & kept) << np.uint64(16)) | values.astype(np.uint64)
    return bytes(packed.astype(np.uint32 if version == 4 else np.uint64).tobytes())


# -- sorted IPv4 networks ---------------------------------------------------------------------------------------------


def sorted_set(parts: Sequence[bytes]) -> tuple[array[int], int]:
    """Return packed networks ascending and without duplicates, and how many duplicates there were."""
    np = numpy()
    keys = np.frombuffer(b"".join(parts), np.uint64).copy()
    keys.sort()
    keep = np.ones(len(keys), bool)
    keep[1:] = keys[1:] != keys[:-1]
    found = array("Q")
    found.frombytes(keys[keep].tobytes())
    return found, len(keys) - len(found)


def _first_and_end(keys: array[int]) -> tuple[Array, Array]:
    np = numpy()
    packed = np.frombuffer(keys, np.uint64)
    firsts = packed >> np.uint64(8)
    return firsts, firsts + (np.uint64(1) << (np.uint64(32) - (packed & np.uint64(0xFF))))


def _are_outermost(firsts: Array, ends: Array) -> Array:
    """Which networks, in order, lie inside of none before them."""
    np = numpy()
    top = np.ones(len(firsts), bool)
    top[1:] = firsts[1:] >= np.maximum.accumulate(ends)[:-1]
    return top


def covered(keys: array[int]) -> int:
    """Count the networks that lie inside of another one."""
    return int((~_are_outermost(*_first_and_end(keys))).sum())


def outermost(keys: array[int]) -> tuple[array[int], array[int]]:
    """Return the first addresses and the ends of the networks that lie inside of no other; the ends begin with 0."""
    firsts, ends = _first_and_end(keys)
    top = _are_outermost(firsts, ends)
    return array("Q", firsts[top].tobytes()), array("Q", bytes(8) + ends[top].tobytes())


def inside(keys: array[int], starts: Sequence[int], ends: Sequence[int]) -> int:
    """Count the networks that lie inside of one that :func:`outermost` has returned."""
    np = numpy()
    firsts, mine = _first_and_end(keys)
    at = np.searchsorted(np.array(starts, np.uint64), firsts, side="right")
    return int((mine <= np.array(ends, np.uint64)[at]).sum())


def are_networks(keys: array[int]) -> bool:
    """Whether these are networks, ascending and without duplicates."""
    np = numpy()
    packed = np.frombuffer(keys, np.uint64)
    lengths = packed & np.uint64(0xFF)
    if not bool((packed[1:] > packed[:-1]).all()) or int(packed[-1]) >> 40 or int(lengths.max()) > 32:
        return False
    host = (np.uint64(1) << (np.uint64(32) - lengths)) - np.uint64(1)
    return not bool(((packed >> np.uint64(8)) & host).any())
