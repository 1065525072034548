"""The sets of rules in a gate's maps: how one is put into force, tried, and read back.

A set is built in a map of its own and put into force by one number (see :meth:`KernelSets._install`).
"""

from __future__ import annotations

import contextlib
import mmap
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from ..core.address import IPAddress
from ..kernel import abi, bpf
from ..kernel.gate_maps import GateMaps, set_pages
from ..kernel.gate_state import GateState, SetHead
from . import document
from .compiler import CompiledSet, read_chain
from .counters import number
from .intervals import PAGE, Layout, Table, find
from .rule import Action, RuleSet, Settings, SynLimit, boottime_ns
from .store import PolicyStore

__all__ = ["KernelSets", "packed_limit", "unpacked_limit"]

_BARRIER: Final = 2  # an element of `sets` that no program reads
_WORD: Final = struct.Struct("=Q")


class KernelSets(PolicyStore):
    """The part of :class:`~.kernel_store.KernelStore` that is about ``gate`` and the loaded sets."""

    def __init__(self, maps: GateMaps) -> None:
        self._maps = maps
        self._constant = abi.constants()
        self._chains_size = self._constant["MAX_CHAIN_ITEMS"] * abi.CHAIN_ITEM.size
        self._read: tuple[int, RuleSet] | None = None  # the description of a set, by the id of its map

    # -- the gate ------------------------------------------------------------------------------------------------

    def _gate(self) -> GateState:
        raw = bpf.map_lookup(self._maps["gate"], number(0), abi.GATE.size)
        assert raw is not None  # an array has all its elements
        return GateState.unpack(raw)

    def _put_gate(self, gate: GateState) -> None:
        bpf.map_update(self._maps["gate"], number(0), gate.pack())

    def _flag(self, name: str) -> None:
        """Tell the programs that there is something to look up. :meth:`sweep` lowers flags again."""
        gate, flag = self._gate(), self._constant[name]
        if not gate.flags & flag:
            self._put_gate(replace(gate, flags=gate.flags | flag))

    def _changed(self) -> int:
        gate = self._gate()
        self._put_gate(replace(gate, revision=gate.revision + 1))
        return gate.revision + 1

    @property
    def revision(self) -> int:
        return self._gate().revision

    @property
    def pending(self) -> int | None:
        gate = self._gate()
        return gate.deadline if gate.deadline and boottime_ns() < gate.deadline else None

    def _head(self) -> SetHead:
        gate = self._gate()
        return gate.sets[gate.in_force(boottime_ns())]

    def settings(self) -> Settings:
        head = self._head()
        return Settings(Action(head.default), unpacked_limit(*head.per_source), unpacked_limit(*head.overall))

    def _set_settings(self, settings: Settings) -> int:
        gate = self._gate()
        sets = list(gate.sets)
        sets[gate.active] = replace(
            sets[gate.active],
            default=int(settings.default),
            per_source=packed_limit(settings.per_source),
            overall=packed_limit(settings.overall),
        )
        self._put_gate(replace(gate, revision=gate.revision + 1, sets=(sets[0], sets[1])))
        return gate.revision + 1

    # -- the set -------------------------------------------------------------------------------------------------

    def _install(self, compiled: CompiledSet, ids: Sequence[int], deadline: int | None) -> int:
        """Fill a map that nobody reads yet, describe it in the half of ``gate`` that nobody reads, then change the
        one number that says which half to read."""
        gate = self._gate()
        slot, settings = 1 - gate.active, compiled.ruleset.settings
        head = SetHead(
            int(settings.default),
            packed_limit(settings.per_source),
            packed_limit(settings.overall),
            (_pack_table(compiled.tables[0]), _pack_table(compiled.tables[1])),
            compiled.document_at,
            compiled.document_size,
        )
        pages = compiled.all_pages(ids)
        fd = set_pages(len(pages) // PAGE).create("set")
        try:
            _write(fd, 0, pages)
            bpf.map_update(self._maps["sets"], number(slot), fd.to_bytes(4, sys.byteorder))
        finally:
            bpf.close(fd)
        for family, pairs in enumerate(compiled.slots):
            first = (2 * slot + family) * self._constant["MAX_SLOTS"]
            _write(self._maps["slots"], first * abi.SLOT.size, pairs.tobytes())
        _write(self._maps["chains"], slot * self._chains_size, compiled.chains(ids))
        sets = (head, gate.sets[1]) if slot == 0 else (gate.sets[0], head)
        gate = replace(gate, sets=sets, fallback=gate.active, deadline=deadline or 0)
        self._put_gate(gate)
        gate = replace(gate, active=slot, revision=gate.revision + 1)
        self._put_gate(gate)
        if deadline is None:
            self._retire(1 - slot)
        return gate.revision

    def _wait_for_programs(self) -> None:
        """Return when every program that runs now has ended: changing a map of maps waits for an RCU grace period
        (``maybe_wait_bpf_programs`` in ``kernel/bpf/syscall.c``)."""
        self._empty_set(_BARRIER)

    def _empty_set(self, slot: int) -> None:
        fd = set_pages(1).create("set")
        try:
            bpf.map_update(self._maps["sets"], number(slot), fd.to_bytes(4, sys.byteorder))
        finally:
            bpf.close(fd)

    def _retire(self, slot: int) -> None:
        """Free a set that is no longer in force, once no program can be reading it."""
        self._wait_for_programs()
        self._empty_set(slot)
        gate = self._gate()
        sets = (SetHead(), gate.sets[1]) if slot == 0 else (gate.sets[0], SetHead())
        self._put_gate(replace(gate, sets=sets))
        self._free_rules()

    # A trial: `fallback` and `active` are made equal before the deadline is taken away, and programs read the deadline
    # first, so none of these steps shows a packet anything but the set that is meant.

    def _confirm(self) -> None:
        gate = self._gate()
        gate = replace(gate, fallback=gate.active, revision=gate.revision + 1)
        self._put_gate(gate)
        self._put_gate(replace(gate, deadline=0))
        self._retire(1 - gate.active)

    def _roll_back(self) -> None:
        gate = self._gate()
        gate = replace(gate, active=gate.fallback, revision=gate.revision + 1)
        self._put_gate(gate)
        self._wait_for_programs()
        self._put_gate(replace(gate, deadline=0))
        self._retire(1 - gate.active)

    def _settle(self) -> None:
        gate = self._gate()
        if gate.deadline and boottime_ns() >= gate.deadline:
            self._roll_back()
            self._note("rollback", self.revision, reason="not confirmed in time")

    def _open_set(self, slot: int) -> int:
        raw = bpf.map_lookup(self._maps["sets"], number(slot), 4)
        assert raw is not None
        return bpf.map_by_id(int.from_bytes(raw, sys.byteorder))

    @contextlib.contextmanager
    def _set_in_force(self) -> Iterator[tuple[int, SetHead, int]]:
        """Yield which set is in force, its head, and a descriptor of its pages, which never change."""
        while True:
            gate = self._gate()
            slot = gate.in_force(boottime_ns())
            fd = self._open_set(slot)
            again = self._gate()
            if again.in_force(boottime_ns()) == slot and again.sets[slot] == gate.sets[slot]:
                break
            bpf.close(fd)  # it was replaced meanwhile
        try:
            yield slot, gate.sets[slot], fd
        finally:
            bpf.close(fd)

    def _chain(self, source: IPAddress) -> list[tuple[int, int]]:
        family = 0 if source.version == 4 else 1
        with self._set_in_force() as (slot, head, fd):

            def slot_at(index: int) -> tuple[int, int]:
                key = (2 * slot + family) * self._constant["MAX_SLOTS"] + index
                first, count = abi.SLOT.unpack(self._element("slots", key, abi.SLOT.size))
                return first, count

            def read(at: int, size: int) -> int:
                page = bpf.map_lookup(fd, number(at // PAGE), PAGE)
                assert page is not None
                return int.from_bytes(page[at % PAGE : at % PAGE + size], sys.byteorder)

            def item(index: int) -> bytes:
                return self._element("chains", slot * self._constant["MAX_CHAIN_ITEMS"] + index, abi.CHAIN_ITEM.size)

            value = find(slot_at, read, _unpack_table(head.tables[family]), source.version, int(source))
            return read_chain(item, value, source.version)

    def _element(self, name: str, index: int, size: int) -> bytes:
        raw = bpf.map_lookup(self._maps[name], number(index), size)
        assert raw is not None  # an array has all its elements
        return raw

    def set_token(self) -> int:
        with self._set_in_force() as (_, _, fd):
            return bpf.map_info(fd).id

    def ruleset(self) -> RuleSet:
        with self._set_in_force() as (_, head, fd):
            identity = bpf.map_info(fd).id
            if self._read is None or self._read[0] != identity:
                self._read = identity, _read_document(head, fd)
            ruleset = self._read[1]
        settings = Settings(Action(head.default), unpacked_limit(*head.per_source), unpacked_limit(*head.overall))
        return replace(ruleset, settings=settings)

    def _ids_of_both_sets(self) -> set[int]:
        """Return the ids of the rules of the active set, and of the one that it may fall back to."""
        ids: set[int] = set()
        gate = self._gate()
        for slot in (0, 1):
            fd = self._open_set(slot)
            try:
                ids.update(_read_ids(gate.sets[slot], fd))
            finally:
                bpf.close(fd)
        return ids

    def _loaded_ids(self) -> Sequence[int]:
        with self._set_in_force() as (_, head, fd):
            return _read_ids(head, fd)


def _write(fd: int, at: int, data: bytes) -> None:
    """Write into an array map that has MMAPABLE."""
    info = bpf.map_info(fd)
    with mmap.mmap(fd, info.max_entries * info.value_size) as memory:
        memory[at : at + len(data)] = data


@contextlib.contextmanager
def _mapped_set(fd: int) -> Iterator[mmap.mmap]:
    with mmap.mmap(fd, bpf.map_info(fd).max_entries * PAGE, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
        yield memory


def _read_document(head: SetHead, fd: int) -> RuleSet:
    if not head.document_size:
        return RuleSet()
    with _mapped_set(fd) as memory:
        return document.decode(memory[head.document_at : head.document_at + head.document_size])


def _read_ids(head: SetHead, fd: int) -> list[int]:
    """Return the ids of a set's rules: its end, see :meth:`.compiler.CompiledSet.all_pages`."""
    if not head.document_size:
        return []
    with _mapped_set(fd) as memory:
        (count,) = _WORD.unpack_from(memory, len(memory) - 8)
        ids = memory[len(memory) - 8 - 8 * count : len(memory) - 8]
    return [rule_id for (rule_id,) in _WORD.iter_unpack(ids)]


def _pack_table(t: Table) -> bytes:
    return abi.TABLE.pack(t.base, t.shift, t.slots, t.page, t.below, t.above, t.layout, 0, 0)


def _unpack_table(raw: bytes) -> Table:
    base, shift, slots, page, below, above, layout, *_ = abi.TABLE.unpack(raw)
    return Table(base, shift, slots, page, below, above, Layout(layout))


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
