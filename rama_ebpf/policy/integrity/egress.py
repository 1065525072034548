"""The egress policy in the kernel: the rows that were put and no others, and the grants of who reads feeds."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Final

from ...kernel import abi
from ...kernel.feed_cgroup import Grants
from ...kernel.map_walk import MapWalk
from ..egress_map import EgressTable, egress_network
from .difference import Difference, slice_of

__all__ = ["EgressCheck"]

_LEAST: Final = 4096
_ROUNDS: Final = 3
"""Slices in which all rows are looked at: whatever their number, what is lost is missed by the end of the next round,
which is within a minute."""


class EgressCheck:
    """Looks at ``egress`` in slices, and at ``grants`` as a whole. To be used by one thread at a time."""

    def __init__(self, table: EgressTable, grants: Grants) -> None:
        self._table = table
        self._grants = grants
        self._round: tuple[Mapping[bytes, int], MapWalk] | None = None
        self._met: set[bytes] = set()

    def look(self) -> Iterator[Difference]:
        """Look at the next slice. Raises OSError."""
        yield from self._look_at_grants()
        wanted = self._table.wanted
        if wanted is None:
            return
        if self._round is None or self._round[0] is not wanted:
            self._round = wanted, MapWalk(self._table.fd, abi.FAILSAFE_KEY.size, 4)
            self._met.clear()
        walk = self._round[1]
        rows = walk.next(slice_of(max(walk.known, len(wanted)), _LEAST, _ROUNDS))
        self._met.update(key for key, _ in rows)
        suspects = {key for key, value in rows if wanted.get(key, -1) != int.from_bytes(value, sys.byteorder)}
        if walk.is_at_end:
            suspects |= wanted.keys() - self._met
            self._met.clear()
        if suspects:
            yield Difference(
                "egress",
                f"the egress policy is not what was put: another program wrote {_named(suspects)}",
                lambda: self._table.differs(wanted),
                self._table.restore,
            )

    def _look_at_grants(self) -> Iterator[Difference]:
        for key, what in self._grants.differing().items():
            yield Difference(
                "egress",
                f"another program wrote where children that read feeds may connect to: {what}",
                lambda key=key: key in self._grants.differing(),  # type: ignore[misc]
                self._grants.restore,
            )


def _named(keys: Collection[bytes]) -> str:
    first = str(egress_network(min(keys)))
    return first if len(keys) == 1 else f"{first} and {len(keys) - 1} more"
