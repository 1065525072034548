"""Rules of a set that can never matter, whoever comes: told when it is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .compiler import CompiledSet
from .prefixes import IPNetwork
from .rule import Action

__all__ = ["futile_rules"]

_MOST_SOURCES = 1000
"""A rule with more is not looked at for the failsafe."""


def futile_rules(compiled: CompiledSet, failsafe: Sequence[IPNetwork]) -> list[str]:
    """Return in words which rules decide for nobody: at all of their networks another one of higher rank is certain to,
    or the failsafe lets in whom they would turn away."""
    reached = {index for index, _, _ in compiled.chain}
    found = []
    for index, rule in enumerate(compiled.ruleset.rules):
        if not len(rule.sources):
            continue
        if index not in reached:
            found.append(f"rule {rule.name} can never matter: for each of its networks another rule decides first")
        elif (
            rule.action is not Action.ALLOW
            and len(rule.sources) <= _MOST_SOURCES
            and all(_is_within(source, failsafe) for source in rule.sources)
        ):
            found.append(f"rule {rule.name} can never matter: the failsafe lets in all of its networks")
    return found


def _is_within(network: IPNetwork, others: Iterable[IPNetwork]) -> bool:
    return any(
        network.version == other.version and network.subnet_of(other)  # type: ignore[arg-type]
        for other in others
    )
