"""Connecting to targets: resolve, check each resolved address against egress policy, dial exactly what was checked."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Protocol

from ..core.address import Authority, IPAddress, SocketAddress
from ..core.errors import PolicyDenied, RamaError
from ..core.stream import SocketStream, Stream
from ..policy.egress import EgressPolicy

__all__ = ["ConnectError", "Connector", "ResolveError", "Resolver", "SystemResolver"]


class ResolveError(RamaError):
    """A name has no usable address. ``temporary`` is true if a retry may succeed (EAI_AGAIN)."""

    kind = "resolve"

    def __init__(self, message: str, *, temporary: bool = False) -> None:
        super().__init__(message)
        self.temporary = temporary


class ConnectError(RamaError, OSError):
    """No address of a target could be connected to; ``errno`` is that of the last attempt."""

    kind = "connect"

    def __init__(self, number: int, message: str) -> None:
        OSError.__init__(self, number, message)


class Resolver(Protocol):
    """Turns a domain name into addresses, in order of preference."""

    async def resolve(self, name: str) -> Sequence[IPAddress]: ...


class SystemResolver:
    """getaddrinfo(3) in a pool of threads of its own, so that slow names cannot starve the loop's default pool.

    ``threads`` bounds how many names are looked up at once, ``timeout`` (seconds) how long a caller waits.
    """

    def __init__(self, *, threads: int = 8, timeout: float = 5.0) -> None:
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="resolver")
        self._timeout = timeout

    async def resolve(self, name: str) -> Sequence[IPAddress]:
        """Raises :class:`ResolveError`."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout):
                found = await loop.run_in_executor(self._pool, _getaddrinfo, name)
        except TimeoutError as error:
            raise ResolveError(f"no answer for {name!r} within {self._timeout} s", temporary=True) from error
        except socket.gaierror as error:
            raise ResolveError(
                f"cannot resolve {name!r}: {error.strerror}", temporary=error.errno == socket.EAI_AGAIN
            ) from error
        except UnicodeError as error:
            raise ResolveError(f"{name!r} is not a valid domain name: {error}") from error
        return found

    def close(self) -> None:
        """Let the threads end; look-ups under way are abandoned."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _getaddrinfo(name: str) -> list[IPAddress]:
    rows = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(ip_address(str(row[4][0]).partition("%")[0]) for row in rows))


@dataclass(frozen=True)
class Connector:
    """A service from :class:`Authority` to a connected :class:`SocketStream`.

    Every resolved address is checked against ``egress`` and only checked addresses are dialled, in order, until one
    accepts. ``timeout`` (seconds) bounds each attempt. Raises :class:`PolicyDenied` if policy leaves no address,
    :class:`ResolveError`, or :class:`ConnectError` with the errno of the last attempt.
    """

    resolver: Resolver
    egress: EgressPolicy
    timeout: float = 10.0

    accepts = Authority

    async def __call__(self, target: Authority, /) -> Stream:
        ips = [target.ip] if target.ip is not None else await self.resolver.resolve(str(target.host))
        denied: PolicyDenied | None = None
        failed: OSError | None = None
        for ip in ips:
            try:
                self.egress.check(ip)
            except PolicyDenied as error:
                denied = error
                continue
            try:
                return await self._dial(SocketAddress(ip, target.port))
            except OSError as error:
                failed = error
        if failed is not None:
            raise ConnectError(failed.errno or errno.EIO, f"cannot connect to {target}: {failed.strerror}") from failed
        if denied is not None:
            raise denied
        raise ResolveError(f"{target.host} has no address")

    async def _dial(self, address: SocketAddress) -> Stream:
        sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(self.timeout):
                await asyncio.get_running_loop().sock_connect(sock, address.to_sockaddr())
        except TimeoutError as error:
            sock.close()
            raise OSError(errno.ETIMEDOUT, f"no answer within {self.timeout} s") from error
        except BaseException:
            sock.close()
            raise
        return SocketStream(sock)
