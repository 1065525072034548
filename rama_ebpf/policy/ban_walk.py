"""The bans on disk, against those in force: read in slices, round and round."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, Final

from .atomic import open_regular
from .ban_record import KEY_SIZE, VALUE_SIZE, BanBlock, ban_key, read_ban, value_expires
from .ban_rows import RowReader
from .ban_snapshot import BanSnapshot
from .rule import Ban, boottime_ns
from .whole_lines import WholeLines

__all__ = ["BanRound", "BanWalk"]

_CHUNK: Final = 64 * 1024
"""Bytes of the log that are read at a time: a few hundred rows."""
_ROW: Final = 240
"""Bytes of a usual row."""
_MOST_LOST: Final = 4096
"""Lost bans that are remembered in a round; the next has the rest."""
_MOST_KEPT: Final = 1 << 18
"""With more bans on disk it would take too much memory to look for those in force that are not there."""

_File = tuple[Path, BinaryIO | None]


class BanWalk:
    """``has`` says whether a ban's key is in force. On disk are ``snapshot`` and then ``logs``, the older first; rows
    of an earlier boot are counted from ``since`` on (see :mod:`.ban_log`)."""

    def __init__(self, snapshot: Path, logs: tuple[Path, Path], since: int, has: Callable[[bytes], bool]) -> None:
        self._paths = snapshot, *logs
        self._since = since
        self._has = has
        self._round: BanRound | None = None
        self._last: BanRound | None = None
        self.known = 0
        """How many there are, about."""

    def next(self, count: int) -> tuple[BanRound, list[Ban]] | None:
        """Look at about ``count`` more. At the end of a round, return it with those that seem to be lost. Raises
        OSError or :class:`.ban_snapshot.SnapshotDamaged` where the disk cannot be read: the next call begins anew."""
        if self._round is None:
            self._round = BanRound(self._paths, self._since, self._has)
            self.known = max(self.known, self._round.expected)
        try:
            over = self._round.go_on(count)
        except BaseException:
            self._round.close()
            self._round = None
            raise
        if not over:
            return None
        if self._last is not None:
            self._last.close()
        ended, self._last, self._round = self._round, self._round, None
        self.known = ended.met
        return ended, ended.lost()

    def close(self) -> None:
        """Let go of the files."""
        for one in (self._round, self._last):
            if one is not None:
                one.close()
        self._round = self._last = None


class BanRound:
    """One time through all that is on disk. Close it when done."""

    def __init__(self, paths: tuple[Path, ...], since: int, has: Callable[[bytes], bool]) -> None:
        self._has = has
        self._since = since
        self._lost: dict[bytes, bytes] = {}
        self._kept: set[int] = set()
        """What tells the bans that were met, without those that were lifted."""
        self.met = 0
        """How many bans and lifts it has read."""
        self._open = ExitStack()
        self._files: list[_File] = []
        try:
            for path in paths:
                self._files.append((path, self._opened(path)))
        except BaseException:
            self.close()
            raise
        self._readers = [RowReader(since) for _ in self._files[1:]]
        self._logs = [None if file is None else WholeLines(file, lambda: None, _CHUNK) for _, file in self._files[1:]]
        self._steps = self._walk()
        sizes = [0 if file is None else os.fstat(file.fileno()).st_size for _, file in self._files]
        self.expected = sizes[0] // (KEY_SIZE + VALUE_SIZE) + sum(sizes[1:]) // _ROW
        """How many there are, about: by the files' sizes."""

    def _opened(self, path: Path) -> BinaryIO | None:
        with suppress(FileNotFoundError):
            return self._open.enter_context(open(open_regular(path, os.O_RDONLY), "rb"))
        return None

    def close(self) -> None:
        """Let go of the files; nothing is known to be lost any more."""
        self._open.close()
        self._files = []
        self._lost.clear()
        self._kept.clear()

    def go_on(self, count: int) -> bool:
        """Look at about ``count`` more; return whether that was the last."""
        until = self.met + count
        return all(self.met < until for _ in self._steps)

    def _walk(self) -> Iterator[None]:
        snapshot = self._files[0][1]
        if snapshot is not None:
            for block in BanSnapshot.open(snapshot, self._since).blocks():
                self._look_at_all(block)
                yield
        for reader, log in zip(self._readers, self._logs, strict=True):
            while log is not None and (lines := log.read()):
                self._read(reader, lines)
                yield

    def _look_at_all(self, block: BanBlock) -> None:
        self.met += len(block)
        has, keys = self._has, block.keys
        for index in range(len(block)):
            key = keys[KEY_SIZE * index : KEY_SIZE * (index + 1)]
            self._keep(key)
            if not has(key):
                self._note(key, block.values[VALUE_SIZE * index : VALUE_SIZE * (index + 1)])

    def _read(self, reader: RowReader, lines: bytes) -> None:
        rows = reader.read_all(lines, lambda: None)
        self.met += len(rows)
        for key, value in rows:
            if value is None:
                self._kept.discard(hash(key))
            else:
                self._keep(key)
            if value is None or self._has(key):
                self._lost.pop(key, None)
            else:
                self._note(key, value)

    def _keep(self, key: bytes) -> None:
        if len(self._kept) <= _MOST_KEPT:
            self._kept.add(hash(key))

    def unknown(self, keys: Iterable[bytes]) -> list[bytes]:
        """At the end, return those of ``keys`` that are not on disk; none if there are too many to tell."""
        return [] if len(self._kept) > _MOST_KEPT else [key for key in keys if hash(key) not in self._kept]

    def is_unknown(self, key: bytes) -> bool:
        """Under the policy's lock: whether it is not on disk, by the last word of that. False where the files are
        others by now."""
        return self._read_on() and len(self._kept) <= _MOST_KEPT and hash(key) not in self._kept

    def _note(self, key: bytes, value: bytes) -> None:
        ends = value_expires(value)
        if ends and ends <= boottime_ns():
            self._lost.pop(key, None)
        elif len(self._lost) < _MOST_LOST or key in self._lost:
            self._lost[key] = value

    def lost(self) -> list[Ban]:
        """Return those that are on disk, have not ended, and are not in force; some may have been lifted meanwhile."""
        now = boottime_ns()
        return [read_ban(key, value) for key, value in self._lost.items() if self._is_lost(key, now)]

    def _is_lost(self, key: bytes, now: int) -> bool:
        value = self._lost.get(key)
        return value is not None and not 0 < value_expires(value) <= now and not self._has(key)

    def is_lost(self, ban: Ban) -> bool:
        """Under the policy's lock: whether it is, by the last word of the disk. False where the files are others by
        now: then the next round says it."""
        return self._read_on() and self._is_lost(ban_key(ban.network), boottime_ns())

    def _read_on(self) -> bool:
        """Read what was added since; return whether the files are still those."""
        if not self._files or not all(map(_is_there, self._files)):
            return False
        for reader, log in zip(self._readers, self._logs, strict=True):
            while log is not None and (lines := log.read()):
                self._read(reader, lines)
        return True


def _is_there(opened: _File) -> bool:
    """Whether a path names the file that was opened there, or none as it did then."""
    path, file = opened
    try:
        there = path.stat()
    except FileNotFoundError:
        return file is None
    return file is not None and os.path.samestat(os.fstat(file.fileno()), there)
