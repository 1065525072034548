"""Bans: the programs find those in the kernel, and the kernel has those on disk."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Final

from ...kernel import abi, bpf
from ...kernel.map_walk import MapWalk
from ...kernel.witness import SourceQuestion, Witness
from ..ban_record import ban_network
from ..kernel_store import KernelStore
from ..rule import boottime_ns, source_text
from .difference import ANY_PORT, BEFORE_RULES, Difference, slice_of

__all__ = ["BanCheck"]

_LOOKS_AT_FEW_BANS: Final = 6
"""In so many calls all bans are compared with the disk, if they are few."""
_BANS_IN_A_ROUND: Final = 100_000
"""So many are compared in an hour."""
_MOST_LOST: Final = 32
"""Lost bans that are put back one by one in a call; the next call has the rest."""


class BanCheck:
    """Looks at slices of the map, and at all of the disk."""

    def __init__(self, store: KernelStore, witness: Witness) -> None:
        self._store = store
        self._witness = witness
        self._walk = MapWalk(store.tables.maps["bans"], abi.BAN_KEY.size, abi.BAN.size)
        self._until_bans = 0

    def look(self, least: int, rounds: int) -> Iterator[Difference]:
        """Look at a slice, and now and then at the disk."""
        rows = self._walk.next(slice_of(self._walk.known, least, rounds))
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
        yield from self._lost(rounds)

    def _lost(self, rounds: int) -> Iterator[Difference]:
        """Compare all with the disk, now and then: the more there are, the less often."""
        self._until_bans -= 1
        if self._until_bans > 0:
            return
        count, lost = self._store.lost_bans()
        self._until_bans = max(_LOOKS_AT_FEW_BANS, count * rounds // _BANS_IN_A_ROUND)
        for ban in lost[:_MOST_LOST]:
            yield Difference(
                "ban",
                f"the ban of {ban.network} is on disk, and not in the kernel",
                lambda ban=ban: ban.network in {one.network for one in self._store.lost_bans()[1]},  # type: ignore[misc]
                lambda ban=ban: self._store.bring_back_ban(ban),  # type: ignore[misc]
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
