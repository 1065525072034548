"""The one place where a tunnel gets its directions: from the relay that it is to have.

A relay is a module of this package that is called as its :class:`~.options.RelayKind` is, and has a ``join``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Final

from . import auto
from .choice import Choice
from .direction import DirectionOwner
from .host import Join, RelayHost
from .options import RelayKind
from .paths import Pair, Paths, Refusal

__all__ = ["begin", "promote"]

_RELAYS: Final[Mapping[RelayKind, Join]] = {
    kind: importlib.import_module(f".{kind.value}", __package__).join for kind in RelayKind
}


def begin(host: RelayHost, choice: Choice, owner: DirectionOwner, pair: Pair) -> Paths:
    """Return the directions of ``choice``, or those of ``auto`` where that relay cannot be had."""
    if choice.promotes_to is not None:
        return auto.join_promotable(host, owner, pair)
    made = _RELAYS[choice.kind](host, owner, pair)
    if isinstance(made, Paths):
        return made
    return auto.join(host, owner, pair, fallback=_without(choice.kind, made))


def promote(host: RelayHost, choice: Choice, owner: DirectionOwner, pair: Pair) -> Paths | Refusal:
    """Return the better directions that ``choice`` promises, or say why there are none."""
    if choice.promotes_to is None:
        return Refusal(choice.why)
    made = _RELAYS[choice.promotes_to](host, owner, pair)
    return Refusal(_without(choice.promotes_to, made), made.final) if isinstance(made, Refusal) else made


def _without(kind: RelayKind, refusal: Refusal) -> str:
    return f"no {kind.value}: {refusal.why}"
