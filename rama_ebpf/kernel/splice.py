"""The maps and the program of the relay in the kernel: how they are made, shared with workers, and read.

One process with privileges makes them and hands their descriptors to the workers, which need no privilege to use
them: sockets are put into a map by its descriptor, and the directions are shared memory. Each worker has a share of
the directions and a ring of its own.
Nothing stays pinned: with the last descriptor the kernel frees all of it.

The layout is that of ``bpf/splice.h``.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from . import bpf
from .abi import source_dir
from .bpf import AttachType, MapFlags, MapType
from .btf import member_offsets
from .bytecode import Program
from .compile import Unit, amalgamate
from .programs import load_programs

__all__ = ["ARMED", "BROKEN", "DirectionSlot", "Directions", "EventRing", "SpliceMaps"]

SYNCED, ARMED, BROKEN = 1, 2, 4

_DIRECTION_SIZE: Final = 128
_SK_SKB: Final = 14  # enum bpf_prog_type
_RECORD: Final = struct.Struct("=II")
_RING_BUSY, _RING_DISCARDED = 1 << 31, 1 << 30
_NEVER: Final = (1 << 64) - 1


class SpliceMaps:
    """The descriptors of the relay's maps, by name: ``slots``, ``directions``, ``relayed``, ``ring0``, ``ring1``, …"""

    def __init__(self, fds: dict[str, int]) -> None:
        self.fds = fds

    @classmethod
    def create(cls, shares: int, tunnels: int) -> SpliceMaps:
        """Make the maps for ``tunnels`` tunnels at once in each of ``shares`` shares. Raises OSError."""
        directions = 2 * shares * tunnels
        maps = cls({})
        try:
            fds = maps.fds
            fds["slots"] = bpf.map_create(
                MapType.HASH, 8, 4, directions, flags=MapFlags.NO_PREALLOC, name="relay_slots"
            )
            fds["directions"] = bpf.map_create(
                MapType.ARRAY, 4, _DIRECTION_SIZE, directions, flags=MapFlags.MMAPABLE, name="relay_dirs"
            )
            fds["relayed"] = bpf.map_create(MapType.SOCKHASH, 4, 8, directions, name="relay_socks")
            for number in range(shares):
                # One record a direction at a time, and room for one that says that it is broken.
                fds[f"ring{number}"] = bpf.map_create(
                    MapType.RINGBUF, 0, 0, _ring_size(2 * tunnels * 32), name="relay_ring"
                )
        except BaseException:
            maps.close()
            raise
        return maps

    @classmethod
    def load(
        cls, shares: int, tunnels: int, *, kernel_headers: Path | None = None, sources: Path | None = None
    ) -> SpliceMaps:
        """Make the maps and attach the program: :meth:`create` and :meth:`attach`."""
        maps = cls.create(shares, tunnels)
        try:
            maps.attach(kernel_headers=kernel_headers, sources=sources)
        except BaseException:
            maps.close()
            raise
        return maps

    def attach(self, *, kernel_headers: Path | None = None, sources: Path | None = None) -> None:
        """Compile and load the program from the directory ``sources``, and attach it.

        Raises OSError, :class:`~.compile.CompileError`, or :class:`~.btf.BtfUnavailable`.
        """
        offsets = member_offsets(
            [
                ("tcp_sock", "bytes_received"),
                ("tcp_sock", "copied_seq"),
                ("tcp_sock", "rcv_nxt"),
                ("tcp_sock", "snd_una"),
                ("tcp_sock", "write_seq"),
                ("sk_buff", "cb"),
                ("tcp_skb_cb", "seq"),
            ]
        )
        cflags = [
            f"-DOFFSET_{name.upper()}={offset}" for (type_, name), offset in offsets.items() if type_ == "tcp_sock"
        ]
        cflags.append(f"-DOFFSET_SKB_SEQ={offsets['sk_buff', 'cb'] + offsets['tcp_skb_cb', 'seq']}")
        fds = self.fds
        rings = [fd for name, fd in fds.items() if name.startswith("ring")]
        outer = bpf.map_create(MapType.ARRAY_OF_MAPS, 4, 4, len(rings), inner_fd=rings[0], name="relay_rings")
        try:
            for number, ring in enumerate(rings):
                bpf.map_update(outer, number.to_bytes(4, sys.byteorder), ring.to_bytes(4, sys.byteorder))
            pinned = {name: fds[name] for name in ("slots", "directions", "relayed")} | {"rings": outer}
            source = amalgamate((sources or source_dir()) / "splice.c")
            verdict = Program("relay_verdict", _SK_SKB, AttachType.SK_SKB_VERDICT)
            unit = Unit(source, (verdict,), tuple(cflags), kernel_headers)
            program = load_programs(unit, pinned)[verdict.name]
        finally:
            os.close(outer)
        try:
            bpf.prog_attach(program, fds["relayed"], AttachType.SK_SKB_VERDICT)
        finally:
            os.close(program)

    def close(self) -> None:
        """Close the descriptors."""
        while self.fds:
            os.close(self.fds.popitem()[1])


