"""What services say that can decide at once, so that a request is served in callbacks (:mod:`rama_ebpf.core.lane`).

A service that can decide at once has a method ``quick_exchange(request)``: it returns an :class:`Exchange` over a
connection that is ready, or None where it cannot, and then nothing has happened. Layers that decide at once have one
that asks the service inside. For CONNECT the same with ``quick_connect(request)`` and :class:`Dial`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, Protocol

from ....core.address import Authority
from ....core.shortcut import shortcut_of
from ....core.socket_stream import SocketStream
from ....relay import TunnelLimits
from ...connect import BeginsAtOnce, ConnectError
from ..message.errors import HttpError
from ..message.headers import Headers, Written
from ..message.model import Request, Response

__all__ = [
    "Dial",
    "Exchange",
    "Marks",
    "ReadyConnection",
    "Recover",
    "ResponseBegun",
    "decide_aside",
    "decides",
    "dial_aside",
    "dial_of",
    "dials",
    "quick_of",
]


class ResponseBegun(Protocol):
    """A response's header section (:class:`~..h1.heads.ResponseHead`)."""

    @property
    def status(self) -> int: ...

    @property
    def reason(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def headers(self) -> Headers: ...


class Marks(NamedTuple):
    """What a proxy does to the fields of each response on its way back: those of ``dropped`` (names in lower case) go
    no further, and Via gets a member by the version that the response came in."""

    dropped: frozenset[bytes]
    via: dict[str, bytes | None]


class PouredBody(Protocol):
    """The body of a response that comes in pieces (:class:`~..h1.body.ResponseBody`)."""

    trailers: Headers | None

    @property
    def over(self) -> bool: ...

    @property
    def failed(self) -> bool: ...

    def broke_off(self, error: OSError) -> None: ...

    def take_ahead(self) -> bytes: ...

    def take(self, data: bytes) -> list[bytes]: ...


class ReadyConnection(Protocol):
    """A connection to an upstream over which one request can be sent and answered in callbacks
    (:class:`~..h1.client.H1ClientConnection`)."""

    @property
    def plain(self) -> SocketStream: ...

    @property
    def whole(self) -> bool: ...

    @property
    def stuck(self) -> bool: ...

    @property
    def content(self) -> bytes | None: ...

    @property
    def dials(self) -> bool: ...

    @property
    def patience(self) -> float: ...

    def late(self) -> Exception: ...

    def dialled(self, request: Request) -> bool | None: ...

    def begin_plain(self, request: Request, host: str, lines: bytes, content: bytes = b"") -> bool: ...

    def lend(self, taker: Callable[[], None] | None) -> None: ...

    def received(self, data: bytes) -> ResponseBegun | None: ...

    def response(self, head: ResponseBegun) -> Response: ...

    @property
    def body(self) -> PouredBody | None: ...

    @property
    def body_seconds(self) -> float: ...

    @property
    def movable(self) -> int: ...

    def carries(self, response: Response) -> bool: ...

    def finish_now(self) -> None: ...

    def abort_now(self) -> None: ...

    async def receive(self, request: Request) -> Response: ...

    async def abort(self) -> None: ...


Recover = Callable[[Request, HttpError | ConnectError], Awaitable[Response]]
"""Answers a request otherwise, or raises what has gone wrong."""


class Exchange(NamedTuple):
    """A ``request`` without an upgrade, whose body is here whole, that goes out over ``connection``, which is ready for
    it or being made for it, to ``host`` with ``onward`` as the lines of its fields. ``finish`` makes what the client is
    sent of the response. Where there are ``marks``, which say all that it does, a response that is here whole goes
    back without it, and ``answered`` is called. ``recover`` is asked for a response, by the coroutine, where the
    upstream has failed."""

    connection: ReadyConnection
    request: Request
    host: str
    onward: Written
    marks: Marks | None
    finish: Callable[[Response], Response]
    recover: Recover
    answered: Callable[[], None] | None = None


class Dial(NamedTuple):
    """A CONNECT that may be carried out: ``connector`` has ``target`` dialled, and ``limits`` bound the tunnel."""

    connector: BeginsAtOnce
    target: Authority
    limits: TunnelLimits | None


def decides(service: Callable[..., object], quick: Callable[[Request], Exchange | None]) -> None:
    """Let ``quick`` be the ``quick_exchange`` of a service that is a function, as that of a layer is."""
    service.quick_exchange = quick  # type: ignore[attr-defined]  # functions take attributes
    quick.decides_for = service  # type: ignore[attr-defined]


def quick_of(service: object) -> Callable[[Request], Exchange | None] | None:
    """Return the ``quick_exchange`` of a service, None if it has none of its own.

    What stands around a service must not be passed by: a function that was made to look like it (functools.wraps),
    and what :mod:`rama_ebpf.core.shortcut` says of classes."""
    found: Callable[[Request], Exchange | None] | None = _own(service, "quick_exchange")
    return found


def dials(service: Callable[..., object], quick: Callable[[Request], Dial | None]) -> None:
    """As :func:`decides`, for ``quick_connect``."""
    service.quick_connect = quick  # type: ignore[attr-defined]  # functions take attributes
    quick.decides_for = service  # type: ignore[attr-defined]


def dial_of(service: object) -> Callable[[Request], Dial | None] | None:
    """As :func:`quick_of`, for ``quick_connect``."""
    found: Callable[[Request], Dial | None] | None = _own(service, "quick_connect")
    return found


def _own(service: object, name: str) -> Any:
    found = getattr(service, name, None)
    return found if found is None or getattr(found, "decides_for", None) is service else shortcut_of(service, name)


def decide_aside(decide: Callable[[Request], Exchange | None], request: Request, told: Request) -> Exchange | None:
    """Return what ``decide`` says of ``told``, a copy of ``request`` with a fork of its extensions: only if that is
    something has anything happened, and what was added to the one is the other's."""
    exchange = decide(told)
    if exchange is None:
        return None
    request.extensions.adopt(told.extensions)
    return exchange._replace(recover=lambda _request, error: exchange.recover(told, error))


def dial_aside(decide: Callable[[Request], Dial | None], request: Request, told: Request) -> Dial | None:
    """As :func:`decide_aside`, for ``quick_connect``."""
    dial = decide(told)
    if dial is not None:
        request.extensions.adopt(told.extensions)
    return dial
