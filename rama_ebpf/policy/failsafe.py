"""The failsafe: networks and listeners' ports that no rule, ban or default can shut."""

from __future__ import annotations

import logging
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

log = logging.getLogger(__name__)


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
        gate = self._tables.gate()
        return port in gate.failsafe_ports or self._tables.failsafe.covers(gate.failsafe_list, source)

    def networks(self) -> list[IPNetwork]:
        """Return its networks."""
        return self._tables.failsafe.networks(self._tables.gate().failsafe_list)

    def ports(self) -> tuple[int, ...]:
        """Return its ports."""
        return self._tables.gate().failsafe_ports

    def replace(self, networks: Sequence[IPNetwork], ports: Sequence[int]) -> int:
        """Replace networks and ports; return the new revision. The new ones are made a list of their own, which comes
        into force as a whole. Raises :class:`PolicyError` for too many, or OSError; then nothing is changed."""
        wanted = check_failsafe(networks, ports)
        if wanted or ports:
            self._derived.expect_failsafe()
        which = 1 - self._tables.gate().failsafe_list
        try:
            self._tables.failsafe.fill(which, wanted)
            gate = self._tables.gate()
            revision = gate.revision + 1
            new = replace(gate, revision=revision, failsafe_list=which, failsafe_ports=tuple(ports))
            self._tables.put_gate(new)
        finally:
            self.tidy()
        return revision

    def tidy(self) -> None:
        """Forget the list that is not in force, of the change before or of a writer that was killed, when nobody can be
        reading it. What the kernel refuses is logged, and done by the next change or sweep."""
        try:
            idle = 1 - self._tables.gate().failsafe_list
            if self._tables.failsafe.networks(idle):
                self._tables.sets.wait_for_readers()
                self._tables.failsafe.fill(idle, ())
        except OSError as error:
            log.warning("a failsafe that is not in force is not forgotten yet: %s", error)
