"""Reading a BPF ring buffer through shared memory.

Reference: the kernel's ``Documentation/bpf/ringbuf.rst`` and ``kernel/bpf/ringbuf.c``. The positions are 64-bit words
that are read in one piece; the order of the reads is that of x86-64, and on other machines that of an interpreter,
which takes far longer between two reads than a CPU holds them back.
"""

from __future__ import annotations

import mmap
import struct
from typing import Final

from . import bpf

__all__ = ["RingBuffer"]

_BUSY, _DISCARDED = 1 << 31, 1 << 30
_HEADER: Final = struct.Struct("=II")


class RingBuffer:
    """The one consumer of a ring buffer map. ``fd`` stays the caller's, and is readable when there are records."""

    def __init__(self, fd: int) -> None:
        page = mmap.PAGESIZE
        self.fd = fd
        self._size = bpf.map_info(fd).max_entries
        # The consumer's page is ours to write. The producer's and the data, mapped twice in a row, may only be read.
        self._consumer_memory = mmap.mmap(fd, page)
        self._producer_memory = mmap.mmap(fd, page + 2 * self._size, prot=mmap.PROT_READ, offset=page)
        self._consumer = memoryview(self._consumer_memory).cast("Q")
        view = memoryview(self._producer_memory)
        self._producer = view[:page].cast("Q")
        self._data = view[page:]
        self._views = (self._data, self._producer, view, self._consumer)

    def read(self, most: int) -> list[bytes]:
        """Take up to ``most`` records; none if there are none."""
        records: list[bytes] = []
        position, end = self._consumer[0], self._producer[0]
        while position < end and len(records) < most:
            at = position & (self._size - 1)
            length, _ = _HEADER.unpack_from(self._data, at)
            if length & _BUSY:  # reserved, not written yet
                break
            size = length & ~_DISCARDED
            if not length & _DISCARDED:
                records.append(bytes(self._data[at + _HEADER.size : at + _HEADER.size + size]))
            position += (_HEADER.size + size + 7) & ~7
            self._consumer[0] = position
        return records

    def close(self) -> None:
        """Unmap the memory."""
        for view in self._views:
            view.release()
        self._producer_memory.close()
        self._consumer_memory.close()
