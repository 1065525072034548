"""Strikes: a client that misbehaves time and again is banned, in the kernel where there is one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

from ..core.address import IPAddress, SocketAddress
from ..core.at_once import NOTHING, Entered, Visit, entered_by
from ..core.blame import BLAME, judge
from ..core.client import Carrier, HasExtensions, SourceLengths, TrustedPeer, client_address
from ..core.errors import RamaError
from ..core.first_bytes import FirstBytes, Refused
from ..core.offender import Offender, strike
from ..core.service import Output, Service
from .source import source_prefix

__all__ = ["Banner", "LocalStrikes", "StrikeBook", "StrikeKeeper", "StrikeLayer", "StrikeLimit", "strike"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StrikeLimit:
    """A source is banned for ``ban`` seconds at its ``strikes``-th strike within ``window`` seconds."""

    strikes: int = 5
    window: float = 60.0
    ban: float = 3600.0

    def __post_init__(self) -> None:
        if not 1 <= self.strikes <= 10_000:
            raise ValueError(f"strikes must be 1-10000, not {self.strikes}")
        if not self.window > 0 or not self.ban > 0:
            raise ValueError(f"window and ban must be above 0 seconds, not {self.window} and {self.ban}")


class StrikeBook:
    """Counts strikes by source: IPv4 by address, IPv6 by /64, or as ``lengths`` says. Knows no clock and bans nobody.

    At most ``max_sources`` are remembered, the one quiet for longest is forgotten first.
    """

    def __init__(self, max_sources: int = 65536, lengths: Callable[[], SourceLengths] = SourceLengths) -> None:
        self._max_sources = max_sources
        self._lengths = lengths
        self._struck: OrderedDict[Hashable, deque[float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._struck)

    def add(self, ip: IPAddress, limit: StrikeLimit, now: float) -> bool:
        """Write down a strike at ``now`` (monotonic seconds); return whether it is enough for a ban."""
        lengths = self._lengths()
        source = (source_prefix(ip, lengths.ipv4, lengths.ipv6), limit)
        times = self._struck.get(source)
        if times is None:
            if len(self._struck) >= self._max_sources:
                self._struck.popitem(last=False)
            times = self._struck[source] = deque(maxlen=limit.strikes)
        else:
            self._struck.move_to_end(source)
        times.append(now)
        while times[0] <= now - limit.window:
            times.popleft()
        return len(times) >= limit.strikes


class StrikeKeeper(Protocol):
    """Who counts strikes and bans; in a worker of ``rama-ebpf run`` that is ``context.policy``, which counts for all
    workers together."""

    async def strike(
        self, ip: IPAddress, limit: StrikeLimit, /, *, reason: str, spared: IPAddress | None = None
    ) -> None:
        """Count a strike of ``ip``; if it is the last one allowed, ban it before this returns. No ban is of ``spared``:
        if that is of the same source, the ban is of the address alone.

        Raises OSError or :class:`RamaError` if that fails.
        """


class Banner(Protocol):
    """Who can keep a source out."""

    async def ban(self, ip: IPAddress, /, *, ttl: float, reason: str) -> None:
        """Refuse connections of the source that ``ip`` belongs to (what its strikes were counted by: an IPv4 address,
        an IPv6 /64) for ``ttl`` seconds, from the moment this returns.

        Raises OSError or :class:`RamaError` if that fails.
        """


class LocalStrikes:
    """A :class:`StrikeKeeper` that counts in this process and bans through ``banner``."""

    def __init__(
        self, banner: Banner, *, max_sources: int = 65536, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.book = StrikeBook(max_sources)
        self._banner = banner
        self._clock = clock

    async def strike(
        self, ip: IPAddress, limit: StrikeLimit, /, *, reason: str, spared: IPAddress | None = None
    ) -> None:
        """See :class:`StrikeKeeper`. A ``spared`` of the same source spares all of it: that is what ``banner`` bans."""
        same = spared is not None and source_prefix(spared) == source_prefix(ip)
        if self.book.add(ip, limit, self._clock()) and not same:
            await self._banner.ban(ip, ttl=limit.ban, reason=f"{limit.strikes} strikes, the last: {reason}")


class StrikeLayer:
    """Counts a strike against the client for each error that passes and proves abuse by it, as the table in
    :mod:`~rama_ebpf.core.blame` says, and has it banned as :class:`StrikeLimit` says. With ``on`` every error of these
    types is a strike, and no other. What a strike was for is the error's ``kind``.

    Whom a :class:`~rama_ebpf.services.proxy_protocol.ProxyProtocolLayer` or a
    :class:`~rama_ebpf.services.http.TrustedPeersLayer` trusts is never struck, whether that layer is inside this one
    or outside: the client in the header is.

    A ban is in force before the connection ends. One that fails is logged as an error, and the next strike tries it
    again; the connection ends as it would have.
    """

    def __init__(
        self,
        keeper: StrikeKeeper,
        *,
        strikes: int = 5,
        window: float = 60.0,
        ban: float = 3600.0,
        on: tuple[type[Exception], ...] | None = None,
    ) -> None:
        self._keeper = keeper
        self._limit = StrikeLimit(strikes, window, ban)
        self._on = on
        self._reports: set[asyncio.Task[None]] = set()

    def __call__(self, inner: Service[Carrier, Output], /) -> Service[Carrier, Output]:
        async def serve(input: Carrier, /) -> Output:
            if entered_by(input, self) is None:
                self._watch(input)
            try:
                return await inner(input)
            except Exception as error:
                if not self._counts(error):
                    raise
                report = self._strike(input, error.kind if isinstance(error, RamaError) else type(error).__name__)
                if report is not None:
                    await asyncio.shield(report)  # a cut of this connection does not stop it
                raise

        return serve

    def enter(self, visit: Visit) -> Entered:
        """In callbacks (:mod:`rama_ebpf.core.at_once`), where nothing goes wrong: errors are the coroutine's."""
        self._watch(visit.stream)
        return NOTHING

    def _watch(self, input: HasExtensions) -> None:
        input.extensions.add(Offender(lambda reason, client: self._strike(input, reason, client)))

    def first_bytes(self, inner: FirstBytes | None) -> FirstBytes | None:
        """Strike those who are refused by their first bytes, too. With ``on`` it takes the error itself to tell."""

        def struck(why: Refused, peer: SocketAddress | None, _name: str | None, _: int) -> asyncio.Future[None] | None:
            row = BLAME.get(why.kind)
            return self._start(peer.ip, why.kind) if peer is not None and row is not None and row.strikes else None

        return None if inner is None or self._on is not None else inner.watched(struck)

    def _counts(self, error: Exception) -> bool:
        if self._on is not None:
            return isinstance(error, self._on)
        judgement = judge(error)
        return judgement is not None and judgement.strikes

    def _strike(
        self, input: HasExtensions, reason: str, client: SocketAddress | None = None
    ) -> asyncio.Task[None] | None:
        address = client or client_address(input)
        if address is None:
            return None  # a client of a Unix socket has no address that could be banned
        trusted = input.extensions.get(TrustedPeer)
        if trusted is not None and trusted.ip == address.ip:
            return None  # a balancer: to ban it would shut out everybody behind it
        return self._start(address.ip, reason, None if trusted is None else trusted.ip)

    def _start(self, ip: IPAddress, reason: str, spared: IPAddress | None = None) -> asyncio.Task[None]:
        report = asyncio.create_task(self._report(ip, reason, spared))
        self._reports.add(report)
        report.add_done_callback(self._reports.discard)
        return report

    async def _report(self, ip: IPAddress, reason: str, spared: IPAddress | None) -> None:
        try:
            await self._keeper.strike(ip, self._limit, reason=reason, spared=spared)
        except (OSError, RamaError) as error:
            log.error("a strike of %s (%s) did not count: %s", ip, reason, error)
