"""The failsafe: networks and listeners' ports that no rule, ban or default can shut."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

from ..core.address import IPAddress
from ..kernel import abi
from ..kernel.gate_maps import MAX_FAILSAFE
from .derived import DerivedState
from .prefixes import IPNetwork, unmap_network
from .rule import PolicyError
from .tables import Tables

__all__ = ["Failsafe", "check_failsafe"]


def check_failsafe(networks: Sequence[IPNetwork], ports: Sequence[int] = ()) -> list[IPNetwork]:
    """Return the networks, each once. Raises :class:`PolicyError` for more, or more ports, than there may be."""
    most = abi.constants()["MAX_FAILSAFE_PORTS"]
    if len(ports) > most:
        raise PolicyError(f"{len(ports)} failsafe ports: use at most {most}")
    wanted = list(dict.fromkeys(map(unmap_network, networks)))
    if len(wanted) > MAX_FAILSAFE:
        raise PolicyError(f"{len(wanted)} failsafe networks: use at most {MAX_FAILSAFE}")
    return wanted


class Failsafe:
    """Changes are made under the policy's lock."""

    def __init__(self, tables: Tables, derived: DerivedState) -> None:
        self._tables = tables
        self._derived = derived

    def covers(self, source: IPAddress, port: int) -> bool:
        """Whether a connection of a source to a port gets in whatever else is said."""
        return port in self.ports() or self._tables.failsafe.covers(source)

    def networks(self) -> list[IPNetwork]:
        """Return its networks."""
        return self._tables.failsafe.networks()

    def ports(self) -> tuple[int, ...]:
        """Return its ports."""
        return self._tables.gate().failsafe_ports

    def replace(self, networks: Sequence[IPNetwork], ports: Sequence[int]) -> int:
        """Replace networks and ports; return the new revision. The new ones are added before the old ones go. Raises
        :class:`PolicyError` for too many, or OSError; then nothing is changed."""
        wanted, before = check_failsafe(networks, ports), self.networks()
        if wanted or ports:
            self._derived.expect_failsafe()
        try:
            self._exchange(before, wanted)
            gate = self._tables.gate()
            self._tables.put_gate(replace(gate, revision=gate.revision + 1, failsafe_ports=tuple(ports)))
        except OSError:
            with contextlib.suppress(OSError):
                self._exchange(wanted, before)
            raise
        return gate.revision + 1

    def _exchange(self, before: Sequence[IPNetwork], after: Sequence[IPNetwork]) -> None:
        for network in after:
            self._tables.failsafe.put(network)
        for network in set(before) - set(after):
            self._tables.failsafe.drop(network)
