"""The rules at run time that are on disk, against those in the kernel: read in slices, round and round."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from .atomic import open_regular
from .image import RuntimeRule
from .kept import kept_row
from .tables import Place

__all__ = ["KeptWalk", "Suspect"]

_LONGEST_LINE: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Suspect:
    """A place where the disk has ``rule``, None for one that was taken back, and the kernel has not."""

    place: Place
    rule: RuntimeRule | None


class KeptWalk:
    """``agrees`` says whether the kernel has, at a place, what a row says; ``surely_agrees`` says it of what JSON has
    in a row, quickly, and False where it cannot. A later row of the same place counts more, so what does not agree is
    told at the end of a round; then :meth:`is_whole` says whether that still was the end."""

    def __init__(
        self,
        path: Path,
        agrees: Callable[[Place, RuntimeRule | None], bool],
        surely_agrees: Callable[[Mapping[str, object]], bool],
    ) -> None:
        self._path = path
        self._agrees = agrees
        self._surely_agrees = surely_agrees
        self._file: BinaryIO | None = None
        self._suspects: dict[tuple[object, object], Suspect] = {}
        self._places = array("q")
        self._taken_back: set[int] = set()
        self._met = 0
        self._is_over = False
        self.known = 0
        """How many rows the last whole round has met."""

    def next(self, count: int) -> list[Suspect]:
        """Look at about ``count`` rows more. Raises OSError where the file cannot be read."""
        if self._file is None:
            try:
                fd = open_regular(self._path, os.O_RDONLY)
            except FileNotFoundError:
                return []
            self._file, self._suspects, self._met = os.fdopen(fd, "rb"), {}, 0
            self._places, self._taken_back = array("q"), set()
        for _ in range(count):
            line = self._file.readline(_LONGEST_LINE)
            if not line.endswith(b"\n"):
                return self._end()
            self._met += 1
            self._look_at(line)
        return []

    def _look_at(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            place = row["source"], row["port"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return  # about no place, or damaged
        name = hash((str(place[0]), place[1]))
        if row.get("removed"):
            self._taken_back.add(name)
        else:
            self._taken_back.discard(name)
            self._places.append(name)
        if self._surely_agrees(row):
            self._suspects.pop(place, None)
            return
        kept = kept_row(line)
        if kept is None:
            return
        if not kept.is_certain or self._agrees(kept.place, kept.rule):
            self._suspects.pop(place, None)
        else:
            self._suspects[place] = Suspect(kept.place, kept.rule)

    def _end(self) -> list[Suspect]:
        self.known, self._is_over = self._met, True
        return list(self._suspects.values())

    @property
    def is_over(self) -> bool:
        """Whether a round has just ended."""
        return self._is_over

    def lacks(self, places: Iterable[Place]) -> list[Place]:
        """At the end of a round, return those of ``places`` of which the disk has no rule, not even one that has
        ended."""
        kept = set(self._places) - self._taken_back
        return [(network, port) for network, port in places if hash((str(network), port)) not in kept]

    def is_whole(self) -> bool:
        """Under the policy's lock: whether the round that has just ended has met all rows that there are."""
        if self._file is None:
            return False
        mine = os.fstat(self._file.fileno())
        try:
            there = self._path.stat()
        except OSError:
            return False
        return os.path.samestat(mine, there) and there.st_size == self._file.tell()

    def end(self) -> None:
        """Where a round has ended, begin a new one with the next call."""
        if self._is_over:
            self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._is_over = False
        if self._file is not None:
            self._file.close()
            self._file = None
