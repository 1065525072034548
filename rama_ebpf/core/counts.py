"""How many of each kind are live, in one process or in several that share a table."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final, Protocol

__all__ = ["UNLIMITED", "Counts", "LocalCounts", "SharesCounts"]

UNLIMITED: Final = 1 << 31
"""A limit that nothing reaches."""


class Counts(Protocol):
    """How many are live, by key."""

    def enter(self, key: Hashable, limit: int, /) -> bool:
        """Count one more of ``key`` unless there are ``limit``; return whether it was counted."""

    def leave(self, key: Hashable, /) -> None:
        """Count one less of ``key``."""


class SharesCounts(Protocol):
    """Who can count for several processes; in a worker of ``rama-ebpf run`` that is ``context.shared``."""

    def counts(self) -> Counts: ...


class LocalCounts:
    """The counts of one process by itself."""

    def __init__(self) -> None:
        self._live: dict[Hashable, int] = {}

    def enter(self, key: Hashable, limit: int, /) -> bool:
        """Count one more of ``key`` unless there are ``limit``; return whether it was counted."""
        live = self._live.get(key, 0)
        if live >= limit:
            return False
        self._live[key] = live + 1
        return True

    def leave(self, key: Hashable, /) -> None:
        """Count one less of ``key``."""
        live = self._live[key] - 1
        if live:
            self._live[key] = live
        else:
            del self._live[key]
