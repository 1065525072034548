"""The policy in force: one interface, two places where it can live.

:class:`PolicyStore` holds all the logic on top of the operations of :class:`.tables.PolicyTables`. ``KernelStore``
keeps the tables in the BPF maps that the kernel programs read; ``LocalStore`` keeps them in this process, with the
same meaning, for hosts without privileges.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network
from itertools import islice
from pathlib import Path
from typing import Final

from ..core.address import IPAddress, unmap
from .ban_log import BanLog
from .compiler import CompiledSet, compile_rules
from .journal import Journal
from .prefixes import IPNetwork
from .rule import Action, Ban, PolicyError, Rule, RuleSet, Settings, Stage, Verdict, boottime_ns
from .stored import RuleRecord, StaleRevision, StaleSet, StoredRule
from .tables import PolicyTables

__all__ = ["PolicyStore"]

log = logging.getLogger(__name__)

_OF_SINGLE_RULES: Final = {"add", "remove"}
"""What the journal says of them is not synced: there may be thousands in a second, and they end with the machine."""


class PolicyStore(PolicyTables):
    """A policy that can be asked and changed. All methods may raise OSError where the kernel refuses an operation."""

    _journal: Journal | None = None
    _ban_log: BanLog | None = None
    _unsynced = False
    _left_out = False
    """Whether there are bans on disk for which there was no room: the log must not be written anew without them."""

    def remember_in(self, directory: Path) -> None:
        """Keep the journal and the bans in this directory from now on."""
        self._journal = Journal(directory / "journal")
        self._ban_log = BanLog(directory / "bans")

    def journal(self, count: int | None = None) -> list[dict[str, object]]:
        """Return the last entries of the journal (None: all there are), the oldest first."""
        return [] if self._journal is None else self._journal.read(count)

    def sync(self) -> None:
        """Have bans, and the journal's entries of all but single rules, outlive a power failure.

        Waits for the disk, so not on an event loop. Does nothing if there is nothing new.
        """
        if not self._unsynced:
            return
        self._unsynced = False
        for noted in (self._ban_log, self._journal):
            if noted is not None:
                noted.sync()

    def _note(self, what: str, revision: int, **details: object) -> None:
        self._unsynced |= what not in _OF_SINGLE_RULES
        if self._journal is not None:
            told = {name: value for name, value in details.items() if value is not None}
            self._journal.append(what, {**told, "revision": revision})

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Keep all other writers out over several calls, of this thread alone. Entering raises OSError if somebody else
        does not let go of the policy."""
        return self._locked()

    # -- the whole policy --------------------------------------------------------------------------------------

    def set_settings(self, settings: Settings) -> None:
        """Change the default and the SYN limits, until the next set is loaded."""
        with self._locked():
            self._settle()
            self._note("settings", self._set_settings(settings), default=settings.default.name.lower())

    def set_failsafe(self, networks: Sequence[IPNetwork], ports: Sequence[int] = ()) -> None:
        """Replace the networks, and the listeners' ports (at most 8), that no rule, ban or default can shut."""
        with self._locked():
            revision = self._set_failsafe(networks, ports)
            self._note("failsafe", revision, networks=[str(network) for network in networks], ports=list(ports))

    # -- asking ------------------------------------------------------------------------------------------------

    def verdict(self, source: IPAddress, port: int, *, now: int | None = None) -> Verdict:
        """Judge a connection attempt as the kernel would; rates are reported as within their limit."""
        now = boottime_ns() if now is None else now
        source = unmap(source)
        if self._in_failsafe(source, port):
            return Verdict(Action.ALLOW, Stage.FAILSAFE)
        ban = self._ban(source)
        if ban is not None and (ban.expires is None or now < ban.expires):
            return Verdict(ban.action, Stage.BAN, "ban")
        dry: StoredRule | None = None
        for rule in self._applicable(source, port, now):
            if rule.dry_run:
                dry = dry or rule
                continue
            action = Action.ALLOW if rule.action is Action.LIMIT else rule.action
            return _with_dry(Verdict(action, Stage.RULE, rule.name), dry)
        return _with_dry(Verdict(self.settings().default, Stage.DEFAULT, "default"), dry)

    def _applicable(self, source: IPAddress, port: int, now: int) -> list[StoredRule]:
        """Return the rules of both layers that apply, the highest rank first."""
        found: list[tuple[int, int]] = [*self._runtime_matches(source, port), *self._chain(source)]
        ranked = []
        for length, rule_id in found:
            rule = self._rule(rule_id)
            if rule is None or rule.port not in (None, port) or (rule.expires is not None and now >= rule.expires):
                continue
            ranked.append(((length, rule.order), rule))
        ranked.sort(key=lambda pair: pair[0], reverse=True)  # keeps the order of equals
        return [rule for _, rule in ranked]

    def _runtime_matches(self, source: IPAddress, port: int) -> Iterator[tuple[int, int]]:
        for length in self._runtime_lengths(source.version):
            network = _around(source, length)
            for key in (port, 0):
                rule_id = self._runtime(network, key)
                if rule_id is not None:
                    yield length, rule_id

    def rule_name(self, rule_id: int) -> str:
        """Return a rule's name by its id, or the id if there is no such rule any more."""
        rule = self._rule(rule_id)
        return f"#{rule_id}" if rule is None else rule.name

    def records(self, *, now: int | None = None) -> list[RuleRecord]:
        """Return all rules that are in force: those of the set as it lists them, then the runtime ones by age."""
        now = boottime_ns() if now is None else now
        records = []
        for loaded, rule_id in zip(self.ruleset().rules, self._loaded_ids(), strict=True):
            rule = self._rule(rule_id)
            if rule is not None:
                records.append(RuleRecord(rule, loaded.sources, *self._hits(rule_id)))
        runtime = []
        for network, _, rule_id in self._runtime_entries():
            rule = self._rule(rule_id)
            if rule is not None:
                runtime.append(RuleRecord(rule, (network,), *self._hits(rule_id)))
        runtime.sort(key=lambda record: (record.rule.created, record.rule.id))
        return [record for record in records + runtime if record.rule.expires is None or now < record.rule.expires]

    def hits_of_set(self, most: int) -> list[tuple[str, Action, int]]:
        """Return name, action and hits of the first ``most`` rules of the set in force: what metrics can name."""
        rows = []
        for loaded, rule_id in islice(zip(self.ruleset().rules, self._loaded_ids(), strict=True), most):
            rows.append((loaded.name, loaded.action, self._hits(rule_id)[0]))
        return rows

    # -- changing ----------------------------------------------------------------------------------------------

    def add(self, rule: Rule) -> StoredRule:
        """Put a runtime rule into force; when this returns, the next packet is judged by it.

        It has one source, and replaces the runtime rule of exactly the same prefix and port at once, also in a full
        table. Raises :class:`PolicyError` when there is no room, not even that of rules that have ended; nothing is
        changed then.
        """
        if len(rule.sources) != 1:
            raise PolicyError(f"rule {rule.name}: a rule at run time has one source, not {len(rule.sources)}")
        with self._locked():
            replaces = self._runtime(rule.sources[0], rule.port or 0) is not None
            rule_id = self._new_rule(rule, time.time_ns(), replaces=replaces)
            self._set_runtime(rule.sources[0], rule.port or 0, rule_id)
            stored = self._rule(rule_id)
            assert stored is not None
            told = {"source": str(rule.sources[0]), "port": rule.port, "reason": rule.reason or None}
            self._note("add", self._changed(), rule=rule.name, action=rule.action.name.lower(), **told)
            return stored

    def remove(self, network: IPNetwork, port: int | None = None) -> list[StoredRule]:
        """Take the runtime rule of exactly this prefix and port out of force.

        Returns the removed rules (empty if there was none).
        """
        with self._locked():
            rule_id = self._runtime(network, port or 0)
            if rule_id is None:
                return []
            rule = self._rule(rule_id)
            self._drop_runtime(network, port or 0)
            self._note("remove", self._changed(), source=str(network), port=port)
            return [] if rule is None else [rule]

    def replace(
        self,
        ruleset: RuleSet,
        *,
        expected_revision: int | None = None,
        expected_set: int | None = None,
        confirm_within: float | None = None,
        origin: str = "",
        compiled: CompiledSet | None = None,
        keep_settings: bool = False,
    ) -> int:
        """Put a whole set into force at once, in place of the present one; return the new revision.

        Runtime rules, bans and the failsafe stay. No packet is judged by a mix of two sets. A rule whose name and
        attributes (all but the sources) are unchanged keeps its counters. With ``confirm_within`` (seconds) the
        present set comes back by itself unless :meth:`confirm` is called in time; the kernel sees to it, whatever
        becomes of this process. ``origin`` is for the journal, ``compiled`` what :meth:`compile` made of the set.
        With ``keep_settings`` the settings stay as they are: whoever reads feeds knows only those of before.
        Raises :class:`StaleRevision` if ``expected_revision`` is not the one in force, :class:`StaleSet` if
        ``expected_set`` (see :meth:`set_token`) is not, :class:`PolicyError` for what does not fit; the present set
        stays in force then.
        """
        if compiled is None:
            compiled = compile_rules(ruleset)  # takes a second for a million prefixes; nobody is locked out meanwhile
        with self._locked():
            self._settle()
            if expected_revision is not None and expected_revision != self.revision:
                raise StaleRevision(expected_revision, self.revision)
            if expected_set is not None and expected_set != self.set_token():
                raise StaleSet
            if self.pending is not None:
                raise PolicyError("the last change waits to be confirmed: policy confirm, or policy rollback, first")
            if keep_settings:
                kept = replace(compiled.ruleset, settings=self.settings())
                compiled = replace(compiled, ruleset=kept)
            self._check_size(len(ruleset.rules))
            deadline = None if confirm_within is None else boottime_ns() + round(confirm_within * 1e9)
            try:
                revision = self._install(compiled, self._ids_for(ruleset), deadline)
            except (PolicyError, OSError):
                self._free_rules()
                raise
            prefixes = sum(len(rule.sources) for rule in ruleset.rules)
            default = compiled.ruleset.settings.default.name.lower()
            told = {"rules": len(ruleset.rules), "prefixes": prefixes, "default": default}
            self._note("load", revision, **told, confirm_within=confirm_within, origin=origin or None)
            return revision

    def _ids_for(self, ruleset: RuleSet) -> list[int]:
        """Return an id for each rule: the present one where a rule is unchanged."""
        loaded = zip(self.ruleset().rules, self._loaded_ids(), strict=True)
        present = {replace(rule, sources=()): rule_id for rule, rule_id in loaded}
        created = time.time_ns()
        ids: list[int] = []
        for rule in ruleset.rules:
            rule_id = present.get(replace(rule, sources=()))
            ids.append(self._new_rule(rule, created, ids, replaces=True) if rule_id is None else rule_id)
        return ids

    def compile(self, ruleset: RuleSet) -> CompiledSet:
        """Compile a set for :meth:`replace`. Raises :class:`PolicyError` if it does not fit; nothing is changed."""
        self._check_size(len(ruleset.rules))
        return compile_rules(ruleset)

    def confirm(self) -> None:
        """Keep the set that :meth:`replace` put into force for a trial. Raises :class:`PolicyError` if none is on
        trial, also because its time is over."""
        with self._locked():
            self._settle()
            if self.pending is None:
                raise PolicyError(
                    "nothing waits to be confirmed: it was confirmed, or its time is over and it is undone"
                )
            self._confirm()
            self._note("confirm", self.revision)

    def roll_back(self) -> None:
        """Undo the set that is on trial at once. Raises :class:`PolicyError` if none is."""
        with self._locked():
            self._settle()
            if self.pending is None:
                raise PolicyError("nothing to roll back: no change waits to be confirmed")
            self._roll_back()
            self._note("rollback", self.revision)

    def ban(
        self,
        address: IPAddress,
        *,
        ttl: float | None = None,
        reason: str = "",
        action: Action = Action.DROP,
        automatic: bool = False,
    ) -> Ban:
        """Shut out one address at once, for ``ttl`` seconds or for good; return the ban that is in force then.

        An operator's ban replaces any; an ``automatic`` one neither replaces an operator's nor shortens any. Where the
        disk refuses an operator's ban, OSError is raised and nothing is changed; an automatic one is in force all the
        same, until the server ends.
        """
        now = boottime_ns()
        expires = None if ttl is None else now + round(ttl * 1e9)
        ban = Ban(unmap(address), action, expires, time.time_ns(), 0, reason, automatic)
        with self._locked():
            before = self._ban(ban.address)
            if before is not None and not before.in_force(now):
                before = None
            if automatic and before is not None and (not before.automatic or before.outlasts(ban)):
                return before
            self._set_ban(ban)
            try:
                if self._ban_log is not None:
                    self._ban_log.banned(ban)
            except OSError as error:
                if not automatic:
                    self._drop_ban(ban.address) if before is None else self._set_ban(before)
                    raise
                log.error("%s: the ban of %s ends with this server", error, ban.address)
            told = {"address": str(ban.address), "ttl": ttl, "reason": reason or None}
            self._note("ban", self._changed(), action=action.name.lower(), **told)
        return ban

    def unban(self, address: IPAddress) -> bool:
        """Lift a ban; return whether there was one. Where the disk refuses, OSError is raised and it stays: else it
        would come back with the next start."""
        address = unmap(address)
        with self._locked():
            if self._ban(address) is None:
                return False
            if self._ban_log is not None:
                self._ban_log.lifted(address)
            self._drop_ban(address)
            self._note("unban", self._changed(), address=str(address))
            return True

    def restore_bans(self) -> int:
        """Put the bans that are kept on disk into force again, as far as there is room; return how many were not in
        force already."""
        if self._ban_log is None:
            return 0
        with self._locked():
            try:
                kept = self._ban_log.replay()
            except OSError as error:
                log.error("bans of earlier cannot be read, and are left as they are: %s", error)
                return 0
            present = {ban.address for ban in self.bans()}
            missing = [ban for ban in kept if ban.address not in present]
            restored = 0
            try:
                for ban in missing:
                    self._set_ban(ban)
                    restored += 1
            except PolicyError as error:  # room for fewer than before: serve, and forget none of the rest on disk
                self._left_out = True
                log.error("%d bans of earlier are not in force: %s", len(missing) - restored, error)
            else:
                self._ban_log.rewrite(self.bans())
            if restored:
                self._changed()
            return restored

    def sweep(self, *, now: int | None = None) -> int:
        """Forget what has expired; return how many rules and bans. Only frees room: an expired rule decides nothing
        anyway."""
        now = boottime_ns() if now is None else now
        # Looked for without the lock: with 100,000 rules it takes a second, and mostly there are none.
        entries = self._runtime_entries()
        candidates = [(network, port) for network, port, rule_id in entries if self._has_ended(rule_id, now)]
        with self._locked():
            self._settle()
            expired = 0
            for network, port in candidates:
                rule_id = self._runtime(network, port)
                if rule_id is not None and self._has_ended(rule_id, now):
                    self._drop_runtime(network, port)
                    expired += 1
            self._free_rules()
            if self._ban_log is not None and not self._left_out and self._ban_log.overgrown():
                self._ban_log.rewrite(self.bans())
            expired += self._drop_expired_bans(now)
            self._rebuild()
            return expired

    def rebuild(self) -> None:
        """Derive anew, from the entries, what the programs are told of them: a writer may have been killed half way."""
        with self._locked():
            self._rebuild()

    def _reclaim(self, keep: Collection[int] = ()) -> int:
        """Take what has ended out of the runtime layer, and forget rules that nothing refers to; return how many."""
        now, kept, ended = boottime_ns(), set(keep), 0
        for network, port, rule_id in self._runtime_entries():
            if rule_id not in kept and self._has_ended(rule_id, now):
                self._drop_runtime(network, port)
                ended += 1
        return ended + self._free_rules(keep)

    def _has_ended(self, rule_id: int, now: int) -> bool:
        rule = self._rule(rule_id)
        return rule is None or (rule.expires is not None and now >= rule.expires)


def _around(source: IPAddress, length: int) -> IPNetwork:
    width = source.max_prefixlen
    address = int(source) >> (width - length) << (width - length)
    return IPv4Network((address, length)) if source.version == 4 else IPv6Network((address, length))


def _with_dry(verdict: Verdict, dry: StoredRule | None) -> Verdict:
    if dry is None:
        return verdict
    return Verdict(verdict.action, verdict.stage, verdict.rule, dry.name, dry.action)
