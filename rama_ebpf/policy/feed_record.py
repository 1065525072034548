"""A parsed feed as bytes: how the child that parses it hands it over, and how its last good copy is kept.

A line of JSON, then the IPv4 networks of 8 bytes each, then the IPv6 ones of 17 bytes, both big-endian ``address << 8 |
prefix length`` in ascending order.
"""

from __future__ import annotations

import json
import operator
import sys
from array import array
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Final

from . import vectors
from .feed import BadLine, FeedContent, is_mapped
from .prefixes import Prefixes

__all__ = ["HEAD_BYTES", "V6_BYTES", "decode", "encode"]

HEAD_BYTES: Final = 128 * 1024
"""The longest head, with its line feed."""
V6_BYTES: Final = 17


def encode(content: FeedContent, **more: object) -> bytes:
    """Return a record; ``more`` is put into its head."""
    v4 = array("Q", content.prefixes.v4)
    if sys.byteorder == "little":
        v4.byteswap()
    head = {
        **more,
        "networks": [len(v4), len(content.prefixes.v6)],
        "lines": content.lines,
        "bad_count": content.bad_count,
        "bad": [[line.number, line.text, line.why] for line in content.bad],
        "duplicates": content.duplicates,
    }
    v6 = b"".join(key.to_bytes(V6_BYTES, "big") for key in content.prefixes.v6)
    return json.dumps(head).encode("ascii") + b"\n" + v4.tobytes() + v6


def decode(record: bytes) -> tuple[FeedContent, Mapping[str, Any]]:
    """Return what a record holds, and its head. Raises ValueError for whatever :func:`encode` would not have made:
    the one that made it may have been taken over by what it parsed."""
    end = record.find(b"\n", 0, HEAD_BYTES)
    if end < 0:
        raise ValueError("its head has no end")
    try:
        head = json.loads(record[:end])
        count4, count6 = map(int, head["networks"])
        bad = tuple(BadLine(int(number), str(text)[:80], str(why)[:200]) for number, text, why in head["bad"][:100])
        lines, bad_count, duplicates = (int(head[name]) for name in ("lines", "bad_count", "duplicates"))
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"its head is not whole: {error}") from error
    start6 = end + 1 + 8 * count4
    if min(count4, count6, lines, bad_count, duplicates) < 0 or len(record) != start6 + V6_BYTES * count6:
        raise ValueError("its length is wrong")
    v4 = array("Q", record[end + 1 : start6])
    if sys.byteorder == "little":
        v4.byteswap()
    v6 = [int.from_bytes(record[at : at + V6_BYTES], "big") for at in range(start6, len(record), V6_BYTES)]
    if not (_are_networks(v4, 32) and _are_networks(v6, 128)) or any(is_mapped(key >> 8) for key in v6):
        raise ValueError("its networks are none, or in no order")
    return FeedContent(Prefixes.from_sorted(v4, v6), lines, bad, bad_count, duplicates), head


def _are_networks(keys: Sequence[int], width: int) -> bool:
    if width == 32 and isinstance(keys, array) and len(keys) >= vectors.MANY and vectors.numpy() is not None:
        return vectors.are_networks(keys)
    host_bits = [(1 << (width - length)) - 1 for length in range(width + 1)]
    lengths = [key & 0xFF for key in keys]
    return (
        all(map(operator.lt, keys, islice(keys, 1, None)))
        and (not keys or keys[-1] >> 8 < 1 << width)
        and (not lengths or max(lengths) <= width)
        and not any(map(operator.and_, (key >> 8 for key in keys), map(host_bits.__getitem__, lengths)))
    )
