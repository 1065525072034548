"""Where a child that reads a feed may connect to: the ways that it asks for, judged where it cannot argue.

It asks before each connection, with the name it looks up and the addresses it found; they are judged here, and with a
gate the kernel lets it connect nowhere else (:mod:`rama_ebpf.kernel.feed_cgroup`). Anywhere leads what the operator
named: the server in the URL, or a proxy in the environment. All else, where redirects lead, must be public, and not
this host.
"""

from __future__ import annotations

import contextlib
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from ipaddress import ip_address
from typing import Annotated, Final, Protocol
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from ..core.address import IPAddress, unmap
from ..core.errors import PolicyDenied
from ..kernel.own_addresses import local_networks
from .egress import EgressPolicy, OwnHost

__all__ = ["ASKS", "Ask", "FeedRoom", "Grants", "NoRoom", "judge", "same_server"]

ASKS: Final = 64
"""A child may ask so often: Python's client follows ten redirects."""
_PORTS: Final = {"http": 80, "https": 443}


class Ask(msgspec.Struct, forbid_unknown_fields=True):
    """What the child sends: ``listener`` first, if there is one (:class:`~rama_ebpf.kernel.denials.DenialCounts`), then
    a name or address with its port and the addresses that it stands for."""

    host: Annotated[str, Meta(max_length=256)] = ""
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    addresses: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(max_length=64)] = []
    listener: Annotated[int, Meta(ge=0, le=2**20)] | None = None


class Grants(Protocol):
    """The ways that are open to one child."""

    def allow(self, addresses: Iterable[IPAddress], port: int) -> None:
        """Let it connect there, too. Raises OSError."""

    def follow(self, listener: int) -> None:
        """Count what its sandbox refuses. Raises OSError."""


class FeedRoom(Protocol):
    """Puts children where they may connect only to what they are granted."""

    def admit(self, pid: int) -> AbstractContextManager[Grants]:
        """Do so with a child that has just been started, until the block ends. Raises OSError."""


class NoRoom:
    """Where a command reads feeds: the child is kept by its own code alone, which asks us what it may."""

    @contextlib.contextmanager
    def admit(self, pid: int) -> Iterator[Grants]:
        yield self

    def allow(self, addresses: Iterable[IPAddress], port: int) -> None:
        pass

    def follow(self, listener: int) -> None:
        pass


def judge(ask: Ask, url: str) -> list[IPAddress]:
    """Return the addresses that the child may connect to. Raises :class:`~rama_ebpf.core.errors.PolicyDenied`, OSError
    where this host's own addresses cannot be told, or ValueError for what is no address."""
    addresses = [unmap(ip_address(text.partition("%")[0])) for text in ask.addresses]
    if _is_named(ask, url):
        return addresses
    policy = EgressPolicy(host=OwnHost(local_networks()))
    allowed, denial = [], PolicyDenied(f"{ask.host} has no address", rule="egress")
    for address in addresses:
        try:
            policy.check(address, ask.port)
        except PolicyDenied as error:
            denial = error
        else:
            allowed.append(address)
    if not allowed:
        raise denial
    return allowed


def _is_named(ask: Ask, url: str) -> bool:
    """Whether the operator has named it."""
    asked = f"//[{ask.host}]" if ":" in ask.host else f"//{ask.host}"
    scheme = urlsplit(url).scheme
    if any(same_server(f"{kind}:{asked}:{ask.port}", url) for kind in {scheme, "https"}):
        return True
    proxies = (proxy if "//" in proxy else f"//{proxy}" for proxy in urllib.request.getproxies().values())
    named = [(urlsplit(proxy).hostname, urlsplit(proxy).port or 80) for proxy in proxies]
    return (ask.host.lower(), ask.port) in named


def same_server(url: str, other: str) -> bool:
    """Whether two URLs are of one host and port, or of the default ports of one host."""
    one, two = urlsplit(url), urlsplit(other)
    ports = [parts.port or _PORTS.get(parts.scheme) for parts in (one, two)]
    return one.hostname == two.hostname and (ports[0] == ports[1] or ports == [443, 80])
