"""The policy in force: one interface, two places where it can live.

:class:`PolicyStore` holds all the logic (allocating rules, the candidates of a prefix, the walk that decides) on top of
a handful of table operations. ``KernelStore`` keeps the tables in the BPF maps that the kernel programs read;
``LocalStore`` keeps them in this process, with the same meaning, for hosts without privileges.
"""

from __future__ import annotations

import abc
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from ..core.address import IPAddress, unmap
from .rule import (
    MAX_CANDIDATES,
    PRECEDENCE,
    Action,
    IPNetwork,
    PolicyError,
    Rule,
    Stage,
    SynLimit,
    Verdict,
    boottime_ns,
)

__all__ = ["Ban", "PolicyStore", "RuleRecord", "Settings", "StoredRule"]

RUNTIME = "runtime"


@dataclass(frozen=True, slots=True)
class StoredRule:
    """A rule as the tables hold it, without its sources. ``created`` is wall-clock nanoseconds."""

    id: int
    name: str
    action: Action
    expires: int | None
    dry_run: bool
    limit: SynLimit | None
    reason: str
    origin: str
    created: int

    def order(self) -> tuple[int, int, int]:
        """Sort key among the candidates of one prefix."""
        return (PRECEDENCE[self.action], self.created, self.id)


@dataclass(frozen=True, slots=True)
class RuleRecord:
    """A rule with its sources, its port and its counters, for listings."""

    rule: StoredRule
    sources: tuple[IPNetwork, ...]
    port: int | None
    hits: int
    dry_hits: int


@dataclass(frozen=True, slots=True)
class Ban:
    """An address that a service or an operator shut out: before all rules, after the failsafe."""

    address: IPAddress
    action: Action
    expires: int | None
    created: int
    hits: int
    reason: str


@dataclass(frozen=True, slots=True)
class Settings:
    """What a policy says besides its rules."""

    default: Action = Action.ALLOW
    per_source: SynLimit | None = None
    overall: SynLimit | None = None


