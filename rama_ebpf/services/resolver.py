"""What a connector needs of a resolver."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol, runtime_checkable

from ..core.address import Authority, IPAddress
from ..core.client import client_address, source_prefix
from ..core.target import Target
from .dns import DnsResolver, Lookup, ResolveError, ResolveTimeout, SystemLookups, SystemResolver

__all__ = [
    "DnsResolver",
    "Lookup",
    "ResolveError",
    "ResolveTimeout",
    "Resolver",
    "SharedResolver",
    "SystemLookups",
    "SystemResolver",
    "resolve_for",
    "source_of",
]


class Resolver(Protocol):
    """Turns a domain name into addresses, in order of preference."""

    async def resolve(self, name: str) -> Sequence[IPAddress]: ...


@runtime_checkable
class SharedResolver(Resolver, Protocol):
    """A resolver that tells addresses as they arrive, and gives each source a fair share.

    A connector that is given one begins to connect before all addresses are known (RFC 8305).
    """

    def look_up(self, name: str, source: Hashable, /) -> Lookup:
        """Begin to look ``name`` up for the client that is counted under ``source`` (None: nobody in particular)."""


def source_of(target: Authority) -> Hashable:
    """Return what the client that asks for ``target`` is counted under, None where it is not known."""
    address = client_address(target) if isinstance(target, Target) else None
    return None if address is None else source_prefix(address.ip)


async def resolve_for(resolver: Resolver, name: str, source: Hashable) -> Sequence[IPAddress]:
    """Return the addresses of ``name`` for a source, which has its share where ``resolver`` knows shares.

    Raises :class:`ResolveError` or :class:`~rama_ebpf.core.errors.Busy`.
    """
    if isinstance(resolver, SharedResolver):
        with resolver.look_up(name, source) as lookup:
            return await lookup.all()
    return await resolver.resolve(name)
