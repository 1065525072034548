"""The bans in force: which sources are shut out before all rules, and which of them make room for others.

A ban is of one source: an exact address, or the prefix by which strikes are counted. Services may fill seven eighths of
the table; then their ban that ends first goes for a new one. An operator's ban never goes for another, and takes the
place of a service's in a full table.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_network
from typing import Final

from ..core.address import IPAddress, unmap
from .ban_record import BanBlock, ban_key, ban_value, canonical, is_automatic, read_ban, value_expires
from .ban_table import BanTable, TableFull
from .derived import DerivedState
from .prefixes import IPNetwork
from .rule import Ban, PolicyError, boottime_ns
from .tables import Tables

__all__ = ["BanSurvey", "Bans"]

log = logging.getLogger(__name__)

_NEVER: Final = 1 << 64
_CANDIDATES: Final = 16
"""Of the bans that services made, one in so many is remembered as the next to go: all are looked through once for
these."""
_FORGOTTEN: Final = 65_536
"""Bans that have ended and are forgotten at one go: the rest waits for the next."""


@dataclass(frozen=True, slots=True)
class BanSurvey:
    """What there was when all bans were looked through."""

    revision: int
    ended: list[bytes]
    automatic: int
    lengths: set[tuple[int, int]]


class Bans:
    """The bans in force. Changes are made under the policy's lock."""

    def __init__(self, tables: Tables, derived: DerivedState) -> None:
        self._tables = tables
        self._derived = derived
        self._next = _NextToGo()

    @property
    def _table(self) -> BanTable:
        return self._tables.bans

    # -- asking --------------------------------------------------------------------------------------------------

    @property
    def revision(self) -> int:
        """Grows with every ban and every lift."""
        return self._table.tally().revision

    def source(self, address: IPAddress) -> IPNetwork:
        """Return the prefix that stands for an address, to strikes and the bans that follow."""
        address = unmap(address)
        return ip_network((address, self.source_length(address.version)), strict=False)

    def source_length(self, version: int) -> int:
        """Return how many bits of an address stand for a source."""
        return self._tables.gate().source_lengths[version == 6]

    @property
    def capacity(self) -> int:
        """How many bans there may be."""
        return self._table.capacity

    @property
    def has_any(self) -> bool:
        """Whether there is a ban, in force or not."""
        return not self._table.is_empty()

    def too_many(self, network: IPNetwork) -> PolicyError:
        """A ban of this network finds no room."""
        return self._tables.too_many_bans(network)

    def target(self, banned: IPAddress | IPNetwork) -> IPNetwork:
        """Return what an operator's ban is of. Raises :class:`.rule.PolicyError` for a network that is no one
        source."""
        network = canonical(banned)
        length = self.source_length(network.version)
        if network.prefixlen not in (network.max_prefixlen, length):
            prefix = "" if length == network.max_prefixlen else f", or a /{length}"
            raise PolicyError(
                f"{network} is not one source: a ban is of an address{prefix}; for others write for example "
                f"rama-ebpf block {network}"
            )
        return network

    def get(self, network: IPNetwork) -> Ban | None:
        """Return the ban of exactly this network, which may have ended."""
        key = ban_key(network)
        value = self._table.get(key)
        return None if value is None else read_ban(key, value)

    def has(self, key: bytes) -> bool:
        """Whether there is a ban of this key."""
        return self._table.get(key) is not None

    def covering(self, address: IPAddress, now: int) -> Ban | None:
        """Return the ban in force that shuts an address out, the longest prefix if there are several."""
        number, width = int(address), address.max_prefixlen
        for mapped_length in self._derived.ban_lengths(address.version):
            length = mapped_length - (128 - width)
            ban = self.get(ip_network((number >> (width - length) << (width - length), length)))
            if ban is not None and ban.in_force(now):
                return ban
        return None

    def all(self) -> list[Ban]:
        """Return all bans, also those that have ended and were not swept."""
        return [read_ban(key, value) for block in self._table.blocks() for key, value in block.rows()]

    def in_force(self) -> Iterator[BanBlock]:
        """Yield all that have not ended."""
        now = boottime_ns()
        for block in self._table.blocks():
            yield block.in_force(now)

    # -- changing ------------------------------------------------------------------------------------------------

    def put(self, ban: Ban) -> list[Ban]:
        """Put a ban into force; return those that had to go for it. Raises :class:`.rule.PolicyError` when full."""
        key, value = ban_key(ban.network), ban_value(ban)
        self._expect(ban.network)
        gone: list[Ban] = []
        before = self._table.get(key)
        before_automatic = before is not None and is_automatic(before)
        most = self._table.capacity - self._table.capacity // 8
        try:
            if ban.automatic and not before_automatic and self._table.tally().automatic >= most:
                self._make_room(gone)
            # Before it is in force: what follows that cannot fail, and who counts all bans knows of it.
            self._count(int(ban.automatic) - int(before_automatic))
            self._put_with_room(ban, key, value, gone)
        except (PolicyError, OSError):
            self._put_back(gone)
            raise
        if ban.automatic:
            self._next.add(ban.expires or _NEVER, key)
        return gone

    def _expect(self, network: IPNetwork) -> None:
        try:
            self._derived.expect_ban(network)
        except PolicyError:  # one prefix length too many, unless all of one have ended
            if not self._forget_ended():
                raise
            self._derived.rebuild(self.survey(boottime_ns(), self.revision).lengths)
            self._derived.expect_ban(network)

    def _put_with_room(self, ban: Ban, key: bytes, value: bytes, gone: list[Ban]) -> None:
        try:
            self._table.put(key, value)
        except TableFull:
            if not self._make_room(gone) and not self._forget_ended():
                raise self._tables.too_many_bans(ban.network) from None
            try:
                self._table.put(key, value)
            except TableFull as error:
                raise self._tables.too_many_bans(ban.network) from error

    def _put_back(self, gone: Sequence[Ban]) -> None:
        """Have those in force again that went for one that could not be made."""
        for ban in gone:
            try:
                self._table.put(ban_key(ban.network), ban_value(ban))
                self._count(int(ban.automatic), changes=0)
            except (TableFull, OSError) as error:
                log.warning("the ban of %s is put back by the audit only: %s", ban.source, error)

    def drop(self, network: IPNetwork) -> bool:
        """Lift a ban; return whether there was one."""
        key = ban_key(network)
        value = self._table.get(key)
        if value is None:
            return False
        self._count(-int(is_automatic(value)))
        self._table.drop(key)
        return True

    def put_all(self, block: BanBlock) -> int:
        """Put many into force that are not there yet; return how many, from the first, found room.

        Raises :class:`.rule.PolicyError` for one prefix length too many."""
        self._derived.expect_ban_lengths(block.lengths())
        automatic = block.automatic()
        self._count(automatic, changes=int(len(block) > 0))
        done = self._table.put_all(block)
        self._next.forget()
        if done < len(block):
            self._count(block.cut(0, done).automatic() - automatic, changes=0)
        return done

    def replace_all(self, block: BanBlock) -> tuple[list[bytes | None], list[Ban]]:
        """Put an operator's many into force, in place of those that are there; return these, None where there is none,
        and those of services that had to go for them. Raises :class:`.rule.PolicyError` where there is no room; nothing
        is changed then."""
        former = self._values(block.each_key())
        gone: list[Ban] = []
        self._expect_all(block)
        # Before they are in force, as :meth:`put` counts one.
        self._count(-sum(value is not None and is_automatic(value) for value in former))
        done = self._table.put_all(block)
        self._next.forget()
        if done < len(block):
            try:
                self._put_with_room_for_all(block.cut(done, len(block)), gone)
            except (PolicyError, OSError):
                self.put_back_all(block, former, gone)
                raise
        return former, gone

    def _put_with_room_for_all(self, block: BanBlock, gone: list[Ban]) -> None:
        """Put an operator's many into a table that is full."""
        missing = []
        for key, value in block.rows():
            if self._table.get(key) is None:
                missing.append((key, value))
            else:
                self._table.put(key, value)  # first, so that none of these makes room for another
        if self._forget_ended():
            missing = missing[self._table.put_all(BanBlock.of(missing)) :]
        if len(missing) > self._table.tally().automatic:  # nobody gets in for what cannot be
            raise self._tables.too_many_bans(BanBlock.of(missing).network(0))
        for key, value in missing:
            self._put_with_room(read_ban(key, value), key, value, gone)

    def put_back_all(self, block: BanBlock, former: Sequence[bytes | None], gone: Sequence[Ban]) -> None:
        """Have in force again what was so before :meth:`replace_all`."""
        self._count(sum(value is not None and is_automatic(value) for value in former))
        for key, value in zip(block.each_key(), former, strict=True):
            if value is None:
                self._table.drop(key)
            else:
                self._table.put(key, value)
        self._put_back(gone)

    def drop_all(self, keys: Sequence[bytes]) -> int:
        """Lift the bans of these keys; return how many."""
        if not keys:
            return 0
        self._count(-sum(value is not None and is_automatic(value) for value in self._values(keys)))
        return sum(self._table.drop(key) for key in keys)

    def _values(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if not self.has_any:
            return [None] * len(keys)
        return [self._table.get(key) for key in keys]

    def _expect_all(self, block: BanBlock) -> None:
        try:
            self._derived.expect_ban_lengths(block.lengths())
        except PolicyError:
            if not self._forget_ended():
                raise
            self._derived.rebuild(self.survey(boottime_ns(), self.revision).lengths)
            self._derived.expect_ban_lengths(block.lengths())

    def keys(self) -> set[bytes]:
        """Return the keys of all bans."""
        return {key for block in self._table.blocks() for key in block.each_key()}

    def _make_room(self, gone: list[Ban]) -> bool:
        """Take away the ban of a service that ends first; return whether there was one."""
        key = self._next.take(self._table)
        if key is None:
            return False
        value = self._table.get(key)
        self._count(-1, changes=0)
        self._table.drop(key)
        if value is not None and (ban := read_ban(key, value)).in_force(boottime_ns()):
            gone.append(ban)
        return True

    def _count(self, automatic: int, *, changes: int = 1) -> None:
        tally = self._table.tally()
        if automatic or changes:
            count = max(0, tally.automatic + automatic)
            self._table.set_tally(replace(tally, revision=tally.revision + changes, automatic=count))

    # -- upkeep --------------------------------------------------------------------------------------------------

    def survey(self, now: int, revision: int) -> BanSurvey:
        """Look through all bans; no lock is needed. ``revision`` is that of the bans, read under the lock before: a
        change that has begun since then, even if its writer was killed in the middle, has raised it."""
        automatic = 0
        ended: list[bytes] = []
        lengths: set[tuple[int, int]] = set()
        for block in self._table.blocks():
            automatic += block.automatic()
            lengths |= block.lengths()
            ended += block.ended(now)[: _FORGOTTEN - len(ended)]
        return BanSurvey(revision, ended, automatic, lengths)

    def lengths(self, survey: BanSurvey) -> set[tuple[int, int]]:
        """Return which (IP version, length in the IPv4-mapped form) are to be looked for."""
        if survey.revision == self.revision:
            return survey.lengths
        present = ((version, length) for version in (4, 6) for length in self._derived.ban_lengths(version))
        return survey.lengths.union(present)

    def settle(self, survey: BanSurvey, now: int) -> int:
        """Forget the bans that have ended; return how many. How many bans services made is put right if nothing changed
        since the survey."""
        if survey.revision == self.revision:
            self._count(survey.automatic - self._table.tally().automatic, changes=0)
        forgotten = automatic = 0
        for key in survey.ended:
            value = self._table.get(key)
            if value is not None and 0 < value_expires(value) <= now:  # and was not banned anew meanwhile
                self._table.drop(key)
                automatic += is_automatic(value)
                forgotten += 1
        self._count(-automatic, changes=0)
        return forgotten

    def _forget_ended(self) -> int:
        now = boottime_ns()
        return self.settle(self.survey(now, self.revision), now)

    def set_source_lengths(self, lengths: tuple[int, int]) -> None:
        """Say how many bits of an IPv4 and of an IPv6 address stand for a source from now on."""
        gate = self._tables.gate()
        if gate.source_lengths != lengths:
            self._tables.put_gate(replace(gate, source_lengths=lengths))


class _NextToGo:
    """The bans of services that end first: all of them up to some moment, so that a full table is not looked through
    for each new one."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, bytes]] = []
        self._up_to = -1

    def add(self, expires: int, key: bytes) -> None:
        """A ban is new, or has another end."""
        if expires <= self._up_to:
            heapq.heappush(self._heap, (expires, key))

    def forget(self) -> None:
        """Look through the table again before the next goes."""
        self._heap, self._up_to = [], -1

    def take(self, table: BanTable) -> bytes | None:
        """Return the key of the ban that is to go, None if there is none of a service."""
        for _ in range(2):
            while self._heap:
                expires, key = heapq.heappop(self._heap)
                value = table.get(key)
                if value is not None and is_automatic(value) and (value_expires(value) or _NEVER) == expires:
                    return key
            self._look(table)
        return None

    def _look(self, table: BanTable) -> None:
        count = max(64, table.tally().automatic // _CANDIDATES)
        self._heap = heapq.nsmallest(count, _automatic(table))  # sorted, so it is a heap
        self._up_to = self._heap[-1][0] if self._heap else -1


def _automatic(table: BanTable) -> Iterator[tuple[int, bytes]]:
    for block in table.blocks():
        for key, expires, automatic in zip(block.each_key(), block.expires(), block.automatic_flags(), strict=True):
            if automatic:
                yield expires or _NEVER, key
