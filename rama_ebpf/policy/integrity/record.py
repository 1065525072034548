"""The record: settings, which set is in force, the failsafe, and whether bans and failsafe are looked for at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...kernel import abi
from ...kernel.gate_state import GateState
from ..kernel_sets import KernelSet
from ..kernel_store import KernelStore
from ..prefixes import IPNetwork
from .difference import Difference

__all__ = ["RecordCheck"]


@dataclass(frozen=True, slots=True)
class _Remembered:
    """What a revision of the policy was, as it was seen under the lock. ``opened`` keeps its set alive."""

    gate: GateState
    failsafe: frozenset[IPNetwork]
    token: int
    opened: KernelSet

    def differs(self, gate: GateState) -> bool:
        return _whole(self.gate) != _whole(gate)


def _whole(gate: GateState) -> tuple[object, ...]:
    return gate.active, gate.fallback, gate.deadline, gate.sets, gate.failsafe_ports, gate.failsafe_list


class RecordCheck:
    """Close it when done."""

    def __init__(self, store: KernelStore) -> None:
        self._store = store
        self._remembered: _Remembered | None = None

    def close(self) -> None:
        """Let go of the set that is remembered."""
        if self._remembered is not None:
            self._remembered.opened.close()
            self._remembered = None

    def look(self) -> Iterator[Difference]:
        """Compare with what the same revision was. Whoever changes the policy raises the revision."""
        tables = self._store.tables
        if not tables.gate().is_sealed:
            yield Difference(
                "settings",
                f"the record of revision {tables.gate().revision} (settings, set in force, failsafe's ports, what is "
                "looked for) was written by another program",
                lambda: not tables.gate().is_sealed,
                lambda: self._store.repairs.put_record_back(self._known()),
            )
        if self._remembered is None or self._remembered.gate.revision != tables.gate().revision:
            self._remember()
            return
        known = self._remembered
        if known.differs(tables.gate()):
            yield Difference(
                "settings",
                f"the record of revision {known.gate.revision} (settings, set in force, failsafe's ports) was changed",
                lambda: self._same_revision(known) and known.differs(tables.gate()),
                lambda: self._store.repairs.put_record_back(known.gate),
            )
        elif (token := self._token()) != known.token:
            yield Difference(
                "set",
                f"the set of revision {known.gate.revision} was exchanged for map {token}",
                lambda: self._same_revision(known) and self._token() != known.token,
                lambda: self._put_set_back(known),
            )
        if self._has_other_failsafe(known):
            yield Difference(
                "failsafe",
                f"the failsafe of revision {known.gate.revision} was changed",
                lambda: self._same_revision(known) and self._has_other_failsafe(known),
                lambda: self._store.set_failsafe(list(known.failsafe), known.gate.failsafe_ports),
            )
        yield from self._flags()

    def _flags(self) -> Iterator[Difference]:
        store, tables = self._store, self._store.tables
        for flag, what, is_empty in (
            ("GATE_BANS", "bans", tables.bans.is_empty),
            ("GATE_FAILSAFE", "failsafe", lambda: not store.failsafe() and not tables.gate().failsafe_ports),
        ):

            def missing(flag: str = flag, is_empty: Callable[[], bool] = is_empty) -> bool:
                return not is_empty() and not tables.gate().flags & abi.constants()[flag]

            if missing():
                yield Difference("flag", f"the programs do not look for the {what}", missing, self._store.rebuild)

    def _has_other_failsafe(self, known: _Remembered) -> bool:
        return frozenset(self._store.failsafe()) != known.failsafe or not self._store.tables.failsafe.is_sound()

    def _known(self) -> GateState | None:
        """What is known of the revision in force: what was seen of it, or what this process wrote."""
        seen = None if self._remembered is None else self._remembered.gate
        revision = self._store.tables.gate().revision
        known = (one for one in (self._store.tables.written, seen) if one is not None)
        return next((one for one in known if one.is_sealed and one.revision == revision), None)

    def _remember(self) -> None:
        tables = self._store.tables
        with self._store.held():
            gate = tables.gate()
            if not gate.is_sealed:
                return
            opened = tables.sets.open(gate.active)
            self.close()
            self._remembered = _Remembered(gate, frozenset(self._store.failsafe()), opened.token, opened)

    def _same_revision(self, known: _Remembered) -> bool:
        return self._store.tables.gate().revision == known.gate.revision

    def _token(self) -> int:
        tables = self._store.tables
        opened = tables.sets.open(tables.gate().active)
        try:
            return opened.token
        finally:
            opened.close()

    def _put_set_back(self, known: _Remembered) -> None:
        with self._store.held():
            self._store.tables.sets.put_back(known.gate.active, known.opened)
