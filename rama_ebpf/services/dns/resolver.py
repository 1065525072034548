"""The resolver: hosts, cache, name servers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from ...core.address import IPAddress
from ...core.fair_slots import FairSlots
from .cache import AnswerCache
from .errors import ResolveError, ResolveTimeout
from .exchange import Answer, Family
from .files import WatchedFile, parse_hosts, watched_resolv_conf
from .flights import Deliver, Flights, Observe
from .lookup import Lookup
from .names import ascii_name, known_addresses
from .servers import NameServers

__all__ = ["DnsResolver"]

log = logging.getLogger(__name__)

_FAMILIES: Final[tuple[Family, ...]] = (IPv6Address, IPv4Address)
_WATCH_SECONDS: Final = 1.0
_MAX_LOOKUPS: Final = 1024
_MAX_QUEUE: Final = 1024


class DnsResolver:
    """Looks names up in /etc/hosts and at name servers, without threads; both files are watched.

    ``servers`` are asked instead of those in resolv.conf. ``timeout`` (seconds) bounds a look-up, in which each server
    is asked ``attempts`` times. ``cache`` answers are kept for their TTL, at most an hour, at most a minute where there
    is no address. At most 1,024 names are looked up at once, and ``per_source`` (0: no bound) of one source; others
    wait in a queue of the source. ``observe`` is called with the outcome of each look-up and its seconds.
    """

    def __init__(
        self,
        servers: Sequence[IPAddress] = (),
        *,
        timeout: float = 5.0,
        attempts: int = 2,
        cache: int = 4096,
        per_source: int = 128,
        observe: Observe | None = None,
        hosts: str = "/etc/hosts",
        resolv_conf: str = "/etc/resolv.conf",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._given = tuple(servers)
        self._timeout = timeout
        self._attempts = attempts
        self._clock = clock
        self._observe: Final[Observe] = observe or (lambda _outcome, _seconds: None)
        self._hosts = WatchedFile(hosts, parse_hosts)
        self._conf = watched_resolv_conf(resolv_conf)
        self._cache = AnswerCache(cache, clock)
        self._servers = self._name_servers()
        self._flights = Flights(
            self._work,
            FairSlots(_MAX_LOOKUPS, per_source, _MAX_QUEUE),
            timeout=timeout,
            stoppable=True,
            observe=observe,
        )
        self._look_again = clock() + _WATCH_SECONDS
        self._reading: asyncio.Future[None] | None = None
        self._complained = False

    async def resolve(self, name: str) -> Sequence[IPAddress]:
        """Return the addresses of ``name``, IPv6 first. Raises :class:`ResolveError` or
        :class:`~rama_ebpf.core.errors.Busy`."""
        with self.look_up(name, None) as lookup:
            return await lookup.all()

    def look_up(self, name: str, source: Hashable) -> Lookup:
        """Begin to look ``name`` up on behalf of ``source``, which has its fair share; None: of the server itself."""
        self._watch()
        try:
            known = self._known(ascii_name(name))
        except ResolveError as error:
            return Lookup.failed(error)
        if known is None:
            return self._flights.join(ascii_name(name), source)
        self._observe("cached", 0.0)
        return Lookup(known, ended=True)

    def known(self, name: str) -> Sequence[IPAddress] | None:
        """Return what :meth:`look_up` would tell of ``name`` at once, None if that is nothing, or an error."""
        self._watch()
        try:
            found = self._known(ascii_name(name))
        except ResolveError:
            return None
        if found:
            self._observe("cached", 0.0)
        return found or None

    def close(self) -> None:
        """Drop all look-ups."""
        self._flights.close()

    # -- what is known already ---------------------------------------------------------------------------------

    def _known(self, name: str) -> Sequence[IPAddress] | None:
        """Return what is known without asking, None if somebody must be asked. Raises :class:`ResolveError`."""
        found = self._hosts.value.find(name) or known_addresses(name)
        if found:
            return found
        exists = False
        for candidate in self._conf.value.candidates(name):
            answers = [self._cache.get(candidate, family) for family in _FAMILIES]
            addresses: list[IPAddress] = []
            for answer in answers:
                if answer is None:
                    return None
                addresses += answer.addresses
                exists |= answer.exists
            if addresses:
                return addresses
        raise _no_address(name, exists)

    # -- asking ------------------------------------------------------------------------------------------------

    async def _work(self, name: str, deliver: Deliver) -> None:
        exists = False
        failure: ResolveError | None = None
        for candidate in self._conf.value.candidates(name):
            if len(candidate) > 253:
                continue
            try:
                found, there = await self._both(candidate, deliver)
            except ResolveTimeout:
                raise
            except ResolveError as error:
                failure = failure or error
                continue
            if found:
                return
            exists |= there
        raise failure or _no_address(name, exists)

    async def _both(self, name: str, deliver: Deliver) -> tuple[bool, bool]:
        """Ask for both families; deliver what comes when it comes. Returns whether there is an address, and whether
        the name exists. Raises :class:`ResolveError` if there is none and one family could not be learnt."""
        asking = {asyncio.create_task(self._ask(name, family)) for family in _FAMILIES}
        found = exists = False
        failure: ResolveError | None = None
        try:
            for next_answer in asyncio.as_completed(asking):
                try:
                    answer = await next_answer
                except ResolveError as error:
                    failure = error if failure is None or isinstance(error, ResolveTimeout) else failure
                    continue
                deliver(answer.addresses)
                found |= bool(answer.addresses)
                exists |= answer.exists
        finally:
            for task in asking:
                task.cancel()
        if failure is not None and not found:
            raise failure
        return found, exists

    async def _ask(self, name: str, family: Family) -> Answer:
        answer = self._cache.get(name, family)
        if answer is None:
            servers = self._servers
            answer = await servers.ask(name, family)
            if servers is self._servers:
                self._cache.put(name, family, answer)
        return answer

    # -- files -------------------------------------------------------------------------------------------------

    def _name_servers(self) -> NameServers:
        servers = self._given or self._conf.value.servers
        return NameServers(servers, timeout=self._timeout, attempts=self._attempts, clock=self._clock)

    def _watch(self) -> None:
        now = self._clock()
        if now < self._look_again:
            return
        self._look_again = now + _WATCH_SECONDS
        if self._conf.changed():
            before = self._conf.value
            self._conf.read()
            if self._conf.value != before:
                self._servers = self._name_servers()
                self._cache.clear()
        if (self._reading is None or self._reading.done()) and (self._hosts.changed() or self._complained):
            # In a thread: some files of hosts have 100,000 lines.
            try:
                self._reading = asyncio.get_running_loop().run_in_executor(None, self._hosts.read)
            except RuntimeError as error:  # no thread can be started (pids.max)
                if not self._complained:
                    log.warning("the hosts file has changed and cannot be read again yet: %s", error)
                self._complained = True
            else:
                self._complained = False


def _no_address(name: str, exists: bool) -> ResolveError:
    why = "No address associated with hostname" if exists else "Name or service not known"
    return ResolveError(f"cannot resolve {name!r}: {why}")
