"""A whole policy but its bans, as a value: what is kept on disk, and what is carried into other maps."""

from __future__ import annotations

from dataclasses import dataclass

from .prefixes import IPNetwork
from .rule import Rule, RuleSet

__all__ = ["PolicyImage", "RuntimeRule"]


@dataclass(frozen=True, slots=True)
class RuntimeRule:
    """A rule of the runtime layer, which has one source. ``created`` is wall-clock nanoseconds."""

    rule: Rule
    created: int

    @property
    def place(self) -> tuple[IPNetwork, int]:
        """Its prefix, and its port or 0."""
        return self.rule.sources[0], self.rule.port or 0


@dataclass(frozen=True, slots=True)
class PolicyImage:
    """``ruleset`` is the set that lasts, with its settings: of two while one is on trial, the one before it."""

    revision: int
    ruleset: RuleSet
    failsafe: tuple[IPNetwork, ...] = ()
    failsafe_ports: tuple[int, ...] = ()
    runtime: tuple[RuntimeRule, ...] = ()

    def described(self) -> str:
        """Say in a line how much there is."""
        settings = self.ruleset.settings
        return (
            f"revision {self.revision}: default {settings.default.name.lower()}, a set of {len(self.ruleset.rules)} "
            f"rules, {len(self.runtime)} rules at run time, {len(self.failsafe)} failsafe networks"
        )
