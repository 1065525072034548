"""What the programs are told of the entries: which prefix lengths, ports, bans and failsafe there are to look up.

It is put into force before the first entry that needs it, and taken back only from a count of all entries: wherever a
writer is killed, the programs look for too much, never for too little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..kernel import abi
from .compiler import MAPPED
from .prefixes import IPNetwork
from .rule import PolicyError
from .tables import Tables

__all__ = ["DerivedState"]


class DerivedState:
    """The flags and the prefix lengths in the record."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        constant = abi.constants()
        self._bans, self._failsafe = constant["GATE_BANS"], constant["GATE_FAILSAFE"]
        self._ports = constant["GATE_RUNTIME_PORTS"]

    def expect_rule(self, network: IPNetwork, port: int) -> None:
        """Have a rule of the runtime layer looked for. Raises :class:`PolicyError` for one prefix length too many."""
        lengths, most = self.lengths(network.version), self._tables.most_lengths
        if len(lengths) >= most and network.prefixlen not in lengths:
            self.rebuild()
            lengths = self.lengths(network.version)
            if len(lengths) >= most:
                raise PolicyError(
                    f"cannot add {network}: rules at run time have {len(lengths)} different prefix lengths already; "
                    f"use one of those, or load a set (policy load)"
                )
        gate = self._tables.gate()
        self._tell(_with_length(gate.runtime, network), gate.flags | self._ports * bool(port))

    def expect_bans(self) -> None:
        """Have bans looked for."""
        gate = self._tables.gate()
        self._tell(gate.runtime, gate.flags | self._bans)

    def expect_failsafe(self) -> None:
        """Have the failsafe looked for."""
        gate = self._tables.gate()
        self._tell(gate.runtime, gate.flags | self._failsafe)

    def rebuild(self) -> bool:
        """Derive everything anew from the entries; return whether the programs have looked for too little."""
        runtime, flags = (0, 0), 0
        for (network, port), _ in self._tables.runtime.items():
            runtime = _with_length(runtime, network)
            flags |= self._ports * bool(port)
        if not self._tables.bans.is_empty():
            flags |= self._bans
        if self._tables.gate().failsafe_ports or self._tables.failsafe.networks():
            flags |= self._failsafe
        gate = self._tables.gate()
        self._tell(runtime, flags)
        return bool(flags & ~gate.flags or runtime[0] & ~gate.runtime[0] or runtime[1] & ~gate.runtime[1])

    def lengths(self, version: int) -> Sequence[int]:
        """Return the prefix lengths that the runtime layer has, the longest first."""
        bits = self._tables.gate().runtime[version == 6] >> MAPPED[version]
        return [length for length in range(bits.bit_length() - 1, -1, -1) if bits >> length & 1]

    def _tell(self, runtime: tuple[int, int], flags: int) -> None:
        gate = self._tables.gate()
        if (runtime, flags) != (gate.runtime, gate.flags):
            self._tables.put_gate(replace(gate, runtime=runtime, flags=flags))


def _with_length(runtime: tuple[int, int], network: IPNetwork) -> tuple[int, int]:
    bit = 1 << network.prefixlen + MAPPED[network.version]
    return (runtime[0] | bit, runtime[1]) if network.version == 4 else (runtime[0], runtime[1] | bit)
