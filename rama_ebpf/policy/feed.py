"""Feeds: lists of networks that others keep, read from files and URLs, with the last good copy kept.

The format is what block lists are published in: one address or CIDR a line, ``#`` and ``;`` begin a comment, gzip is
recognised by its first bytes.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import itertools
import json
import logging
import operator
import os
import socket
import sys
import tempfile
import time
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from .fetch import FetchError, fetch
from .prefixes import Prefixes, pack_network
from .rule import Feed, PolicyError, parse_network

__all__ = [
    "BadLine",
    "FeedContent",
    "FeedError",
    "FeedStore",
    "Loaded",
    "overlapping",
    "parse_feed",
    "write_atomically",
]

log = logging.getLogger(__name__)

_BAD_LINES_KEPT: Final = 100
_BLOCK: Final = 4096

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
    """A feed cannot be used: it cannot be had, or too much of it is bad."""

    kind = "feed"


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
    """What a feed says. ``bad`` holds the first hundred of ``bad_count`` lines."""

    prefixes: Prefixes
    bad: tuple[BadLine, ...] = ()
    bad_count: int = 0
    duplicates: int = 0

    def covered(self) -> int:
        """How many networks lie inside of another one of the feed."""
        return _covered(self.prefixes.v4, 32) + _covered(self.prefixes.v6, 128)


def parse_feed(data: bytes, *, max_bad: float = 0.05, max_size: int = 64 * 1024 * 1024) -> FeedContent:
    """Parse a feed. Raises :class:`FeedError` if more than ``max_bad`` (0 to 1) of its lines are bad, if it is not
    UTF-8 text, or if it is longer than ``max_size`` bytes when unpacked."""
    text = _unpack(data, max_size)
    found = _Lines()
    found.add(text.replace("\r\n", "\n").split("\n"))
    lines = len(found.v4) + len(found.v6) + found.bad_count
    if found.bad_count > max_bad * lines:
        shown = "; ".join(map(str, found.bad[:3]))
        raise FeedError(
            f"{found.bad_count} of {lines} lines are no network, and more than {max_bad:.0%} are not accepted ({shown})"
        )
    side4, duplicates4 = _sorted_set(found.v4)
    side6, duplicates6 = _sorted_set(found.v6)
    prefixes = Prefixes.from_sorted(array("Q", side4), side6)
    return FeedContent(prefixes, tuple(found.bad), found.bad_count, duplicates4 + duplicates6)


def _unpack(data: bytes, max_size: int) -> str:
    if data[:2] == b"\x1f\x8b":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
                data = packed.read(max_size + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise FeedError(f"not whole gzip data: {error}") from error
    if len(data) > max_size:
        raise FeedError(f"longer than {max_size} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FeedError(f"not UTF-8 text: {error.reason} at byte {error.start}") from error


@dataclass(slots=True)
class _Lines:
    """Collects the packed networks of both families, and what is no network.

    A million lines have to take about a second: blocks of plain CIDRs of one family are parsed without a loop in
    Python, and what is in a block that holds anything else is looked at line by line.
    """

    v4: list[int] = field(default_factory=list)
    v6: list[int] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    bad_count: int = 0

    def add(self, lines: Sequence[str]) -> None:
        for at in range(0, len(lines), _BLOCK):
            block = lines[at : at + _BLOCK]
            if not self._add_plain(block):
                for number, line in enumerate(block, at + 1):
                    self._add_line(number, line)

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
            if any(map(_is_mapped, values)):
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
            self.bad_count += 1
            if len(self.bad) < _BAD_LINES_KEPT:
                self.bad.append(BadLine(number, line.strip()[:80], str(error)))
            return
        (self.v4 if network.version == 4 else self.v6).append(pack_network(network))


def _is_mapped(value: int) -> bool:
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
    sizes = [1 << (width - length) for length in range(width + 1)]
    count = end = 0
    for key in keys:
        start = key >> 8
        if start < end:
            count += 1
        else:
            end = start + sizes[key & 0xFF]
    return count


@dataclass(frozen=True, slots=True)
class Loaded:
    """The outcome of :meth:`FeedStore.load`: what to use, and why it is not fresh, if it is not."""

    content: FeedContent
    stale: str = ""


class FeedStore:
    """Loads feeds, and keeps the last good copy of each in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, feed: Feed, *, kept_will_do: bool = False) -> Loaded:
        """Read a feed. If it cannot be had or is bad, its last good copy is returned, with the reason.

        With ``kept_will_do`` a copy of a URL is taken without asking for a newer one. Raises :class:`FeedError` if
        there is neither.
        """
        kept = self._kept(feed)
        if kept is not None and kept_will_do:
            return Loaded(self._parse(feed, kept.data))
        try:
            return Loaded(self._load_url(feed, kept) if feed.is_url else self._parse(feed, _read_file(feed)))
        except FeedError as error:
            if kept is None:
                raise
            log.warning("feed %s: %s; the copy of %s stays in use", feed.source, error, _ago(kept.fetched))
            return Loaded(self._parse(feed, kept.data), str(error))

    def _load_url(self, feed: Feed, kept: _Kept | None) -> FeedContent:
        validators = {} if kept is None else kept.validators
        try:
            answer = fetch(feed.source, validators, timeout=feed.timeout, max_size=feed.max_size)
        except FetchError as error:
            raise FeedError(f"feed {feed.source}: {error}") from error
        if answer.data is None:
            if kept is None:
                raise FeedError(f"feed {feed.source}: answered 304, but nothing is kept of it")
            return self._parse(feed, kept.data)
        content = self._parse(feed, answer.data)
        self._keep(feed, answer.data, answer.validators)
        return content

    @staticmethod
    def _parse(feed: Feed, data: bytes) -> FeedContent:
        try:
            return parse_feed(data, max_bad=feed.max_bad, max_size=feed.max_size)
        except FeedError as error:
            raise FeedError(f"feed {feed.source}: {error}") from error

    # -- copies: a line of JSON with the checksum of the data, then the data -------------------------------------------

    def _path(self, feed: Feed) -> Path:
        return self._directory / hashlib.sha256(feed.source.encode()).hexdigest()[:32]

    def _kept(self, feed: Feed) -> _Kept | None:
        if not feed.is_url:
            return None
        try:
            head, _, data = self._path(feed).read_bytes().partition(b"\n")
            fields = json.loads(head)
            if fields["sha256"] != hashlib.sha256(data).hexdigest():
                raise ValueError("its checksum is wrong")
            return _Kept(data, dict(fields["validators"]), float(fields["fetched"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            log.warning("the copy of feed %s is damaged and not used: %s", feed.source, error)
            return None

    def _keep(self, feed: Feed, data: bytes, validators: dict[str, str]) -> None:
        fields = {
            "source": feed.source,
            "fetched": time.time(),
            "validators": validators,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        write_atomically(self._path(feed), json.dumps(fields).encode() + b"\n" + data)


@dataclass(frozen=True, slots=True)
class _Kept:
    data: bytes
    validators: dict[str, str]
    fetched: float


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file by a whole one, on disk before it has the name. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read_file(feed: Feed) -> bytes:
    try:
        with open(feed.source, "rb") as file:
            data = file.read(feed.max_size + 1)
    except OSError as error:
        raise FeedError(f"feed {feed.source}: cannot be read: {error.strerror}") from error
    if len(data) > feed.max_size:
        raise FeedError(f"feed {feed.source}: longer than {feed.max_size} bytes")
    return data


def _ago(moment: float) -> str:
    return f"{max(0, time.time() - moment) / 3600:.1f} hours ago"


def overlapping(sets: Sequence[tuple[str, Prefixes]]) -> list[tuple[str, str, int]]:
    """Return, for each two sets (by name) that have networks in common, how many."""
    found = []
    for (name, mine), (other_name, others) in itertools.combinations(sets, 2):
        common = len(set(mine.v4).intersection(others.v4)) + len(set(mine.v6).intersection(others.v6))
        if common:
            found.append((name, other_name, common))
    return found
