"""getaddrinfo(3), for what only the host's NSS modules know (mDNS, LDAP, machines of systemd)."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv6Address, ip_address

from ...core.address import IPAddress
from ...core.fair_slots import FairSlots
from .errors import ResolveError
from .flights import Deliver, Flights, Observe
from .lookup import Lookup

__all__ = ["SystemLookups", "SystemResolver"]


class SystemLookups:
    """getaddrinfo(3) in ``threads`` threads of its own, of which one source has half at most.

    A look-up that runs cannot be stopped: it holds its thread until libc gives it up, also where nobody waits for it.
    """

    def __init__(
        self, *, threads: int = 8, timeout: float = 5.0, max_waiting: int = 1024, observe: Observe | None = None
    ) -> None:
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="resolver")
        self._flights = Flights(
            self._work,
            FairSlots(threads, max(1, threads // 2), max_waiting),
            timeout=timeout,
            stoppable=False,
            observe=observe,
        )

    async def resolve(self, name: str) -> Sequence[IPAddress]:
        """Raises :class:`ResolveError` or :class:`~rama_ebpf.core.errors.Busy`."""
        with self.look_up(name, None) as lookup:
            return await lookup.all()

    def look_up(self, name: str, source: Hashable) -> Lookup:
        """Begin to look ``name`` up on behalf of ``source``."""
        return self._flights.join(name, source)

    def close(self) -> None:
        """Let the threads end; look-ups under way are abandoned."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._flights.close()

    async def _work(self, name: str, deliver: Deliver) -> None:
        try:
            deliver(await asyncio.get_running_loop().run_in_executor(self._pool, _getaddrinfo, name))
        except socket.gaierror as error:
            raise ResolveError(
                f"cannot resolve {name!r}: {error.strerror}", temporary=error.errno == socket.EAI_AGAIN
            ) from error
        except UnicodeError as error:
            raise ResolveError(f"{name!r} is not a valid domain name: {error}") from error
        except RuntimeError as error:  # no thread can be had (pids.max)
            raise ResolveError(f"cannot resolve {name!r}: {error}", temporary=True) from error


class SystemResolver:
    """:class:`SystemLookups` for a program of one's own: names in the order of getaddrinfo(3), no shares of sources."""

    def __init__(self, *, threads: int = 8, timeout: float = 5.0, max_waiting: int = 1024) -> None:
        self._lookups = SystemLookups(threads=threads, timeout=timeout, max_waiting=max_waiting)

    async def resolve(self, name: str) -> Sequence[IPAddress]:
        """Raises :class:`ResolveError` or :class:`~rama_ebpf.core.errors.Busy`."""
        return await self._lookups.resolve(name)

    def close(self) -> None:
        """Let the threads end; look-ups under way are abandoned."""
        self._lookups.close()


def _getaddrinfo(name: str) -> list[IPAddress]:
    found: dict[IPAddress, None] = {}
    for _family, _type, _protocol, _canonical, sockaddr in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM):
        ip = ip_address(str(sockaddr[0]))
        if len(sockaddr) == 4 and sockaddr[3] and isinstance(ip, IPv6Address) and ip.scope_id is None:
            ip = IPv6Address(f"{ip}%{sockaddr[3]}")
        found[ip] = None
    return list(found)
