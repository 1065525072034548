"""Room for rules: a new one gets an id and a place, and what has ended makes room for it where there is none left."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

from .loaded_set import LoadedSet
from .prefixes import Prefixes
from .rule import PolicyError, Rule, RuleSet, boottime_ns
from .rule_ids import RuleIds
from .runtime_rules import RuntimeRules
from .tables import TableFull, Tables

__all__ = ["RuleRoom"]

T = TypeVar("T")

_PORTION: Final = 4096


class RuleRoom:
    """Calls are made under the policy's lock. Raises :class:`.rule.PolicyError` where there is no room, not even that
    of what has ended; what is in force stays as it is then."""

    def __init__(self, tables: Tables, loaded: LoadedSet, runtime: RuntimeRules) -> None:
        self._tables = tables
        self._loaded = loaded
        self._runtime = runtime
        self._ids = RuleIds(tables)

    def check(self, rules: int) -> None:
        """Find out whether a set of so many rules fits beside the runtime layer."""
        now = boottime_ns()
        runtime = sum(not self._runtime.has_ended(rule_id, now) for _, rule_id in self._runtime.items())
        self._tables.check_size(rules, runtime)

    def place(self, rule: Rule, created: int) -> int:
        """Put a rule with one source into force in the runtime layer, and return its id."""
        network, port = rule.sources[0], rule.port or 0
        rule_id = self._claim(rule, created, replaces=self._runtime.get(network, port) is not None)
        self._with_room(lambda: self._runtime.put(network, port, rule_id), str(network), (rule_id,))
        return rule_id

    def portions(self, prefixes: Prefixes, port: int) -> Iterator[Prefixes]:
        """Yield those where no rule stands, then the others, a few thousand at a time."""
        former = self._runtime.ids_at(prefixes, port)
        yield from prefixes.chosen([was is None for was in former], len(former))
        yield from prefixes.chosen([was is not None for was in former], _PORTION)

    def forget(self, ids: Sequence[int]) -> None:
        """Forget rules that nothing refers to any more."""
        self._ids.forget(ids)

    def place_alike(
        self, prefixes: Prefixes, names: Sequence[str], model: Rule, created: int, free: Sequence[int] = ()
    ) -> list[int | None]:
        """Put many rules into force that differ from ``model`` by their source and name alone, all or none; return the
        ids that stood there. ``free`` are ids that are known to be."""
        port, what = model.port or 0, "a rule" if len(names) == 1 else f"{len(names)} rules"
        replaced = sum(was is not None for was in self._runtime.ids_at(prefixes, port))
        claim = partial(self._ids.claim_alike, names, model, created, replaced=replaced, free=free)
        ids = self._with_room(claim, what, ())
        return self._with_room(lambda: self._runtime.put_all(prefixes, port, ids), what, ids)

    def ids_for(self, ruleset: RuleSet) -> list[int]:
        """Return an id for each rule of a set that is to be put into force: the present one where it is unchanged."""
        loaded = zip(self._loaded.ruleset().rules, self._loaded.ids(), strict=True)
        present = {replace(rule, sources=()): rule_id for rule, rule_id in loaded}
        created = time.time_ns()
        known = [present.get(replace(rule, sources=())) for rule in ruleset.rules]
        ids: list[int] = []
        try:
            for rule, rule_id in zip(ruleset.rules, known, strict=True):
                ids.append(self._claim(rule, created, ids, replaces=True) if rule_id is None else rule_id)
        except PolicyError as error:
            raise PolicyError(
                f"{known.count(None)} rules are new or changed, also by name, and there is no room for them beside the "
                f"{len(present)} that they replace: load them in parts, or restart with a larger --max-rules"
            ) from error
        return ids

    def free(self, keep: Collection[int] = ()) -> int:
        """Forget the rules that nothing refers to, but for the ids of ``keep``; return how many."""
        used = {rule_id for _, rule_id in self._runtime.items()}
        used.update(keep)
        used.update(self._loaded.ids_of_both())
        return self._ids.free(used)

    def _claim(self, rule: Rule, created: int, keep: Collection[int] = (), *, replaces: bool = False) -> int:
        def claim() -> int:
            return self._ids.claim(rule, created, replaces=replaces)

        return self._with_room(claim, f"rule {rule.name}", keep)

    def _with_room(self, attempt: Callable[[], T], what: str, keep: Collection[int]) -> T:
        try:
            return attempt()
        except TableFull:
            if not self._runtime.drop_ended(boottime_ns()) + self.free(keep):
                raise self._tables.too_many_rules(what) from None
        try:
            return attempt()
        except TableFull as error:
            raise self._tables.too_many_rules(what) from error
