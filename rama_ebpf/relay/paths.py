"""What a relay is asked for, and what it answers: a pair of directions, or why there is none."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .direction import Direction
from .options import RelayKind

__all__ = ["Pair", "Paths", "Refusal"]


class Pair(NamedTuple):
    """The two sockets of a tunnel, and how many bytes have been moved before, up and down.

    ``with_unix`` if one of them is a Unix socket.
    """

    client: socket.socket
    upstream: socket.socket
    with_unix: bool = False
    delivered: tuple[int, int] = (0, 0)


class Paths(NamedTuple):
    """The directions that a relay has made, ``up`` to the upstream and ``down`` to the client.

    ``fallback`` says why they are not what was asked for, where the relay could do only a part of it. ``release``
    gives back what the relay holds for them, once the sockets are closed.
    """

    kind: RelayKind
    up: Direction
    down: Direction
    fallback: str = ""
    release: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a relay does not take a pair, which is as it was. ``final`` if it is no use to ask again for this one."""

    why: str
    final: bool = True
