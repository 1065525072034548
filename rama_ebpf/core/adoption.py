"""Connections that a process has not accepted itself: their bytes move without it, and it only accounts for them.

A layer that counts, limits or logs connections has a method ``adopt``, as it has ``enter`` for those that are served in
callbacks (:mod:`.at_once`); :func:`~rama_ebpf.core.service.stack` hands it outwards. Whatever a layer would refuse is
past: the connection is counted all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .address import SocketAddress
from .shortcut import shortcut_of
from .stream import Stream

if TYPE_CHECKING:
    from .at_once import Entered

__all__ = ["Adopt", "AdoptedStream", "adopts_of", "with_layer"]

Adopt = Callable[["AdoptedStream"], "Entered"]


class AdoptedStream(Stream):
    """What stands for such a connection: its extensions, addresses and counters. There is nothing to read or write.

    ``began`` is when it was established, by CLOCK_MONOTONIC in seconds."""

    __slots__ = ("_local", "_peer", "began")

    def __init__(self, peer: SocketAddress | None, local: SocketAddress | None, began: float) -> None:
        super().__init__()
        self._peer = peer
        self._local = local
        self.began = began

    async def _receive(self, max_bytes: int) -> bytes:
        return b""

    async def write(self, *chunks: bytes | bytearray | memoryview) -> None:
        raise ConnectionAbortedError("the connection is elsewhere")

    async def write_eof(self) -> None:
        """Does nothing."""

    async def close(self) -> None:
        """Does nothing."""

    def abort(self) -> None:
        """Does nothing."""

    @property
    def peer(self) -> SocketAddress | None:
        return self._peer

    @property
    def local(self) -> SocketAddress | None:
        return self._local


def adopts_of(service: object) -> tuple[Adopt, ...]:
    """Return how the layers around a service adopt a connection, the outermost first."""
    found = getattr(service, "adopts", ())
    return found if isinstance(found, tuple) else ()


def with_layer(layer: object, inside: tuple[Adopt, ...]) -> tuple[Adopt, ...]:
    """Return the same for what ``layer`` has made around that service."""
    adopt: Adopt | None = shortcut_of(layer, "adopt")
    return inside if adopt is None else (adopt, *inside)
