"""Counts that all workers of a server share, so that a limit holds for the server and not for each worker.

The supervisor makes one table in anonymous memory (memfd) and every worker maps it. A row belongs to a key; it holds
a cell for each worker that can be alive at once, which only that worker writes, and a time for rates. Rows are found,
claimed and judged under a POSIX record lock, which the kernel frees if its holder dies; a count is given back without
it. What a dead worker still counted the supervisor wipes.

Rejected: asking the supervisor for each connection (a round trip and one process in the way of all), BPF maps (not
without privileges), and dividing limits by the number of workers (a source's connections are not spread evenly).
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import time
from collections.abc import Callable, Hashable
from typing import Final

from ..core.errors import LimitExceeded
from ..core.proven import PROVEN_BYTES, proven_token
from .ways import SharedBoard, board_bytes

__all__ = ["SharedBuckets", "SharedCounts", "SharedProven", "SharedTable", "TableFull"]

_ROWS: Final = 65536
_PROBES: Final = 64
_CELL: Final = 4
_PROVEN: Final = struct.Struct(f"={PROVEN_BYTES}sd")
_PROVEN_SETS: Final = 4096
_PROVEN_WAYS: Final = 4
_PROVEN_BYTES: Final = _PROVEN_SETS * _PROVEN_WAYS * _PROVEN.size


class TableFull(LimitExceeded):
    """More sources are being counted than the table has room for."""

    kind = "table_full"


class SharedTable:
    """The mapped table of one process, with ``columns`` cells in each row. ``own`` is the column of this worker; None
    for the supervisor, who only wipes. ``secret`` keeps clients from choosing sources that fall into one row.
    """

    def __init__(self, fd: int, columns: int, own: int | None, secret: bytes) -> None:
        self._fd = fd
        self._columns = columns
        self._own = own
        self._secret = secret
        self._spaces = 0
        memory = memoryview(mmap.mmap(fd, _size(columns)))
        self._keys = memory[: _ROWS * 8].cast("Q")
        self.times = memory[_ROWS * 8 : _ROWS * 16].cast("d")
        """The time of each row, CLOCK_MONOTONIC seconds: one clock for all processes of a host."""
        self._cells = memory[_ROWS * 16 : _counted(columns)].cast("I")
        self._proven = memory[_counted(columns) : _counted(columns) + _PROVEN_BYTES]
        ways = memory[_counted(columns) + _PROVEN_BYTES :]
        self._board = SharedBoard(ways, columns, own, self.lock, self.unlock)

    @staticmethod
    def create(columns: int) -> int:
        """Return the descriptor of a new, empty table. Pages that are never touched cost nothing."""
        fd = os.memfd_create("rama-ebpf-counts", os.MFD_CLOEXEC)
        os.ftruncate(fd, _size(columns))
        return fd

    def wipe(self, column: int) -> None:
        """Set all cells of a column to zero; its worker has ended."""
        for row, count in enumerate(self._cells[column :: self._columns].tolist()):
            if count:
                self._cells[row * self._columns + column] = 0
        self._board.wipe(column)

    def board(self) -> SharedBoard:
        """Return the health of ways, which those of earlier configurations are among."""
        return self._board

    def counts(self) -> SharedCounts:
        """Return a new space of keys for counts. Workers that make theirs in the same order share them."""
        self._spaces += 1
        return SharedCounts(self, self._spaces)

    def buckets(self, rate: float, burst: float) -> SharedBuckets:
        """Return a new space of keys for token buckets, likewise."""
        self._spaces += 1
        return SharedBuckets(self, self._spaces, rate, burst)

    def proven(self) -> SharedProven:
        """Return the proven passwords of all workers, those of earlier configurations included."""
        return SharedProven(self._proven, self._secret)

    def hash_of(self, space: int, key: Hashable) -> int:
        """The number under which ``key`` is found: 1 to 2**64 - 1, 0 marks an empty row."""
        digest = hashlib.blake2b(repr((space, key)).encode(), digest_size=8, key=self._secret).digest()
        return int.from_bytes(digest, "little") or 1

    def row(self, wanted: int, is_free: Callable[[int], bool]) -> int:
        """Find the row of a key, or claim one that ``is_free``, under :meth:`lock`. Raises :class:`TableFull`."""
        free = -1
        start = wanted % _ROWS
        for at in range(start, start + _PROBES):
            at %= _ROWS
            found = self._keys[at]
            if found == wanted:
                return at
            if free < 0 and (found == 0 or is_free(at)):
                free = at
            if found == 0:
                break
        if free < 0:
            raise TableFull(f"no room to count another source beside {_ROWS}")
        self._keys[free] = wanted
        self.times[free] = 0.0
        return free

    def idle(self, row: int) -> bool:
        """Whether nobody counts in a row and its time has passed."""
        return self.times[row] <= time.monotonic() and not self.total(row)

    def total(self, row: int) -> int:
        """The sum over all workers."""
        return sum(self._cells[row * self._columns : (row + 1) * self._columns])

    def far_below(self, row: int, limit: int) -> bool:
        """Whether every process may count one more in a row, in which we count already, without going above ``limit``:
        then nobody has to be kept out. Each has at most one count under way that we do not see yet."""
        return self.total(row) + self._columns <= limit

    def change(self, row: int, by: int) -> None:
        """Change this worker's own cell."""
        assert self._own is not None
        self._cells[row * self._columns + self._own] += by

    def lock(self) -> None:
        """Keep other processes out."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX)

    def unlock(self) -> None:
        """Let them in again."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN)


