"""The one place where a tunnel is put together: from the relay that it is to have to its directions.

A relay is a module of this package that is called as its :class:`~.options.RelayKind` is, and has a ``join``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Final

from ..core.socket_stream import SocketStream
from . import auto
from .choice import Choice
from .host import Join, RelayHost
from .options import RelayKind, TunnelLimits
from .paths import Pair, Paths, Refusal
from .tunnel import Tunnel

__all__ = ["assemble"]

_RELAYS: Final[Mapping[RelayKind, Join]] = {
    kind: importlib.import_module(f".{kind.value}", __package__).join for kind in RelayKind
}


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
            return auto.join_promotable(host, tunnel, pair)
        made = _RELAYS[choice.kind](host, tunnel, pair)
        if isinstance(made, Paths):
            return made
        return auto.join(host, tunnel, pair, fallback=_without(choice.kind, made))

    def promote(tunnel: Tunnel, pair: Pair) -> Paths | Refusal:
        if promotes_to is None:
            return Refusal(choice.why)
        made = _RELAYS[promotes_to](host, tunnel, pair)
        return Refusal(_without(promotes_to, made), made.final) if isinstance(made, Refusal) else made

    return Tunnel(host, client, upstream, limits, choice.why, begin=begin, promote=promote, forget=forget)


def _without(kind: RelayKind, refusal: Refusal) -> str:
    return f"no {kind.value}: {refusal.why}"
