"""Whether the pages, slots and chains of the set in force are what was loaded, by their checksum: a part at a time."""

from __future__ import annotations

import zlib
from typing import Final

from ...kernel.gate_state import GateState
from ..kernel_sets import KernelSet, read_bytes
from ..kernel_store import KernelStore
from ..rule import boottime_ns

__all__ = ["SetContent"]

_PARTS: Final = 3
"""In so many calls all is looked at, so what is written behind the place that was read is found in twice as many."""
_LEAST_BYTES: Final = 1 << 20


class SetContent:
    """A set's pages never change while it is in force, nor do its halves of slots and chains."""

    def __init__(self, store: KernelStore) -> None:
        self._store = store
        self._token = 0
        self._done = self._sum = 0

    def differs_so_far(self) -> bool:
        """Read on, and return whether all was read and its checksum is another one."""
        opened, gate, which = self._open()
        try:
            head = gate.sets[which]
            if not head.document_size:
                return False  # nothing is looked up in it
            if opened.token != self._token:
                self._token, self._done, self._sum = opened.token, 0, 0
            parts = opened.parts(head)
            total = sum(size for _, _, size in parts)
            end = min(total, self._done + max(_LEAST_BYTES, -(-total // _PARTS)))
            at = 0
            for fd, first, size in parts:
                low, high = max(self._done, at), min(end, at + size)
                if low < high:
                    self._sum = zlib.crc32(read_bytes(fd, first + low - at, high - low), self._sum)
                at += size
            self._done = end
            if end < total:
                return False
            found, self._done, self._sum = self._sum, 0, 0
            return found != head.checksum
        finally:
            opened.close()

    def differs(self) -> bool:
        """Read all, and return whether its checksum is another one; to be called under the policy's lock."""
        opened, gate, which = self._open()
        try:
            head = gate.sets[which]
            return bool(head.document_size) and opened.checksum(head) != head.checksum
        finally:
            opened.close()

    def _open(self) -> tuple[KernelSet, GateState, int]:
        gate = self._store.tables.gate()
        which = gate.in_force(boottime_ns())
        return self._store.tables.sets.open(which), gate, which
