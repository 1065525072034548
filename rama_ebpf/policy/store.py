"""A policy that can be asked and changed, wherever it is kept.

:class:`PolicyStore` is made of parts over one place, :class:`.tables.Tables`: the loaded set, the runtime layer, room
for rules, bans, the failsafe, what is derived for the programs, and the journal. A change walks one way: it takes the
lock, asks the parts, which write the tables, raises the revision, and is noted.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

from ..core.address import IPAddress, unmap
from ..core.client import SourceLengths
from ..kernel.clock import is_synchronized
from ..kernel.gate_state import LAST_REVISION
from ..kernel.policy_lock import PolicyBusy
from .ban_book import BanBook, stands
from .ban_log import BanLog
from .ban_record import BanBlock, canonical
from .bans import Bans, BanSurvey
from .changes import Changes
from .clients import ClientTable
from .compiler import CompiledSet, compile_rules
from .derived import DerivedState
from .failsafe import Failsafe
from .image import PolicyImage, RuntimeRule
from .journal import Journal
from .judgement import Judgement
from .keeping import Keeping
from .kept_history import PastSet
from .loaded_set import LoadedSet
from .prefixes import IPNetwork, Prefixes
from .repairs import Repairs
from .rule import Action, Ban, PolicyError, Rule, RuleSet, Settings, SynLimit, Verdict, boottime_ns, source_text
from .rule_room import RuleRoom
from .runtime_rules import RuntimeRules
from .set_in_waiting import SetInWaiting
from .stored import RuleRecord, StaleRevision, StaleSet, StoredRule
from .tables import Exclusive, Place, Tables

__all__ = ["PolicyStore"]

log = logging.getLogger(__name__)

_QUICK_SURVEY: Final = 0.03
"""Seconds that a look through all bans may take at each sweep, which comes every 30 seconds."""
_SURVEY_SHARE: Final = 1000


class PolicyStore:
    """A policy in its place. All methods may raise OSError where the kernel refuses an operation, and those that change
    something :class:`~rama_ebpf.kernel.policy_lock.PolicyBusy`."""

    def __init__(self, tables: Tables, exclusive: Exclusive, briefly: Exclusive | None = None) -> None:
        """``briefly`` is ``exclusive`` for who does not wait."""
        self._tables = tables
        self._exclusive = exclusive
        self._briefly = briefly or exclusive
        self._derived = DerivedState(tables)
        self._loaded = LoadedSet(tables)
        self._runtime = RuntimeRules(tables, self._derived)
        self._room = RuleRoom(tables, self._loaded, self._runtime)
        self._bans = Bans(tables, self._derived)
        self._failsafe = Failsafe(tables, self._derived)
        self._keeping = Keeping(tables, self._loaded, self._runtime, self._failsafe)
        self._judgement = Judgement(tables, self._loaded, self._runtime, self._bans, self._failsafe)
        self._changes = Changes(tables, self._keeping, self._bans)
        self._ban_book = BanBook(self._bans)
        self._survey_due = float("-inf")
        self._disagreed: Callable[[str], None] = log.error
        self.repairs = Repairs(
            tables,
            exclusive,
            self._changes,
            self._loaded,
            self._runtime,
            self._room,
            self._failsafe,
            self._keeping,
            self._ban_book,
            rebuild=self.rebuild,
            undo_trial=self._undo_trial,
            load=self._load_for_repair,
        )
        """What the audit puts in order."""

    @property
    def kind(self) -> str:
        """``kernel`` or ``local``."""
        return self._tables.kind

    def remember_in(self, directory: Path) -> None:
        """Keep the policy, the journal and the bans in this directory from now on."""
        self._keeping.keep_in(directory)
        self._changes.note_in(Journal(directory / "journal"))
        self._ban_book.keep_in(BanLog(directory / "bans"))

    def journal(self, count: int | None = None) -> list[dict[str, object]]:
        """Return the last entries of the journal (None: all there are), the oldest first."""
        return self._changes.noted(count)

    def sync(self) -> None:
        """Have everything reach the disk that did not have to at once: what the server does by itself, bans, and the
        journal's entries of all but single rules; it outlives a power failure then.

        Waits for the disk, so not on an event loop. Does nothing if there is nothing new.
        """
        self._keeping.catch_up(self._exclusive)
        if self._ban_book.is_behind:
            self._write_bans()
        if not self._changes.unsynced:
            return
        self._changes.unsynced = False
        self._ban_book.sync()
        self._changes.sync()

    def _write_bans(self) -> None:
        try:
            with self._exclusive():
                self._ban_book.catch_up()
            self._changes.unsynced = True
        except OSError as error:
            log.debug("bans of services are still not on disk: %s", error)  # it was said when they were made

    def finish(self) -> None:
        """:meth:`sync`, before the tables go: also of what commands have left unwritten that were killed."""
        self._keeping.sweep()
        self.sync()

    def keep(self) -> None:
        """Have the whole policy written to disk anew by the next :meth:`sync`, and judge by the wall clock again what
        depends on it (:meth:`judge_again`)."""
        if self.revision:
            self._keeping.take_up()

    def judge_again(self) -> int:
        """After a reboot ends are judged by the wall clock, which may have been wrong: do so again. Return how many
        rules at run time and bans have come into force, ended, or got another end. Raises OSError or
        :class:`PolicyError`."""
        with self._exclusive():
            bans = self._ban_book.judge_again()
            changes = self._keeping.judged_again()
            for (network, port), wanted in changes:
                if wanted is None:
                    self._runtime.drop(network, port)
                else:
                    self._room.place(wanted.rule, wanted.created)
            if changes:
                self._changes.made()
            return len(changes) + bans

    def judge_when_sure(self) -> int:
        """:meth:`judge_again`, if the wall clock is known to be right by now."""
        return self.judge_again() if is_synchronized() else 0

    def held(self) -> contextlib.AbstractContextManager[object]:
        """Keep all other writers out over several calls, of this thread alone. Entering raises OSError if somebody else
        does not let go of the policy."""
        return self._exclusive()

    # -- the whole policy --------------------------------------------------------------------------------------

    def set_settings(self, settings: Settings) -> None:
        """Change the default and the SYN limits, until the next set is loaded."""
        with self._exclusive():
            self._settle()
            self._keeping.fall_behind()
            self._changes.note("settings", self._loaded.set_settings(settings), default=settings.default.name.lower())

    def set_failsafe(self, networks: Sequence[IPNetwork], ports: Sequence[int] = ()) -> None:
        """Replace the networks, and the listeners' ports (at most 8), that no rule, ban or default can shut."""
        with self._exclusive():
            self._keeping.fall_behind()
            revision = self._failsafe.replace(networks, ports)
            self._changes.note("failsafe", revision, networks=[str(network) for network in networks], ports=list(ports))

    # -- asking ------------------------------------------------------------------------------------------------

    @property
    def revision(self) -> int:
        """Grows with every change but bans and lifts, which have one of their own."""
        return self._tables.gate().revision

    @property
    def ban_revision(self) -> int:
        """Grows with every ban and every lift."""
        return self._bans.revision

    def source(self, address: IPAddress) -> IPNetwork:
        """Return the prefix that stands for an address, to strikes and the bans that follow."""
        return self._bans.source(address)

    def source_lengths(self) -> SourceLengths:
        """Return what stands for a source."""
        return SourceLengths(*self._tables.gate().source_lengths)

    def covering_ban(self, address: IPAddress) -> Ban | None:
        """Return the ban that shuts an address out, None if none does."""
        return self._bans.covering(unmap(address), boottime_ns())

    @property
    def pending(self) -> int | None:
        """When the set that was loaded last will be undone unless it is confirmed, None if it need not be."""
        return self._loaded.pending

    def next_end(self, now: int) -> int | None:
        """Return when after ``now`` (CLOCK_BOOTTIME nanoseconds) something ends by itself, a rule or a trial."""
        ends = (self._tables.rules.next_end(now), self.pending)
        return min((end for end in ends if end is not None and end > now), default=None)

    def set_token(self) -> int:
        """Return a number that names the set in force: it differs after every :meth:`replace` and roll-back."""
        return self._loaded.token()

    def ruleset(self) -> RuleSet:
        """Return the set in force, with the settings in force."""
        return self._loaded.ruleset()

    def settings(self) -> Settings:
        """Return the settings in force."""
        return self._loaded.settings()

    def bans(self) -> list[Ban]:
        """Return all bans; some may have ended."""
        return self._bans.all()

    def ban_blocks(self) -> Iterable[BanBlock]:
        """Return all bans that are in force, many at a time."""
        return self._bans.in_force()

    def failsafe(self) -> list[IPNetwork]:
        """Return the networks that nothing can shut out."""
        return self._failsafe.networks()

    @property
    def clients(self) -> ClientTable:
        """Who came, and what became of them."""
        return self._tables.clients

    def seconds_until_due(self, bucket: int, source: IPAddress, limit: SynLimit) -> float:
        """Return for how long a limit has no room for another connection of a source; 0 if it has. ``bucket`` is a
        rule's id, or a constant of ``enum bucket``."""
        now = boottime_ns()
        ahead = (self._tables.due(bucket, unmap(source)) or 0) - now - limit.tolerance_ns
        return ahead / 1e9 if 0 < ahead <= limit.emission_ns else 0.0

    def failsafe_ports(self) -> tuple[int, ...]:
        """Return the listeners' ports that nothing can shut."""
        return self._failsafe.ports()

    def verdict(self, source: IPAddress, port: int, *, now: int | None = None) -> Verdict:
        """Judge a connection attempt as the kernel would; rates are reported as within their limit."""
        return self._judgement.verdict(source, port, now)

    def judgement_of(self, compiled: CompiledSet) -> Judgement:
        """Return who judges as if a set, of :meth:`compile`, was in force in place of the present one."""
        waiting = SetInWaiting(compiled, self._tables.rules)
        return Judgement(waiting, waiting, self._runtime, self._bans, self._failsafe)

    def past_sets(self) -> list[PastSet]:
        """Return the sets that were in force before, the latest first. Raises OSError."""
        return self._keeping.past_sets()

    def past_set(self, revision: int) -> RuleSet:
        """Return the set that was in force at a revision. Raises :class:`PolicyError` if it is not kept, or OSError."""
        return self._keeping.past_set(revision)

    def rule_at(self, network: IPNetwork, port: int | None = None) -> StoredRule | None:
        """Return the runtime rule of exactly this prefix and port, None if there is none."""
        rule_id = self._runtime.get(network, port or 0)
        return None if rule_id is None else self._tables.rules.get(rule_id)

    def stored_rule(self, rule_id: int) -> StoredRule | None:
        """Return a rule of either layer by its id, None if there is no such rule any more."""
        return self._tables.rules.get(rule_id)

    def ban_of(self, banned: IPAddress | IPNetwork) -> Ban | None:
        """Return the ban of exactly this address or prefix, also one that has ended; None if there is none."""
        return self._bans.get(canonical(banned))

    def rule_name(self, rule_id: int) -> str:
        """Return a rule's name by its id, or the id if there is no such rule any more."""
        rule = self._tables.rules.get(rule_id)
        return f"#{rule_id}" if rule is None else rule.name

    def records(self, *, now: int | None = None) -> list[RuleRecord]:
        """Return all rules that are in force: those of the set as it lists them, then the runtime ones by age."""
        now = boottime_ns() if now is None else now
        records = []
        for loaded, rule_id in zip(self.ruleset().rules, self._loaded.ids(), strict=True):
            rule = self._tables.rules.get(rule_id)
            if rule is not None:
                records.append(RuleRecord(rule, loaded.sources, *self._tables.rules.hits(rule_id)))
        runtime = []
        for (network, _), rule_id in self._runtime.items():
            rule = self._tables.rules.get(rule_id)
            if rule is not None:
                runtime.append(RuleRecord(rule, (network,), *self._tables.rules.hits(rule_id)))
        runtime.sort(key=lambda record: (record.rule.created, record.rule.id))
        return [record for record in records + runtime if record.rule.expires is None or now < record.rule.expires]

    def hits_of_set(self, most: int) -> list[tuple[str, Action, int]]:
        """Return name, action and hits of the first ``most`` rules of the set in force: what metrics can name."""
        rows = []
        for loaded, rule_id in islice(zip(self.ruleset().rules, self._loaded.ids(), strict=True), most):
            rows.append((loaded.name, loaded.action, self._tables.rules.hits(rule_id)[0]))
        return rows

    # -- changing ----------------------------------------------------------------------------------------------

    def add(self, rule: Rule, *, ttl: int | None = None) -> StoredRule:
        """Put a runtime rule into force, for ``ttl`` nanoseconds from now on if that is given; when this returns, the
        next packet is judged by it, and it is on disk.

        It has one source, and replaces the runtime rule of exactly the same prefix and port at once, also in a full
        table. Raises :class:`PolicyError` when there is no room, not even that of rules that have ended, and OSError
        where the disk refuses; nothing is changed then.
        """
        with self._exclusive():
            (stored,), revision = self._add_all([rule], ttl)
            told = {"source": str(rule.sources[0]), "port": rule.port, "reason": rule.reason or None}
            self._changes.note("add", revision, rule=rule.name, action=rule.action.name.lower(), **told)
            return stored

    def add_all(self, rules: Sequence[Rule], *, ttl: int | None = None) -> list[StoredRule]:
        """:meth:`add` many rules as one change: one revision, and one wait for the disk. They come into force one after
        the other; where one cannot, those before it are undone and it raises as :meth:`add` does."""
        if not rules:
            return []
        with self._exclusive():
            stored, revision = self._add_all(rules, ttl)
            first = f"{rules[0].name} and {len(rules) - 1} more" if len(rules) > 1 else rules[0].name
            self._changes.note("add", revision, rule=first, rules=len(rules))
            return stored

    def add_many(
        self, sources: Prefixes, action: Action, *, port: int | None = None, ttl: int | None = None, reason: str = ""
    ) -> int:
        """:meth:`add_all` for rules that differ by their source alone, quickly. Each is called as :command:`block` and
        :command:`allow` call theirs. Return the revision.

        All that are new are one change. Those that replace another follow, 4,096 at a time: a table has no room for
        more rules twice."""
        if not sources:
            return self.revision
        with self._exclusive():
            self._refuse_from_the_future()
            expires = None if ttl is None else boottime_ns() + ttl
            model = Rule("many", sources[:1], action, port, expires, reason=reason)
            free: list[int] = []
            for portion in self._room.portions(sources, port or 0):
                free = self._add_alike(portion, model, time.time_ns(), free)
            return self.revision

    def _add_alike(self, sources: Prefixes, model: Rule, created: int, free: Sequence[int]) -> list[int]:
        """Return the ids of the rules that have gone."""
        texts, verb = sources.texts(), model.action.name.lower()
        former = self._room.place_alike(sources, [f"{verb}:{text}" for text in texts], model, created, free)
        try:
            revision = self._changes.made(lambda revision: self._keeping.added_alike(texts, model, created, revision))
        except OSError:
            self._runtime.exchange(sources, model.port or 0, former)
            raise
        gone = [rule_id for rule_id in former if rule_id is not None]
        self._room.forget(gone)
        first = f"{verb}:{texts[0]}" + (f" and {len(texts) - 1} more" if len(texts) > 1 else "")
        self._changes.note("add", revision, rule=first, rules=len(texts), port=model.port, reason=model.reason or None)
        return gone

    def remove_many(self, sources: Prefixes, port: int | None = None) -> int:
        """:meth:`remove` many as one change, all or none; return how many there were."""
        with self._exclusive():
            self._refuse_from_the_future()
            former = self._runtime.exchange(sources, port or 0, [None] * len(sources))
            texts = [text for text, was in zip(sources.texts(), former, strict=True) if was is not None]
            if not texts:
                return 0
            try:
                revision = self._changes.made(lambda revision: self._keeping.removed_all(texts, port or 0, revision))
            except OSError:
                self._runtime.exchange(sources, port or 0, former)
                raise
            self._room.forget([rule_id for rule_id in former if rule_id is not None])
            first = texts[0] if len(texts) == 1 else f"{texts[0]} and {len(texts) - 1} more"
            self._changes.note("remove", revision, source=first, rules=len(texts), port=port)
            return len(texts)

    def _add_all(self, rules: Sequence[Rule], ttl: int | None) -> tuple[list[StoredRule], int]:
        self._refuse_from_the_future()
        self.settle()
        expires, created = None if ttl is None else boottime_ns() + ttl, time.time_ns()
        undo: list[tuple[Place, StoredRule | None]] = []
        stored: list[StoredRule] = []
        added: list[RuntimeRule] = []
        try:
            for rule in rules:
                self._check_one(rule)
                one = rule if expires is None else replace(rule, expires=expires)
                place = one.sources[0], one.port or 0
                before = self.rule_at(one.sources[0], one.port)
                rule_id = self._room.place(one, created)
                undo.append((place, before))
                stored.append(StoredRule.of(rule_id, one, created))
                added.append(RuntimeRule(one, created))
            revision = self._changes.made(lambda revision: self._keeping.added(added, revision))
        except (PolicyError, OSError):
            for place, before in reversed(undo):
                self._undo(place, before)
            raise
        return stored, revision

    def _undo(self, place: Place, before: StoredRule | None) -> None:
        """Have the rule again that was at a place. Its id may be another's by now, if there was no room."""
        if before is None or self._tables.rules.get(before.id) == before:
            self._runtime.put_back(*place, None if before is None else before.id)
        else:
            self._room.place(before.rule(place[0]), before.created)

    def _check_one(self, rule: Rule) -> None:
        if len(rule.sources) != 1:
            raise PolicyError(f"rule {rule.name}: a rule at run time has one source, not {len(rule.sources)}")
        present = self.rule_at(rule.sources[0], rule.port)
        if rule.dry_run and present is not None and present.decides(boottime_ns()):
            raise PolicyError(
                f"{rule.sources[0]} has a rule already, {present.name} ({present.action.name.lower()}), and a dry "
                f"run would take its place: nothing is changed"
            )

    def remove(self, network: IPNetwork, port: int | None = None) -> list[StoredRule]:
        """Take the runtime rule of exactly this prefix and port out of force, and off the disk.

        Returns the removed rules (empty if there was none). Raises OSError where the disk refuses; nothing is changed
        then.
        """
        with self._exclusive():
            self._refuse_from_the_future()
            self.settle()
            rule_id = self._runtime.get(network, port or 0)
            if rule_id is None:
                return []
            rule = self._tables.rules.get(rule_id)
            self._runtime.drop(network, port or 0)
            try:
                revision = self._changes.made(lambda revision: self._keeping.removed(network, port or 0, revision))
            except OSError:
                self._runtime.put_back(network, port or 0, rule_id)
                raise
            self._changes.note("remove", revision, source=str(network), port=port)
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
        settings: Callable[[Settings], Settings] | None = None,
        must_be_kept: bool = True,
    ) -> int:
        """Put a whole set into force at once, in place of the present one; return the new revision.

        Runtime rules, bans and the failsafe stay. No packet is judged by a mix of two sets. A rule whose name and
        attributes (all but the sources) are unchanged keeps its counters. With ``confirm_within`` (seconds) the
        present set comes back by itself unless :meth:`confirm` is called in time; the kernel sees to it, whatever
        becomes of this process. ``origin`` is for the journal, ``compiled`` what :meth:`compile` made of the set.
        With ``settings`` they are what that makes of those in force: what was read of them before the lock may not be
        so any more. Where the
        disk refuses, OSError is raised and nothing is changed, unless it need not ``must_be_kept``: then :meth:`sync`
        tries again.

        Raises :class:`StaleRevision` if ``expected_revision`` is not the one in force, :class:`StaleSet` if
        ``expected_set`` (see :meth:`set_token`) is not, :class:`PolicyError` for what does not fit; the present set
        stays in force then.
        """
        if compiled is None:
            compiled = compile_rules(ruleset)  # takes a second for a million prefixes; nobody is locked out meanwhile
        with self._exclusive():
            self._settle()
            if expected_revision is not None and expected_revision != self.revision:
                raise StaleRevision(expected_revision, self.revision)
            if expected_set is not None and expected_set != self.set_token():
                raise StaleSet
            if self.pending is not None:
                raise PolicyError("the last change waits to be confirmed: policy confirm, or policy rollback, first")
            if settings is not None:
                compiled = replace(compiled, ruleset=replace(compiled.ruleset, settings=settings(self.settings())))
            self._room.check(len(ruleset.rules))
            deadline = None if confirm_within is None else boottime_ns() + round(confirm_within * 1e9)
            try:
                keep = partial(self._keeping.loaded, compiled.ruleset, at_once=must_be_kept)
                revision = self._loaded.install(compiled, self._room.ids_for(ruleset), deadline, keep)
            except (PolicyError, OSError):
                self._room.free()
                raise
            self._tidy()
            prefixes = sum(len(rule.sources) for rule in ruleset.rules)
            default = compiled.ruleset.settings.default.name.lower()
            told = {"rules": len(ruleset.rules), "prefixes": prefixes, "default": default}
            self._changes.note("load", revision, **told, confirm_within=confirm_within, origin=origin or None)
            return revision

    def _load_for_repair(self, ruleset: RuleSet, settings: Settings) -> None:
        self.replace(ruleset, settings=lambda _: settings, origin="the audit")

    def compile(self, ruleset: RuleSet) -> CompiledSet:
        """Compile a set for :meth:`replace`. Raises :class:`PolicyError` if it does not fit; nothing is changed."""
        self._room.check(len(ruleset.rules))
        return compile_rules(ruleset)

    def confirm(self, *, expected_set: int | None = None) -> None:
        """Keep the set that :meth:`replace` put into force for a trial. Raises :class:`PolicyError` if none is on
        trial, also because its time is over, and :class:`StaleSet` if it is not ``expected_set``."""
        with self._exclusive():
            self._refuse_if_unsealed()
            self._settle()
            if self.pending is not None and expected_set not in (None, self.set_token()):
                raise StaleSet
            if self.pending is None:
                raise PolicyError(
                    "nothing waits to be confirmed: it was confirmed, or its time is over and it is undone"
                )
            ruleset = self.ruleset()
            revision = self._loaded.confirm(partial(self._keeping.loaded, ruleset, at_once=True))
            self._tidy()
            self._changes.note("confirm", revision)

    def roll_back(self, *, expected_set: int | None = None) -> None:
        """Undo the set that is on trial at once. Raises :class:`PolicyError` if none is, and :class:`StaleSet` if it is
        not ``expected_set``."""
        with self._exclusive():
            self._settle()
            if self.pending is not None and expected_set not in (None, self.set_token()):
                raise StaleSet
            if self.pending is None:
                raise PolicyError("nothing to roll back: no change waits to be confirmed")
            self._changes.note("rollback", self._undo_trial())

    def ban(
        self,
        banned: IPAddress | IPNetwork,
        *,
        ttl: float | None = None,
        reason: str = "",
        action: Action = Action.DROP,
        automatic: bool = False,
    ) -> Ban:
        """Shut out one source at once, for ``ttl`` seconds or for good; return the ban that is in force then.

        A ban is of an address or of one source's prefix (see :meth:`source`). An operator's replaces any; an
        ``automatic`` one neither replaces an operator's nor shortens any, and one that
        would last about as long as that which is there is that one. Where the disk refuses an operator's ban, OSError
        is raised and nothing is changed; an automatic one is in force all the same, and :meth:`sync` tries again.

        An ``automatic`` one waits for no command that does not let go of the policy: it needs nothing that others
        write but where there is no ban of its prefix length yet.

        Raises :class:`PolicyError` for an operator's of a network that is no source's, and when there is no room.
        """

        def put() -> Ban:
            network = canonical(banned) if automatic else self._bans.target(banned)
            now = boottime_ns()
            expires = None if ttl is None else now + round(ttl * 1e9)
            ban = Ban(network, action, expires, time.time_ns(), 0, reason, automatic)
            revisions = self._changes.next_of_bans()
            in_force = self._ban_book.ban(ban, now)
            if in_force is ban:
                told = {"address": ban.source, "ttl": ttl, "reason": reason or None, "action": action.name.lower()}
                self._changes.note("ban", revisions["revision"], ban_revision=revisions["ban_revision"], **told)
            return in_force

        try:
            with self._briefly() if automatic else self._exclusive():
                return put()
        except PolicyBusy:
            if not automatic or not self._derived.looks_for_bans_of(canonical(banned)):
                raise
        return put()

    def ban_many(
        self, sources: Prefixes, *, ttl: float | None = None, reason: str = "", action: Action = Action.DROP
    ) -> int:
        """:meth:`ban` many at once, as an operator, all or none; return the revision of the bans."""
        if not sources:
            return self.ban_revision
        with self._exclusive():
            for network in sources.widths():
                self._bans.target(network)
            now = boottime_ns()
            expires = None if ttl is None else now + round(ttl * 1e9)
            revisions = self._changes.next_of_bans()
            self._ban_book.ban_all(sources, Ban(sources[0], action, expires, time.time_ns(), 0, reason))
            first = sources.texts()[0] + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")
            told = {"address": first, "bans": len(sources), "ttl": ttl, "reason": reason or None}
            self._changes.note("ban", revisions["revision"], ban_revision=revisions["ban_revision"], **told)
            return self.ban_revision

    def unban_many(self, sources: Prefixes) -> int:
        """:meth:`unban` many as one change, all or none; return how many there were."""
        with self._exclusive():
            revisions = self._changes.next_of_bans()
            lifted = self._ban_book.lift_all(sources)
            if lifted:
                self._changes.note("unban", **revisions, bans=lifted)
            return lifted

    def stands(self, banned: IPAddress | IPNetwork, ttl: float) -> bool:
        """Whether an automatic ban of it for ``ttl`` seconds would change nothing. It takes no lock."""
        now, before = boottime_ns(), self.ban_of(banned)
        return before is not None and stands(before, now + round(ttl * 1e9), now)

    def unban(self, banned: IPAddress | IPNetwork) -> bool:
        """Lift the ban of exactly this address or prefix; return whether there was one. Where the disk refuses, OSError
        is raised and it stays: else it would come back with the next start."""
        with self._exclusive():
            network, revisions = canonical(banned), self._changes.next_of_bans()
            if not self._ban_book.lift(network):
                return False
            self._changes.note("unban", **revisions, address=source_text(network))
            return True

    def set_source_lengths(self, lengths: SourceLengths) -> None:
        """Say what stands for a source from now on. Bans that are in force stay as they are."""
        with self._exclusive():
            self._bans.set_source_lengths((lengths.ipv4, lengths.ipv6))

    def restore_bans(self) -> int:
        """Put the bans that are kept on disk into force again, as far as there is room; return how many were not in
        force already."""
        with self._exclusive():
            return self._ban_book.restore()

    def compact_bans(self) -> None:
        """Make a snapshot of the bans on disk, if their log has grown long. Waits for the disk."""
        self._ban_book.compact(self._exclusive)

    def sweep(self, *, now: int | None = None) -> int:
        """Forget what has expired; return how many rules and bans. Only frees room: an expired rule decides nothing
        anyway."""
        now = boottime_ns() if now is None else now
        with self._exclusive():
            revision = self.ban_revision
        # Looked for without the lock: with 100,000 rules it takes a second, and mostly there are none.
        candidates, survey = self._runtime.ended(now), self._surveyed(now, revision)
        with self._exclusive():
            self._settle()
            expired = self._runtime.drop_ended(now, candidates)
            self._room.free()
            expired += 0 if survey is None else self._bans.settle(survey, now)
            self._failsafe.tidy()
            self._keeping.sweep()
            if self._derived.rebuild(None if survey is None else self._bans.lengths(survey)):
                self._disagreed("the programs did not look for some rules, bans or the failsafe")
            return expired

    def _surveyed(self, now: int, revision: int) -> BanSurvey | None:
        """Look through all bans; with very many not at each sweep, but for a thousandth of a CPU. A full table forgets
        those that have ended by itself."""
        if time.monotonic() < self._survey_due:
            return None
        before = time.thread_time()
        survey = self._bans.survey(now, revision)
        took = time.thread_time() - before
        if took > _QUICK_SURVEY:
            self._survey_due = time.monotonic() + took * _SURVEY_SHARE
        return survey

    def tell_of_disagreements(self, tell: Callable[[str], None]) -> None:
        """Call ``tell`` with what a sweep has found not to be what it was to be, and has put in order."""
        self._disagreed = tell

    def rebuild(self) -> None:
        """Derive anew, from the entries, what the programs are told of them: a writer may have been killed half way."""
        with self._exclusive():
            survey = self._bans.survey(boottime_ns(), self.ban_revision)
            self._derived.rebuild(self._bans.lengths(survey))

    # -- carrying it -------------------------------------------------------------------------------------------

    def image(self) -> PolicyImage:
        """Return the whole policy that lasts, but bans."""
        return self._keeping.image()

    def put_image(self, image: PolicyImage, bans: Iterable[BanBlock] = ()) -> None:
        """Put a whole policy into an empty place that nobody else knows yet: no lock is taken, nothing is noted.

        Raises :class:`PolicyError` for what does not fit.
        """
        now = boottime_ns()
        runtime = [one for one in image.runtime if one.rule.expires is None or now < one.rule.expires]
        self._tables.check_size(len(image.ruleset.rules), len(runtime))
        self._failsafe.replace(image.failsafe, image.failsafe_ports)
        self._loaded.install(compile_rules(image.ruleset), self._room.ids_for(image.ruleset))
        for one in runtime:
            self._room.place(one.rule, one.created)
        for block in bans:
            if self._bans.put_all(block) < len(block):
                raise self._bans.too_many(block.network(0))
        self._tables.put_gate(replace(self._tables.gate(), revision=image.revision))

    def _refuse_from_the_future(self) -> None:
        """A revision that no policy has is not what is written to disk."""
        if self._tables.gate().revision >= LAST_REVISION:
            self._refuse_if_unsealed()

    def _refuse_if_unsealed(self) -> None:
        """What is written down of a set is written with the settings and the failsafe that are in force."""
        if not self._tables.gate().is_sealed:
            raise PolicyError(
                "another program has written into the policy's record in the kernel: the server puts it in order "
                "within a minute, and so does its next start"
            )

    def _undo_trial(self) -> int:
        revision = self._loaded.roll_back()
        self._keeping.fall_behind()  # by a revision
        self._tidy()
        return revision

    def settle(self) -> None:
        """Note that a trial has ended by itself, if one has: the programs went back to the set before it at once."""
        if self._loaded.trial_is_over:
            with self._exclusive():
                self._settle()

    def _settle(self) -> None:
        """If a trial has ended unconfirmed, make what the programs do by themselves final."""
        self._loaded.finish()
        if self._loaded.trial_is_over:
            ended = time.time() - (boottime_ns() - self._tables.gate().deadline) / 1e9
            self._changes.note_later(ended, "rollback", self._undo_trial(), reason="not confirmed in time")
            log.info("the set on trial was not confirmed in time: the one before it is in force again")

    def _tidy(self) -> None:
        """Forget rules that nothing refers to any more. What was done is done: if the kernel refuses, the next sweep
        does it."""
        try:
            self._room.free()
        except OSError as error:
            log.warning("rules that are no longer in force are not forgotten yet: %s", error)
