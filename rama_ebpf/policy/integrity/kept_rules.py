"""The rules at run time on disk: the kernel has them, and not those that were taken back."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from typing import Final

from ...kernel import abi
from ..image import RuntimeRule
from ..kept_walk import KeptWalk, Suspect
from ..kernel_store import KernelStore
from ..kernel_tables import packed_rule, runtime_key
from ..rule import PRECEDENCE, Action, boottime_ns
from ..tables import Place
from .difference import Difference, slice_of
from .rows import MAPPED_IPV4, RuleRows

__all__ = ["KeptCheck"]

_MOST_OF_NOBODY: Final = 256
"""Rules that nobody made are taken away one by one in a call; the next round has the rest."""


class KeptCheck:
    """Close it when done."""

    def __init__(self, store: KernelStore, rows: RuleRows) -> None:
        self._store = store
        self._rows = rows
        self._walk: KeptWalk | None = None

    def close(self) -> None:
        """Let go of the file."""
        if self._walk is not None:
            self._walk.close()

    def look(self, least: int, rounds: int) -> Iterator[Difference]:
        """Look at a slice."""
        path = self._store.repairs.rules_on_disk
        if path is None:  # the disk is behind, and no witness
            return
        if self._walk is None:
            self._walk = KeptWalk(path, self._agrees, self._surely_agrees)
        kept = self._walk
        for suspect in kept.next(slice_of(kept.known, least, rounds)):
            network, port = suspect.place
            where = f"{network} port {port}" if port else str(network)
            has = (
                "is on disk, and not like that in the kernel"
                if suspect.rule
                else "was taken back, and is in the kernel"
            )
            yield Difference(
                "rule",
                f"the rule at run time for {where} {has}",
                lambda suspect=suspect: self._is_apart(kept, suspect),  # type: ignore[misc]
                lambda suspect=suspect: self._store.repairs.put_back(suspect.place, suspect.rule),  # type: ignore[misc]
            )
        yield from self._nobodys(kept)
        kept.end()

    def _nobodys(self, kept: KeptWalk) -> Iterator[Difference]:
        """Rules in the kernel that are not on disk: another program has written them."""
        if not kept.is_over:
            return  # what is on disk is not known yet, and all rules of the kernel are not read for nothing
        suspects = kept.lacks(place for place, _ in self._store.tables.runtime.items())
        known = self._store.repairs.places_on_disk() if suspects else set()
        for place in suspects[:_MOST_OF_NOBODY]:
            if place not in known:
                network, port = place
                where = f"{network} port {port}" if port else str(network)
                yield Difference(
                    "rule",
                    f"the rule at run time for {where} is in the kernel, and not on disk: another program made it",
                    lambda place=place: self._is_nobodys(kept, place),  # type: ignore[misc]
                    lambda place=place: self._store.repairs.put_back(place, None),  # type: ignore[misc]
                )

    def _is_nobodys(self, kept: KeptWalk, place: Place) -> bool:
        if self._store.repairs.rules_on_disk is None or not kept.is_whole():
            return False
        value = self._rows.place(runtime_key(place))
        rule = None if value is None else self._store.stored_rule(int.from_bytes(value, sys.byteorder))
        if rule is not None and rule.expires is not None and rule.expires <= boottime_ns():
            return False  # the next sweep forgets it
        return value is not None

    def _is_apart(self, kept: KeptWalk, suspect: Suspect) -> bool:
        if self._store.repairs.rules_on_disk is None or not kept.is_whole():
            return False
        one = suspect.rule
        if one is not None and one.rule.expires is not None and one.rule.expires <= boottime_ns():
            return False
        return not self._agrees(suspect.place, one)

    def _surely_agrees(self, row: Mapping[str, object]) -> bool:
        """The usual row of this boot, read without making a rule of it."""
        source, port = str(row["source"]), row["port"]
        address, _, length = source.partition("/")
        try:
            if ":" in address:
                key = abi.RUNTIME_KEY.pack(int(length), port, socket.inet_pton(socket.AF_INET6, address))
            else:
                packed = MAPPED_IPV4 + socket.inet_pton(socket.AF_INET, address)
                key = abi.RUNTIME_KEY.pack(int(length) + 96, port, packed)
            value = self._rows.place(key)
            if value is None or row.get("removed"):
                return value is None and bool(row.get("removed"))
            if row["limit"] is not None or row["dry_run"] or row["until"] is not None:
                return False
            action = Action[str(row["action"]).upper()]
            order = 8 * (port != 0) + 2 * PRECEDENCE[action] + 1
            flags = 0 if port else abi.constants()["RULE_CERTAIN"]
            return self._rows.row(value) == abi.RULE.pack(action, flags, 0, 0, 0, port, order, 0)
        except (LookupError, ValueError, TypeError, OSError, struct.error):
            return False

    def _agrees(self, place: Place, one: RuntimeRule | None) -> bool:
        value = self._rows.place(runtime_key(place))
        if value is None or one is None:
            return value is None and one is None
        row = self._rows.row(value)
        return row == packed_rule(one.rule)
