"""The snapshot of bans: all of them as the kernel has them, so that a million are read and in force within a second.

A header, then blocks of up to 1,024 bans: a checksum, keys, values. All numbers are in the host's byte order. A block
that is damaged costs its bans and no others. Times are CLOCK_BOOTTIME nanoseconds of the boot that the header names;
the header says which time of the wall clock that was, for those after a reboot.
"""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from .atomic import replacing
from .ban_record import KEY_SIZE, VALUE_SIZE, BanBlock
from .lifetime import boot_id
from .rule import boottime_ns

__all__ = ["BanSnapshot", "SnapshotDamaged", "write_snapshot"]

_HEADER: Final = struct.Struct("=16s36sdQQII")
"""Magic, boot id, wall clock in seconds and boot clock in nanoseconds when it was written, how many bans, how many
bytes a key and a value have. A checksum of these follows."""
_MAGIC: Final = b"rama-ebpf bans 1"
_SUM: Final = struct.Struct("=I")
_BLOCK: Final = 1024
_BLOCK_SIZE: Final = _SUM.size + _BLOCK * (KEY_SIZE + VALUE_SIZE)


class SnapshotDamaged(ValueError):
    """A file that is no snapshot of bans, or one of another version."""


@dataclass(slots=True)
class BanSnapshot:
    """A snapshot that is being read. ``count`` is how many bans it was written with, ``lost`` how many of those that
    were passed are damaged."""

    count: int
    _file: BinaryIO
    _passed: int
    """How many nanoseconds are to be taken off the ends: what passed between two boots."""
    by_wall: bool = False
    """Whether the wall clock said how many."""
    lost: int = 0

    @classmethod
    def open(cls, file: BinaryIO, since: int) -> BanSnapshot:
        """Read the header. What was left of a ban of an earlier boot is counted from ``since`` on. Raises
        :class:`SnapshotDamaged`."""
        header, checksum = file.read(_HEADER.size), file.read(_SUM.size)
        if len(checksum) < _SUM.size or zlib.crc32(header) != _SUM.unpack(checksum)[0]:
            raise SnapshotDamaged("its header is damaged")
        magic, boot, wall, clock, count, key_size, value_size = _HEADER.unpack(header)
        if (magic, key_size, value_size) != (_MAGIC, KEY_SIZE, VALUE_SIZE):
            raise SnapshotDamaged("it was written by another version")
        passed, by_wall = 0, False
        if boot.decode(errors="replace") != boot_id():
            # No longer than was left then, whatever the wall clock says: one that begins in 1970 prolongs nothing.
            passed = max(clock + round((time.time() - wall) * 1e9) - boottime_ns(), clock - since)
            by_wall = True
        return cls(count, file, passed, by_wall)

    def blocks(self) -> Iterator[BanBlock]:
        """Yield the bans, of which some may have ended, but for damaged blocks."""
        left = self.count
        while left > 0:
            raw, rows = self._file.read(_BLOCK_SIZE), min(left, _BLOCK)
            if not raw:
                self.lost += left
                return
            left -= rows
            end = _SUM.size + rows * KEY_SIZE
            if (
                len(raw) < end + rows * VALUE_SIZE
                or zlib.crc32(memoryview(raw)[_SUM.size :]) != _SUM.unpack_from(raw)[0]
            ):
                self.lost += rows
                continue
            block = BanBlock(raw[_SUM.size : end], raw[end : end + rows * VALUE_SIZE])
            if self._passed:
                ends = block.expires()
                for index, expires in enumerate(ends):
                    if expires:
                        ends[index] = max(1, expires - self._passed)
                block = block.with_expires(ends)
            yield block


def write_snapshot(path: Path, blocks: Iterable[BanBlock]) -> int:
    """Replace the file ``path`` by a snapshot of these bans, on disk before it has the name; return how many there are.

    Raises OSError."""
    count, waiting = 0, BanBlock(b"", b"")
    with replacing(path) as file:
        file.write(bytes(_HEADER.size + _SUM.size))
        for block in blocks:
            count += len(block)
            waiting = BanBlock(waiting.keys + block.keys, waiting.values + block.values)
            whole = len(waiting) // _BLOCK * _BLOCK
            for at in range(0, whole, _BLOCK):
                _write(file, waiting.cut(at, at + _BLOCK))
            waiting = waiting.cut(whole, len(waiting))
        if len(waiting):
            _write(file, waiting)
        header = _HEADER.pack(_MAGIC, boot_id().encode(), time.time(), boottime_ns(), count, KEY_SIZE, VALUE_SIZE)
        file.seek(0)
        file.write(header + _SUM.pack(zlib.crc32(header)))
    return count


def _write(file: BinaryIO, block: BanBlock) -> None:
    file.write(_SUM.pack(zlib.crc32(block.values, zlib.crc32(block.keys))))
    file.write(block.keys)
    file.write(block.values)
