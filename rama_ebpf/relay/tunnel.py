"""What a tunnel is bounded by and what is known of it when it ends."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["CloseReason", "TunnelLimits", "TunnelReport"]


class CloseReason(enum.Enum):
    """Why a tunnel ended."""

    EOF = "eof"
    """Both sides ended their stream in order; every byte was delivered."""
    CLIENT_RESET = "client_reset"
    UPSTREAM_RESET = "upstream_reset"
    IDLE_TIMEOUT = "idle_timeout"
    TOTAL_TIMEOUT = "total_timeout"
    CUT = "cut"
    """Cancelled from outside: a drain deadline, a kill, a layer's limit."""
    INTEGRITY = "integrity"
    """The kernel path could not prove that every byte was right; both sides were reset."""
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TunnelLimits:
    """Time-outs of an established tunnel in seconds; None means none.

    ``idle``: no byte in either direction for that long. ``total``: age of the tunnel. Add one to a stream's
    extensions to bound the tunnel that it becomes.
    """

    idle: float | None = 300.0
    total: float | None = None


@dataclass(frozen=True, slots=True)
class TunnelReport:
    """How a tunnel went: ``to_upstream`` and ``to_client`` are bytes delivered, ``age`` is seconds, ``relay`` which
    way the bytes moved and ``why`` that one was chosen."""

    reason: CloseReason
    to_upstream: int
    to_client: int
    age: float
    relay: str
    why: str = ""
