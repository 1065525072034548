"""A pool of backends behind a reverse proxy: least connections, health, retries, kept connections."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

from ....core.address import Authority
from ....core.errors import RamaError
from ....core.request_log import explained
from ....core.service import Service, check_fit
from ....core.stream import Stream
from ...connect import ConnectError
from ...proxy_protocol import ProxyProtocolConnector
from ..exchange.quick import Exchange
from ..h1.client import H1ClientConnection
from ..message.errors import HttpError, NoResponse
from ..message.limits import HttpLimits, HttpTimeouts, OriginOptions
from ..message.model import Request, Response
from .duties import DEFAULT_UPGRADES, answer_max_forwards, forwardable, marks, onward, returned
from .health import BackendHealth, HealthCheck, PassiveHealth
from .pool import ConnectionPool, PoolLimits, repeatable

__all__ = ["BackendPool"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Backend:
    target: Authority
    health: BackendHealth
    name: str


class BackendPool:
    """An HTTP service that sends each request to one of ``backends`` (``host:port`` as :class:`Authority`).

    The one with the fewest requests under way is taken, at random among equals. A request moves on to another
    backend, at most ``retries`` times, if no connection could be made, and if it may be repeated also if there was
    no valid response or one of ``retry_statuses``. At most ``max_busy`` requests go to one backend at a time; when
    none is left, or none passes its ``check``, the answer is 503. Backends that only failed requests (``passive``)
    are tried again when there is no better one.

    ``via`` is our pseudonym in Via, ``upgrades`` are the protocols that may be switched to. The client's Host is
    passed on unless ``own_host``. ``proxy_protocol`` sends a PROXY header first, on a connection per request.
    ``origin`` says how the backends are treated. ``upgrade_connector`` and ``h2_prior_knowledge``: see
    :class:`~.pool.ConnectionPool`.
    Call :meth:`start` to run active checks, which speak HTTP/1.1 and use ``upgrade_connector`` if there is one, and
    :meth:`stop` at the end.
    """

    accepts = Request

    def __init__(
        self,
        backends: Iterable[Authority],
        connector: Service[Authority, Stream],
        *,
        check: HealthCheck | None = None,
        passive: PassiveHealth | None = None,
        retries: int = 1,
        retry_statuses: Collection[int] = (),
        max_busy: int | None = None,
        own_host: bool = False,
        via: str = "rama-ebpf",
        upgrades: Collection[str] = DEFAULT_UPGRADES,
        proxy_protocol: ProxyProtocolConnector | None = None,
        upgrade_connector: Service[Authority, Stream] | None = None,
        h2_prior_knowledge: bool = False,
        origin: OriginOptions | None = None,
        pool_limits: PoolLimits | None = None,
        limits: HttpLimits | None = None,
        timeouts: HttpTimeouts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        health = PassiveHealth() if passive is None else passive
        check_fit(self, Authority, connector)
        self._backends = [_Backend(target, BackendHealth(check, health, clock), str(target)) for target in backends]
        if not self._backends:
            raise ValueError("a pool needs at least one backend")
        self._check = check
        self._check_connector = connector if upgrade_connector is None else upgrade_connector
        self._retries = retries
        self._retry_statuses = retry_statuses
        self._max_busy = max_busy
        self._own_host = own_host
        self._via = via
        self._marks = marks(via)
        self._upgrades = upgrades
        self._proxy_protocol = proxy_protocol
        self._limits = HttpLimits() if limits is None else limits
        self._timeouts = HttpTimeouts() if timeouts is None else timeouts
        options = OriginOptions() if origin is None else origin
        self.connections = ConnectionPool(
            connector,
            upgrade_connector=upgrade_connector,
            h2_prior_knowledge=h2_prior_knowledge,
            origins=lambda _backend: options,
            pool_limits=pool_limits,
            limits=limits,
            timeouts=timeouts,
        )
        self._checks: list[asyncio.Task[None]] = []

    # -- requests ----------------------------------------------------------------------------------------------

    async def __call__(self, request: Request, /) -> Response:
        if request.method == "CONNECT":
            raise HttpError(405, "CONNECT is not for this server", headers=[("Allow", "GET, HEAD, POST")])
        own = answer_max_forwards(request)
        if own is not None:
            return own
        return await self._serve(request, set())

    async def _serve(self, request: Request, tried: set[Authority]) -> Response:
        onward = forwardable(request, self._via, self._upgrades)
        while True:
            backend = self._pick(tried)
            tried.add(backend.target)
            last = len(tried) > self._retries or len(tried) == len(self._backends)
            try:
                response = await self._send(backend, onward)
            except (RamaError, OSError) as error:
                log.info("backend %s: %s", backend.target, explained(error))
                if last or not _may_move_on(request, error):
                    raise
                continue
            if response.status in self._retry_statuses and not last and repeatable(request):
                await response.body.close()
                continue
            return returned(response, self._via)

    def quick_exchange(self, request: Request, /) -> Exchange | None:
        """See :mod:`..exchange.quick`."""
        if self._proxy_protocol is not None or self._retry_statuses:
            return None
        written = onward(request, self._via)
        backend = self._pick(set())
        connection = self.connections.ready(request, backend.target)
        kept = connection is not None
        if connection is None:
            connection = self.connections.open(request, backend.target)
            if connection is None:
                return None
        host = backend.name if self._own_host or not request.authority else request.authority

        def finish(response: Response) -> Response:
            backend.health.succeeded()
            return returned(response, self._via)

        async def recover(request: Request, error: HttpError | ConnectError) -> Response:
            if kept and isinstance(error, NoResponse):
                return await self._serve(request, set())  # a kept connection that was closed meanwhile
            backend.health.failed()
            log.info("backend %s: %s", backend.target, explained(error))
            if not self._retries or len(self._backends) == 1 or not _may_move_on(request, error):
                raise error
            return await self._serve(request, {backend.target})

        return Exchange(
            connection, request, host, written, self._marks, finish, recover, answered=backend.health.succeeded
        )

    def _pick(self, tried: set[Authority]) -> _Backend:
        passing = [backend for backend in self._backends if backend.health.passing]
        untried = [backend for backend in passing if backend.target not in tried]
        usable = [backend for backend in untried if not backend.health.ejected] or untried
        if self._max_busy is not None:
            usable = [backend for backend in usable if self.connections.busy(backend.target) < self._max_busy]
        if not usable:
            raise HttpError(
                503,
                "no backend can take the request",
                proxy_error="destination_unavailable" if not passing else "connection_limit_reached",
                headers=[("Retry-After", "1")],
            )
        if len(usable) == 1:
            return usable[0]
        busy = [self.connections.busy(backend.target) for backend in usable]
        least = min(busy)
        return random.choice([backend for backend, number in zip(usable, busy, strict=True) if number == least])

    async def _send(self, backend: _Backend, request: Request) -> Response:
        authority = str(backend.target) if self._own_host or not request.authority else request.authority
        connector = None if self._proxy_protocol is None else self._proxy_protocol.bind(request)
        try:
            response = await self.connections.send(
                replace(request, authority=authority), backend.target, connector=connector
            )
        except HttpError as error:
            if error.status in (502, 503, 504):  # else it is the client's failure
                backend.health.failed()
            raise
        except (RamaError, OSError):
            backend.health.failed()
            raise
        backend.health.succeeded()
        return response

    # -- active checks -----------------------------------------------------------------------------------------

    @property
    def passing(self) -> list[Authority]:
        """The backends that active checks let take requests."""
        return [backend.target for backend in self._backends if backend.health.passing]

    def start(self) -> None:
        """Begin active checks, on the running event loop; does nothing without a ``check``."""
        if self._check is not None and not self._checks:
            self._checks = [asyncio.create_task(self._watch(backend, self._check)) for backend in self._backends]

    def close(self) -> None:
        """End active checks and close idle connections, without waiting for it."""
        for task in self._checks:
            task.cancel()
        self.connections.close()

    async def stop(self) -> None:
        """Like :meth:`close`, and wait until it is done."""
        self.close()
        checks, self._checks = self._checks, []
        await asyncio.gather(*checks, return_exceptions=True)
        await self.connections.wait_closed()

    async def _watch(self, backend: _Backend, check: HealthCheck) -> None:
        while True:
            before = backend.health.passing
            backend.health.probed(await self._probe(backend.target, check))
            if backend.health.passing != before:
                log.warning("backend %s is %s", backend.target, "up" if backend.health.passing else "down")
            await asyncio.sleep(check.interval)

    async def _probe(self, target: Authority, check: HealthCheck) -> bool:
        request = Request("GET", check.host or str(target), check.path)
        try:
            async with asyncio.timeout(check.timeout):
                stream = await self._check_connector(target)
                try:
                    connection = H1ClientConnection(
                        stream, limits=self._limits, timeouts=self._timeouts, released=lambda _: None
                    )
                    response = await connection.send(request)
                    return response.status in check.statuses
                finally:
                    stream.abort()
        except (RamaError, OSError) as error:
            log.debug("check of backend %s: %s", target, error)
            return False


def _may_move_on(request: Request, error: Exception) -> bool:
    if isinstance(error, HttpError):
        return error.status in (502, 504) and repeatable(request)
    return True  # no connection: nothing of the request was sent
