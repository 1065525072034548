"""Connecting to targets: resolve, check each resolved address against egress policy, dial exactly what was checked.

A name with several addresses is dialled as RFC 8305 (happy eyeballs) says: the families take turns, the next address
is tried when the one before has failed or has not answered for a moment, and the first connection wins.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Final, Protocol, cast

from ..core.address import Authority, IPAddress, SocketAddress
from ..core.errors import AuthFailed, PeerClosed, PolicyDenied, ProtocolError, RamaError
from ..core.extensions import Extensions
from ..core.lean_socket import LeanSocket
from ..core.service import Service
from ..core.shortcut import shortcut_of
from ..core.socket_stream import SocketStream
from ..core.stream import Stream
from .dns.lookup import RESOLUTION_DELAY, Lookup
from .resolver import DnsResolver, ResolveError, Resolver, SharedResolver, SystemResolver, source_of
from .socket_options import Setting, SocketOptions, apply_settings

__all__ = [
    "BeginsAtOnce",
    "ConnectError",
    "Connector",
    "Dialling",
    "Egress",
    "OneDeadlineLayer",
    "ResolveError",
    "Resolver",
    "SystemResolver",
    "WayReset",
    "connects_at_once",
    "reach_proxy",
    "upstream_failure",
]

_MAX_ADDRESSES: Final = 16
_STREAM: Final = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


class ConnectError(RamaError, OSError):
    """No address of a target could be connected to; ``errno`` is that of the last attempt."""

    kind = "connect"

    def __init__(self, number: int, message: str) -> None:
        OSError.__init__(self, number, message)


class WayReset(PolicyDenied):
    """A route says that the client is to be reset, without an answer."""


def upstream_failure(error: BaseException, doing: str) -> ConnectError | None:
    """Return the :class:`ConnectError` that stands for ``error``, met in a handshake with a proxy or server upstream,
    or None if it is none of that kind.

    The cause keeps its type; the caller's client must not be blamed for it, as it would be for a ProtocolError.
    """
    if isinstance(error, PeerClosed):
        number = errno.ECONNRESET
    elif isinstance(error, TimeoutError):  # HandshakeTimeout among them
        number = errno.ETIMEDOUT
    elif isinstance(error, AuthFailed):
        number = errno.EKEYREJECTED
    elif isinstance(error, ProtocolError):
        number = errno.EPROTO
    elif isinstance(error, OSError):
        number = error.errno or errno.EIO
    else:
        return None
    return ConnectError(number, f"{doing}: {error}")


async def reach_proxy(connector: Service[Authority, Stream], proxy: Authority) -> Stream:
    """Connect to a proxy upstream. Raises :class:`ConnectError` with EIO whatever the reason.

    That our way out is broken says nothing about the target, so it must not look like an answer about the target.
    """
    try:
        return await connector(proxy)
    except (RamaError, OSError) as error:
        raise ConnectError(errno.EIO, f"cannot reach the proxy {proxy}: {error}") from error


@dataclass(slots=True)
class Dialling:
    """A connection that has begun. ``stream`` may not be connected yet, None if it will never be; ``rest`` are
    the addresses to be tried as well where it takes its time."""

    stream: SocketStream | None
    rest: Sequence[SocketAddress] = ()
    delay: float = 0.25
    """Seconds after which they are."""


class Egress(Protocol):
    """Says which addresses may be dialled."""

    def check(self, ip: IPAddress, port: int | None = None, /) -> None:
        """Raise :class:`PolicyDenied`, naming the rule, if ``ip`` may not be dialled, or not on that TCP ``port``."""


@dataclass(frozen=True)
class Connector:
    """A service from :class:`Authority` to a connected :class:`SocketStream`.

    Every resolved address is checked against ``egress`` and only checked addresses are dialled, at most 16.
    ``timeout`` (seconds) bounds all attempts together, ``attempt_delay`` is how long one attempt has before the next
    address is tried as well (RFC 8305 section 5: 0.25 s; not below 0.01). ``source_v4`` and ``source_v6`` are
    addresses of ours to connect from; ``options`` are set on each socket.

    Raises :class:`PolicyDenied` if policy leaves no address, :class:`ResolveError`, or :class:`ConnectError` with
    the errno of the last attempt.
    """

    resolver: Resolver
    egress: Egress
    timeout: float = 10.0
    attempt_delay: float = 0.25
    source_v4: str | None = None
    source_v6: str | None = None
    options: SocketOptions = field(default_factory=SocketOptions)

    accepts = Authority

    @functools.cached_property
    def _settings(self) -> tuple[tuple[Setting, ...], tuple[Setting, ...]]:
        """The options of IPv6 and of IPv4 sockets."""
        return self.options.settings(socket.AF_INET6), self.options.settings(socket.AF_INET)

    def __post_init__(self) -> None:
        if self.attempt_delay < 0.01:
            raise ValueError(f"attempt_delay must be at least 0.01 s, not {self.attempt_delay}")

    async def __call__(self, target: Authority, /) -> Stream:
        if target.ip is not None:
            self.egress.check(target.ip, target.port)
            return await self._connect(target, [target.ip], None)
        resolver = self.resolver
        if not isinstance(resolver, SharedResolver):
            allowed = _Allowed(target, self.egress)
            allowed.add(await resolver.resolve(str(target.host)))
            return await self._connect(target, allowed.need(), None)
        with resolver.look_up(str(target.host), source_of(target)) as lookup:
            arrivals = _Arrivals(lookup, _Allowed(target, self.egress))
            try:
                return await self._connect(target, await arrivals.first(), arrivals)
            finally:
                arrivals.close()

    async def _connect(self, target: Authority, ips: Sequence[IPAddress], arrivals: _Arrivals | None) -> Stream:
        timeout = None
        try:
            addresses = [SocketAddress.zoned(ip, target.port) for ip in ips]
            alone = len(addresses) == 1 and (arrivals is None or arrivals.task is None)
            if alone and (stream := self._begin(addresses[0])).is_connected:
                return stream
            async with asyncio.timeout(self.timeout) as timeout:
                if not alone:
                    return await self._race(addresses, target.port, arrivals)
                await stream.connected()
                return stream
        except OSError as error:  # TimeoutError among them
            raise self.failure(target, error, late=timeout is not None and timeout.expired()) from error

    async def finish(self, target: Authority, dialling: Dialling) -> SocketStream:
        """Wait for what :meth:`begin` has begun, and return the connected stream. Raises :class:`ConnectError`."""
        stream = dialling.stream
        if stream is not None and stream.is_connected:
            return stream
        timeout = None
        try:
            async with asyncio.timeout(self.timeout) as timeout:
                if stream is None or dialling.rest:
                    return await self._race(dialling.rest, target.port, None, stream)
                await stream.connected()
                return stream
        except OSError as error:  # TimeoutError among them
            raise self.failure(target, error, late=timeout is not None and timeout.expired()) from error

    def begins(self, target: Authority, extensions: Extensions | None = None) -> bool:
        """Whether it is worth to call :meth:`begin`."""
        return target.ip is not None or type(self.resolver) is DnsResolver

    def begin(self, target: Authority, extensions: Extensions | None = None) -> Dialling | None:
        """Begin to connect to a target whose addresses are known; None for one that takes a call. For callbacks
        (:mod:`.reaching`). ``extensions`` are the client's, for connectors that choose by them.

        Raises :class:`PolicyDenied` or :class:`ConnectError`.
        """
        ip = target.ip
        if ip is None:
            return self._begin_known(target)
        self.egress.check(ip, target.port)
        try:
            return Dialling(self._begin(SocketAddress.zoned(ip, target.port)))
        except OSError as error:
            raise self.failure(target, error) from error

    def _begin_known(self, target: Authority) -> Dialling | None:
        """As :meth:`begin`, for a name."""
        resolver = self.resolver
        found = resolver.known(str(target.host)) if type(resolver) is DnsResolver else None
        if found is None:
            return None
        allowed = _Allowed(target, self.egress)
        allowed.add(sorted(found, key=lambda ip: -ip.version))
        ips = allowed.need()
        failure: OSError | None = None
        try:
            waiting = [SocketAddress.zoned(ip, target.port) for ip in ips]
        except OSError as error:
            raise self.failure(target, error) from error
        last: SocketAddress | None = None
        while waiting:
            last = _of_the_other_family(waiting, last)
            waiting.remove(last)
            try:
                return Dialling(self._begin(last), waiting, self.attempt_delay)
            except OSError as error:
                failure = error
        assert failure is not None
        raise self.failure(target, failure)

    def failure(self, target: Authority, error: OSError, *, late: bool = False) -> ConnectError:
        """Return what a call raises where an attempt has ended in ``error``, or where it was too ``late``."""
        if late and isinstance(error, TimeoutError):
            number, why = errno.ETIMEDOUT, f"no answer within {self.timeout} s"
        else:
            number, why = error.errno or errno.EIO, _reason(error)
        failure = ConnectError(number, f"cannot connect to {target}: {why}")
        failure.__cause__ = error
        return failure

    async def _race(
        self,
        addresses: Sequence[SocketAddress],
        port: int,
        arrivals: _Arrivals | None,
        under_way: SocketStream | None = None,
    ) -> SocketStream:
        """Return the first stream that connects, maybe that which is ``under_way``; the others are aborted. Raises the
        OSError of the last failure."""
        clock = asyncio.get_running_loop().time
        waiting = list(addresses)
        attempts: set[asyncio.Task[SocketStream]] = set()
        last: SocketAddress | None = None
        next_attempt = clock()
        failure: OSError | None = None
        winner: SocketStream | None = None
        if under_way is not None:
            last = under_way.peer
            attempts.add(asyncio.create_task(_connected(under_way)))
        try:
            while winner is None:
                coming = None if arrivals is None else arrivals.task
                if waiting and (not attempts or clock() >= next_attempt):
                    last = _of_the_other_family(waiting, last)
                    waiting.remove(last)
                    attempts.add(asyncio.create_task(self._dial(last)))
                    next_attempt = clock() + self.attempt_delay
                if not attempts and coming is None:
                    break
                done, _ = await asyncio.wait(
                    attempts if coming is None else {*attempts, coming},
                    timeout=max(0.0, next_attempt - clock()) if waiting else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if coming in done and arrivals is not None:
                    waiting += [SocketAddress.zoned(ip, port) for ip in arrivals.take()]
                for attempt in attempts & done:
                    attempts.discard(attempt)
                    error = attempt.exception()
                    if error is None and winner is None:
                        winner = attempt.result()
                    elif error is None:
                        attempts.add(attempt)  # lost by a moment
                    elif isinstance(error, OSError):
                        failure = error
                        next_attempt = clock()
                    else:
                        raise error
        finally:
            for attempt in attempts:
                attempt.add_done_callback(_abort_loser)
                attempt.cancel()
        if winner is not None:
            return winner
        assert failure is not None
        raise failure

    async def _dial(self, address: SocketAddress) -> SocketStream:
        return await _connected(self._begin(address))

    def _begin(self, address: SocketAddress) -> SocketStream:
        version_4 = type(address.ip) is IPv4Address
        sock = LeanSocket(socket.AF_INET if version_4 else socket.AF_INET6, _STREAM)
        try:
            apply_settings(sock, self._settings[version_4])
            source = self.source_v4 if version_4 else self.source_v6
            if source is not None:
                self.options.bind_source(sock, source)
        except BaseException:
            sock.close()
            raise
        return SocketStream.connecting(sock, address, tuned=self.options.nodelay)


class OneDeadlineLayer:
    """Around a connector that tries again: ``seconds`` bound all tries together. Raises :class:`ConnectError`."""

    accepts = Authority

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, inner: Service[Authority, Stream], /) -> Service[Authority, Stream]:
        async def connect(target: Authority, /) -> Stream:
            try:
                async with asyncio.timeout(self._seconds) as timer:
                    return await inner(target)
            except TimeoutError as error:
                if not timer.expired():
                    raise
                text = f"cannot connect to {target}: no answer within {self._seconds} s, all tries together"
                raise ConnectError(errno.ETIMEDOUT, text) from error

        return connect


class BeginsAtOnce(Protocol):
    """A connector that can begin in callbacks; see :class:`Connector`."""

    @property
    def timeout(self) -> float: ...

    def begins(self, target: Authority, extensions: Extensions | None = None) -> bool:
        """Whether it is worth to call :meth:`begin`."""

    def begin(self, target: Authority, extensions: Extensions | None = None) -> Dialling | None: ...

    async def finish(self, target: Authority, dialling: Dialling) -> SocketStream: ...

    def failure(self, target: Authority, error: OSError, *, late: bool = False) -> ConnectError: ...


def connects_at_once(connector: object) -> BeginsAtOnce | None:
    """Return a connector whose :meth:`Connector.begin` does what a call does; None for one with anything around it."""
    if shortcut_of(connector, "begin") is None:
        return None
    return cast("BeginsAtOnce", connector)


async def _connected(stream: SocketStream) -> SocketStream:
    await stream.connected()
    return stream


def _reason(error: OSError) -> str:
    # The event loops put the address into the text where the reason should be; our own texts say more than errno.
    text = error.strerror or str(error)
    return os.strerror(error.errno) if error.errno and text.startswith("Connect call failed") else text


def _abort_loser(attempt: asyncio.Task[SocketStream]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().abort()


class _Allowed:
    """The addresses of a target that policy lets through, at most 16."""

    def __init__(self, target: Authority, egress: Egress) -> None:
        self.ips: list[IPAddress] = []
        self._target = target
        self._egress = egress
        self._denied: PolicyDenied | None = None

    def add(self, ips: Iterable[IPAddress]) -> list[IPAddress]:
        """Judge ``ips``; return those of them that may be dialled."""
        added: list[IPAddress] = []
        for ip in ips:
            try:
                self._egress.check(ip, self._target.port)
            except PolicyDenied as error:
                self._denied = error
            else:
                added.append(ip)
        added = _families_in_turn(added)[: _MAX_ADDRESSES - len(self.ips)]
        self.ips += added
        return added

    def need(self) -> list[IPAddress]:
        """Return all. Raises :class:`PolicyDenied` or :class:`ResolveError` if there are none."""
        if self.ips:
            return self.ips
        raise self._denied or ResolveError(f"{self._target.host} has no address")


class _Arrivals:
    """Allowed addresses as they arrive. ``task`` ends when more have, and is None when no more will."""

    def __init__(self, lookup: Lookup, allowed: _Allowed) -> None:
        self.task: asyncio.Task[Sequence[IPAddress]] | None = None
        self._lookup = lookup
        self._allowed = allowed

    async def first(self) -> list[IPAddress]:
        """Return what there is to begin with: IPv6 if it comes within a moment of IPv4 (RFC 8305 section 3)."""
        while not self._allowed.ips and (fresh := await self._lookup.more()):
            self._allowed.add(sorted(fresh, key=lambda ip: -ip.version))
        ips = list(self._allowed.need())
        self._expect_more()
        if self.task is not None and all(ip.version == 4 for ip in ips):
            done, _ = await asyncio.wait({self.task}, timeout=RESOLUTION_DELAY)
            if done:
                ips = sorted([*ips, *self.take()], key=lambda ip: -ip.version)
        return ips

    def take(self) -> list[IPAddress]:
        """Return what the task has brought."""
        assert self.task is not None
        fresh = self.task.result()
        self.task = None
        if fresh:
            self._expect_more()
        return self._allowed.add(fresh)

    def _expect_more(self) -> None:
        if not self._lookup.ended:
            self.task = asyncio.create_task(self._read())

    async def _read(self) -> Sequence[IPAddress]:
        return await self._lookup.more()

    def close(self) -> None:
        """Wait for no more."""
        if self.task is not None:
            self.task.cancel()


def _of_the_other_family(waiting: list[SocketAddress], last: SocketAddress | None) -> SocketAddress:
    if last is not None:
        for address in waiting:
            if address.family != last.family:
                return address
    return waiting[0]


def _families_in_turn(ips: Sequence[IPAddress]) -> list[IPAddress]:
    """Order ``ips`` so that IPv6 and IPv4 alternate, beginning with the family that the resolver put first
    (RFC 8305 section 4, with a First Address Family Count of 1)."""
    first = deque(ip for ip in ips if ip.version == ips[0].version)
    second = deque(ip for ip in ips if ip.version != ips[0].version)
    ordered: list[IPAddress] = []
    while first or second:
        for family in (first, second):
            if family:
                ordered.append(family.popleft())
    return ordered
