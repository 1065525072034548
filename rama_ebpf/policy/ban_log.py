"""Bans on disk, so that they outlive the server and the machine's uptime.

``bans`` is a log: every ban and every lift is one line of JSON, appended. When it has grown it is put aside as
``bans.1`` and a new one begun, all bans are written to ``bans.snapshot``, and ``bans.1`` goes. A start reads the three
in the order snapshot, ``bans.1``, ``bans``. Each line says what holds from then on, so lines that a snapshot knows
already do no harm: whenever a writer is killed, nothing is lost.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from .atomic import bring_to_disk, open_regular
from .ban_record import BanBlock
from .ban_rows import RowReader, lift_row, row_of
from .ban_snapshot import BanSnapshot, SnapshotDamaged, write_snapshot
from .ban_walk import BanWalk
from .prefixes import IPNetwork, Prefixes
from .row_log import RowLog
from .rule import Ban, boottime_ns
from .whole_lines import WholeLines

__all__ = ["BanLog", "KeptBans"]

log = logging.getLogger(__name__)

_SMALL: Final = 1024 * 1024
"""A log of so many bytes is not worth a snapshot."""
_HUGE: Final = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class KeptBans:
    """What is on disk."""

    snapshot: Path | None
    count: int
    """How many bans there are at most."""
    changes: dict[bytes, bytes | None]
    """What the log says, which is later than the snapshot: value by key, None where a ban was lifted."""
    since: int
    by_wall: bool
    """Whether some were written in an earlier boot and end: the wall clock says when."""

    def blocks(self) -> Iterator[BanBlock]:
        """Yield the bans that are in force. Raises OSError."""
        now = boottime_ns()
        return (block.in_force(now) for block in self.all_blocks())

    def all_blocks(self) -> Iterator[BanBlock]:
        """Yield the bans, also those that have ended. Raises OSError."""
        if self.snapshot is not None:
            with open(open_regular(self.snapshot, os.O_RDONLY), "rb") as file:
                snapshot = BanSnapshot.open(file, self.since)
                for block in snapshot.blocks():
                    if self.changes:
                        yield BanBlock.of((key, value) for key, value in block.rows() if key not in self.changes)
                    else:
                        yield block
                if snapshot.lost:
                    log.warning("%d bans of %s are damaged and left out", snapshot.lost, self.snapshot)
        rows = [(key, value) for key, value in self.changes.items() if value is not None]
        for at in range(0, len(rows), 4096):
            yield BanBlock.of(rows[at : at + 4096])


class BanLog:
    """The files. All calls but :meth:`compact` and :meth:`sync` are made under the store's lock."""

    def __init__(self, path: Path) -> None:
        """``path`` is the log's; the others are beside it."""
        self._path = path
        self._log = RowLog(path)
        self._aside = path.with_name(path.name + ".1")
        self._snapshot = path.with_name(path.name + ".snapshot")
        self._since = boottime_ns()

    def banned(self, ban: Ban) -> None:
        """Note a ban. Raises OSError where the file system refuses; the log is as it was then."""
        self._log.append(row_of(ban))

    def lifted(self, networks: Iterable[IPNetwork]) -> None:
        """Note that bans were lifted. Raises OSError like :meth:`banned`."""
        for network in networks:
            self._log.append(lift_row(network))

    def banned_alike(self, sources: Prefixes, model: Ban) -> None:
        """:meth:`banned` for many that differ from ``model`` by their source alone, all or none."""
        rest = json.dumps({name: value for name, value in row_of(model).items() if name != "address"})[1:]
        self._log.extend_lines("".join([f'{{"address": "{text}", {rest}\n' for text in _addresses(sources)]).encode())

    def lifted_all(self, texts: Iterable[str]) -> None:
        """:meth:`lifted` for many, all or none."""
        self._log.extend_lines("".join([f'{{"address": "{text}", "lifted": true}}\n' for text in texts]).encode())

    def sync(self) -> None:
        """Have what was noted outlive a power failure, too. A disk that refuses is logged as an error."""
        try:
            self._log.sync()
        except OSError as error:
            log.error("cannot sync %s: %s", self._path, error)

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self) -> KeptBans:
        """Return what is on disk. Raises OSError for a file that is there and cannot be read."""
        changes: dict[bytes, bytes | None] = {}
        by_wall = False
        for path in (self._aside, self._path):
            with contextlib.suppress(FileNotFoundError), open(open_regular(path, os.O_RDONLY), "rb") as file:
                by_wall |= _read_log(file, path, changes, self._since)
        present = sum(value is not None for value in changes.values())
        try:
            with open(open_regular(self._snapshot, os.O_RDONLY), "rb") as file:
                snapshot = BanSnapshot.open(file, self._since)
        except FileNotFoundError:
            return KeptBans(None, present, changes, self._since, by_wall)
        except SnapshotDamaged as error:
            aside = self._snapshot.with_name(self._snapshot.name + ".damaged")
            self._snapshot.rename(aside)
            log.error("the snapshot of bans cannot be used, and is kept as %s: %s", aside, error)
            return KeptBans(None, present, changes, self._since, by_wall)
        count = snapshot.count + present
        return KeptBans(self._snapshot, count, changes, self._since, by_wall or snapshot.by_wall)

    def walk(self, has: Callable[[bytes], bool]) -> BanWalk:
        """Return a walk through what is on disk; ``has`` says whether a ban's key is in force."""
        return BanWalk(self._snapshot, (self._aside, self._path), self._since, has)

    # -- the snapshot --------------------------------------------------------------------------------------------

    def is_huge(self) -> bool:
        """Whether the log is so long that it is made shorter whatever that loses."""
        return _size(self._path) > _HUGE

    def overgrown(self) -> bool:
        """Whether the log is so long that a snapshot is worth it: 1 MiB, and a quarter of the last one, for it takes
        several times as long to read."""
        return self._aside.exists() or _size(self._path) > max(_SMALL, _size(self._snapshot) // 4)

    def compact(
        self, locked: Callable[[], AbstractContextManager[object]], blocks: Callable[[], Iterable[BanBlock]]
    ) -> None:
        """Put all bans into a snapshot and begin a new log. Waits for the disk; the lock is held for a moment only.

        ``blocks`` yields all bans in force. What changes meanwhile is in the new log. Raises OSError; nothing is lost
        then."""
        for torn in self._path.parent.glob(f".{self._snapshot.name}-*"):
            torn.unlink()  # of a server that was killed meanwhile
        with locked():
            if not self._aside.exists():
                with contextlib.suppress(FileNotFoundError):
                    bring_to_disk(self._path)
                    self._path.rename(self._aside)
        write_snapshot(self._snapshot, blocks())
        bring_to_disk(self._snapshot)  # its name, before what it replaces goes
        self._aside.unlink(missing_ok=True)


def _addresses(sources: Prefixes) -> list[str]:
    """Sources as text, addresses without their length."""
    ends = (len("/32"), "/32"), (len("/128"), "/128")
    return [text[: -ends[":" in text][0]] if text.endswith(ends[":" in text][1]) else text for text in sources.texts()]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read_log(file: BinaryIO, path: Path, changes: dict[bytes, bytes | None], since: int) -> bool:
    """Return whether the wall clock was needed."""
    reader, damaged = RowReader(since), 0

    def lost() -> None:
        nonlocal damaged
        damaged += 1

    lines = WholeLines(file, lost)
    while data := lines.read():
        changes.update(reader.read_all(data, lost))
    if lines.rest:
        changes.update(reader.read_all(lines.rest, lost))
    if damaged:
        log.warning("%d lines of %s are damaged and left out", damaged, path)
    return reader.by_wall
