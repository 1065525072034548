"""Who may connect, and where to: rules, verdicts, and the stores that keep them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .egress import EgressPolicy as EgressPolicy
    from .kernel_store import KernelStore as KernelStore
    from .local import LocalStore as LocalStore
    from .prefixes import Prefixes as Prefixes
    from .rule import Action as Action
    from .rule import Ban as Ban
    from .rule import PolicyError as PolicyError
    from .rule import Rule as Rule
    from .rule import RuleSet as RuleSet
    from .rule import Settings as Settings
    from .rule import Stage as Stage
    from .rule import SynLimit as SynLimit
    from .rule import Verdict as Verdict
    from .rule import parse_network as parse_network
    from .rule import parse_ttl as parse_ttl
    from .store import PolicyStore as PolicyStore

__all__ = [
    "Action",
    "Ban",
    "EgressPolicy",
    "KernelStore",
    "LocalStore",
    "PolicyError",
    "PolicyStore",
    "Prefixes",
    "Rule",
    "RuleSet",
    "Settings",
    "Stage",
    "SynLimit",
    "Verdict",
    "parse_network",
    "parse_ttl",
]

_HOMES: Final = {
    ".egress": ("EgressPolicy",),
    ".kernel_store": ("KernelStore",),
    ".local": ("LocalStore",),
    ".prefixes": ("Prefixes",),
    ".rule": (
        "Action",
        "Ban",
        "PolicyError",
        "Rule",
        "RuleSet",
        "Settings",
        "Stage",
        "SynLimit",
        "Verdict",
        "parse_network",
        "parse_ttl",
    ),
    ".store": ("PolicyStore",),
}


def __getattr__(name: str) -> object:
    """Import a name when it is asked for: most programs need few."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
