"""Putting something between a tunnel's two ends: what looks into tunnels, whichever protocol opened them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ..core.stream import Stream
from .report import TunnelReport

__all__ = ["Move", "TunnelHandler"]

Move = Callable[[Stream, Stream], Awaitable[TunnelReport]]
"""Moves the bytes between a client and an upstream, as :func:`rama_ebpf.relay.relay` does where nothing is between."""


@dataclass(frozen=True, slots=True)
class TunnelHandler:
    """Gets the tunnels of the clients whose extensions hold it, with both streams as they are.

    ``handle`` is called with the client, the upstream and the :data:`Move` that relays them. It returns what that
    returns, for these two streams or for others on top of them, or refuses by raising; then both streams are
    aborted.
    """

    handle: Callable[[Stream, Stream, Move], Awaitable[TunnelReport]]
