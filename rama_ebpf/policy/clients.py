"""Who came to which listener and what became of them: a bounded record, for ``why`` and for what a load would change.

The gate's programs keep it where their verdicts take effect (``note_client`` in ``bpf/account.h``): who is let in
always, who is turned away up to a rate. It is private: the map is root's, as all of the policy is.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Protocol

from ..core.address import IPAddress, mapped, unmap
from ..kernel import abi, bpf
from ..kernel.gate_maps import GateMaps
from .counters import HOOKS
from .rule import Action, Stage, Verdict, boottime_ns
from .stored import StoredRule

__all__ = ["Client", "ClientTable", "KernelClients", "LocalClients"]


@dataclass(frozen=True, slots=True)
class Client:
    """What became of one source at one port of ours. Times are seconds of the wall clock, 0 for never. ``rule`` (the
    name; "" if it is gone, or none decided), ``stage``, ``action`` and ``hook`` are of the last time it was denied."""

    source: IPAddress
    port: int
    let_in: int = 0
    let_in_last: float = 0.0
    denied: int = 0
    denied_last: float = 0.0
    rule: str = ""
    stage: Stage = Stage.NONE
    action: Action = Action.NONE
    hook: str = ""

    @property
    def last(self) -> float:
        """When it was seen last."""
        return max(self.let_in_last, self.denied_last)

    @property
    def was_let_in(self) -> bool:
        """Whether that is what became of it last."""
        return self.let_in_last > self.denied_last


class ClientTable(Protocol):
    """The record."""

    def all(self) -> list[Client]:
        """Return everybody. Raises OSError."""

    def of(self, source: IPAddress) -> list[Client]:
        """Return what is known of one source, a row for each port. Raises OSError."""

    def missed(self) -> int:
        """Return how many denials were not kept, because there were too many at once."""


class KernelClients:
    """The record in the maps of a gate. ``rule`` returns a rule by its id."""

    def __init__(self, maps: GateMaps, rule: Callable[[int], StoredRule | None]) -> None:
        self._maps = maps
        self._rule = rule

    def all(self) -> list[Client]:
        return self._read(self._rows())

    def of(self, source: IPAddress) -> list[Client]:
        wanted = mapped(source)
        return self._read(row for row in self._rows() if row[0].startswith(wanted))

    def missed(self) -> int:
        raw = bpf.map_lookup(self._maps["client_meter"], bytes(4), abi.EVENT_METER.size * abi.possible_cpus())
        assert raw is not None  # an array has all its elements
        return sum(lost for _, lost in abi.EVENT_METER.iter_unpack(raw))

    def _rows(self) -> Iterable[tuple[bytes, bytes]]:
        return bpf.map_lookup_batch(self._maps["clients"], abi.CLIENT_KEY.size, abi.CLIENT.size)

    def _read(self, rows: Iterable[tuple[bytes, bytes]]) -> list[Client]:
        offset = time.time() - boottime_ns() / 1e9
        names: dict[int, StoredRule | None] = {}
        found = []
        for key, value in rows:
            packed, port, _ = abi.CLIENT_KEY.unpack(key)
            let_in, let_in_last, denied, denied_last, rule, stage, action, hook, _ = abi.CLIENT.unpack(value)
            if rule not in names:
                names[rule] = self._rule(rule) if rule else None
            last = denied_last / 1e9 + offset if denied_last else 0.0
            known = names[rule]
            if known is not None and known.created / 1e9 > last + 1:
                known = None  # the id is another rule's by now
            found.append(
                Client(
                    unmap(ip_address(packed)),
                    port,
                    let_in,
                    let_in_last / 1e9 + offset if let_in_last else 0.0,
                    denied,
                    last,
                    "" if known is None else known.name,
                    Stage(stage),
                    Action(action),
                    HOOKS[hook] if denied else "",
                )
            )
        return found


class LocalClients:
    """The record where the policy is in this process, of as many as in the kernel."""

    def __init__(self, most: int | None = None) -> None:
        self._most = abi.constants()["MAX_CLIENTS"] if most is None else most
        self._rows: OrderedDict[tuple[IPAddress, int], Client] = OrderedDict()

    def note(self, verdict: Verdict, source: IPAddress, port: int) -> None:
        """Keep what became of a source. One thread at a time."""
        key, now = (source, port), time.time()
        was = self._rows.pop(key, None) or Client(source, port)
        if verdict.allowed:
            new = Client(
                source,
                port,
                was.let_in + 1,
                now,
                was.denied,
                was.denied_last,
                was.rule,
                was.stage,
                was.action,
                was.hook,
            )
        else:
            rule = verdict.rule if verdict.stage in (Stage.RULE, Stage.LIMIT) else ""
            last = (rule, verdict.stage, verdict.action, "accept")
            new = Client(source, port, was.let_in, was.let_in_last, was.denied + 1, now, *last)
        if len(self._rows) >= self._most:
            self._rows.popitem(last=False)
        self._rows[key] = new

    def all(self) -> list[Client]:
        return list(self._rows.values())

    def of(self, source: IPAddress) -> list[Client]:
        return [row for row in self.all() if row.source == source]

    def missed(self) -> int:
        return 0
