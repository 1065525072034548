"""What is known of a tunnel when it has ended."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

__all__ = ["INSTEAD", "CloseReason", "DirectionOutcome", "TunnelReport"]

INSTEAD: Final = "no "
"""What the reason for a relay begins with where another one was wanted: ``no wire: ECN``."""


class CloseReason(enum.Enum):
    """Why a tunnel ended."""

    __hash__ = object.__hash__  # members are single objects; Enum's own hash is a call of Python for each look-up

    EOF = "eof"
    """Both sides ended their stream in order; every byte was delivered."""
    CLIENT_RESET = "client_reset"
    UPSTREAM_RESET = "upstream_reset"
    IDLE_TIMEOUT = "idle_timeout"
    TOTAL_TIMEOUT = "total_timeout"
    CUT = "cut"
    """Cancelled from outside: a drain deadline, a kill, a layer's limit."""
    LEFT = "left"
    """It goes on without this process: see `survive` in docs/wire.md."""
    INTEGRITY = "integrity"
    """The kernel path could not prove that every byte was right; both sides were reset."""
    ERROR = "error"


class DirectionOutcome(enum.Enum):
    """How one direction of a tunnel ended."""

    EOF = "eof"
    """The source ended its stream and the sink was told so after the last byte."""
    SOURCE_LOST = "source_lost"
    """Reading failed: the source reset the connection or is gone."""
    SINK_LOST = "sink_lost"
    """Writing failed: the sink reset the connection or is gone."""
    CUT = "cut"
    """The tunnel ended for another reason while this direction was open."""


@dataclass(frozen=True, slots=True)
class TunnelReport:
    """How a tunnel went: ``to_upstream`` and ``to_client`` are bytes delivered, ``age`` is seconds, ``relay`` which
    way the bytes moved and ``why`` that one was chosen. ``upward`` and ``downward`` say how each direction ended,
    ``spills`` how often the kernel handed a direction back to userspace."""

    reason: CloseReason
    to_upstream: int
    to_client: int
    age: float
    relay: str
    why: str = ""
    upward: DirectionOutcome = DirectionOutcome.EOF
    downward: DirectionOutcome = DirectionOutcome.EOF
    spills: int = 0
