"""Sets that were in force before, on disk: for who asks what they were, and what they would do today.

When another set takes the place of the file ``policy``, the file that was there gets a second name in ``history``, by
its revision: that costs nothing but its room, which is bounded.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["KeptHistory", "PastSet"]

_MOST: Final = 32
_MOST_BYTES: Final = 512 * 1024 * 1024
_LONGEST_HEADER: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class PastSet:
    """A set that is kept. ``written`` is wall-clock seconds, ``size`` bytes."""

    revision: int
    written: float
    size: int
    path: Path


class KeptHistory:
    """The directory. All raise OSError where the file system refuses."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def remember(self, path: Path, digest: str) -> None:
        """Keep the set in the file ``path``, which is about to be replaced by the one of this digest; nothing is done
        if that is the same, or there is none."""
        try:
            with path.open("rb") as file:
                header = json.loads(file.readline(_LONGEST_HEADER))
            revision = int(header["revision"])
        except (FileNotFoundError, ValueError, LookupError, TypeError, RecursionError):
            return  # nothing, or damaged: whoever reads it says so
        if header.get("set") == digest:
            return
        self._directory.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.link(path, self._directory / str(revision))
        self._prune()

    def all(self) -> list[PastSet]:
        """Return what is kept, the latest first."""
        found = []
        if self._directory.is_dir():
            for path in self._directory.iterdir():
                with contextlib.suppress(FileNotFoundError, ValueError):
                    facts = path.stat()
                    found.append(PastSet(int(path.name), facts.st_mtime, facts.st_size, path))
        return sorted(found, key=lambda past: -past.revision)

    def forget(self) -> None:
        """Remove all."""
        for past in self.all():
            past.path.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._directory.rmdir()

    def _prune(self) -> None:
        total = 0
        for index, past in enumerate(self.all()):
            total += past.size
            if index and (index >= _MOST or total > _MOST_BYTES):
                past.path.unlink(missing_ok=True)
