"""Strikes: a client that misbehaves time and again is banned, in the kernel where there is one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any, Protocol

from ..core.address import IPAddress
from ..core.client import HasExtensions, client_address
from ..core.errors import AuthFailed, HandshakeTimeout, ProtocolError, RamaError
from ..core.extensions import Extensions
from ..core.service import Service
from .source import source_prefix

__all__ = ["Banner", "StrikeLayer", "strike"]

log = logging.getLogger(__name__)


class Banner(Protocol):
    """Who can keep an address out; in a worker of ``rama-ebpf run`` that is ``context.policy``."""

    async def ban(self, ip: IPAddress, /, *, ttl: float, reason: str) -> None:
        """Refuse connections of ``ip`` for ``ttl`` seconds, from the moment this returns.

        Raises OSError or :class:`RamaError` if that fails.
        """


class _Offender:
    """Added to the extensions, so that a protocol can report what it answered politely instead of raising."""

    def __init__(self, report: Callable[[str], object]) -> None:
        self.report = report


def strike(extensions: Extensions, reason: str) -> None:
    """Count one strike against the client that these extensions belong to; does nothing without a StrikeLayer."""
    offender = extensions.get(_Offender)
    if offender is not None:
        offender.report(reason)


class StrikeLayer:
    """Bans a source for ``ban`` seconds at its ``strikes``-th strike within ``window`` seconds.

    An error of one of the types ``on`` that passes is a strike; what it is counted as is the error's ``kind``. IPv6
    sources are counted by /64, banned is the address that struck last. At most ``max_sources`` are remembered, the
    one quiet for longest is forgotten first. A ban that fails is logged as an error and tried again at the next
    strike; the connection ends as it would have.
    """

    def __init__(
        self,
        banner: Banner,
        *,
        strikes: int = 5,
        window: float = 60.0,
        ban: float = 3600.0,
        on: tuple[type[Exception], ...] = (ProtocolError, AuthFailed, HandshakeTimeout),
        max_sources: int = 65536,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if strikes < 1:
            raise ValueError(f"strikes must be at least 1, not {strikes}")
        if not window > 0 or not ban > 0:
            raise ValueError(f"window and ban must be above 0 seconds, not {window} and {ban}")
        self._banner = banner
        self._strikes = strikes
        self._window = window
        self._ban = ban
        self._on = on
        self._max_sources = max_sources
        self._clock = clock
        self._struck: OrderedDict[Hashable, deque[float]] = OrderedDict()
        self._bans: set[asyncio.Task[None]] = set()

    def __call__(self, inner: Service[Any, Any]) -> Service[Any, Any]:
        async def serve(input: HasExtensions) -> Any:
            input.extensions.add(_Offender(lambda reason: self._strike(input, reason)))
            try:
                return await inner(input)
            except self._on as error:
                ban = self._strike(input, error.kind if isinstance(error, RamaError) else type(error).__name__)
                if ban is not None:
                    await asyncio.shield(ban)  # in force before the connection ends; a cut does not stop it
                raise

        return serve

    def _strike(self, input: HasExtensions, reason: str) -> asyncio.Task[None] | None:
        """Count a strike; return the ban that it leads to."""
        address = client_address(input)
        if address is None:
            return None  # a client of a Unix socket has no address that could be banned
        now = self._clock()
        times = self._times(source_prefix(address.ip))
        times.append(now)
        while times[0] <= now - self._window:
            times.popleft()
        if len(times) < self._strikes:
            return None
        ban = asyncio.create_task(self._ban_source(address.ip, f"{len(times)} strikes, the last: {reason}"))
        self._bans.add(ban)
        ban.add_done_callback(self._bans.discard)
        return ban

    async def _ban_source(self, ip: IPAddress, reason: str) -> None:
        try:
            await self._banner.ban(ip, ttl=self._ban, reason=reason)
        except (OSError, RamaError) as error:
            log.error("cannot ban %s: %s", ip, error)
        else:
            log.info("banned %s for %g s: %s", ip, self._ban, reason)

    def _times(self, source: Hashable) -> deque[float]:
        times = self._struck.get(source)
        if times is None:
            if len(self._struck) >= self._max_sources:
                self._struck.popitem(last=False)
            times = self._struck[source] = deque(maxlen=self._strikes)
        else:
            self._struck.move_to_end(source)
        return times
