"""The kernel's half of the egress policy, kept as the configuration and the host's nameservers say."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from ..loader import Gate
from ..policy.egress import EgressPolicy
from ..policy.egress_map import put_egress, system_nameservers
from ..policy.rule import PolicyError

__all__ = ["EgressBackstop"]

log = logging.getLogger("rama_ebpf")

_NAMESERVER_SECONDS: Final = 2.0


class EgressBackstop:
    """What the programs of ``gate`` enforce; without a gate, nothing."""

    def __init__(self, gate: Gate | None) -> None:
        self._gate = gate
        self._policy = EgressPolicy()
        self._nameservers = [] if gate is None else system_nameservers()

    def put(self, policy: EgressPolicy) -> None:
        """Enforce ``policy`` from now on. Raises :class:`PolicyError` if it has too many networks, or OSError."""
        self._policy = policy
        if self._gate is not None:
            put_egress(self._gate.maps, policy, self._nameservers)

    async def follow_nameservers(self) -> None:
        """Keep the workers' way to the nameservers open when the host gets others, as by DHCP or a VPN."""
        while self._gate is not None:
            await asyncio.sleep(_NAMESERVER_SECONDS)
            try:
                found = system_nameservers()
                if found != self._nameservers:
                    self._nameservers = found
                    self.put(self._policy)
                    log.info("nameservers are now %s", ", ".join(map(str, found)))
            except (PolicyError, OSError) as error:
                log.error("workers may not reach the nameservers: %s", error)
