"""What a feed says. The format is what block lists are published in: one address or CIDR a line, in ASCII; ``#`` and
``;`` begin a comment, in which any bytes may be."""

from __future__ import annotations

import codecs
import functools
import itertools
import operator
import socket
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from . import vectors
from .feed_formats import BINARY, NO_OPTIONS, Entry, FormatError, FormatOptions, networks_of, read_entries
from .prefixes import Prefixes, pack_network
from .rule import PolicyError, parse_network

__all__ = [
    "MAX_LINES",
    "BadLine",
    "FeedContent",
    "FeedError",
    "is_mapped",
    "judge_feed",
    "overlapping",
    "parse_feed",
]

MAX_LINES: Final = 12_000_000
"""Lines of a feed."""

_BAD_LINES_KEPT: Final = 100
_BLOCK_BYTES: Final = 64 * 1024
_VECTOR_BYTES: Final = 4 * 1024 * 1024
_TOGETHER: Final = 4096

_WIDTH: Final = {4: 32, 6: 128}
_PARSE: Final = {
    4: functools.partial(socket.inet_pton, socket.AF_INET),
    6: functools.partial(socket.inet_pton, socket.AF_INET6),
}
_LENGTHS: Final = {version: {str(length): length for length in range(width + 1)} for version, width in _WIDTH.items()}
_HOST_BITS: Final = {
    version: [(1 << (width - length)) - 1 for length in range(width + 1)] for version, width in _WIDTH.items()
}


