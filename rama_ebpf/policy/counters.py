"""What the gate has counted: verdicts by hook, handshakes that finished, connections that were accepted."""

from __future__ import annotations

import itertools
import sys
from ipaddress import ip_address
from typing import Final, Protocol

from ..core.address import SocketAddress, unmap
from ..kernel import abi, bpf
from ..kernel.bindings import bound_examples
from ..kernel.gate_maps import GateMaps
from .rule import Action, Stage

__all__ = ["HOOKS", "GateCounters", "HasMaps", "number"]

HOOKS: Final = tuple(
    name.removeprefix("HOOK_").lower()
    for name, _ in sorted(abi.constants().items(), key=lambda item: item[1])
    if name.startswith("HOOK_") and name != "HOOK_COUNT"
)
"""Where a verdict can take effect, in the order of ``enum hook``."""


def number(value: int) -> bytes:
    """A 32-bit key or value of a map."""
    return value.to_bytes(4, sys.byteorder)


class HasMaps(Protocol):
    """Whoever has a gate's maps open, and may open others in their place."""

    @property
    def maps(self) -> GateMaps: ...


class GateCounters:
    """Reads the counters of the maps that ``source`` has open."""

    def __init__(self, source: HasMaps) -> None:
        self._source = source

    def totals(self) -> dict[tuple[str, str, str], int]:
        """Return how many verdicts took effect by (hook, stage, action), in lower case; zero counts are left out."""
        constant = abi.constants()
        totals: dict[tuple[str, str, str], int] = {}
        for (hook, name), stage, action in itertools.product(enumerate(HOOKS), Stage, Action):
            index = (hook * constant["STAGE_COUNT"] + stage) * constant["ACTION_COUNT"] + action
            value = self._total("gate_stats", index)
            if value:
                totals[name, stage.name.lower(), action.name.lower()] = value
        return totals

    def guarded(self, port: int | None = None) -> list[SocketAddress]:
        """Return the addresses of the listeners that the gate knows, or of those with a ``port``; of what is bound to
        prefixes and ranges of ports an example each."""
        maps, home = self._source.maps, abi.constants()["LISTENER_HOME"]
        rows = bpf.map_lookup_batch(maps["listeners"], abi.LISTENER_KEY.size, abi.LISTENER.size)
        keys = [abi.LISTENER_KEY.unpack(key) for key, value in rows if abi.LISTENER.unpack(value)[2] != home]
        found = [SocketAddress(unmap(ip_address(packed)), at) for packed, at, _ in keys if port in (None, at)]
        return [*found, *(bound_examples(maps, port) if len(keys) < len(rows) else ())]

    @property
    def identity(self) -> int:
        """The id of the map ``gate``, by which it is known whether a server uses these maps."""
        return bpf.map_info(self._source.maps["gate"]).id

    def silent_rejects(self) -> int:
        """How many SYNs were to be rejected and got no RST, because the rate of those was used up."""
        return self._total("silent_rejects", 0)

    def established(self, listener: int) -> int:
        """How many handshakes finished on a listener, by its index."""
        return self._total("established", listener)

    def accepted(self, listener: int) -> int:
        """How many connections accept(2) returned on a listener, by its index, over all workers."""
        per_listener = abi.constants()["SOCKETS_PER_LISTENER"]
        total = 0
        for index in range(listener * per_listener, (listener + 1) * per_listener):
            raw = bpf.map_lookup(self._source.maps["accepted"], number(index), 8)
            assert raw is not None
            total += int.from_bytes(raw, sys.byteorder)
        return total

    def _total(self, name: str, index: int) -> int:
        raw = bpf.map_lookup(self._source.maps[name], number(index), 8 * abi.possible_cpus())
        assert raw is not None
        return sum(int.from_bytes(raw[i : i + 8], sys.byteorder) for i in range(0, len(raw), 8))
