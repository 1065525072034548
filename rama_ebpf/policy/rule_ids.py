"""The ids of rules: which are free, and which nobody needs any more."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Sequence

from .rule import Rule
from .tables import TableFull, Tables

__all__ = ["RuleIds"]


class RuleIds:
    """Gives rules their ids; id 0 is the default's. Calls are made under the policy's lock."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        # Where to look for a free id first: starting at 1, each process would walk past those of all the others.
        self._hint = random.randrange(1, tables.rules.ids)

    def claim(self, rule: Rule, created: int, *, replaces: bool = False) -> int:
        """Store a rule, which nobody refers to yet, and return its id. ``created`` is wall-clock nanoseconds.

        ``replaces``: another rule goes for it, so that it is not one more. Raises :class:`.tables.TableFull`.
        """
        rules = self._tables.rules
        hint = self._hint if self._hint < rules.ids else 1
        for tries, rule_id in enumerate(itertools.chain(range(hint, rules.ids), range(1, hint))):
            if not rules.add(rule_id, rule, created):
                continue
            if not replaces and rules.is_overfull(tries):
                rules.drop(rule_id)
                raise TableFull
            self._hint = rule_id + 1
            return rule_id
        raise TableFull

    def claim_alike(
        self, names: Sequence[str], model: Rule, created: int, *, replaced: int, free: Sequence[int] = ()
    ) -> list[int]:
        """:meth:`claim` for many rules that differ from ``model`` by their names alone, of which so many go for others;
        all or none. ``free`` are ids that are known to be."""
        rules, ids = self._tables.rules, list(free[: len(names)])
        if len(ids) < len(names) or replaced < len(names):
            known = rules.known()
            ids = list(itertools.islice((one for one in range(1, rules.ids) if one not in known), len(names)))
            if len(ids) < len(names) or not rules.have_room(len(known) - replaced + len(names)):
                raise TableFull
        try:
            rules.add_alike(ids, names, model, created)
        except (TableFull, OSError):
            rules.drop_all(ids)
            raise
        return ids

    def free(self, used: Collection[int]) -> int:
        """Forget the rules that nothing refers to, all but ``used``; return how many."""
        unused = self._tables.rules.known() - set(used)
        self.forget(unused)
        return len(unused)

    def forget(self, unused: Collection[int]) -> None:
        """Forget rules that nothing refers to any more."""
        if unused:
            self._tables.sets.wait_for_readers()  # one may have found a rule's id just before it was taken away
            self._tables.rules.drop_all(list(unused))
            self._hint = min(self._hint, *unused)