class FeedError(PolicyError):
    """A feed cannot be used: it cannot be had, or too much of it is bad. ``retry_after`` is in how many seconds its
    server wants to be asked again, if it said so."""

    kind = "feed"

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no network. ``number`` counts from 1."""

    number: int
    text: str
    why: str

    def __str__(self) -> str:
        return f"line {self.number}: {self.why}"


@dataclass(frozen=True, slots=True)
class FeedContent:
    """What a feed says, in ``lines`` that are neither empty nor comments. ``bad`` holds the first hundred of
    ``bad_count`` lines."""

    prefixes: Prefixes
    lines: int
    bad: tuple[BadLine, ...] = ()
    bad_count: int = 0
    duplicates: int = 0

    def everybody(self) -> str:
        """The family all of whose addresses are in it ("IPv4", "IPv6"), or nothing."""
        for name, keys, width in (("IPv4", self.prefixes.v4, 32), ("IPv6", self.prefixes.v6, 128)):
            starts, ends = _cover(keys, width)
            if sum(map(operator.sub, ends[1:], starts)) == 1 << width:
                return name
        return ""

    def covered(self) -> int:
        """How many networks lie inside of another one of the feed."""
        return _covered(self.prefixes.v4, 32) + _covered(self.prefixes.v6, 128)


def parse_feed(
    data: bytes,
    *,
    max_bad: float = 0.05,
    quote: bool = True,
    format: str = "plain",
    options: FormatOptions = NO_OPTIONS,
) -> FeedContent:
    """Parse a feed of a format. A byte order mark at its start is passed over. Without ``quote`` nothing of its text is
    told.

    Raises :class:`FeedError` if more than ``max_bad`` (0 to 1) of its lines are bad, if it has more than
    :data:`MAX_LINES`, or if there is nothing in it, not even a comment: that is more likely an accident than a wish.
    """
    data = data if format in BINARY else data.removeprefix(codecs.BOM_UTF8)
    if format not in BINARY and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise FeedError("is UTF-16 text: write it as ASCII or UTF-8")
    if not data.strip():
        raise FeedError("is empty (if that is meant, write a comment into it)")
    if format not in BINARY and data.count(b"\n") > MAX_LINES:
        raise FeedError(f"has more than {MAX_LINES} lines")
    found = _Lines(quote)
    if format == "plain":
        found.add_text(data)
    else:
        try:
            found.add_entries(read_entries(data, format, options))
        except FormatError as error:
            raise FeedError(str(error) if quote else f"is no {format} list") from error
        if format == "json" and not found.v4 and not found.v6 and not found.bad_count:
            raise FeedError(f"has nothing at {options.path or '[]'}")
    content = found.content()
    judge_feed(content, max_bad)
    return content


def judge_feed(content: FeedContent, max_bad: float) -> None:
    """Raise :class:`FeedError` if more than ``max_bad`` (0 to 1) of the lines are bad."""
    if content.bad_count > max_bad * content.lines:
        shown = "; ".join(map(str, content.bad[:3]))
        raise FeedError(
            f"{content.bad_count} of {content.lines} lines are no network, and more than {max_bad:.0%} are not "
            f"accepted ({shown})"
        )


def _blocks(data: bytes) -> Iterator[tuple[int, list[str]]]:
    """Split into blocks of lines, each with the number of its first; all lines at once would take a hundred times the
    room of the text."""
    number, start = 1, 0
    while start < len(data):
        end = data.find(b"\n", start + _BLOCK_BYTES)
        end = len(data) if end < 0 else end
        text = data[start:end].decode(errors="replace").replace("\r\n", "\n").removesuffix("\r")
        lines = text.split("\n")
        yield number, lines
        number += len(lines)
        start = end + 1


@dataclass(slots=True)
class _Lines:
    """Collects the packed networks of both families, and what is no network.

    A million lines have to take about a second: blocks of plain CIDRs of one family are parsed without a loop in
    Python, and what is in a block that holds anything else is looked at line by line.
    """

    quote: bool
    v4: list[int] = field(default_factory=list)
    v6: list[int] = field(default_factory=list)
    many: list[bytes] = field(default_factory=list)
    """IPv4 networks of long texts, packed."""
    bad: list[BadLine] = field(default_factory=list)
    bad_count: int = 0
    lines: int = 0
    """Good entries, where one may be several networks."""

    def add_text(self, data: bytes) -> None:
        """Add a whole text: of a long one the plain IPv4 lines with numpy, where it is there."""
        if data.count(b"\n") < vectors.MANY or vectors.numpy() is None:
            for at, block in _blocks(data):
                self.add(at, block)
            return
        number, start = 1, 0
        while start < len(data):
            end = data.find(b"\n", start + _VECTOR_BYTES)
            end = len(data) if end < 0 else end
            text = data[start:end] + b"\n"
            keys, others = vectors.addresses_of_lines(text)
            self.many.append(keys)
            self._add_others(number, text, others)
            number += text.count(b"\n")
            start = end + 1

    def _add_others(self, first: int, block: bytes, others: Sequence[tuple[int, int]]) -> None:
        """Add the lines of a block that are no plain IPv4 ones: those that follow one another together."""
        for at in range(0, len(others), _TOGETHER):
            some = others[at : at + _TOGETHER]
            lines = [
                block[begin : block.index(b"\n", begin)].decode(errors="replace").removesuffix("\r")
                for _, begin in some
            ]
            if not self._add_plain(lines):
                for (number, _), line in zip(some, lines, strict=True):
                    self._add_line(first + number, line)

    def add(self, first: int, block: Sequence[str]) -> None:
        """Add lines, of which the first has the number ``first``."""
        if not self._add_plain(block):
            for number, line in enumerate(block, first):
                self._add_line(number, line)

    def add_entries(self, entries: Iterable[Entry]) -> None:
        """Add what a reader of another format has found."""
        for number, text in entries:
            try:
                networks = networks_of(text)
            except ValueError as error:
                self._add_bad(number, text, str(error))
                continue
            self.lines += 1
            for network in networks:
                (self.v4 if network.version == 4 else self.v6).append(pack_network(network))

    def _add_bad(self, number: int, text: str, why: str) -> None:
        self.bad_count += 1
        if len(self.bad) < _BAD_LINES_KEPT:
            shown, why = (text.strip()[:80], why) if self.quote else ("", "no network")
            self.bad.append(BadLine(number, shown, why[:200]))

    def content(self) -> FeedContent:
        many = sum(map(len, self.many)) // 8
        lines = (self.lines or many + len(self.v4) + len(self.v6)) + self.bad_count
        side6, duplicates6 = _sorted_set(self.v6)
        if many:
            side4, duplicates4 = vectors.sorted_set([*self.many, array("Q", self.v4).tobytes()])
            self.many.clear()
        else:
            found4, duplicates4 = _sorted_set(self.v4)
            side4 = array("Q", found4)
        prefixes = Prefixes.from_sorted(side4, side6)
        return FeedContent(prefixes, lines, tuple(self.bad), self.bad_count, duplicates4 + duplicates6)

    def _add_plain(self, block: Sequence[str]) -> bool:
        """Add a block of nothing but CIDRs of one family; return whether it is one."""
        parts = "/".join(block).split("/")
        if len(parts) != 2 * len(block):
            return False
        version = 6 if ":" in parts[0] else 4
        try:
            packed = b"".join(map(_PARSE[version], parts[0::2]))
            lengths = list(map(_LENGTHS[version].__getitem__, parts[1::2]))
        except (OSError, KeyError, ValueError):
            return False
        values: Sequence[int]
        if version == 4:
            values = words = array("I", packed)
            if sys.byteorder == "little":
                words.byteswap()
        else:
            from_bytes = int.from_bytes
            values = [from_bytes(packed[i : i + 16], "big") for i in range(0, len(packed), 16)]
            if any(map(is_mapped, values)):
                return False
        if any(map(operator.and_, values, map(_HOST_BITS[version].__getitem__, lengths))):
            return False
        side = self.v4 if version == 4 else self.v6
        side += [value << 8 | length for value, length in zip(values, lengths, strict=True)]
        return True

    def _add_line(self, number: int, line: str) -> None:
        entry = line.split("#", 1)[0].split(";", 1)[0].strip()
        if not entry:
            return
        try:
            network = parse_network(entry)
        except PolicyError as error:
            self._add_bad(number, line, str(error))
            return
        (self.v4 if network.version == 4 else self.v6).append(pack_network(network))


def is_mapped(value: int) -> bool:
    """Whether an IPv6 address is an IPv4-mapped one."""
    return value >> 32 == 0xFFFF


def _sorted_set(keys: list[int]) -> tuple[list[int], int]:
    """Return the keys ascending and without duplicates, and how many duplicates there were."""
    keys.sort()
    if not any(map(operator.eq, keys, itertools.islice(keys, 1, None))):
        return keys, 0
    unique = sorted(set(keys))
    return unique, len(keys) - len(unique)


def _covered(keys: Iterable[int], width: int) -> int:
    """Count the prefixes that lie inside of the one before them, or of the same one as that."""
    if width == 32 and isinstance(keys, array) and len(keys) >= vectors.MANY and vectors.numpy() is not None:
        return vectors.covered(keys)
    sizes = [1 << (width - length) for length in range(width + 1)]
    count = end = 0
    for key in keys:
        start = key >> 8
        if start < end:
            count += 1
        else:
            end = start + sizes[key & 0xFF]
    return count


def overlapping(sets: Sequence[tuple[str, Prefixes]]) -> list[tuple[str, str, int]]:
    """Return, for each two sets (by name), how many networks of the first lie inside of one of the second, or are one
    of them; pairs that have none are left out."""
    covers = {
        name: {version: _cover(mine.packed(version), _WIDTH[version]) for version in (4, 6)} for name, mine in sets
    }
    found = []
    for (name, mine), (other_name, _) in itertools.permutations(sets, 2):
        inside = sum(_inside(mine.packed(version), _WIDTH[version], covers[other_name][version]) for version in (4, 6))
        if inside:
            found.append((name, other_name, inside))
    return found


def _cover(keys: Iterable[int], width: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return the first addresses, and the ends, of the networks that lie inside of no other; the ends begin with 0."""
    if width == 32 and isinstance(keys, array) and len(keys) >= vectors.MANY and vectors.numpy() is not None:
        return vectors.outermost(keys)
    starts: list[int] = []
    ends: list[int] = [0]
    for key in keys:
        if key >> 8 >= ends[-1]:
            starts.append(key >> 8)
            ends.append((key >> 8) + (1 << (width - (key & 0xFF))))
    return starts, ends


def _inside(keys: Iterable[int], width: int, cover: tuple[Sequence[int], Sequence[int]]) -> int:
    starts, ends = cover
    if width == 32 and isinstance(keys, array) and len(keys) >= vectors.MANY and vectors.numpy() is not None:
        return vectors.inside(keys, starts, ends)
    count = 0
    for key in keys:
        end = ends[bisect_right(starts, key >> 8)]  # of the last network that begins before
        count += (key >> 8) + (1 << (width - (key & 0xFF))) <= end
    return count
