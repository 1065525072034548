"""Matchers: questions about an input that combine with ``&``, ``|`` and ``~``.

A matcher is a callable from an input (a stream, a request: what carries extensions) to a bool; it never waits and
never changes anything. Those that look into TLS and HTTP are in :mod:`rama_ebpf.services.matchers`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from ipaddress import ip_network
from typing import Any, Final

from .address import Authority, IPAddress, unmap
from .auth import User
from .client import HasExtensions, client_address, local_address
from .names import NameSet

__all__ = [
    "ANY",
    "ListenerPort",
    "Matcher",
    "Source",
    "TargetHost",
    "TargetNetwork",
    "TargetPort",
    "UserIs",
    "UserOption",
    "where",
]


class Matcher(abc.ABC):
    """A question about an input. ``&`` and ``|`` ask the right side only if the left has not decided."""

    @abc.abstractmethod
    def __call__(self, input: Any, /) -> bool:
        """Whether ``input`` matches. What an input cannot tell (no target, no user, …) does not match."""

    def __and__(self, other: Matcher) -> Matcher:
        return _All(self, other)

    def __or__(self, other: Matcher) -> Matcher:
        return _AnyOf(self, other)

    def __invert__(self) -> Matcher:
        return _Not(self)


class _All(Matcher):
    def __init__(self, *parts: Matcher) -> None:
        self._parts = parts

    def __call__(self, input: Any, /) -> bool:
        return all(part(input) for part in self._parts)


class _AnyOf(Matcher):
    def __init__(self, *parts: Matcher) -> None:
        self._parts = parts

    def __call__(self, input: Any, /) -> bool:
        return any(part(input) for part in self._parts)


class _Not(Matcher):
    def __init__(self, part: Matcher) -> None:
        self._part = part

    def __call__(self, input: Any, /) -> bool:
        return not self._part(input)


class where(Matcher):  # reads as a word in an expression: Source(...) & where(lambda ...)
    """Matches what ``predicate`` says yes to."""

    def __init__(self, predicate: Callable[[Any], bool]) -> None:
        self._predicate = predicate

    def __call__(self, input: Any, /) -> bool:
        return self._predicate(input)


ANY: Final = where(lambda input: True)
"""Matches everything."""


class _Networks:
    def __init__(self, cidrs: tuple[str, ...]) -> None:
        if not cidrs:
            raise ValueError("name at least one network")
        self._networks = tuple(map(ip_network, cidrs))

    def __contains__(self, ip: IPAddress) -> bool:
        ip = unmap(ip)
        return any(ip in network for network in self._networks)


class Source(Matcher):
    """The client's address (:func:`client_address`) is in one of these networks. Raises ValueError for a bad one."""

    def __init__(self, *cidrs: str) -> None:
        self._networks = _Networks(cidrs)

    def __call__(self, input: HasExtensions, /) -> bool:
        address = client_address(input)
        return address is not None and address.ip in self._networks


class ListenerPort(Matcher):
    """The client connected to one of these ports (:func:`local_address`)."""

    def __init__(self, *ports: int) -> None:
        self._ports = frozenset(ports)

    def __call__(self, input: HasExtensions, /) -> bool:
        local = local_address(input)
        return local is not None and local.port in self._ports


def _target(input: Any) -> Authority | None:
    if isinstance(input, Authority):
        return input
    found: Authority | None = input.extensions.get(Authority)
    return found


class TargetPort(Matcher):
    """The target's port is one of these. The input is an :class:`Authority` or has one among its extensions."""

    def __init__(self, *ports: int) -> None:
        self._ports = frozenset(ports)

    def __call__(self, input: Any, /) -> bool:
        target = _target(input)
        return target is not None and target.port in self._ports


class TargetNetwork(Matcher):
    """The client named its target by an address in one of these networks; a name is not resolved for this."""

    def __init__(self, *cidrs: str) -> None:
        self._networks = _Networks(cidrs)

    def __call__(self, input: Any, /) -> bool:
        target = _target(input)
        return target is not None and target.ip is not None and target.ip in self._networks


class TargetHost(Matcher):
    """The client named its target by a name that matches one of these patterns (:class:`NameMap` has the forms)."""

    def __init__(self, *patterns: str) -> None:
        self._names = NameSet(patterns)

    def __call__(self, input: Any, /) -> bool:
        target = _target(input)
        if target is None or not isinstance(target.host, str):
            return False
        return target.host.lower().removesuffix(".") in self._names


class UserIs(Matcher):
    """The client is authenticated as one of these users."""

    def __init__(self, *names: str) -> None:
        self._names = frozenset(names)

    def __call__(self, input: HasExtensions, /) -> bool:
        user = input.extensions.get(User)
        return user is not None and user.name in self._names


class UserOption(Matcher):
    """The user asked, in its user name, for the option ``key`` with one of ``values`` (none given: any value)."""

    def __init__(self, key: str, *values: str) -> None:
        self._key = key
        self._values = frozenset(values)

    def __call__(self, input: HasExtensions, /) -> bool:
        user = input.extensions.get(User)
        value = None if user is None else user.options.get(self._key)
        return value is not None and (not self._values or value in self._values)
