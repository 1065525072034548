"""The one place where a tunnel is put together: from the relay that it is to have to its directions.

A new relay is a module with its direction, a :class:`~.options.RelayKind`, and a line in :data:`_RELAYS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

from ..core.socket_stream import SocketStream
from .choice import Choice
from .direction import Direction, DirectionHost, DirectionOwner
from .options import RelayKind, TunnelLimits
from .paths import Pair, Paths, Refusal
from .promotion import PromotableDirection
from .sockmap import Sockmap
from .splice import SpliceDirection
from .tunnel import Tunnel

__all__ = ["RelayHost", "assemble"]


class RelayHost(DirectionHost, Protocol):
    """What relays need of the event loop that their tunnels live in."""

    @property
    def sockmap(self) -> Sockmap | None:
        """The kernel's relay, where there is one."""

    def want_sockmap(self) -> str:
        """Say that it is wanted; return why there is none."""


Join = Callable[[RelayHost, DirectionOwner, Pair], Paths | Refusal]
"""Make the directions of a pair whose bytes are the owner's, or say why not."""


def assemble(
    host: RelayHost,
    client: SocketStream,
    upstream: SocketStream,
    choice: Choice,
    limits: TunnelLimits,
    *,
    forget: Callable[[Tunnel], None],
) -> Tunnel:
    """Return a tunnel with the directions of ``choice``, or those of ``auto`` where that relay cannot be had.

    ``forget`` is called when it ends.
    """
    promotes_to = choice.promotes_to

    def begin(tunnel: Tunnel, pair: Pair) -> Paths:
        if promotes_to is not None:
            return _promotable(host, tunnel, pair)
        made = _RELAYS[choice.kind](host, tunnel, pair)
        if isinstance(made, Paths):
            return made
        return _adaptive(host, tunnel, pair, fallback=_without(choice.kind, made))

    def promote(tunnel: Tunnel, pair: Pair) -> Paths | Refusal:
        if promotes_to is None:
            return Refusal(choice.why)
        made = _RELAYS[promotes_to](host, tunnel, pair)
        return Refusal(_without(promotes_to, made), made.final) if isinstance(made, Refusal) else made

    return Tunnel(host, client, upstream, limits, choice.why, begin=begin, promote=promote, forget=forget)


def _without(kind: RelayKind, refusal: Refusal) -> str:
    return f"no {kind.value}: {refusal.why}"


def _copying(host: RelayHost, owner: DirectionOwner, pair: Pair) -> Paths:
    return Paths(
        RelayKind.COPY,
        Direction(host, owner, pair.client, pair.upstream, pair.delivered[0], read_all=pair.with_unix),
        Direction(host, owner, pair.upstream, pair.client, pair.delivered[1], read_all=pair.with_unix),
    )


def _splicing(host: RelayHost, owner: DirectionOwner, pair: Pair) -> Paths:
    return Paths(
        RelayKind.SPLICE,
        SpliceDirection(host, owner, pair.client, pair.upstream, adaptive=False, read_all=pair.with_unix),
        SpliceDirection(host, owner, pair.upstream, pair.client, adaptive=False, read_all=pair.with_unix),
    )


def _adaptive(host: RelayHost, owner: DirectionOwner, pair: Pair, *, fallback: str = "") -> Paths:
    return Paths(
        RelayKind.AUTO,
        SpliceDirection(host, owner, pair.client, pair.upstream, adaptive=True, read_all=pair.with_unix),
        SpliceDirection(host, owner, pair.upstream, pair.client, adaptive=True, read_all=pair.with_unix),
        fallback,
    )


def _promotable(host: RelayHost, owner: DirectionOwner, pair: Pair) -> Paths:
    return Paths(
        RelayKind.AUTO,
        PromotableDirection(host, owner, pair.client, pair.upstream, read_all=pair.with_unix),
        PromotableDirection(host, owner, pair.upstream, pair.client, read_all=pair.with_unix),
    )


def _by_sockmap(host: RelayHost, owner: DirectionOwner, pair: Pair) -> Paths | Refusal:
    sockmap = host.sockmap
    if sockmap is None:
        return Refusal(host.want_sockmap(), final=False)
    return sockmap.join(host, owner, pair)


_RELAYS: Final[Mapping[RelayKind, Join]] = {
    RelayKind.AUTO: _adaptive,
    RelayKind.COPY: _copying,
    RelayKind.SPLICE: _splicing,
    RelayKind.SOCKMAP: _by_sockmap,
}
