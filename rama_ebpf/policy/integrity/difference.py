"""Something in the kernel that is not as it should be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..rule import Stage

__all__ = ["ANY_PORT", "BEFORE_RULES", "Difference", "slice_of"]

ANY_PORT: Final = 1080
"""The port to ask about where a rule has none."""
BEFORE_RULES: Final = (Stage.FAILSAFE, Stage.BAN)


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not as it should be. ``persists`` looks again, to be called under the policy's lock: a writer
    may have been at work. ``mend`` puts it in order, and takes the lock itself."""

    kind: str
    what: str
    persists: Callable[[], bool]
    mend: Callable[[], None]


def slice_of(known: int, least: int, rounds: int) -> int:
    """How many of so many entries are looked at in a call, for all to be within ``rounds`` calls."""
    return max(least, -(-known // rounds))
