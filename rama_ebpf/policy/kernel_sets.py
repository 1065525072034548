"""The two sets in a gate's maps. Each has pages of its own, in an array that is made for it and never changed while it
is in force; slots and chains of both are halves of two maps.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Final

from ..core.address import IPAddress
from ..kernel import abi, bpf
from ..kernel.gate_maps import GateMaps, set_pages
from ..kernel.gate_state import SetHead
from . import document
from .compiler import CompiledSet, read_chain
from .counters import number
from .intervals import PAGE, Layout, Table, find
from .rule import RuleSet

__all__ = ["KernelSet", "KernelSets", "read_bytes"]

_BARRIER: Final = 2  # an element of `sets` that no program reads
_WORD: Final = struct.Struct("=Q")


class KernelSets:
    """The maps ``sets``, ``slots`` and ``chains``."""

    def __init__(self, maps: GateMaps) -> None:
        self.maps = maps
        self.slot_count, self.item_count = abi.constants()["MAX_SLOTS"], abi.constants()["MAX_CHAIN_ITEMS"]
        self._read: tuple[int, RuleSet] | None = None  # the description of a set, by its token

    def fill(self, which: int, compiled: CompiledSet, ids: Sequence[int]) -> SetHead:
        pages = compiled.all_pages(ids)
        fd = set_pages(len(pages) // PAGE).create("set")
        try:
            _write(fd, 0, pages)
            bpf.map_update(self.maps["sets"], number(which), fd.to_bytes(4, sys.byteorder))
        finally:
            bpf.close(fd)
        checksum = zlib.crc32(pages)
        for family, pairs in enumerate(compiled.slots):
            first = (2 * which + family) * self.slot_count
            _write(self.maps["slots"], first * abi.SLOT.size, pairs.tobytes())
            checksum = zlib.crc32(pairs.tobytes(), checksum)
        chains = compiled.chains(ids)
        _write(self.maps["chains"], which * self.item_count * abi.CHAIN_ITEM.size, chains)
        return SetHead(
            tables=(_pack_table(compiled.tables[0]), _pack_table(compiled.tables[1])),
            document_at=compiled.document_at,
            document_size=compiled.document_size,
            chain_items=len(chains) // abi.CHAIN_ITEM.size,
            checksum=zlib.crc32(chains, checksum),
        )

    def empty(self, which: int) -> None:
        fd = set_pages(1).create("set")
        try:
            bpf.map_update(self.maps["sets"], number(which), fd.to_bytes(4, sys.byteorder))
        finally:
            bpf.close(fd)

    def put_back(self, which: int, opened: KernelSet) -> None:
        """Put a set that is still open where it was: for one that somebody else has exchanged."""
        bpf.map_update(self.maps["sets"], number(which), opened.fileno().to_bytes(4, sys.byteorder))

    def open(self, which: int) -> KernelSet:
        raw = bpf.map_lookup(self.maps["sets"], number(which), 4)
        assert raw is not None  # an array has all its elements
        return KernelSet(self, which, bpf.map_by_id(int.from_bytes(raw, sys.byteorder)))

    def wait_for_readers(self) -> None:
        """Return when every program that runs now has ended: changing a map of maps waits for an RCU grace period
        (``maybe_wait_bpf_programs`` in ``kernel/bpf/syscall.c``)."""
        self.empty(_BARRIER)

    def slot(self, which: int, family: int, index: int) -> tuple[int, int]:
        """Return a slot's first interval, and how many it has."""
        at = (2 * which + family) * self.slot_count + index
        first, count = abi.SLOT.unpack(self._element("slots", at, abi.SLOT.size))
        return first, count

    def item(self, which: int, index: int) -> bytes:
        """Return a ``struct chain_item``."""
        return self._element("chains", which * self.item_count + index, abi.CHAIN_ITEM.size)

    def described(self, token: int, head: SetHead, fd: int) -> RuleSet:
        """Return what a set was compiled from; a set is read once."""
        if self._read is None or self._read[0] != token:
            self._read = token, _read_document(head, fd)
        return self._read[1]

    def _element(self, name: str, index: int, size: int) -> bytes:
        raw = bpf.map_lookup(self.maps[name], number(index), size)
        assert raw is not None  # an array has all its elements
        return raw


class KernelSet:
    """One of the sets, by a descriptor of its pages, which never change."""

    def __init__(self, sets: KernelSets, which: int, fd: int) -> None:
        self._sets = sets
        self._which = which
        self._fd = fd

    @property
    def token(self) -> int:
        return bpf.map_info(self._fd).id

    def fileno(self) -> int:
        """The descriptor of its pages."""
        return self._fd

    @property
    def pages(self) -> int:
        """How many pages it has."""
        return bpf.map_info(self._fd).max_entries

    def chain(self, head: SetHead, source: IPAddress) -> list[tuple[int, int]]:
        family = 0 if source.version == 4 else 1

        def read(at: int, size: int) -> int:
            page = bpf.map_lookup(self._fd, number(at // PAGE), PAGE)
            assert page is not None  # an array has all its elements
            return int.from_bytes(page[at % PAGE : at % PAGE + size], sys.byteorder)

        value = find(
            lambda index: self._sets.slot(self._which, family, index),
            read,
            _unpack_table(head.tables[family]),
            source.version,
            int(source),
        )
        return read_chain(lambda index: self._sets.item(self._which, index), value, source.version)

    def ruleset(self, head: SetHead) -> RuleSet:
        return self._sets.described(self.token, head, self._fd)

    def ids(self, head: SetHead) -> Sequence[int]:
        """The end of the pages, see :meth:`.compiler.CompiledSet.all_pages`."""
        if not head.document_size:
            return []
        with _mapped_set(self._fd) as memory:
            (count,) = _WORD.unpack_from(memory, len(memory) - 8)
            ids = memory[len(memory) - 8 - 8 * count : len(memory) - 8]
        return [rule_id for (rule_id,) in _WORD.iter_unpack(ids)]

    def parts(self, head: SetHead) -> list[tuple[int, int, int]]:
        """Where all is that programs read of it: descriptors of maps, the first byte and how many, in the order of its
        checksum."""
        maps, sets = self._sets.maps, self._sets
        found = [(self._fd, 0, self.pages * PAGE)]
        for family in (0, 1):
            at = (2 * self._which + family) * sets.slot_count
            found.append((maps["slots"], at * abi.SLOT.size, _unpack_table(head.tables[family]).slots * abi.SLOT.size))
        at, count = self._which * sets.item_count, min(head.chain_items, sets.item_count)
        return [*found, (maps["chains"], at * abi.CHAIN_ITEM.size, count * abi.CHAIN_ITEM.size)]

    def checksum(self, head: SetHead) -> int:
        """Return the checksum of what there is now: a head has that of what was written."""
        found = 0
        for fd, at, size in self.parts(head):
            found = zlib.crc32(read_bytes(fd, at, size), found)
        return found

    def close(self) -> None:
        bpf.close(self._fd)


def read_bytes(fd: int, at: int, size: int) -> bytes:
    """Return bytes of an array map that has MMAPABLE; fewer at its end."""
    info = bpf.map_info(fd)
    with mmap.mmap(fd, info.max_entries * info.value_size, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
        return memory[at : at + size]


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


def _pack_table(t: Table) -> bytes:
    return abi.TABLE.pack(t.base, t.shift, t.slots, t.page, t.below, t.above, t.layout, 0, 0)


def _unpack_table(raw: bytes) -> Table:
    base, shift, slots, page, below, above, layout, *_ = abi.TABLE.unpack(raw)
    return Table(base, shift, slots, page, below, above, Layout(layout))
