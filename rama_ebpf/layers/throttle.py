"""Bandwidth: how many bytes a second a connection, or all of them together, may move."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from ..core.address import Authority
from ..core.auth import User
from ..core.bucket import TokenBucket
from ..core.first_bytes import FirstBytes
from ..core.service import Output, Service
from ..core.stream import Stream
from ..core.target import Target
from ..core.wrapped import WrappedStream

__all__ = ["Bandwidth", "ThrottleLayer", "UserThrottleLayer"]

_SMALLEST = 4096


class Bandwidth:
    """A budget of ``rate`` bytes a second and ``burst`` bytes at once (default: 0.1 s worth, at least 64 KiB)."""

    def __init__(self, rate: float, burst: float | None = None) -> None:
        self._bucket = TokenBucket(rate, max(rate / 10, 65536.0) if burst is None else burst)

    @property
    def piece(self) -> int:
        """How many bytes are moved at a time, so that streams that share the budget take turns."""
        return max(int(self._bucket.burst) // 4, _SMALLEST)

    async def spend(self, count: int) -> None:
        """Wait until the debt of earlier calls is paid, then take ``count`` bytes."""
        # The bytes are taken at once even if that makes a debt: whoever comes next waits for it. So many streams
        # queue up in turn, none is starved, and the sum over time is exact.
        wait = self._bucket.force(asyncio.get_running_loop().time(), count)
        if wait > 0:
            await asyncio.sleep(wait)


class ThrottleLayer:
    """Slows down what is read from the client (``up``) and written to it (``down``), live tunnels included.

    A plain number is bytes a second for each connection; a :class:`Bandwidth` is shared by all connections that go
    through layers that hold it. The stream handed on is no socket, so a tunnel behind it runs on the ``copy`` relay:
    what moves inside the kernel cannot be slowed down.
    """

    accepts = Stream

    def __init__(self, *, up: float | Bandwidth | None = None, down: float | Bandwidth | None = None) -> None:
        self._up = _factory(up)
        self._down = _factory(down)

    def first_bytes(self, inner: FirstBytes | None) -> FirstBytes | None:
        """First bytes are judged as inside: what is refused by them needs nothing of this layer."""
        return inner

    def __call__(self, inner: Service[Stream, Output], /) -> Service[Stream, Output]:
        async def serve(stream: Stream, /) -> Output:
            return await inner(_ThrottledStream(stream, self._up(), self._down()))

        return serve


class UserThrottleLayer:
    """Around a connector: bounds what each authenticated user moves, in each direction, all connections of a worker
    together. ``rate(user)`` is bytes a second, asked for each connection; None is no bound, and nobody without a user
    has one. ``users`` is how many of them are remembered.

    As with :class:`ThrottleLayer`, such a tunnel runs on the ``copy`` relay.
    """

    accepts = Authority
    provides = Authority

    def __init__(self, rate: Callable[[User], float | None], *, users: int = 65_536) -> None:
        self._rate = rate
        self._most = users
        self._budgets: OrderedDict[str, tuple[float, Bandwidth, Bandwidth]] = OrderedDict()

    def __call__(self, inner: Service[Authority, Stream], /) -> Service[Authority, Stream]:
        async def connect(target: Authority, /) -> Stream:
            user = target.extensions.get(User) if isinstance(target, Target) else None
            rate = None if user is None else self._rate(user)
            upstream = await inner(target)
            if user is None or rate is None:
                return upstream
            from_target, to_target = self._budget(user.name, rate)
            return _ThrottledStream(upstream, from_target, to_target)

        return connect

    def _budget(self, name: str, rate: float) -> tuple[Bandwidth, Bandwidth]:
        found = self._budgets.pop(name, None)
        if found is None or found[0] != rate:
            found = rate, Bandwidth(rate), Bandwidth(rate)
        self._budgets[name] = found
        if len(self._budgets) > self._most:
            self._budgets.popitem(last=False)
        return found[1:]


def _factory(limit: float | Bandwidth | None) -> Callable[[], Bandwidth | None]:
    if isinstance(limit, Bandwidth):
        return lambda: limit
    if limit is None:
        return lambda: None
    rate = limit
    Bandwidth(rate)  # raises ValueError for a bad number now
    return lambda: Bandwidth(rate)


class _ThrottledStream(WrappedStream):
    def __init__(self, inner: Stream, up: Bandwidth | None, down: Bandwidth | None) -> None:
        super().__init__(inner)
        self._up = up
        self._down = down

    async def _receive(self, max_bytes: int) -> bytes:
        if self._up is None:
            return await super()._receive(max_bytes)
        data = await super()._receive(min(max_bytes, self._up.piece))
        await self._up.spend(len(data))
        return data

    async def write(self, *chunks: bytes | bytearray | memoryview) -> None:
        if self._down is None:
            await super().write(*chunks)
            return
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            for start in range(0, len(view), self._down.piece):
                piece = view[start : start + self._down.piece]
                await self._down.spend(len(piece))
                await super().write(piece)
