"""Names to addresses, in threads of their own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Protocol

from ..core.address import IPAddress
from ..core.errors import RamaError

__all__ = ["ResolveError", "Resolver", "SystemResolver"]


class ResolveError(RamaError):
    """A name has no usable address. ``temporary`` is true if a retry may succeed (EAI_AGAIN, no answer in time)."""

    kind = "resolve"

    def __init__(self, message: str, *, temporary: bool = False) -> None:
        super().__init__(message)
        self.temporary = temporary


class Resolver(Protocol):
    """Turns a domain name into addresses, in order of preference."""

    async def resolve(self, name: str) -> Sequence[IPAddress]: ...


class SystemResolver:
    """getaddrinfo(3) in a pool of threads of its own, so that slow names cannot starve the loop's default pool.

    ``threads`` bounds how many names are looked up at once, ``timeout`` (seconds) how long a caller waits, and
    ``max_waiting`` how many different names may be in hand: a look-up cannot be stopped, so those that nobody waits
    for any more still hold their thread. Callers that ask for one name at the same time share a look-up.
    """

    def __init__(self, *, threads: int = 8, timeout: float = 5.0, max_waiting: int = 1024) -> None:
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="resolver")
        self._timeout = timeout
        self._max_waiting = max_waiting
        self._lookups: dict[str, asyncio.Future[list[IPAddress]]] = {}

    async def resolve(self, name: str) -> Sequence[IPAddress]:
        """Raises :class:`ResolveError`."""
        lookup = self._lookups.get(name) or self._start(name)
        try:
            async with asyncio.timeout(self._timeout):
                return await asyncio.shield(lookup)
        except TimeoutError as error:
            raise ResolveError(f"no answer for {name!r} within {self._timeout} s", temporary=True) from error
        except socket.gaierror as error:
            raise ResolveError(
                f"cannot resolve {name!r}: {error.strerror}", temporary=error.errno == socket.EAI_AGAIN
            ) from error
        except UnicodeError as error:
            raise ResolveError(f"{name!r} is not a valid domain name: {error}") from error

    def _start(self, name: str) -> asyncio.Future[list[IPAddress]]:
        if len(self._lookups) >= self._max_waiting:
            raise ResolveError(f"{len(self._lookups)} names are being looked up: no room for {name!r}", temporary=True)
        lookup = asyncio.get_running_loop().run_in_executor(self._pool, _getaddrinfo, name)
        self._lookups[name] = lookup
        lookup.add_done_callback(lambda done: self._finished(name, done))
        return lookup

    def _finished(self, name: str, lookup: asyncio.Future[list[IPAddress]]) -> None:
        self._lookups.pop(name, None)
        if not lookup.cancelled():
            lookup.exception()  # whoever still waits gets it; for a look-up that nobody waits for it is not news

    def close(self) -> None:
        """Let the threads end; look-ups under way are abandoned."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _getaddrinfo(name: str) -> list[IPAddress]:
    rows = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(ip_address(str(row[4][0]).partition("%")[0]) for row in rows))
