"""A policy in this process alone: the same meaning as in the kernel, for hosts without privileges.

It decides after accept(2), so a denied client costs a descriptor for a moment and learns that something listens.
"""

from __future__ import annotations

import threading

from ..core.address import IPAddress, unmap
from .ban_record import ban_key
from .local_tables import LocalTables
from .rule import Verdict, boottime_ns
from .store import PolicyStore

__all__ = ["CountedPolicy", "LocalStore"]


class LocalStore(PolicyStore):
    """The store over tables in this process. ``max_entries`` bounds rules, and bans unless ``max_bans`` does."""

    def __init__(self, *, max_entries: int = 1_048_576, max_bans: int | None = None) -> None:
        self.tables = LocalTables(max_entries, max_entries if max_bans is None else max_bans)
        lock = threading.RLock()
        super().__init__(self.tables, lambda: lock)

    def count(self, verdict: Verdict, source: IPAddress, port: int) -> None:
        """Count a verdict that took effect. The kernel counts its own; here the layer that asks has to."""
        self.tables.clients.note(verdict, unmap(source), port)
        if verdict.rule:
            self.tables.rules.count(verdict.rule, dry=False)
        if verdict.dry_rule:
            self.tables.rules.count(verdict.dry_rule, dry=True)
        if verdict.rule == "ban":
            ban = self._bans.covering(unmap(source), boottime_ns())
            if ban is not None:
                self.tables.bans.count(ban_key(ban.network))


class CountedPolicy:
    """A local store as the policy layer sees it: every verdict takes effect, so it is counted."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store

    def verdict(self, source: IPAddress, port: int, /) -> Verdict:
        """Judge and count one connection."""
        verdict = self._store.verdict(source, port)
        self._store.count(verdict, source, port)
        return verdict
