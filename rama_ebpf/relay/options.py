"""How the tunnels of a listener are to be relayed, and what bounds them."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

__all__ = ["RelayKind", "RelayOptions", "TunnelLimits"]


class RelayKind(enum.Enum):
    """Which way a tunnel's bytes move, see docs/relay.md."""

    __hash__ = object.__hash__  # members are single objects; Enum's own hash is a call of Python for each look-up

    AUTO = "auto"
    SOCKMAP = "sockmap"
    SPLICE = "splice"
    COPY = "copy"
    WIRE = "wire"


@dataclass(frozen=True, slots=True)
class RelayOptions:
    """How tunnels of a listener are relayed: add one to a stream's extensions to choose.

    ``lossless`` names the networks in which ``auto`` may use sockmap besides this host: those where no segment is
    lost, so that peers never send overlapping retransmissions. With ``survive`` tunnels of the wire relay go on when
    this process, or the server, ends.
    """

    kind: RelayKind = RelayKind.AUTO
    lossless: tuple[IPv4Network | IPv6Network, ...] = ()
    survive: bool = False


@dataclass(frozen=True, slots=True)
class TunnelLimits:
    """Time-outs of an established tunnel in seconds; None means none.

    ``idle``: no byte in either direction for that long; it is checked coarsely, so a tunnel may live up to a quarter
    longer, never shorter. ``total``: age of the tunnel. Add one to a stream's extensions to bound the tunnel that it
    becomes.
    """

    idle: float | None = 300.0
    total: float | None = None
