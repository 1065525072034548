"""What bounds a tunnel, how its bytes are to be moved, and what is known of it when it ends."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

__all__ = [
    "CloseReason",
    "DirectionEnd",
    "RelayKind",
    "RelayOptions",
    "TunnelLimits",
    "TunnelReport",
]


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


class DirectionEnd(enum.Enum):
    """How one direction of a tunnel ended."""

    EOF = "eof"
    """The source ended its stream and the sink was told so after the last byte."""
    SOURCE_LOST = "source_lost"
    """Reading failed: the source reset the connection or is gone."""
    SINK_LOST = "sink_lost"
    """Writing failed: the sink reset the connection or is gone."""
    CUT = "cut"
    """The tunnel ended for another reason while this direction was open."""


class RelayKind(enum.Enum):
    """Which way a tunnel's bytes move, see docs/relay.md."""

    AUTO = "auto"
    SOCKMAP = "sockmap"
    SPLICE = "splice"
    COPY = "copy"


@dataclass(frozen=True, slots=True)
class RelayOptions:
    """How tunnels of a listener are relayed: add one to a stream's extensions to choose.

    ``lossless`` names the networks in which ``auto`` may use sockmap besides this host: those where no segment is
    lost, so that peers never send overlapping retransmissions.
    """

    kind: RelayKind = RelayKind.AUTO
    lossless: tuple[IPv4Network | IPv6Network, ...] = ()


@dataclass(frozen=True, slots=True)
class TunnelLimits:
    """Time-outs of an established tunnel in seconds; None means none.

    ``idle``: no byte in either direction for that long; it is checked coarsely, so a tunnel may live up to a quarter
    longer, never shorter. ``total``: age of the tunnel. Add one to a stream's extensions to bound the tunnel that it
    becomes.
    """

    idle: float | None = 300.0
    total: float | None = None


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
    upward: DirectionEnd = DirectionEnd.EOF
    downward: DirectionEnd = DirectionEnd.EOF
    spills: int = 0
