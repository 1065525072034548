"""What a relay finds where it is asked to join a pair of sockets, and what it is then: one function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .direction import DirectionHost, DirectionOwner
from .paths import Pair, Paths, Refusal

__all__ = ["Join", "KernelRelay", "RelayHost"]


class KernelRelay(Protocol):
    """The kernel's relay, as far as a tunnel that is to have it is concerned."""

    def join(self, host: DirectionHost, owner: DirectionOwner, pair: Pair, /) -> Paths | Refusal: ...


class RelayHost(DirectionHost, Protocol):
    """What relays need of the event loop that their tunnels live in."""

    @property
    def sockmap(self) -> KernelRelay | None:
        """The kernel's relay, where there is one."""

    def want_sockmap(self) -> str:
        """Say that it is wanted; return why there is none."""


Join = Callable[[RelayHost, DirectionOwner, Pair], Paths | Refusal]
"""Make the directions of a pair whose bytes are the owner's, or say why not."""
