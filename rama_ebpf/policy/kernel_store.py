"""A policy in the BPF maps that the kernel programs read.

Any process that may open the pins can change it; a lock file keeps writers apart, and every change is in force when
the call returns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ..kernel import bpf
from ..kernel.gate_maps import GateMaps
from ..kernel.gate_state import owner_number
from ..kernel.instance import Instance
from ..kernel.policy_lock import PolicyBusy, PolicyLock
from .counters import GateCounters
from .kernel_tables import KernelTables
from .rule import PolicyError
from .store import PolicyStore

__all__ = ["KernelStore"]

_SERVER_PATIENCE: Final = 5.0
_BAN_PATIENCE: Final = 0.25
_COMMAND_PATIENCE: Final = 30.0
"""Seconds to wait for others that change the policy."""


class KernelStore(PolicyStore):
    """The store over an instance's pinned maps, and what the gate has counted in them. Close it when done."""

    def __init__(self, instance: Instance, maps: GateMaps | None = None) -> None:
        """Open the pins, or use maps that are open already (which stay the caller's).

        Raises FileNotFoundError if the instance is not loaded, and LayoutMismatch for pins that are not its own.
        """
        self._instance = instance
        self._owned = maps is None
        self._lock = instance.policy_lock(_COMMAND_PATIENCE if self._owned else _SERVER_PATIENCE)
        opened = GateMaps.open(instance.pin_dir, instance.name) if maps is None else maps
        self.tables = KernelTables(opened, owner_number(instance.name))
        self.counters = GateCounters(self.tables)
        self._brief_lock = instance.policy_lock(_BAN_PATIENCE)
        super().__init__(self.tables, self._current, self._current_briefly)
        self.remember_in(instance.state_dir)

    def close(self) -> None:
        """Have what was noted reach the disk, and close the maps if this store opened them."""
        self.sync()
        if self._owned:
            self.tables.maps.close()

    def __enter__(self) -> KernelStore:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _current(self) -> contextlib.AbstractContextManager[None]:
        return self._holding(self._lock)

    @contextlib.contextmanager
    def _current_briefly(self) -> Iterator[None]:
        """Likewise, and wait at most for :data:`_BAN_PATIENCE`; not at all if that was in vain a moment ago."""
        try:
            with self._holding(self._brief_lock):
                self._brief_lock.patience = _BAN_PATIENCE
                yield
        except PolicyBusy:
            self._brief_lock.patience = 0.0
            raise

    @contextlib.contextmanager
    def _holding(self, lock: PolicyLock) -> Iterator[None]:
        """Hold the lock, with the pins open that are in use: those found before it may be nobody's any more."""
        with lock:
            if self._owned and not self._is_current():
                self._reopen()
            yield

    def _is_current(self) -> bool:
        """Whether the pins are those that this store has open: a server that starts or stops replaces all of them at
        once, by renaming their directory. Their name is looked at again at the end: they may go meanwhile."""
        ours, pin = bpf.map_info(self.tables.maps["gate"]).id, self._inode()
        try:
            pinned = bpf.obj_get(str(self._gate_pin))
        except OSError:
            return False
        try:
            found = bpf.map_info(pinned).id
        finally:
            bpf.close(pinned)
        return found == ours and pin is not None and self._inode() == pin

    @property
    def _gate_pin(self) -> Path:
        return self._instance.pin_dir / "gate"

    def _inode(self) -> int | None:
        """A number that the pin has, and none that takes its place."""
        try:
            return self._gate_pin.stat().st_ino
        except OSError:
            return None

    def _reopen(self) -> None:
        """Open the pins anew. Raises :class:`PolicyError` if there are none any more."""
        try:
            maps = GateMaps.open(self._instance.pin_dir, self._instance.name)
        except FileNotFoundError as error:
            raise PolicyError(f"the policy of instance {self._instance.name!r} was unloaded meanwhile") from error
        self.tables.maps.close()
        self.tables.use(maps)