class PolicyStore(abc.ABC):
    """A policy that can be asked and changed. All methods may raise OSError where the kernel refuses an operation."""

    kind: str
    """``kernel`` or ``local``."""

    # -- table operations, one process or many -----------------------------------------------------------------

    @abc.abstractmethod
    def _locked(self) -> contextlib.AbstractContextManager[None]:
        """Keep all other writers out."""

    @abc.abstractmethod
    def _entry(self, network: IPNetwork, scope: int) -> tuple[int, ...]:
        """Return the rule ids of exactly this prefix and scope."""

    @abc.abstractmethod
    def _set_entry(self, network: IPNetwork, scope: int, ids: tuple[int, ...]) -> None:
        """Replace them; an empty tuple removes the entry. Raises :class:`PolicyError` when the table is full."""

    @abc.abstractmethod
    def _longest(self, source: IPAddress, scope: int, bits: int) -> tuple[int, tuple[int, ...]] | None:
        """Return (length, rule ids) of the longest prefix of at most ``bits`` bits that covers ``source``."""

    @abc.abstractmethod
    def _entries(self) -> Iterator[tuple[IPNetwork, int, tuple[int, ...]]]:
        """Yield every (network, scope, rule ids)."""

    @abc.abstractmethod
    def _new_rule(self, rule: Rule, created: int) -> StoredRule:
        """Store a rule under a free id with its counters at zero. Raises :class:`PolicyError` when full."""

    @abc.abstractmethod
    def _rule(self, rule_id: int) -> StoredRule | None: ...

    @abc.abstractmethod
    def _rules(self) -> list[StoredRule]: ...

    @abc.abstractmethod
    def _drop_rule(self, rule_id: int) -> None: ...

    @abc.abstractmethod
    def _hits(self, rule_id: int) -> tuple[int, int]:
        """Return (decided, dry)."""

    @abc.abstractmethod
    def _changed(self) -> int:
        """Bump and return the revision."""

    @abc.abstractmethod
    def _ban(self, address: IPAddress) -> Ban | None: ...

    @abc.abstractmethod
    def _set_ban(self, ban: Ban) -> None: ...

    @abc.abstractmethod
    def _drop_ban(self, address: IPAddress) -> bool: ...

    @abc.abstractmethod
    def _in_failsafe(self, source: IPAddress) -> bool: ...

    # -- the whole policy --------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def revision(self) -> int:
        """Grows by one with every change."""

    @abc.abstractmethod
    def settings(self) -> Settings: ...

    @abc.abstractmethod
    def set_settings(self, settings: Settings) -> None: ...

    @abc.abstractmethod
    def bans(self) -> list[Ban]: ...

    @abc.abstractmethod
    def failsafe(self) -> list[IPNetwork]: ...

    @abc.abstractmethod
    def set_failsafe(self, networks: list[IPNetwork]) -> None:
        """Replace the networks that no rule, ban or default can shut out."""

    # -- asking ------------------------------------------------------------------------------------------------

    def verdict(self, source: IPAddress, port: int, *, now: int | None = None) -> Verdict:
        """Judge a connection attempt as the kernel would; rates are reported as within their limit."""
        now = boottime_ns() if now is None else now
        source = unmap(source)
        if self._in_failsafe(source):
            return Verdict(Action.ALLOW, Stage.FAILSAFE)
        ban = self._ban(source)
        if ban is not None and (ban.expires is None or now < ban.expires):
            return Verdict(ban.action, Stage.BAN, "ban")
        dry: StoredRule | None = None
        for ids in self._walk(source, port):
            for rule_id in ids:
                rule = self._rule(rule_id)
                if rule is None or (rule.expires is not None and now >= rule.expires):
                    continue
                if rule.dry_run:
                    dry = dry or rule
                    continue
                action = Action.ALLOW if rule.action is Action.LIMIT else rule.action
                return _with_dry(Verdict(action, Stage.RULE, rule.name), dry)
        return _with_dry(Verdict(self.settings().default, Stage.DEFAULT, "default"), dry)

    def _walk(self, source: IPAddress, port: int) -> Iterator[tuple[int, ...]]:
        bits = source.max_prefixlen
        own = self._longest(source, port, bits)
        anyone = self._longest(source, 0, bits)
        while own is not None or anyone is not None:
            if own is not None and (anyone is None or own[0] >= anyone[0]):
                yield own[1]
                own = self._longest(source, port, own[0] - 1) if own[0] else None
            elif anyone is not None:
                yield anyone[1]
                anyone = self._longest(source, 0, anyone[0] - 1) if anyone[0] else None

    def records(self, *, now: int | None = None) -> list[RuleRecord]:
        """Return all rules that are in force, oldest first."""
        now = boottime_ns() if now is None else now
        rules = {rule.id: rule for rule in self._rules() if rule.expires is None or now < rule.expires}
        sources: dict[int, list[IPNetwork]] = {}
        ports: dict[int, int | None] = {}
        for network, scope, ids in self._entries():
            for rule_id in ids:
                sources.setdefault(rule_id, []).append(network)
                ports[rule_id] = scope or None
        return [
            RuleRecord(rule, tuple(sources.get(rule.id, ())), ports.get(rule.id), *self._hits(rule.id))
            for rule in sorted(rules.values(), key=lambda rule: (rule.created, rule.id))
        ]

    # -- changing ----------------------------------------------------------------------------------------------

    def add(self, rule: Rule) -> StoredRule:
        """Put a rule into force; when this returns, the next packet is judged by it.

        A runtime rule replaces the runtime rules of exactly the same prefix and port. Raises :class:`PolicyError` when
        a table is full or a prefix holds too many rules; nothing is changed then.
        """
        with self._locked():
            stored = self._new_rule(rule, time.time_ns())
            undo: list[tuple[IPNetwork, int, tuple[int, ...]]] = []
            replaced: set[int] = set()
            try:
                for network in rule.sources:
                    before = self._entry(network, rule.port or 0)
                    replaced |= self._insert(network, rule.port or 0, before, stored)
                    undo.append((network, rule.port or 0, before))
            except BaseException:
                for network, scope, ids in reversed(undo):
                    self._set_entry(network, scope, ids)
                self._drop_rule(stored.id)
                raise
            self._drop_orphans(replaced)
            self._changed()
            return stored

    def _insert(self, network: IPNetwork, scope: int, before: tuple[int, ...], new: StoredRule) -> set[int]:
        replaced: set[int] = set()
        keep = [new]
        for rule_id in before:
            rule = self._rule(rule_id)
            if rule is None or (rule.expires is not None and boottime_ns() >= rule.expires):
                continue
            if new.origin == RUNTIME and rule.origin == RUNTIME:
                replaced.add(rule_id)
            else:
                keep.append(rule)
        if len(keep) > MAX_CANDIDATES:
            raise PolicyError(
                f"{network} already has {MAX_CANDIDATES} rules: remove one, or put the address into a wider prefix"
            )
        self._set_entry(network, scope, tuple(rule.id for rule in sorted(keep, key=StoredRule.order)))
        return replaced

    def _drop_orphans(self, ids: set[int]) -> None:
        """Forget rules that no entry holds any more. A runtime rule has one source, so no search is needed."""
        for rule_id in ids:
            self._drop_rule(rule_id)

    def remove(self, network: IPNetwork, port: int | None = None) -> list[StoredRule]:
        """Take the runtime rules of exactly this prefix and port out of force, and the ban of an exact address.

        Returns the removed rules (empty if there was none).
        """
        with self._locked():
            before = self._entry(network, port or 0)
            rules = [rule for rule_id in before if (rule := self._rule(rule_id)) is not None]
            removed = [rule for rule in rules if rule.origin == RUNTIME]
            if removed:
                gone = {rule.id for rule in removed}
                self._set_entry(network, port or 0, tuple(rule_id for rule_id in before if rule_id not in gone))
                self._drop_orphans(gone)
                self._changed()
            return removed

    def ban(
        self, address: IPAddress, *, ttl: float | None = None, reason: str = "", action: Action = Action.DROP
    ) -> Ban:
        """Shut out one address at once, for ``ttl`` seconds or for good. A new ban replaces the old one."""
        now = boottime_ns()
        expires = None if ttl is None else now + round(ttl * 1e9)
        ban = Ban(unmap(address), action, expires, time.time_ns(), 0, reason[:63])
        with self._locked():
            self._set_ban(ban)
            self._changed()
        return ban

    def unban(self, address: IPAddress) -> bool:
        """Lift a ban; return whether there was one."""
        with self._locked():
            found = self._drop_ban(unmap(address))
            if found:
                self._changed()
            return found

    def sweep(self, *, now: int | None = None) -> int:
        """Forget what has expired; return how much. Only frees room: expired rules decide nothing anyway."""
        now = boottime_ns() if now is None else now
        with self._locked():
            dead = {rule.id for rule in self._rules() if rule.expires is not None and now >= rule.expires}
            if dead:
                for network, scope, ids in list(self._entries()):
                    if dead.intersection(ids):
                        self._set_entry(network, scope, tuple(i for i in ids if i not in dead))
                self._drop_orphans(dead)
            bans = [ban.address for ban in self.bans() if ban.expires is not None and now >= ban.expires]
            for address in bans:
                self._drop_ban(address)
            return len(dead) + len(bans)


def _with_dry(verdict: Verdict, dry: StoredRule | None) -> Verdict:
    if dry is None:
        return verdict
    return Verdict(verdict.action, verdict.stage, verdict.rule, dry.name, dry.action)