def _counted(columns: int) -> int:
    return _ROWS * (16 + columns * _CELL)


def _size(columns: int) -> int:
    return _counted(columns) + _PROVEN_BYTES + board_bytes(columns)


class SharedProven:
    """Proven passwords (:class:`~rama_ebpf.core.proven.Proven`) over all workers, and over reloads.

    Without a lock: a slot that two write at once, or that is read while it is written, holds a token that nobody
    has, and is a miss.
    """

    def __init__(self, slots: memoryview, secret: bytes) -> None:
        self._slots = slots
        self._secret = secret

    def token(self, name: str, password: str, proof: str, /) -> bytes:
        """The keyed hash of a user's name, password, and the line that it was proven against."""
        return proven_token(self._secret, name, password, proof)

    def holds(self, token: bytes, /) -> bool:
        """Whether the token was added and its time has not passed."""
        now = time.monotonic()
        return any(found == token and until > now for _, found, until in self._set(token))

    def add(self, token: bytes, seconds: float, /) -> None:
        """Remember a token for ``seconds``, in place of the one of its set that ends first."""
        entries = self._set(token)
        same = [offset for offset, found, _ in entries if found == token]
        offset = same[0] if same else min(entries, key=lambda entry: entry[2])[0]
        _PROVEN.pack_into(self._slots, offset, token, 0.0)
        _PROVEN.pack_into(self._slots, offset, token, time.monotonic() + seconds)

    def _set(self, token: bytes) -> list[tuple[int, bytes, float]]:
        start = int.from_bytes(token[:4], "big") % _PROVEN_SETS * _PROVEN_WAYS
        offsets = [(start + way) * _PROVEN.size for way in range(_PROVEN_WAYS)]
        return [(offset, *_PROVEN.unpack_from(self._slots, offset)) for offset in offsets]


class SharedCounts:
    """How many of each key are live, over all workers."""

    def __init__(self, table: SharedTable, space: int) -> None:
        self._table = table
        self._space = space
        self._rows: dict[Hashable, tuple[int, int]] = {}

    def enter(self, key: Hashable, limit: int) -> bool:
        """Count one more of ``key`` unless there are ``limit``; return whether it was counted."""
        table = self._table
        held = self._rows.get(key)
        if held is not None and table.far_below(held[0], limit):
            table.change(held[0], 1)
            self._rows[key] = held[0], held[1] + 1
            return True
        table.lock()
        try:
            # A row in which we count ourselves cannot be anybody else's.
            row = table.row(table.hash_of(self._space, key), table.idle) if held is None else held[0]
            if table.total(row) >= limit:
                return False
            table.change(row, 1)
        finally:
            table.unlock()
        self._rows[key] = (row, 1 if held is None else held[1] + 1)
        return True

    def leave(self, key: Hashable) -> None:
        """Count one less of ``key``, which this worker has entered."""
        row, count = self._rows[key]
        self._table.change(row, -1)
        if count == 1:
            del self._rows[key]
        else:
            self._rows[key] = (row, count - 1)


class SharedBuckets:
    """A token bucket for each key (see :class:`~rama_ebpf.core.bucket.TokenBucket`), over all workers."""

    def __init__(self, table: SharedTable, space: int, rate: float, burst: float) -> None:
        self._table = table
        self._space = space
        self._rate = rate
        self._slack = burst / rate

    def take(self, key: Hashable, longest: float) -> float:
        """Take one token if that means to wait at most ``longest`` seconds; return the wait, taken or not."""
        table = self._table
        now = time.monotonic()
        table.lock()
        try:
            row = table.row(table.hash_of(self._space, key), table.idle)
            full_at = max(table.times[row], now) + 1 / self._rate
            wait = full_at - now - self._slack
            if wait <= max(longest, 1e-9):
                table.times[row] = full_at
        finally:
            table.unlock()
        return max(wait, 0.0) if wait > 1e-9 else 0.0
