"""Connecting to targets: resolve, check each resolved address against egress policy, dial exactly what was checked.

A name with several addresses is dialled as RFC 8305 (happy eyeballs) says: the families take turns, the next address
is tried when the one before has failed or has not answered for a moment, and the first connection wins.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from ..core.address import Authority, IPAddress, SocketAddress
from ..core.errors import AuthFailed, PeerClosed, PolicyDenied, ProtocolError, RamaError
from ..core.service import Service
from ..core.socket_stream import SocketStream
from ..core.stream import Stream
from .resolver import ResolveError, Resolver, SystemResolver
from .socket_options import SocketOptions

__all__ = [
    "ConnectError",
    "Connector",
    "Egress",
    "ResolveError",
    "Resolver",
    "SystemResolver",
    "reach_proxy",
    "upstream_failure",
]

_MAX_ADDRESSES: Final = 16


class ConnectError(RamaError, OSError):
    """No address of a target could be connected to; ``errno`` is that of the last attempt."""

    kind = "connect"

    def __init__(self, number: int, message: str) -> None:
        OSError.__init__(self, number, message)


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


class Egress(Protocol):
    """Says which addresses may be dialled."""

    def check(self, ip: IPAddress, /) -> None:
        """Raise :class:`PolicyDenied`, naming the rule, if ``ip`` may not be dialled."""


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

    def __post_init__(self) -> None:
        if self.attempt_delay < 0.01:
            raise ValueError(f"attempt_delay must be at least 0.01 s, not {self.attempt_delay}")

    async def __call__(self, target: Authority, /) -> Stream:
        if target.ip is not None:
            self.egress.check(target.ip)
            ips = [target.ip]
        else:
            ips = self._allowed(target, await self.resolver.resolve(str(target.host)))
        addresses = [SocketAddress(ip, target.port) for ip in ips]
        timeout = None
        try:
            if len(addresses) == 1 and (stream := self._begin(addresses[0])).is_connected:
                return stream
            async with asyncio.timeout(self.timeout) as timeout:
                if len(addresses) > 1:
                    return await self._race(addresses)
                await stream.connected()
                return stream
        except OSError as error:  # TimeoutError among them
            if isinstance(error, TimeoutError) and timeout is not None and timeout.expired():
                number, why = errno.ETIMEDOUT, f"no answer within {self.timeout} s"
            else:
                number, why = error.errno or errno.EIO, _reason(error)
            raise ConnectError(number, f"cannot connect to {target}: {why}") from error

    def _allowed(self, target: Authority, ips: Iterable[IPAddress]) -> list[IPAddress]:
        allowed: list[IPAddress] = []
        denied: PolicyDenied | None = None
        for ip in ips:
            try:
                self.egress.check(ip)
            except PolicyDenied as error:
                denied = error
            else:
                allowed.append(ip)
        if allowed:
            return _families_in_turn(allowed)[:_MAX_ADDRESSES]
        if denied is not None:
            raise denied
        raise ResolveError(f"{target.host} has no address")

    async def _race(self, addresses: Sequence[SocketAddress]) -> SocketStream:
        """Return the first stream that connects; the others are aborted. Raises the OSError of the last failure."""
        waiting = deque(addresses)
        attempts: set[asyncio.Task[SocketStream]] = set()
        failure: OSError | None = None
        winner: SocketStream | None = None
        try:
            while winner is None and (waiting or attempts):
                if waiting:
                    attempts.add(asyncio.create_task(self._dial(waiting.popleft())))
                patience = self.attempt_delay if waiting else None
                done, _ = await asyncio.wait(attempts, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                for attempt in done:
                    error = attempt.exception()
                    if error is None and winner is None:
                        winner = attempt.result()
                        attempts.discard(attempt)
                    elif isinstance(error, OSError):
                        failure = error
                        attempts.discard(attempt)
                    elif error is not None:
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
        stream = self._begin(address)
        await stream.connected()
        return stream

    def _begin(self, address: SocketAddress) -> SocketStream:
        sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            self.options.apply(sock)
            source = self.source_v4 if address.ip.version == 4 else self.source_v6
            if source is not None:
                self.options.bind_source(sock, source)
        except BaseException:
            sock.close()
            raise
        return SocketStream.connecting(sock, address)


def _reason(error: OSError) -> str:
    # The event loops put the address into the text where the reason should be; our own texts say more than errno.
    text = error.strerror or str(error)
    return os.strerror(error.errno) if error.errno and text.startswith("Connect call failed") else text


def _abort_loser(attempt: asyncio.Task[SocketStream]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().abort()


def _families_in_turn(ips: list[IPAddress]) -> list[IPAddress]:
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