def _ring_size(least: int) -> int:
    size = mmap.PAGESIZE
    while size < least:
        size *= 2
    return size


class DirectionSlot:
    """One ``struct direction`` in shared memory. Every read is of the kernel's current value."""

    __slots__ = ("_i", "_q", "_u32", "_u64", "index")

    def __init__(self, index: int, u64: memoryview, u32: memoryview) -> None:
        self.index = index
        self._u64, self._q = u64, index * (_DIRECTION_SIZE // 8)
        self._u32, self._i = u32, index * (_DIRECTION_SIZE // 4)

    @property
    def redirected(self) -> int:
        """Bytes that the kernel has moved to the sink."""
        return int(self._u64[self._q])

    @property
    def passed(self) -> int:
        """Bytes that the kernel has left to the source's own reader."""
        return int(self._u64[self._q + 1])

    @property
    def before(self) -> int:
        """Bytes that were read from the source before; known once a byte has come."""
        return int(self._u64[self._q + 3])

    @property
    def state(self) -> int:
        """:data:`SYNCED`, :data:`ARMED` and :data:`BROKEN`, or-ed."""
        return int(self._u32[self._i + 12])

    @property
    def spills(self) -> int:
        """How often the sink did not take the bytes, and userspace had to."""
        return int(self._u32[self._i + 13])

    @property
    def cookie(self) -> int:
        return int(self._u64[self._q + 8])

    def start(self, cookie: int, ring: int, credit: int) -> None:
        """Begin a new direction: it passes bytes, and is watched."""
        self._u64[self._q : self._q + _DIRECTION_SIZE // 8] = _BLANK
        self._u64[self._q + 8] = cookie
        self._u64[self._q + 9] = _NEVER
        self._u32[self._i + 20] = 1
        self._u32[self._i + 21] = ring
        self._u32[self._i + 22] = credit

    def resume_at(self, passed: int) -> None:
        """Let the kernel take over when exactly so many bytes have passed."""
        self._u64[self._q + 9] = passed

    def watch(self, watching: bool) -> None:
        """Say whether userspace polls the source, so that it need not be told of bytes that pass."""
        self._u32[self._i + 20] = watching

    def clear(self) -> None:
        """Forget the direction."""
        self._u64[self._q : self._q + _DIRECTION_SIZE // 8] = _BLANK


_BLANK: Final = memoryview(bytes(_DIRECTION_SIZE)).cast("Q")


class Directions:
    """The shared memory of all directions."""

    def __init__(self, fd: int) -> None:
        self.count = bpf.map_info(fd).max_entries
        self._memory = mmap.mmap(fd, self.count * _DIRECTION_SIZE)
        self._u64 = memoryview(self._memory).cast("Q")
        self._u32 = memoryview(self._memory).cast("I")

    def __getitem__(self, index: int) -> DirectionSlot:
        return DirectionSlot(index, self._u64, self._u32)


class EventRing:
    """A BPF ring buffer of slot indexes, read in place. Poll ``fd`` for EPOLLIN.

    Reference: ``Documentation/bpf/ringbuf.rst``.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        size = bpf.map_info(fd).max_entries
        self._mask: Final = size - 1
        page = mmap.PAGESIZE
        self._consumer = mmap.mmap(fd, page)
        # The data is mapped twice in a row, so that no record is ever cut in two.
        self._producer = mmap.mmap(fd, page + 2 * size, prot=mmap.PROT_READ, offset=page)
        self._consumed = memoryview(self._consumer).cast("Q")
        self._produced = memoryview(self._producer).cast("Q")

    def __iter__(self) -> Iterator[int]:
        """Take and yield what there is."""
        position = self._consumed[0]
        while position < self._produced[0]:
            offset = mmap.PAGESIZE + (position & self._mask)
            length, _ = _RECORD.unpack_from(self._producer, offset)
            if length & _RING_BUSY:
                return
            slot = int.from_bytes(self._producer[offset + 8 : offset + 12], sys.byteorder)
            position += (8 + (length & ~_RING_DISCARDED) + 7) & ~7
            self._consumed[0] = position
            if not length & _RING_DISCARDED:
                yield slot
