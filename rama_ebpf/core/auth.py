"""Who a client is: credentials that a protocol has read, and the authenticator that turns them into a user.

An authenticator is a service from :class:`Credentials` to :class:`User`, so a plain ``async def`` is one and layers
compose around it. A protocol server calls it, adds the user to the extensions and sends its own refusal on
:class:`~rama_ebpf.core.errors.AuthFailed`. The ones that come with the package are in
:mod:`rama_ebpf.layers.auth`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from .address import IPAddress
from .shortcut import shortcut_of

__all__ = ["Authenticator", "Credentials", "User", "known_at_once"]


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user name and password as a client sent them (RFC 1929: 1-255 octets each; HTTP Basic: RFC 7617).

    ``source`` is the client's address, by which checks are shared fairly; None where it has none.
    """

    username: str
    password: str = field(repr=False)
    source: IPAddress | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class User:
    """An authenticated user; added to the extensions of the stream or request.

    ``options`` are wishes that came with the user name (:mod:`rama_ebpf.layers.username`).
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict, hash=False)


Authenticator = Callable[[Credentials], Awaitable[User]]
"""Returns the user, or raises :class:`~rama_ebpf.core.errors.AuthFailed`."""


def known_at_once(authenticate: Authenticator) -> Callable[[Credentials], User | None] | None:
    """Return the ``known`` of an authenticator that has one of its own: a function that returns the user of credentials
    which a call would accept without waiting, and None for all others, of which it says nothing; None for one of which
    nothing can be known so (:mod:`.shortcut`).
    """
    known: Callable[[Credentials], User | None] | None = shortcut_of(authenticate, "known")
    return known
