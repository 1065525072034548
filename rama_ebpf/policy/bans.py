"""Bans: single addresses that are shut out before all rules, in force and on disk."""

from __future__ import annotations

import logging

from ..core.address import IPAddress
from .ban_log import BanLog
from .derived import DerivedState
from .rule import Ban, PolicyError, boottime_ns
from .tables import TableFull, Tables

__all__ = ["Bans"]

log = logging.getLogger(__name__)


class Bans:
    """The bans in force. Changes are made under the policy's lock."""

    def __init__(self, tables: Tables, derived: DerivedState) -> None:
        self._tables = tables
        self._derived = derived
        self._log: BanLog | None = None
        self._left_out = False
        """Whether there are bans on disk for which there was no room: the log must not be written anew without them."""

    def keep_in(self, log: BanLog) -> None:
        """Keep the bans there from now on."""
        self._log = log

    def get(self, address: IPAddress) -> Ban | None:
        """Return the ban of an address, which may have ended."""
        return self._tables.bans.get(address)

    def all(self) -> list[Ban]:
        """Return all bans, also those that have ended and were not swept."""
        return self._tables.bans.values()

    def put(self, ban: Ban) -> None:
        """Put a ban into force; bans that have ended make room. Raises :class:`.rule.PolicyError` when full."""
        self._derived.expect_bans()
        try:
            self._tables.bans.put(ban.address, ban)
        except TableFull:
            if not self.drop_ended(boottime_ns()):
                raise self._tables.too_many_bans(ban.address) from None
            try:
                self._tables.bans.put(ban.address, ban)
            except TableFull as error:
                raise self._tables.too_many_bans(ban.address) from error

    def ban(self, ban: Ban, now: int) -> Ban:
        """Put a ban into force, and on disk, unless it is automatic and a stronger one is in force; return the one that
        is. Where the disk refuses an operator's ban, OSError is raised and nothing is changed; an automatic one is in
        force all the same, until the server ends."""
        before = self.get(ban.address)
        if before is not None and not before.in_force(now):
            before = None
        if ban.automatic and before is not None and (not before.automatic or before.outlasts(ban)):
            return before
        self.put(ban)
        try:
            if self._log is not None:
                self._log.banned(ban)
        except OSError as error:
            if not ban.automatic:
                self._tables.bans.drop(ban.address) if before is None else self.put(before)
                raise
            log.error("%s: the ban of %s ends with this server", error, ban.address)
        return ban

    def lift(self, address: IPAddress) -> bool:
        """Lift a ban, on disk first: where that refuses, OSError is raised and the ban stays. Return whether there was
        one."""
        if self.get(address) is None:
            return False
        if self._log is not None:
            self._log.lifted(address)
        self._tables.bans.drop(address)
        return True

    def restore(self) -> int:
        """Put the bans that are kept on disk into force again, as far as there is room; return how many were not in
        force already."""
        if self._log is None:
            return 0
        try:
            kept = self._log.replay()
        except OSError as error:
            log.error("bans of earlier cannot be read, and are left as they are: %s", error)
            return 0
        present = {ban.address for ban in self.all()}
        missing = [ban for ban in kept if ban.address not in present]
        restored = 0
        try:
            for ban in missing:
                self.put(ban)
                restored += 1
        except PolicyError as error:  # room for fewer than before: serve, and forget none of the rest on disk
            self._left_out = True
            log.error("%d bans of earlier are not in force: %s", len(missing) - restored, error)
        else:
            self._log.rewrite(self.all())
        return restored

    def sweep(self, now: int) -> int:
        """Forget those that have ended at ``now``, and keep the log from growing; return how many."""
        if self._log is not None and not self._left_out and self._log.overgrown():
            self._log.rewrite(self.all())
        return self.drop_ended(now)

    def sync(self) -> None:
        """Have what was noted outlive a power failure."""
        if self._log is not None:
            self._log.sync()

    def drop_ended(self, now: int) -> int:
        """Forget those that have ended at ``now``; return how many."""
        return self._tables.bans.drop_ended(now)
