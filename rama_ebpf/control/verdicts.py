"""What the policy's verdicts are called in metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from ..policy.kernel_store import KernelStore
from ..policy.rule import Action

__all__ = ["MAX_NAMED_RULES", "OTHER", "Verdicts"]

MAX_NAMED_RULES: Final = 1000
"""Rules of the set that have a series of their own: the first ones, as it lists them."""
OTHER: Final = "other"
"""The series of all other rules: those of ``block`` and ``allow``, whose names hold addresses, and further ones."""


class Verdicts:
    """Counts verdicts that took effect. The number of series is bounded, no label is an address, and :data:`OTHER`
    never goes back, though rules come and go."""

    def __init__(self, store: KernelStore) -> None:
        self._store = store
        self._other: Counter[str] = Counter()

    def __call__(self) -> Mapping[tuple[str, str, str], int]:
        """Return the counts by (stage, rule, action)."""
        counts: Counter[tuple[str, str, str]] = Counter()
        by_action: Counter[str] = Counter()
        for (_, stage, action), count in self._store.counters.totals().items():
            if stage == "rule":
                by_action[action] += count
            else:
                counts[stage, "", action] += count
        for name, rule_action, hits in self._store.hits_of_set(MAX_NAMED_RULES):
            action = rule_action.name.lower()
            counts["rule", name, action] += hits
            by_action["allow" if rule_action is Action.LIMIT else action] -= hits
        for action, count in by_action.items():
            self._other[action] = max(self._other[action], count)
            if self._other[action]:
                counts["rule", OTHER, action] = self._other[action]
        return counts
