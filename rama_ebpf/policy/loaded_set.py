"""The loaded set: everything that was loaded at once, how another takes its place, and how one is tried.

Two sets have a place. A new one is filled where nobody reads, described in the half of the record that nobody reads,
and put into force by one number. A trial leaves the set before as the fallback, with a deadline that the programs
themselves keep: no process has to be there.
"""

from __future__ import annotations

import contextlib
import logging
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ..core.address import IPAddress
from ..kernel.gate_state import LAST_REVISION, GateState, SetHead
from .compiler import CompiledSet
from .rule import Action, PolicyError, RuleSet, Settings, SynLimit, boottime_ns
from .tables import OpenSet, Tables

__all__ = ["LoadedSet", "packed_limit", "unpacked_limit"]


log = logging.getLogger(__name__)


def _nowhere() -> None:
    """It is kept nowhere."""


class LoadedSet:
    """The set in force. Changes are made under the policy's lock, return the new revision, and leave rules behind that
    nothing refers to any more."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    # -- asking ------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> int | None:
        """When the set that was loaded last will be undone unless it is confirmed, None if it need not be."""
        gate = self._tables.gate()
        return gate.deadline if _is_trial(gate) and boottime_ns() < gate.deadline else None

    @property
    def trial_is_over(self) -> bool:
        """Whether a trial has ended unconfirmed: the programs judge by the set before already."""
        gate = self._tables.gate()
        return _is_trial(gate) and boottime_ns() >= gate.deadline

    def settings(self) -> Settings:
        """Return the settings in force."""
        gate = self._tables.gate()
        return _settings(gate.sets[gate.in_force(boottime_ns())])

    def ruleset(self) -> RuleSet:
        """Return the set in force, with the settings in force."""
        with self._in_force() as (head, opened):
            return replace(opened.ruleset(head), settings=_settings(head))

    def lasting(self) -> RuleSet:
        """Return the set that will be in force if nobody does anything: while one is on trial, the one before it."""
        gate = self._tables.gate()
        which = gate.fallback if gate.deadline else gate.active
        with contextlib.closing(self._tables.sets.open(which)) as opened:
            return replace(opened.ruleset(gate.sets[which]), settings=_settings(gate.sets[which]))

    def ids(self) -> Sequence[int]:
        """Return the id of each rule of the set in force, in the order of :meth:`ruleset`."""
        with self._in_force() as (head, opened):
            return opened.ids(head)

    def token(self) -> int:
        """Return a number that names the set in force: another one for each that is put into force."""
        with self._in_force() as (_, opened):
            return opened.token

    def chain(self, source: IPAddress) -> list[tuple[int, int]]:
        """Return (prefix length, rule id) of the rules of the set that may decide, in their order."""
        with self._in_force() as (head, opened):
            return opened.chain(head, source)

    def ids_of_both(self) -> set[int]:
        """Return the ids of the rules of the active set, and of the one that it may fall back to."""
        ids: set[int] = set()
        gate = self._tables.gate()
        for which in (0, 1):
            with contextlib.closing(self._tables.sets.open(which)) as opened:
                ids.update(opened.ids(gate.sets[which]))
        return ids

    @contextlib.contextmanager
    def _in_force(self) -> Iterator[tuple[SetHead, OpenSet]]:
        """Yield the set in force and its head, which belong together."""
        while True:
            gate = self._tables.gate()
            which = gate.in_force(boottime_ns())
            opened = self._tables.sets.open(which)
            again = self._tables.gate()
            if again.in_force(boottime_ns()) == which and again.sets[which] == gate.sets[which]:
                break
            opened.close()  # it was replaced meanwhile
        try:
            yield gate.sets[which], opened
        finally:
            opened.close()

    # -- changing ----------------------------------------------------------------------------------------------

    def set_settings(self, settings: Settings) -> int:
        """Change the settings of the set that was loaded last."""
        gate = self._tables.gate()
        head = replace(
            gate.sets[gate.active],
            default=int(settings.default),
            per_source=packed_limit(settings.per_source),
            overall=packed_limit(settings.overall),
        )
        return self._put(_with_head(gate, gate.active, head))

    def install(
        self,
        compiled: CompiledSet,
        ids: Sequence[int],
        deadline: int | None = None,
        keep: Callable[[], None] = _nowhere,
    ) -> int:
        """Put a set into force at once; fall back to the present one at ``deadline``, or have ``keep`` write down that
        it is for good. What that raises undoes it."""
        before = gate = self._tables.gate()
        which, settings = 1 - gate.active, compiled.ruleset.settings
        head = replace(
            self._tables.sets.fill(which, compiled, ids),
            default=int(settings.default),
            per_source=packed_limit(settings.per_source),
            overall=packed_limit(settings.overall),
        )
        gate = replace(_with_head(gate, which, head), fallback=gate.active, deadline=deadline or 0)
        self._tables.put_gate(gate)
        revision = self._put(replace(gate, active=which))
        if deadline is None:
            try:
                keep()
            except OSError:
                self._put(replace(self._tables.gate(), active=before.active))
                self.finish()
                raise
            self.finish()
        return revision

    # A trial: `fallback` and `active` are made equal before the deadline is taken away, and programs read the deadline
    # first, so none of these steps shows a packet anything but the set that is meant. Equal they say that it is over.

    def confirm(self, keep: Callable[[], None] = _nowhere) -> int:
        """Keep the set that is on trial, and have ``keep`` write that down; what that raises undoes it."""
        gate = self._tables.gate()
        revision = self._put(replace(gate, fallback=gate.active))
        try:
            keep()
        except OSError:
            self._put(replace(self._tables.gate(), fallback=gate.fallback))
            raise
        self.finish()
        return revision

    def roll_back(self) -> int:
        """Undo the set that is on trial, or was."""
        gate = self._tables.gate()
        revision = self._put(replace(gate, active=gate.fallback))
        self.finish()
        return revision

    def put_record_back(self, known: GateState | None) -> None:
        """Put in order what somebody else has written into the record: as it was ``known`` to be, or so that no set is
        on trial. One that cannot be read any more makes way for one that lets nobody in."""
        gate = self._tables.gate()
        if known is not None:
            kept = {"runtime": gate.runtime, "flags": gate.flags, "ban_lengths": gate.ban_lengths}
            self._tables.put_gate(replace(known, **kept, revision=gate.revision + 1))  # type: ignore[arg-type]
            return
        head = gate.sets[gate.active]
        try:
            _settings(head)
            list(zip(self.ruleset().rules, self.ids(), strict=True))
        except (PolicyError, ValueError, struct.error):
            head = SetHead(default=int(Action.DROP))
        revision = gate.revision + 1 if gate.revision < LAST_REVISION else 1
        sound = GateState(
            revision, 0, gate.active, gate.active, failsafe_list=gate.failsafe_list, owner=self._tables.owner
        )
        self._tables.put_gate(_with_head(sound, gate.active, head))

    def finish(self) -> None:
        """Do what follows once it is decided which set is in force: free the other one, when nobody can be reading it.
        Whoever decided it cannot have failed any more: what the kernel refuses is logged, and is done by the next
        change or sweep, as it is where a writer was killed."""
        try:
            gate = self._tables.gate()
            idle = 1 - gate.active
            if _is_trial(gate) or (not gate.deadline and gate.sets[idle] == SetHead()):
                return
            self._tables.sets.wait_for_readers()
            self._tables.put_gate(replace(self._tables.gate(), deadline=0))
            self._tables.sets.empty(idle)
            self._tables.put_gate(_with_head(self._tables.gate(), idle, SetHead()))
        except OSError as error:
            log.warning("the set that is no longer in force is not freed yet: %s", error)

    def _put(self, gate: GateState) -> int:
        self._tables.put_gate(replace(gate, revision=gate.revision + 1))
        return gate.revision + 1


def _is_trial(gate: GateState) -> bool:
    return bool(gate.deadline) and gate.active != gate.fallback


def _with_head(gate: GateState, which: int, head: SetHead) -> GateState:
    return replace(gate, sets=(head, gate.sets[1]) if which == 0 else (gate.sets[0], head))


def _settings(head: SetHead) -> Settings:
    return Settings(Action(head.default), unpacked_limit(*head.per_source), unpacked_limit(*head.overall))


def packed_limit(limit: SynLimit | None) -> tuple[int, int]:
    """Return a limit as the kernel keeps it: nanoseconds of emission and of tolerance."""
    return (0, 0) if limit is None else (limit.emission_ns, limit.tolerance_ns)


def unpacked_limit(emission: int, tolerance: int) -> SynLimit | None:
    """The inverse of :func:`packed_limit`, with the roundest rate that is packed the same."""
    if not emission:
        return None
    exact = SynLimit(1e9 / emission, tolerance // emission + 1)
    rounded = replace(exact, rate=max(0.001, round(exact.rate, 6)))
    return rounded if rounded.emission_ns == emission else exact
