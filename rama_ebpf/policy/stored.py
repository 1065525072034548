"""Rules as the tables of a store hold them, and why a change to them is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .prefixes import IPNetwork
from .rule import Action, PolicyError, Rule, SynLimit

__all__ = ["RuleRecord", "StaleRevision", "StaleSet", "StoredRule"]


class StaleRevision(PolicyError):
    """The policy was changed by somebody else meanwhile. ``revision`` is the one in force."""

    def __init__(self, expected: int, revision: int) -> None:
        super().__init__(
            f"the policy is at revision {revision}, not {expected}: look at what changed (policy diff, policy log) "
            f"and try again with --revision {revision}"
        )
        self.revision = revision


class StaleSet(PolicyError):
    """Another set was loaded meanwhile."""

    def __init__(self) -> None:
        super().__init__("another set was loaded meanwhile")


@dataclass(frozen=True, slots=True)
class StoredRule:
    """A rule as the tables hold it, without its sources. ``created`` is wall-clock nanoseconds."""

    id: int
    name: str
    action: Action
    port: int | None
    expires: int | None
    dry_run: bool
    limit: SynLimit | None
    reason: str
    origin: str
    created: int
    order: int
    """:attr:`.rule.Rule.order`"""

    @classmethod
    def of(cls, rule_id: int, rule: Rule, created: int) -> StoredRule:
        """Return a rule as it is held under an id."""
        facts = (rule.name, rule.action, rule.port, rule.expires, rule.dry_run, rule.limit, rule.reason, rule.origin)
        return cls(rule_id, *facts, created, rule.order)

    def decides(self, now: int) -> bool:
        """Whether it is neither a dry run nor over at ``now``."""
        return not self.dry_run and (self.expires is None or now < self.expires)

    def rule(self, source: IPNetwork) -> Rule:
        """Return it as a rule at run time for one source."""
        return Rule(
            self.name,
            (source,),
            self.action,
            self.port,
            self.expires,
            self.dry_run,
            self.limit,
            self.reason,
            self.origin,
        )


@dataclass(frozen=True, slots=True)
class RuleRecord:
    """A rule with its sources and its counters, for listings."""

    rule: StoredRule
    sources: Sequence[IPNetwork]
    hits: int
    dry_hits: int
