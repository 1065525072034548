"""What a policy says about a connection attempt, found in its tables: the kernel programs' verdict in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..core.address import IPAddress, unmap
from .bans import Bans
from .failsafe import Failsafe
from .rule import Action, Settings, Stage, Verdict, boottime_ns
from .runtime_rules import RuntimeRules
from .stored import StoredRule

__all__ = ["Judgement"]


class _Rules(Protocol):
    def get(self, rule_id: int) -> StoredRule | None: ...


class _HasRules(Protocol):
    @property
    def rules(self) -> _Rules: ...


class _Set(Protocol):
    def settings(self) -> Settings: ...

    def chain(self, source: IPAddress) -> Sequence[tuple[int, int]]: ...


class Judgement:
    """Judges by failsafe, bans, both layers of rules, and the default, in this order."""

    def __init__(self, tables: _HasRules, loaded: _Set, runtime: RuntimeRules, bans: Bans, failsafe: Failsafe) -> None:
        self._tables = tables
        self._loaded = loaded
        self._runtime = runtime
        self._bans = bans
        self._failsafe = failsafe

    def verdict(self, source: IPAddress, port: int, now: int | None = None) -> Verdict:
        """Judge a connection attempt as the kernel would; rates are reported as within their limit."""
        now = boottime_ns() if now is None else now
        source = unmap(source)
        if self._failsafe.covers(source, port):
            return Verdict(Action.ALLOW, Stage.FAILSAFE)
        ban = self._bans.covering(source, now)
        if ban is not None:
            return Verdict(ban.action, Stage.BAN, "ban")
        dry: StoredRule | None = None
        for rule in self._applicable(source, port, now):
            if rule.dry_run:
                dry = dry or rule
                continue
            action = Action.ALLOW if rule.action is Action.LIMIT else rule.action
            return _with_dry(Verdict(action, Stage.RULE, rule.name), dry)
        return _with_dry(Verdict(self._loaded.settings().default, Stage.DEFAULT, "default"), dry)

    def _applicable(self, source: IPAddress, port: int, now: int) -> list[StoredRule]:
        """Return the rules of both layers that apply, the highest rank first."""
        found: list[tuple[int, int]] = [*self._runtime.matches(source, port), *self._loaded.chain(source)]
        ranked = []
        for length, rule_id in found:
            rule = self._tables.rules.get(rule_id)
            if rule is None or rule.port not in (None, port) or (rule.expires is not None and now >= rule.expires):
                continue
            ranked.append(((length, rule.order), rule))
        ranked.sort(key=lambda pair: pair[0], reverse=True)  # keeps the order of equals
        return [rule for _, rule in ranked]


def _with_dry(verdict: Verdict, dry: StoredRule | None) -> Verdict:
    if dry is None:
        return verdict
    return Verdict(verdict.action, verdict.stage, verdict.rule, dry.name, dry.action)
