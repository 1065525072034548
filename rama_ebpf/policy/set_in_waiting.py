"""A compiled set that is not in force, as the judgement sees it: for who wants to know what it would decide."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from ..core.address import IPAddress
from ..kernel.gate_state import SetHead
from .compiler import CompiledSet
from .local_tables import LocalSet
from .rule import Settings
from .stored import StoredRule

__all__ = ["SetInWaiting"]

_NOT_OF_TABLES = 1 << 32
"""What its rules' ids have more than any id in the tables."""


class _Rules(Protocol):
    def get(self, rule_id: int) -> StoredRule | None: ...


class SetInWaiting:
    """The set, over the tables' other rules, which those at run time are."""

    def __init__(self, compiled: CompiledSet, others: _Rules) -> None:
        created = time.time_ns()
        rules = compiled.ruleset.rules
        self._stored = [StoredRule.of(_NOT_OF_TABLES + index, rule, created) for index, rule in enumerate(rules)]
        self._set = LocalSet(compiled, range(len(rules)), 0)
        self._settings = compiled.ruleset.settings
        self._others = others

    @property
    def rules(self) -> SetInWaiting:
        """Its rules and all others by id."""
        return self

    def get(self, rule_id: int) -> StoredRule | None:
        """Return a rule, of the set or at run time."""
        if rule_id < _NOT_OF_TABLES:
            return self._others.get(rule_id)
        return self._stored[rule_id - _NOT_OF_TABLES]

    def settings(self) -> Settings:
        """Return its settings."""
        return self._settings

    def chain(self, source: IPAddress) -> Sequence[tuple[int, int]]:
        """Return (prefix length, rule id) of the rules of the set that may decide, in their order."""
        return [(length, _NOT_OF_TABLES + index) for length, index in self._set.chain(SetHead(), source)]
