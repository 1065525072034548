"""What the programs are told of the entries: which prefix lengths, ports, bans and failsafe there are to look up.

It is put into force before the first entry that needs it, and taken back only from a count of all entries: wherever a
writer is killed, the programs look for too much, never for too little.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
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
        self._most_ban_lengths = constant["MAX_BAN_LENGTHS"]

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

    def expect_ban(self, network: IPNetwork) -> None:
        """Have a ban looked for. Raises like :meth:`expect_ban_lengths`."""
        self.expect_ban_lengths({(network.version, network.prefixlen + MAPPED[network.version])})

    def expect_ban_lengths(self, lengths: Set[tuple[int, int]]) -> None:
        """Have bans of each (IP version, length in the IPv4-mapped form) looked for.

        Raises :class:`PolicyError` for more of them than there may be."""
        gate = self._tables.gate()
        wanted = _with_ban_lengths(gate.ban_lengths, lengths)
        if wanted == gate.ban_lengths and gate.flags & self._bans:
            return
        for version, found in zip((4, 6), wanted, strict=True):
            # One place is for exact addresses alone.
            others = [str(length - MAPPED[version]) for length in found if length != 128]
            if len(others) >= self._most_ban_lengths:
                raise PolicyError(
                    f"bans of IPv{version} have the prefix lengths {', '.join(others[:-1])} already: there can be no "
                    "other before those of one are gone (rama-ebpf bans lists them)"
                )
        self._tables.put_gate(replace(gate, flags=gate.flags | self._bans, ban_lengths=wanted))

    def looks_for_bans_of(self, network: IPNetwork) -> bool:
        """Whether a ban of this network would be found as things are."""
        return network.prefixlen + MAPPED[network.version] in self.ban_lengths(network.version)

    def ban_lengths(self, version: int) -> Sequence[int]:
        """Return the lengths, in the IPv4-mapped form, of the bans that are looked for, the longest first."""
        gate = self._tables.gate()
        return gate.ban_lengths[version == 6] if gate.flags & self._bans else ()

    def expect_failsafe(self) -> None:
        """Have the failsafe looked for."""
        gate = self._tables.gate()
        self._tell(gate.runtime, gate.flags | self._failsafe)

    def rebuild(self, ban_lengths: Set[tuple[int, int]] | None = None) -> bool:
        """Derive everything anew from the entries; return whether the programs have looked for too little.

        ``ban_lengths`` are those of all bans, (IP version, length in the IPv4-mapped form); without them what is looked
        for of bans stays.
        """
        runtime, flags = (0, 0), 0
        for (network, port), _ in self._tables.runtime.items():
            runtime = _with_length(runtime, network)
            flags |= self._ports * bool(port)
        if not self._tables.bans.is_empty():
            flags |= self._bans
        gate = self._tables.gate()
        if gate.failsafe_ports or self._tables.failsafe.networks(gate.failsafe_list):
            flags |= self._failsafe
        gate = self._tables.gate()
        lengths = gate.ban_lengths if ban_lengths is None else _with_ban_lengths(((), ()), ban_lengths)
        if lengths != gate.ban_lengths:
            self._tables.put_gate(replace(gate, ban_lengths=lengths))
        self._tell(runtime, flags)
        missed = any(set(now) - set(before) for now, before in zip(lengths, gate.ban_lengths, strict=True))
        return missed or bool(flags & ~gate.flags or runtime[0] & ~gate.runtime[0] or runtime[1] & ~gate.runtime[1])

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


def _with_ban_lengths(
    lengths: tuple[tuple[int, ...], tuple[int, ...]], more: Set[tuple[int, int]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    v4, v6 = (
        {*lengths[n], *(length for family, length in more if family == version)} for n, version in enumerate((4, 6))
    )
    return tuple(sorted(v4, reverse=True)), tuple(sorted(v6, reverse=True))
