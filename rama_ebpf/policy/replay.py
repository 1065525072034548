"""What a set would do to those who came: asked before it is loaded.

Of everybody who came within a span (:mod:`.clients`) it is looked who is let in now and would be turned away (*cut*),
and who was turned away and would be let in. Both are judged by the whole policy, with failsafe, bans and rules
at run time; rates are taken as within their limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..core.address import IPAddress
from .clients import Client
from .rule import Verdict

__all__ = ["Attempt", "Replayed", "replay"]

Attempt = tuple[IPAddress, int]
"""A client and the listener's port it came to."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """The outcome. ``cut`` and ``let_in`` are rows of the record, with the rule that would decide, those who came
    most often first; a client with rows for several ports is counted once in ``connected`` and by :meth:`count`."""

    clients: int
    """who came at all"""
    connected: int
    """who was let in at least once"""
    cut: tuple[tuple[Client, str], ...]
    let_in: tuple[tuple[Client, str], ...]

    @staticmethod
    def count(rows: Iterable[tuple[Client, str]]) -> int:
        """How many clients there are in rows."""
        return len({client.source for client, _ in rows})

    @property
    def share(self) -> float:
        """Which part of those who connected would be cut, 0 to 1."""
        return self.count(self.cut) / self.connected if self.connected else 0.0

    def rules(self) -> Mapping[str, int]:
        """How many clients each rule would cut, the most first."""
        found: dict[str, set[IPAddress]] = {}
        for client, rule in self.cut:
            found.setdefault(rule, set()).add(client.source)
        return {rule: len(sources) for rule, sources in sorted(found.items(), key=lambda item: -len(item[1]))}


def replay(
    record: Iterable[Client],
    since: float,
    present: Callable[[Sequence[Attempt]], Sequence[Verdict]],
    wanted: Callable[[IPAddress, int], Verdict],
) -> Replayed:
    """Judge everybody who came at or after ``since`` (wall clock, seconds). ``present`` says what is decided now,
    ``wanted`` what would be."""
    rows = [client for client in record if client.last >= since]
    now = present([(client.source, client.port) for client in rows])
    cut, let_in = [], []
    for client, verdict in zip(rows, now, strict=True):
        new = wanted(client.source, client.port)
        if new.allowed == verdict.allowed:
            continue
        if verdict.allowed and client.let_in_last >= since:
            cut.append((client, new.rule))
        elif new.allowed and client.denied_last >= since:
            let_in.append((client, new.rule))
    cut.sort(key=lambda row: (-row[0].let_in, int(row[0].source)))
    let_in.sort(key=lambda row: (-row[0].denied, int(row[0].source)))
    connected = {client.source for client in rows if client.let_in_last >= since}
    return Replayed(len({client.source for client in rows}), len(connected), tuple(cut), tuple(let_in))
