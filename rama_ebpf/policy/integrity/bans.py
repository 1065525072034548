"""Bans: the programs find those in the kernel, and the kernel has those on disk."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Final

from ...kernel import abi, bpf
from ...kernel.map_walk import MapWalk
from ...kernel.witness import SourceQuestion, Witness
from ..ban_record import ban_network
from ..ban_snapshot import SnapshotDamaged
from ..ban_walk import BanWalk
from ..kernel_store import KernelStore
from ..rule import boottime_ns, source_text
from .difference import ANY_PORT, BEFORE_RULES, Difference, slice_of

__all__ = ["BanCheck"]

_MOST_LOST: Final = 32
"""Lost bans that are put back one by one in a call; the next call has the rest."""


class BanCheck:
    """Looks at slices of the map and of the disk. Close it when done."""

    def __init__(self, store: KernelStore, witness: Witness) -> None:
        self._store = store
        self._witness = witness
        self._walk = MapWalk(store.tables.maps["bans"], abi.BAN_KEY.size, abi.BAN.size)
        self._on_disk: BanWalk | None = None

    def close(self) -> None:
        """Let go of the files."""
        if self._on_disk is not None:
            self._on_disk.close()

    def look(self, least: int, rounds: int) -> Iterator[Difference]:
        """Look at a slice of each."""
        on_disk = self._on_disk = self._on_disk or self._store.repairs.walk_bans()
        known = max(self._walk.known, 0 if on_disk is None else on_disk.known)
        rows = self._walk.next(slice_of(known, least, rounds))
        now = boottime_ns()
        keys = [key for key, value in rows if _lasts(value, now)]
        answers = self._witness.ask(SourceQuestion(key[:16], ANY_PORT) for key in keys)
        for key, answer in zip(keys, answers, strict=True):
            if answer.stage not in BEFORE_RULES:
                yield Difference(
                    "ban",
                    f"the programs do not find the ban of {source_text(ban_network(key))}",
                    lambda key=key: self._is_missed_ban(key),  # type: ignore[misc]
                    self._store.rebuild,
                )
        if on_disk is not None and self._store.repairs.bans_on_disk_are_all:
            yield from self._lost(on_disk, slice_of(known, least, rounds))

    def _lost(self, walk: BanWalk, count: int) -> Iterator[Difference]:
        try:
            ended = walk.next(count)
        except SnapshotDamaged:
            return  # the next start says so, and keeps it aside
        if ended is None:
            return
        of_round, lost = ended
        for ban in lost[:_MOST_LOST]:
            yield Difference(
                "ban",
                f"the ban of {ban.network} is on disk, and not in the kernel",
                lambda ban=ban: of_round.is_lost(ban),  # type: ignore[misc]
                lambda ban=ban: self._store.repairs.bring_back_ban(ban),  # type: ignore[misc]
            )
        for ban in self._store.repairs.unknown_bans(of_round)[:_MOST_LOST]:
            yield Difference(
                "ban",
                f"the ban of {ban.source} is in the kernel, and not on disk: another program made it",
                lambda ban=ban: self._store.repairs.is_unknown_ban(of_round, ban),  # type: ignore[misc]
                lambda ban=ban: self._store.repairs.take_ban_away(ban),  # type: ignore[misc]
            )

    def _is_missed_ban(self, key: bytes) -> bool:
        value = bpf.map_lookup(self._store.tables.maps["bans"], key, abi.BAN.size)
        if value is None or not _lasts(value, boottime_ns()):
            return False
        (answer,) = self._witness.ask([SourceQuestion(key[:16], ANY_PORT)])
        return answer.stage not in BEFORE_RULES


def _lasts(ban: bytes, now: int) -> bool:
    expires = int.from_bytes(ban[:8], sys.byteorder)
    return not expires or now < expires
