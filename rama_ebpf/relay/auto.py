"""The relay that chooses for itself: copying, splicing once reads are large, and the kernel's where it may."""

from __future__ import annotations

from .direction import DirectionOwner
from .host import RelayHost
from .options import RelayKind
from .paths import Pair, Paths
from .promotion import PromotableDirection
from .splice import SpliceDirection

__all__ = ["join", "join_promotable"]


def join(host: RelayHost, owner: DirectionOwner, pair: Pair, *, fallback: str = "") -> Paths:
    """Make directions that copy small messages and splice large ones: what a tunnel gets where nothing else can be had,
    for which ``fallback`` is the reason."""
    return Paths(
        RelayKind.AUTO,
        SpliceDirection(host, owner, pair.client, pair.upstream, adaptive=True, read_all=pair.with_unix),
        SpliceDirection(host, owner, pair.upstream, pair.client, adaptive=True, read_all=pair.with_unix),
        fallback,
    )


def join_promotable(host: RelayHost, owner: DirectionOwner, pair: Pair) -> Paths:
    """As :func:`join`, for a tunnel that another relay takes over once it has shown that it talks."""
    return Paths(
        RelayKind.AUTO,
        PromotableDirection(host, owner, pair.client, pair.upstream, read_all=pair.with_unix),
        PromotableDirection(host, owner, pair.upstream, pair.client, read_all=pair.with_unix),
    )
