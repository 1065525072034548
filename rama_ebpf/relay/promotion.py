"""Tunnels that begin in userspace and go to the kernel's relay when they have shown that they talk."""

from __future__ import annotations

import socket
from typing import Final

from .direction import DirectionHost, DirectionOwner
from .splice import SpliceDirection

__all__ = ["MESSAGES", "SMALL", "PromotableDirection"]

MESSAGES: Final = 16
"""So many times in a row the source has something to say: then the tunnel is looked at."""
SMALL: Final = 4 * 1024
"""Bytes that these messages may have on the average."""


class PromotableDirection(SpliceDirection):
    """Relays as :class:`~.splice.SpliceDirection` does with ``adaptive``, and asks for its tunnel's promotion when it
    has moved :data:`MESSAGES` messages of at most :data:`SMALL` bytes on the average."""

    __slots__ = ("_before", "_messages")

    def __init__(
        self,
        host: DirectionHost,
        owner: DirectionOwner,
        source: socket.socket,
        sink: socket.socket,
        *,
        read_all: bool = False,
    ) -> None:
        super().__init__(host, owner, source, sink, adaptive=True, read_all=read_all)
        self._messages = 0
        self._before = 0

    def readable(self) -> None:
        if not (self.blocked or self.waits_its_turn) and self.outcome is None:
            self._move(self._read_all)
        self._messages += 1
        if self._messages >= MESSAGES:
            moved, self._before, self._messages = self.delivered - self._before, self.delivered, 0
            if moved <= MESSAGES * SMALL:
                self.owner.promote()
