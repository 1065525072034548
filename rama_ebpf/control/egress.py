"""The kernel's half of the egress policy, kept as the configuration and the host's nameservers say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from ..core.address import IPAddress
from ..loader import Gate
from ..policy.egress import EgressPolicy
from ..policy.egress_map import put_egress, system_nameservers, unzoned
from ..policy.rule import PolicyError

__all__ = ["EgressBackstop"]

log = logging.getLogger("rama_ebpf")

_NAMESERVER_SECONDS: Final = 2.0


class EgressBackstop:
    """What the programs of ``gate`` enforce; without a gate, nothing."""

    def __init__(self, gate: Gate | None) -> None:
        self._gate = gate
        self._policy = EgressPolicy()
        self._given: Sequence[IPAddress] = ()
        self._nameservers = [] if gate is None else system_nameservers()

    def put(self, policy: EgressPolicy, servers: Sequence[IPAddress] = ()) -> None:
        """Enforce ``policy`` from now on, with the way to ``servers`` open, or if there are none to those of the host.

        Raises :class:`PolicyError` if it has too many networks, or OSError."""
        self._policy, self._given = policy, servers
        if self._gate is not None:
            self._nameservers = self._wanted()
        if self._gate is not None:
            put_egress(self._gate.maps, policy, self._nameservers)

    def _wanted(self) -> list[IPAddress]:
        return [unzoned(server) for server in self._given] if self._given else system_nameservers()

    async def follow_nameservers(self) -> None:
        """Keep the workers' way to the nameservers open when the host gets others, as by DHCP or a VPN."""
        while self._gate is not None:
            await asyncio.sleep(_NAMESERVER_SECONDS)
            try:
                found = self._wanted()
                if found != self._nameservers:
                    self.put(self._policy, self._given)
                    log.info("nameservers are now %s", ", ".join(map(str, found)))
            except (PolicyError, OSError) as error:
                log.error("workers may not reach the nameservers: %s", error)
