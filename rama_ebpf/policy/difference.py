"""What one set of rules has that another has not."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .prefixes import Prefixes
from .rule import Feed, Rule, RuleSet, SynLimit

__all__ = ["difference"]

_EXAMPLES = 10
_APART = ("sources", "expires", "at")
"""Attributes that are compared in their own way, or not at all."""


def difference(old: RuleSet, new: RuleSet) -> dict[str, object]:
    """Return, as JSON values, what changes from ``old`` to ``new``: rules by name, their attributes, their sources,
    the settings, and whether rules of equal rank change places. ``same`` is true if nothing does."""
    before = {rule.name: rule for rule in old.rules}
    after = {rule.name: rule for rule in new.rules}
    changed = [row for name, rule in after.items() if name in before and (row := _changed(before[name], rule))]
    settings = {
        field.name: [_plain(getattr(old.settings, field.name)), _plain(getattr(new.settings, field.name))]
        for field in fields(old.settings)
        if not _same(getattr(old.settings, field.name), getattr(new.settings, field.name))
    }
    common = [name for name in after if name in before]
    result: dict[str, object] = {
        "added": [_described(after[name]) for name in after if name not in before],
        "removed": [_described(before[name]) for name in before if name not in after],
        "changed": changed,
        "settings": settings,
        "reordered": common != [name for name in before if name in after],
    }
    return {"same": not any(result.values()), **result}


def _described(rule: Rule) -> dict[str, object]:
    return {"name": rule.name, "action": rule.action.name.lower(), "sources": len(rule.sources)}


def _changed(old: Rule, new: Rule) -> dict[str, object]:
    """Return what differs, an empty dict if nothing does."""
    row: dict[str, object] = {
        field.name: [_plain(getattr(old, field.name)), _plain(getattr(new, field.name))]
        for field in fields(old)
        if field.name not in _APART and not _same(getattr(old, field.name), getattr(new, field.name))
    }
    if (old.expires is None) != (new.expires is None):
        row["expires"] = [old.expires is not None, new.expires is not None]
    added, removed = (
        [network for version in (4, 6) for network in _missing(one, other, version)]
        for one, other in ((new, old), (old, new))
    )
    if added or removed:
        row["sources"] = {
            "added": len(added),
            "removed": len(removed),
            "examples": [f"+{network}" for network in added[:_EXAMPLES]]
            + [f"-{network}" for network in removed[:_EXAMPLES]],
        }
    return {"name": new.name, **row} if row else {}


def _missing(rule: Rule, other: Rule, version: int) -> Prefixes:
    """Return the sources of one IP version that only ``rule`` has."""
    only = set(rule.packed(version)).difference(other.packed(version))
    return Prefixes(v4=only) if version == 4 else Prefixes(v6=only)


def _same(one: object, other: object) -> bool:
    """Whether two attributes mean the same: limits are kept as nanoseconds in the kernel, not as rates."""
    if isinstance(one, SynLimit) and isinstance(other, SynLimit):
        return (one.emission_ns, one.burst) == (other.emission_ns, other.burst)
    return one == other


def _plain(value: Any) -> object:
    if isinstance(value, SynLimit):
        return f"{value.rate:.6g}/s, burst {value.burst}"
    if isinstance(value, Feed):
        return value.source
    if value is None or isinstance(value, bool | str):
        return value
    name = getattr(value, "name", None)
    return name.lower() if isinstance(name, str) else str(value) if not isinstance(value, int | float) else value
