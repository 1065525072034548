"""Bans that are remembered: put into force and written to disk, and put into force again by the next start."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from ipaddress import ip_network
from typing import Final

from ..kernel.clock import is_synchronized
from .ban_log import BanLog, KeptBans
from .ban_record import BanBlock, ban_key, ban_network, is_automatic, read_ban, value_expires
from .ban_walk import BanRound, BanWalk
from .bans import Bans
from .prefixes import IPNetwork, Prefixes
from .rule import Action, Ban, PolicyError, boottime_ns
from .tables import Exclusive

__all__ = ["BanBook"]

log = logging.getLogger(__name__)

_SAME: Final = 16
"""A ban that would last longer by less than this part of it is the one that is there."""
_SAME_END: Final = 1_000_000_000
"""Ends that differ by less, in nanoseconds, are one: the clocks are not read at the same time."""
_SAID_EVERY: Final = 600.0
_BLOCK: Final = 4096
_ANY: Final = Ban(ip_network("0.0.0.0/32"), Action.DROP, None, 0, 0, "")


class BanBook:
    """Bans and lifts. All but :meth:`compact` are called under the policy's lock."""

    def __init__(self, bans: Bans) -> None:
        self._bans = bans
        self._log: BanLog | None = None
        self._unwritten: dict[IPNetwork, Ban] = {}
        """Bans of services that are in force, and which the disk has refused so far."""
        self._left_out = False
        """Whether there are bans on disk for which there was no room: no snapshot must be made without them."""
        self._in_doubt = False
        """Whether some on disk are of an earlier boot, and the wall clock that says when they end may be wrong."""
        self._said = float("-inf")

    def keep_in(self, log: BanLog) -> None:
        """Keep the bans there from now on."""
        self._log = log

    def ban(self, ban: Ban, now: int) -> Ban:
        """Put a ban into force, and on disk; return the one that is in force. That is another if the ban is automatic
        and would change nothing (see :func:`stands`). Where the disk refuses an operator's ban, OSError is raised and
        nothing is changed; an automatic one is in force all the same, and written by the next :meth:`catch_up`."""
        before = self._bans.get(ban.network)
        if before is not None and not before.in_force(now):
            before = None
        if not ban.automatic:
            self._put_and_write(ban, before)
            return ban
        if before is not None and stands(before, ban.expires, now):
            return before
        self._write_and_put(ban, before)
        return ban

    def _put_and_write(self, ban: Ban, before: Ban | None) -> None:
        gone = self._bans.put(ban)
        try:
            if self._log is not None:
                self._log.lifted([other.network for other in gone])
                self._log.banned(ban)
        except OSError:
            self._bans.drop(ban.network)
            for other in gone if before is None else (before, *gone):
                self._bans.put(other)
            raise
        self._unwritten.pop(ban.network, None)
        self._say(gone)

    def _write_and_put(self, ban: Ban, before: Ban | None) -> None:
        """A service's ban may be made without the policy's lock: it is on disk first, for another server's audit, which
        has the lock, takes away what is in force and not there."""
        self._unwritten[ban.network] = ban
        self._write_unwritten(ban)
        try:
            gone = self._bans.put(ban)
        except (PolicyError, OSError):
            self._unwritten.pop(ban.network, None)
            self._write_as_before(ban.network, before)
            raise
        try:
            if self._log is not None:
                self._log.lifted([other.network for other in gone])
        except OSError as error:
            log.error("%s: bans that have made room may be back after a restart", error)
        self._say(gone)

    def _write_unwritten(self, ban: Ban) -> None:
        try:
            if self._log is not None:
                self._log.banned(ban)
        except OSError as error:
            log.error("%s: the ban of %s is in force, and on disk when that takes it", error, ban.source)
            return
        self._unwritten.pop(ban.network, None)

    def _write_as_before(self, network: IPNetwork, before: Ban | None) -> None:
        """Have the disk say again what it said."""
        try:
            if self._log is not None:
                self._log.lifted([network]) if before is None else self._log.banned(before)
        except OSError as error:
            log.error("%s: %s is banned after a restart, though there was no room for the ban", error, network)

    def _say(self, gone: Sequence[Ban]) -> None:
        if gone and time.monotonic() - self._said > _SAID_EVERY:
            self._said = time.monotonic()
            log.warning(
                "bans of services fill their share of the table (7/8 of max_bans): those that end first make room, now "
                "that of %s; raise max_bans to keep them",
                gone[0].source,
            )

    def lift(self, network: IPNetwork) -> bool:
        """Lift a ban, on disk first: where that refuses, OSError is raised and the ban stays. Return whether there was
        one."""
        if self._bans.get(network) is None:
            return False
        if self._log is not None:
            self._log.lifted([network])
        self._unwritten.pop(network, None)
        self._bans.drop(network)
        return True

    def ban_all(self, sources: Prefixes, model: Ban) -> None:
        """Put an operator's bans into force that differ from ``model`` by their source alone, and on disk: all or none.
        Raises OSError, or :class:`.rule.PolicyError` where there is no room."""
        block = BanBlock.alike(sources, model)
        former, gone = self._bans.replace_all(block)
        try:
            if self._log is not None:
                self._log.lifted([other.network for other in gone])
                self._log.banned_alike(sources, model)
        except OSError:
            self._bans.put_back_all(block, former, gone)
            self._unwritten.update((other.network, other) for other in gone)
            raise
        self._forget_unwritten(sources)
        self._say(gone)

    def lift_all(self, sources: Prefixes) -> int:
        """Lift many, on disk first; return how many there were. Raises OSError; nothing is changed then."""
        keys = BanBlock.alike(sources, _ANY).each_key()
        present = [(key, text) for key, text in zip(keys, sources.texts(), strict=True) if self._bans.has(key)]
        if present and self._log is not None:
            self._log.lifted_all([text for _, text in present])
        self._forget_unwritten(sources)
        return self._bans.drop_all([key for key, _ in present])

    def _forget_unwritten(self, sources: Prefixes) -> None:
        for network in [network for network in self._unwritten if network in sources]:
            del self._unwritten[network]

    @property
    def is_behind(self) -> bool:
        """Whether the disk has refused bans that are in force."""
        return bool(self._unwritten)

    def catch_up(self) -> None:
        """Write what the disk has refused. Raises OSError where it still does."""
        now = boottime_ns()
        for network, ban in list(self._unwritten.items()):
            if self._log is not None and ban.in_force(now):
                self._log.banned(ban)
            del self._unwritten[network]

    # -- from run to run -----------------------------------------------------------------------------------------

    def restore(self) -> int:
        """Put the bans that are kept on disk into force, as far as there is room: those of operators first, then those
        that end last. Return how many were not in force already. Raises OSError where the kernel refuses them: who
        goes on without would serve the banned."""
        if self._log is None:
            return 0
        try:
            kept = self._log.read()
        except OSError as error:
            self._left_out = True
            log.error("bans of the previous run cannot be read, and stay on disk as they are: %s", error)
            return 0
        self._in_doubt = kept.by_wall and not is_synchronized()
        restored, left_out, why = self._restore(kept)
        if left_out:  # serve, and forget none of the rest on disk
            self._left_out = True
            log.error("%d bans of the previous run are not in force: %s", left_out, why)
        return restored

    def _restore(self, kept: KeptBans) -> tuple[int, int, object]:
        present = self._bans.keys() if self._bans.has_any else set()
        blocks: Iterator[BanBlock] = kept.blocks()
        if present:
            blocks = (
                BanBlock.of((key, value) for key, value in block.rows() if key not in present) for block in blocks
            )
        if kept.count + len(present) > self._bans.capacity:
            blocks = _most_wanted_first(blocks)
        restored, left_out, why = 0, 0, None
        for block in blocks:
            if not block:
                continue
            try:
                done = self._bans.put_all(block)
            except PolicyError as error:
                done, why = 0, error
            restored += done
            if done < len(block):
                left_out += len(block) - done
                why = why or self._bans.too_many(block.network(done))
        return restored, left_out, why

    def judge_again(self) -> int:
        """Put those into force that have not ended by the wall clock as it is now, and end those sooner that it says
        so of; return how many. Raises OSError."""
        if self._log is None or not self._in_doubt:
            return 0
        kept = self._log.read()
        self._in_doubt = kept.by_wall and not is_synchronized()
        restored, _, _ = self._restore(kept)
        return restored + sum(self._end_sooner(block) for block in kept.all_blocks())

    def _end_sooner(self, said: BanBlock) -> int:
        """End bans that are in force when the disk says, if that is sooner; return how many."""
        now, sooner = boottime_ns(), 0
        for key, value in said.rows():
            expires, present = value_expires(value), self._bans.get(ban_network(key))
            if not expires or present is None or present.expires is None or (expires <= now and self._in_doubt):
                continue
            if present.created == read_ban(key, value).created and expires < present.expires - _SAME_END:
                self._bans.put(replace(present, expires=expires))
                sooner += 1
        return sooner

    def compact(self, exclusive: Exclusive) -> None:
        """Put all bans into a snapshot if the log has grown long. It waits for the disk, and holds the lock for a
        moment only. A disk that refuses is logged as an error."""
        if self._log is None or self._left_out or not self._log.overgrown():
            return
        if self._in_doubt and not self._log.is_huge():
            return  # a snapshot would be without those that have ended by a clock that may be wrong
        try:
            self._log.compact(exclusive, self._bans.in_force)
        except OSError as error:
            log.error("bans are kept in their long log, which cannot be shortened: %s", error)

    def walk(self) -> BanWalk | None:
        """Return a walk through the bans on disk, None where none are kept. Only while :attr:`is_witness` is what it
        finds to be lost."""
        return None if self._log is None else self._log.walk(self._bans.has)

    @property
    def is_witness(self) -> bool:
        """Whether all bans on disk are to be in force."""
        return self._log is not None and not self._left_out

    def unknown(self, ended: BanRound) -> list[Ban]:
        """Return the bans in force that a whole round through the disk has not met, and which it is not to have yet."""
        keys = ended.unknown(key for block in self._bans.in_force() for key in block.each_key())
        found = (self._bans.get(ban_network(key)) for key in keys)
        return [ban for ban in found if ban is not None and self.is_unknown(ended, ban)]

    def is_unknown(self, ended: BanRound, ban: Ban) -> bool:
        """Under the policy's lock: whether a ban is in force, and not on disk."""
        if ban.network in self._unwritten or not ban.in_force(boottime_ns()):
            return False
        return self._bans.get(ban.network) is not None and ended.is_unknown(ban_key(ban.network))

    def take_away(self, ban: Ban) -> None:
        """Take a ban out of force that is not on disk."""
        self._bans.drop(ban.network)

    def bring_back(self, ban: Ban) -> None:
        """Put a ban that is on disk into force again. Raises :class:`.rule.PolicyError` where there is no room."""
        self._bans.put(ban)

    def sync(self) -> None:
        """Have what was noted outlive a power failure."""
        if self._log is not None:
            self._log.sync()


def stands(before: Ban, expires: int | None, now: int) -> bool:
    """Whether a service's ban until ``expires`` changes nothing: an operator's is in force, or a service's that lasts
    about as long. So a burst of strikes is one ban."""
    if not before.in_force(now):
        return False
    if not before.automatic or before.expires is None:
        return True
    return expires is not None and before.expires >= expires - (expires - now) // _SAME


def _most_wanted_first(blocks: Iterator[BanBlock]) -> Iterator[BanBlock]:
    rows = [row for block in blocks for row in block.rows()]
    rows.sort(key=lambda row: (is_automatic(row[1]), -(value_expires(row[1]) or 1 << 64)))
    for at in range(0, len(rows), _BLOCK):
        yield BanBlock.of(rows[at : at + _BLOCK])
