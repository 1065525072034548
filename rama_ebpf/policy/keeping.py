"""Keeping a policy on disk as it changes: at once where somebody waits for it, soon where the server acts by itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from ..kernel.clock import is_synchronized
from .failsafe import Failsafe
from .image import PolicyImage, RuntimeRule
from .kept import KeptPolicy
from .kept_history import PastSet
from .loaded_set import LoadedSet
from .prefixes import IPNetwork
from .rule import PolicyError, Rule, RuleSet, boottime_ns
from .runtime_rules import RuntimeRules
from .tables import Exclusive, Place, Tables

__all__ = ["Keeping"]

log = logging.getLogger(__name__)

_SAME: Final = 1_000_000_000
"""Ends that differ by less, in nanoseconds, are one: the clocks are not read at the same time."""


class Keeping:
    """Writes what is in force to a directory, if it was given one. Calls are made under the policy's lock, but for
    :meth:`catch_up`."""

    def __init__(self, tables: Tables, loaded: LoadedSet, runtime: RuntimeRules, failsafe: Failsafe) -> None:
        self._tables = tables
        self._loaded = loaded
        self._runtime = runtime
        self._failsafe = failsafe
        self._kept: KeptPolicy | None = None
        self._behind_set = self._behind_rules = False
        self._holds: bool | None = False
        """Whether rules on disk that are not in force may have to be: they are not written anew without them. None: it
        is to be found out."""
        self._said = ""

    def keep_in(self, directory: Path) -> None:
        """Keep the policy there from now on."""
        self._kept = KeptPolicy(directory)

    @property
    def rules_on_disk(self) -> Path | None:
        """Where the rules at run time are on disk; None if they are not, or not all of them."""
        return None if self._kept is None or self._behind_rules else self._kept.rules_path

    def places_on_disk(self) -> set[Place]:
        """Return where the disk has rules at run time, also such as have ended. Raises OSError."""
        kept = None if self._kept is None else self._kept.read_rules()
        return set() if kept is None else {*kept.rules, *kept.earlier, *kept.doubtful}

    def on_disk(self) -> PolicyImage | None:
        """Return what is kept; None if nothing is, or if it is not what was in force last. Raises OSError."""
        return None if self._kept is None or self._behind_set else self._kept.read()

    def image(self) -> PolicyImage:
        """Return the whole policy that lasts, but bans: rules that have ended are left out."""
        now, runtime = boottime_ns(), []
        for (network, _), rule_id in self._runtime.items():
            stored = self._tables.rules.get(rule_id)
            if stored is not None and (stored.expires is None or now < stored.expires):
                runtime.append(RuntimeRule(stored.rule(network), stored.created))
        return replace(self._image_of(self._loaded.lasting()), runtime=tuple(runtime))

    def added(self, added: Sequence[RuntimeRule], revision: int) -> int | None:
        """Write down rules at run time, all or none; return what :meth:`take_back` needs. Raises OSError."""
        return None if self._kept is None else self._kept.added(added, revision)

    def removed(self, network: IPNetwork, port: int, revision: int) -> int | None:
        """Write down that a rule was taken back; return what :meth:`take_back` needs. Raises OSError."""
        return None if self._kept is None else self._kept.removed(network, port, revision)

    def added_alike(self, texts: Sequence[str], model: Rule, created: int, revision: int) -> int | None:
        """:meth:`added` for rules that differ by their source, as text, alone."""
        return None if self._kept is None else self._kept.added_alike(texts, model, created, revision)

    def removed_all(self, texts: Sequence[str], port: int, revision: int) -> int | None:
        """:meth:`removed` for many."""
        return None if self._kept is None else self._kept.removed_all(texts, port, revision)

    def take_back(self, mark: int | None) -> None:
        """Forget what was written about a rule since."""
        if self._kept is not None and mark is not None:
            self._kept.take_back(mark)

    def loaded(self, ruleset: RuleSet, *, at_once: bool) -> None:
        """Write down the set that is for good from now on. Raises OSError if it is to be done ``at_once``."""
        if at_once and self._kept is not None:
            self._kept.write_set(
                self._image_of(ruleset)
            )  # if it raises, what is on disk is what will be in force again
        self._behind_set = True
        if at_once and self._kept is not None:
            self._kept.sync_set()
            self._behind_set = False

    def past_sets(self) -> list[PastSet]:
        """Return the sets that were in force before, the latest first. Raises OSError."""
        return [] if self._kept is None else self._kept.history.all()

    def past_set(self, revision: int) -> RuleSet:
        """Return one of them. Raises :class:`PolicyError` if it is not kept, or OSError."""
        if self._kept is None:
            raise PolicyError("no sets are kept")
        return self._kept.past_set(revision)

    def fall_behind(self, *, rules: bool = False) -> None:
        """Set, settings or failsafe have changed, and with ``rules`` perhaps all: :meth:`catch_up` writes that."""
        self._behind_set = True
        self._behind_rules |= rules

    def take_up(self) -> None:
        """Have everything written anew, but for rules of which some on disk are to be judged again."""
        self.fall_behind(rules=True)
        self._holds = None

    def judged_again(self) -> list[tuple[Place, RuntimeRule | None]]:
        """Return what is to be in force, where the wall clock, as it is now, says another thing than it did. Rules that
        were written in an earlier boot are judged by it. Raises OSError."""
        if self._kept is None or self._holds is False:
            return []
        changes: list[tuple[Place, RuntimeRule | None]] = []
        kept = self._kept.read_rules()
        self._holds = bool(kept.earlier) and not is_synchronized()
        self._behind_rules |= not self._holds
        for place, created in kept.earlier.items():
            wanted, rule_id = kept.rules.get(place), self._runtime.get(*place)
            present = None if rule_id is None else self._tables.rules.get(rule_id)
            if present is not None and present.created != created:
                continue  # another one, of this boot
            if wanted is None and present is not None and place not in kept.doubtful:
                changes.append((place, wanted))
            if wanted is not None and (present is None or _differ(present.expires, wanted.rule.expires)):
                changes.append((place, wanted))
        return changes

    def sweep(self) -> None:
        """Keep the rows of rules from growing for ever, and find out whether the disk is behind: a command may have
        been killed when its change was in force and not written down."""
        if self._kept is None:
            return
        try:
            behind = self._kept.revision() < self._tables.gate().revision
        except OSError as error:
            self._complain(error)
        else:
            if behind or self._kept.is_overgrown:
                self.fall_behind(rules=True)

    def catch_up(self, exclusive: Exclusive) -> None:
        """Write what the disk does not have yet, with the lock. A disk that refuses is logged as an error, once; the
        next call tries again."""
        if self._kept is None or not (self._behind_set or (self._behind_rules and not self._holds)):
            return
        try:
            with exclusive():
                if not self._tables.gate().is_sealed:
                    return  # somebody else has written it: what is on disk puts it in order
                if self._holds is None:
                    self._holds = not is_synchronized() and bool(self._kept.read_rules().earlier)
                if self._behind_rules and not self._holds:
                    self._kept.write(self.image())
                elif self._behind_set:
                    self._kept.write_set(self._image_of(self._loaded.lasting()))
                self._behind_set, self._behind_rules = False, self._behind_rules and self._holds
                self._said = ""
        except (PolicyError, OSError) as error:
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        if str(error) != self._said:
            self._said = str(error)
            log.error("the policy cannot be kept on disk, trying again: %s", error)

    def _image_of(self, ruleset: RuleSet) -> PolicyImage:
        revision = self._tables.gate().revision
        return PolicyImage(revision, ruleset, tuple(self._failsafe.networks()), self._failsafe.ports())


def _differ(one: int | None, other: int | None) -> bool:
    if one is None or other is None:
        return one is not other
    return abs(one - other) > _SAME
