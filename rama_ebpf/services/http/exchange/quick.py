"""What services say that can decide at once, so that a request is served in callbacks (:mod:`rama_ebpf.core.lane`).

A service that can decide at once has a method ``quick_exchange(request)``: it returns an :class:`Exchange` over a
connection that is ready, or None where it cannot, and then nothing has happened. Layers that decide at once have one
that asks the service inside."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from ....core.shortcut import shortcut_of
from ....core.stream import Stream
from ..message.errors import HttpError
from ..message.model import Request, Response

__all__ = ["Exchange", "ReadyConnection", "decide_aside", "decides", "quick_of"]


class ReadyConnection(Protocol):
    """A connection to an upstream over which one request can be sent and answered in callbacks
    (:class:`~..h1.client.H1ClientConnection`)."""

    @property
    def stream(self) -> Stream: ...

    @property
    def whole(self) -> bool: ...

    @property
    def stuck(self) -> bool: ...

    def begin(self, request: Request) -> bool: ...

    def received(self, request: Request, data: bytes) -> Response | None: ...

    async def receive(self, request: Request) -> Response: ...

    async def abort(self) -> None: ...


class Exchange(NamedTuple):
    """A request that goes out as ``onward`` over ``connection``, which is ready for it. ``finish`` makes what the
    client is sent of the response; ``recover`` is asked for one, by the coroutine, where the upstream has failed."""

    connection: ReadyConnection
    onward: Request
    finish: Callable[[Response], Response]
    recover: Callable[[Request, HttpError], Awaitable[Response]]


def decides(service: Callable[..., object], quick: Callable[[Request], Exchange | None]) -> None:
    """Let ``quick`` be the ``quick_exchange`` of a service that is a function, as that of a layer is."""
    service.quick_exchange = quick  # type: ignore[attr-defined]  # functions take attributes
    quick.decides_for = service  # type: ignore[attr-defined]


def quick_of(service: object) -> Callable[[Request], Exchange | None] | None:
    """Return the ``quick_exchange`` of a service, None if it has none of its own.

    What stands around a service must not be passed by: a function that was made to look like it (functools.wraps),
    and what :mod:`rama_ebpf.core.shortcut` says of classes."""
    found: Callable[[Request], Exchange | None] | None = getattr(service, "quick_exchange", None)
    if found is None or getattr(found, "decides_for", None) is service:
        return found
    own: Callable[[Request], Exchange | None] | None = shortcut_of(service, "quick_exchange")
    return own


def decide_aside(decide: Callable[[Request], Exchange | None], request: Request, told: Request) -> Exchange | None:
    """Return what ``decide`` says of ``told``, a copy of ``request`` with a fork of its extensions: only if that is
    something has anything happened, and what was added to the one is the other's."""
    exchange = decide(told)
    if exchange is None:
        return None
    request.extensions.adopt(told.extensions)
    return exchange._replace(recover=lambda _request, error: exchange.recover(told, error))
