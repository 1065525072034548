"""The egress policy, kept as the configuration, the host's name servers and its addresses say: in the kernel, and in
workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from ..core.address import IPAddress, SocketAddress
from ..core.binding import Binding
from ..kernel.own_addresses import UNSPECIFIED, local_networks, watch_addresses
from ..loader import Gate
from ..policy.egress import EgressPolicy, OwnHost
from ..policy.egress_map import EgressTable, nameservers, system_conf, unzoned
from ..policy.rule import PolicyError
from ..process import WorkerObserver, WorkerProcess
from ..process.plan import Json

__all__ = ["Egress"]

log = logging.getLogger("rama_ebpf")

_NAMESERVER_SECONDS: Final = 2.0
_ADDRESS_SECONDS: Final = 10.0
"""How often local routes are read without an event: there is none of them alone."""
_RETRY_SECONDS: Final = 0.5

IPNetwork = IPv4Network | IPv6Network


class Egress(WorkerObserver):
    """What the programs of ``gate`` enforce, if there is one, and what workers are told of the host's addresses.

    What cannot be told of them is said, and those that were known stay: rather one too many is denied.
    """

    def __init__(self, gate: Gate | None) -> None:
        self._gate = gate
        self.table = None if gate is None else EgressTable(gate.maps)
        """What the programs are told."""
        self._policy = EgressPolicy()
        self._given: Sequence[IPAddress] = ()
        self._nameservers: list[IPAddress] = []
        self._conf_trouble = ""
        self._networks: frozenset[IPNetwork] = UNSPECIFIED
        self._trouble = ""
        self._workers: set[WorkerProcess] = set()
        self._take(self._look())

    # -- the policy ----------------------------------------------------------------------------------------------

    def put(self, policy: EgressPolicy, servers: Sequence[IPAddress] = ()) -> None:
        """Enforce ``policy`` from now on, with the way to ``servers`` open, or if there are none to those of the host.

        Raises :class:`PolicyError` if it has too many networks, or OSError."""
        self._policy, self._given = policy, servers
        self._nameservers = self._wanted_nameservers()
        self._enforce()

    def _enforce(self) -> None:
        if self.table is not None:
            self.table.put(replace(self._policy, host=OwnHost(self._networks)), self._nameservers)

    @staticmethod
    def parameters(
        policy: EgressPolicy,
        networks: Iterable[IPNetwork],
        listeners: Iterable[SocketAddress],
        bindings: Iterable[Binding] = (),
    ) -> Json:
        """Return a policy over this host as workers are told it; :func:`.worker.application` reads it."""
        return {
            "allow": list(map(str, policy.allow)),
            "deny": list(map(str, policy.deny)),
            "own_addresses": policy.own_addresses,
            "own_listeners": policy.own_listeners,
            "networks": list(map(str, networks)),
            "listeners": [(str(address.ip), address.port) for address in listeners],
            "bindings": [(str(one.network), one.first, one.last) for one in bindings],
        }

    # -- name servers --------------------------------------------------------------------------------------------

    def _wanted_nameservers(self) -> list[IPAddress]:
        if self._gate is None:
            return []
        if self._given:
            return [unzoned(server) for server in self._given]
        try:
            conf = system_conf()
        except OSError as error:
            kept = self._nameservers or nameservers("")
            self._say_of_conf(f"it cannot be read ({error.strerror or error}): {', '.join(map(str, kept))} is asked")
            return kept
        self._say_of_conf("; ".join(conf.mistakes))
        return [unzoned(server) for server in conf.servers]

    def _say_of_conf(self, trouble: str) -> None:
        if trouble and trouble != self._conf_trouble:
            log.warning("/etc/resolv.conf: %s", trouble)
        self._conf_trouble = trouble

    async def follow_nameservers(self) -> None:
        """Keep the workers' way to the name servers open when the host gets others, as by DHCP or a VPN."""
        hindered = ""
        while self._gate is not None:
            await asyncio.sleep(_NAMESERVER_SECONDS)
            if self.table is None or self.table.wanted is None:
                continue  # no revision is in force yet
            try:
                found = self._wanted_nameservers()
                if found != self._nameservers:
                    self.put(self._policy, self._given)
                    log.info("nameservers are now %s", ", ".join(map(str, found)))
            except (PolicyError, OSError) as error:
                if str(error) != hindered:
                    log.error("workers may not reach the nameservers: %s", error)
                hindered = str(error)
            else:
                hindered = ""

    # -- the host's own addresses --------------------------------------------------------------------------------

    @property
    def networks(self) -> frozenset[IPNetwork]:
        """What this host delivers to itself."""
        return self._networks

    def _look(self) -> frozenset[IPNetwork] | None:
        try:
            found = local_networks()
        except OSError as error:
            self._say(f"cannot tell this host's own addresses, so those that are new are not denied: {error}")
            return None
        self._say("")
        return found

    def _say(self, trouble: str) -> None:
        if trouble and trouble != self._trouble:
            log.error("egress: %s", trouble)
        self._trouble = trouble

    def _take(self, found: frozenset[IPNetwork] | None) -> bool:
        """Whether it is news."""
        if found is None or found == self._networks:
            return False
        self._networks = found
        return True

    async def follow_addresses(self) -> None:
        """Deny the host's addresses as they come, and no longer as they go."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        with contextlib.ExitStack() as held:
            try:
                sock = held.enter_context(watch_addresses())
                loop.add_reader(sock.fileno(), changed.set)
                held.callback(loop.remove_reader, sock.fileno())
            except OSError as error:
                sock = None
                log.warning("egress: new addresses of this host are seen only after %g s: %s", _ADDRESS_SECONDS, error)
            while True:
                before = self._networks
                if self._take(await asyncio.to_thread(self._look)):
                    self._changed(before)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_RETRY_SECONDS if self._trouble else _ADDRESS_SECONDS):
                        await changed.wait()
                changed.clear()
                if sock is not None:
                    with contextlib.suppress(OSError):  # empty; or it ran over, and then all is read anew as well
                        while sock.recv(1 << 16):
                            pass

    def _changed(self, before: frozenset[IPNetwork]) -> None:
        try:
            self._enforce()
        except (PolicyError, OSError) as error:
            self._networks = before  # to be tried again
            log.error("egress: the kernel does not know this host's addresses: %s", error)
            return
        for worker in self._workers:
            self._tell(worker)
        came, went = (sorted(map(str, some)) for some in (self._networks - before, before - self._networks))
        log.info("egress: this host's own addresses: + %s, - %s", ", ".join(came) or "none", ", ".join(went) or "none")

    def _tell(self, worker: WorkerProcess) -> None:
        worker.channel.notify("own_addresses", {"networks": list(map(str, self._networks))})

    def serving(self, worker: WorkerProcess) -> None:
        self._workers.add(worker)
        self._tell(worker)  # there may be others since its plan was made

    def ended(self, worker: WorkerProcess) -> None:
        self._workers.discard(worker)
