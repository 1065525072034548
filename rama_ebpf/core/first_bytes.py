"""Judging a connection by its first bytes, before anything is made for it.

A service that can tell from a client's first bytes that it will serve nothing says so beforehand, by an attribute
``first_bytes``; :func:`~rama_ebpf.core.service.stack` hands it outwards through the layers that have a method of that
name. A server that finds it asks it in the callback that has read the bytes: garbage then costs no task, no exception
and no log line. What a service and its layers would have done for such a client, the judge and the watchers do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from .address import SocketAddress

__all__ = ["FirstBytes", "Refused", "Watcher"]


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a client is refused: the ``kind`` of the error that its service would have raised, its ``text`` for people,
    what the client is to be told (``wire``), and whether the connection ends by a reset or in order."""

    kind: str
    text: str
    wire: bytes = b""
    reset: bool = False


Watcher = Callable[[Refused, SocketAddress | None, str | None, int], "asyncio.Future[None] | None"]
"""Told of a refusal, the client's address, the listener's name, and how many bytes had come. The connection ends when
the future that it returns is done; at once without one."""


@dataclass(frozen=True, slots=True)
class FirstBytes:
    """``judge`` is shown a connection's first bytes, b"" if it has ended without any. None: its service is to see it.

    ``watchers`` are told of each refusal, the innermost first.
    """

    judge: Callable[[bytes], Refused | None]
    watchers: tuple[Watcher, ...] = ()

    def watched(self, watcher: Watcher) -> FirstBytes:
        """Return the same with another watcher around."""
        return FirstBytes(self.judge, (*self.watchers, watcher))
