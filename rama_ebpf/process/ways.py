"""The health of ways in memory that all workers map, so that what fails in one is known in all.

A row a way, by its name, so that it outlasts a reload. It is changed under the table's lock; what is only read, and the
counts, of which each worker writes its own, need none. A worker that was taken over can write what it likes: who reads
it takes nothing for granted (:meth:`SharedBoard.described`).
"""

from __future__ import annotations

import contextlib
import math
import re
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from ..core.errors import RamaError
from ..routes.health import Health, State
from ..routes.ways import MAX_WAYS

__all__ = ["SharedBoard", "TooManyWays", "board_bytes"]

_ROWS: Final = 4096
_ROW: Final = struct.Struct("=64s80sBBHIIdddddddd")
_ROW_BYTES: Final = 256
_CELLS: Final = 3
_LIVE, _TRIED, _FAILED = range(_CELLS)
_PIN: Final = struct.Struct("=8s4sI")
_PIN_SETS: Final = 1 << 18
_PIN_WAYS: Final = 4
_OVERRIDES: Final = 256
_NAME: Final = re.compile(rb"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_OVERRIDE: Final = struct.Struct("=64s64s")
_HEAD: Final = 64


class TooManyWays(RamaError):
    """More ways are known than there are rows."""

    kind = "too_many_ways"


def board_bytes(columns: int) -> int:
    """Size in bytes; pages that are never touched cost nothing."""
    pins = _PIN_SETS * _PIN_WAYS * _PIN.size
    return _HEAD + _OVERRIDES * _OVERRIDE.size + _ROWS * (_ROW_BYTES + columns * _CELLS * 4) + pins


class SharedBoard:
    """A :class:`~rama_ebpf.routes.Board` in shared memory. ``own`` is the column of this worker, None for who only
    reads and commands."""

    def __init__(
        self,
        memory: memoryview,
        columns: int,
        own: int | None,
        lock: Callable[[], None],
        unlock: Callable[[], None],
    ) -> None:
        self._columns, self._own = columns, own
        self._lock, self._unlock = lock, unlock
        self._revision = memory[:8].cast("Q")
        at = _HEAD
        self._orders = memory[at : at + _OVERRIDES * _OVERRIDE.size]
        at += _OVERRIDES * _OVERRIDE.size
        self._rows = memory[at : at + _ROWS * _ROW_BYTES]
        at += _ROWS * _ROW_BYTES
        self._cells = memory[at : at + _ROWS * columns * _CELLS * 4].cast("I")
        self._pins = memory[at + _ROWS * columns * _CELLS * 4 :][: _PIN_SETS * _PIN_WAYS * _PIN.size]
        self._at: dict[str, int] = {}
        self._known_orders: tuple[int, dict[str, str]] = (0, {})

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self._lock()
        try:
            yield
        finally:
            self._unlock()

    # -- rows ----------------------------------------------------------------------------------------------------

    def _row(self, name: str) -> int:
        found = self._at.get(name)
        if found is None:
            with self._alone():
                found = self._at[name] = self._place(name.encode()[:63])
        return found

    def _place(self, name: bytes) -> int:
        start = zlib.crc32(name) % _ROWS
        for step in range(_ROWS):
            index = (start + step) % _ROWS
            there = bytes(self._rows[index * _ROW_BYTES : index * _ROW_BYTES + 64]).rstrip(b"\0")
            if there == name:
                return index
            if not there:
                self._rows[index * _ROW_BYTES : index * _ROW_BYTES + len(name)] = name
                return index
        raise TooManyWays(f"no room for the health of another way beside {_ROWS}")

    def _read(self, index: int) -> Health:
        _, cause, state, drained, _, failures, successes, *times = _ROW.unpack_from(self._rows, index * _ROW_BYTES)
        since, until, hold, answered, latency, trial, asked, _ = times
        return Health(
            State(state) if state <= State.QUARANTINED else State.UP,
            bool(drained),
            failures,
            successes,
            since,
            until,
            hold,
            answered,
            latency,
            trial,
            asked,
            cause.rstrip(b"\0").decode(errors="replace"),
        )

    def read(self, name: str, /) -> Health:
        """See :class:`~rama_ebpf.routes.Board`."""
        return self._read(self._row(name))

    def change(self, name: str, change: Callable[[Health], bool], /) -> bool:
        """See :class:`~rama_ebpf.routes.Board`."""
        index = self._row(name)
        with self._alone():
            health = self._read(index)
            news = change(health)
            self._write(index, name, health)
        return news

    def _write(self, index: int, name: str, health: Health) -> None:
        _ROW.pack_into(
            self._rows,
            index * _ROW_BYTES,
            name.encode()[:63],
            health.cause.encode(errors="replace")[:79],
            health.state,
            health.drained,
            0,
            min(health.failures, 2**32 - 1),
            min(health.successes, 2**32 - 1),
            health.since,
            health.until,
            health.hold,
            health.answered,
            health.latency,
            health.trial_until,
            health.asked,
            0.0,
        )

    # -- counts --------------------------------------------------------------------------------------------------

    def _cell(self, index: int, column: int, what: int) -> int:
        return (index * self._columns + column) * _CELLS + what

    def _total(self, index: int, what: int) -> int:
        return sum(self._cells[self._cell(index, column, what)] for column in range(self._columns))

    def live(self, name: str, /) -> int:
        """See :class:`~rama_ebpf.routes.Board`."""
        return self._total(self._row(name), _LIVE)

    def _add(self, name: str, what: int, by: int) -> None:
        assert self._own is not None
        cell = self._cell(self._row(name), self._own, what)
        self._cells[cell] = (self._cells[cell] + by) & 0xFFFFFFFF

    def enter(self, name: str, /) -> None:
        """See :class:`~rama_ebpf.routes.Board`."""
        self._add(name, _LIVE, 1)

    def leave(self, name: str, /) -> None:
        """See :class:`~rama_ebpf.routes.Board`."""
        self._add(name, _LIVE, -1)

    def tried(self, name: str, failed: bool, /) -> None:
        """See :class:`~rama_ebpf.routes.Board`."""
        self._add(name, _TRIED, 1)
        if failed:
            self._add(name, _FAILED, 1)

    def wipe(self, column: int) -> None:
        """A worker has ended, and its connections with it."""
        for index in range(_ROWS):
            if self._rows[index * _ROW_BYTES]:
                self._cells[self._cell(index, column, _LIVE)] = 0

    # -- pins ----------------------------------------------------------------------------------------------------

    def _set_of(self, key: bytes) -> range:
        start = int.from_bytes(key[:4], "big") % _PIN_SETS * _PIN_WAYS * _PIN.size
        return range(start, start + _PIN_WAYS * _PIN.size, _PIN.size)

    def pinned(self, key: bytes, now: float, /) -> bytes | None:
        """See :class:`~rama_ebpf.routes.Board`. Without the lock: what is torn is of a key that nobody has."""
        for at in self._set_of(key):
            found, member, until = _PIN.unpack_from(self._pins, at)
            if found == key:
                return bytes(member) if until > now else None
        return None

    def pin(self, key: bytes, member: bytes, until: float, /) -> None:
        """See :class:`~rama_ebpf.routes.Board`. It takes the place of the one of its set that ends first."""
        entries = [(_PIN.unpack_from(self._pins, at), at) for at in self._set_of(key)]
        same = [at for (found, _, _), at in entries if found == key]
        at = same[0] if same else min(entries, key=lambda entry: int(entry[0][2]))[1]
        _PIN.pack_into(self._pins, at, bytes(8), member, 0)
        _PIN.pack_into(self._pins, at, key, member, math.ceil(until))

    # -- an operator's word --------------------------------------------------------------------------------------

    def overrides(self) -> Mapping[str, str]:
        """Return the ways that an operator has set, by route."""
        revision = self._revision[0]
        if self._known_orders[0] != revision:
            with self._alone():
                revision = self._revision[0]
                self._known_orders = revision, dict(self._orders_now())
        return self._known_orders[1]

    def _orders_now(self) -> Iterator[tuple[str, str]]:
        for at in range(0, len(self._orders), _OVERRIDE.size):
            route, way = (part.rstrip(b"\0") for part in _OVERRIDE.unpack_from(self._orders, at))
            if route:
                yield route.decode(errors="replace"), way.decode(errors="replace")

    def override(self, route: str, way: str | None) -> None:
        """Have a route lead to another way from now on, in all workers; None: as it is written. Raises
        :class:`TooManyWays`."""
        with self._alone():
            orders = dict(self._orders_now())
            orders.pop(route, None)
            if way is not None:
                orders[route] = way
            if len(orders) > _OVERRIDES:
                raise TooManyWays(f"{_OVERRIDES} routes are set already: put the others into the configuration")
            self._orders[:] = bytes(len(self._orders))
            for number, (name, target) in enumerate(orders.items()):
                _OVERRIDE.pack_into(self._orders, number * _OVERRIDE.size, name.encode(), target.encode())
            self._revision[0] += 1

    def troubled(self) -> list[dict[str, object]]:
        """Return the ways that are not up, with what :meth:`described` says of them."""
        return [{"way": name, **said} for name, at in self._named() if (said := self._described(at))["state"] != "up"]

    def states(self) -> dict[str, bool]:
        """Return whether each way that was ever used is up."""
        return {name: self._read(at).usable() for name, at in self._named()}

    def _named(self) -> Iterator[tuple[str, int]]:
        """The rows with names such as ways have, at most 2,000: whatever else stands there, nobody of ours wrote."""
        found = 0
        for index in range(_ROWS):
            if self._rows[index * _ROW_BYTES] and found < MAX_WAYS:
                name = bytes(self._rows[index * _ROW_BYTES : index * _ROW_BYTES + 64]).rstrip(b"\0")
                if _NAME.fullmatch(name) is not None:
                    found += 1
                    yield name.decode("ascii"), index

    def described(self, name: str) -> dict[str, object]:
        """Return what ``status`` and ``route list`` say of a way. Raises :class:`TooManyWays`."""
        return self._described(self._row(name))

    def _described(self, index: int) -> dict[str, object]:
        health, now = self._read(index), time.monotonic()

        def ago(moment: float) -> float | None:
            return round(max(now - moment, 0.0), 1) if math.isfinite(moment) and moment > 0 else None

        def left(moment: float) -> float | None:
            return round(moment - now, 1) if math.isfinite(moment) and moment > now else None

        return {
            "state": "drained" if health.drained else health.state.name.lower(),
            "cause": "".join(one if one.isprintable() else "?" for one in health.cause) or None,
            "since": ago(health.since),
            "retry_in": left(health.until) if health.state is not State.UP else None,
            "answered": ago(health.answered),
            "latency": round(health.latency, 4) if math.isfinite(health.latency) and health.latency else None,
            "live": self._total(index, _LIVE),
            "attempts": self._total(index, _TRIED),
            "failed": self._total(index, _FAILED),
        }
