"""Run a service, or a stack, over streams in memory: a client in front of it, and targets behind it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final, Generic, TypeVar

from ..core.address import Authority, SocketAddress
from ..core.client import ClientAddress, LocalAddress
from ..core.errors import RamaError
from ..core.service import Service
from ..core.stream import Stream
from .memory import MemoryStream, stream_pair
from .patience import PATIENCE
from .peer import Peer

__all__ = ["Dialled", "Served", "Targets", "serve"]

Output = TypeVar("Output")

_CLIENT: Final = SocketAddress(IPv4Address("198.51.100.7"), 40000)
_SERVER: Final = SocketAddress(IPv4Address("192.0.2.1"), 1080)
_TARGET: Final = SocketAddress(IPv4Address("203.0.113.1"), 443)
_PATIENCE: Final = 10.0


@dataclass
class Served(Generic[Output]):
    """A service that serves one client. Made by :func:`serve`."""

    client: Peer
    """The client: what it says, the service reads."""
    stream: MemoryStream
    """What the service was given, with its extensions."""
    _task: asyncio.Task[Output]
    _told: bool = False

    async def outcome(self) -> Output:
        """Wait until the service has ended; return what it returned, or raise what it raised. Raises AssertionError if
        it does not end within 10 s (times ``$RAMA_EBPF_PATIENCE``)."""
        await asyncio.wait([self._task], timeout=_PATIENCE * PATIENCE)
        if not self._task.done():
            raise AssertionError("the service did not end")
        self._told = True
        return self._task.result()


@contextlib.asynccontextmanager
async def serve(
    service: Service[Stream, Output],
    *,
    client: SocketAddress | None = _CLIENT,
    server: SocketAddress | None = _SERVER,
    extensions: tuple[object, ...] = (),
) -> AsyncIterator[Served[Output]]:
    """Serve one client, as :class:`~rama_ebpf.services.TcpServer` does: the stream says who it is, and is closed when
    the service returns, reset when it raises.

    ``extensions`` are added to the stream's, for what a layer outside would have added. When the block ends, a service
    that still serves is cancelled. What it raised is raised then, unless :meth:`Served.outcome` told, or it is what a
    server expects of a hostile network (RamaError, OSError).
    """
    far, near = stream_pair(client, server)
    if client is not None:
        near.extensions.add(ClientAddress(client))
    if server is not None:
        near.extensions.add(LocalAddress(server))
    for extension in extensions:
        near.extensions.add(extension)
    task = asyncio.create_task(_serve(service, near), name="service under test")
    served = Served(Peer(far), near, task)
    try:
        yield served
    except BaseException as failure:
        error = await _ended(task)
        if error is not None:
            failure.add_note(f"the service raised {error!r}")
        raise
    else:
        running = not task.done()
        error = await _ended(task)
        expected = served._told or (not running and isinstance(error, RamaError | OSError))
        if error is not None and not expected:
            raise error
    finally:
        far.abort()


async def _ended(task: asyncio.Task[Output]) -> BaseException | None:
    """End the service, if it has not; return what it raised."""
    task.cancel()
    await asyncio.wait([task])
    return None if task.cancelled() else task.exception()


async def _serve(service: Service[Stream, Output], stream: MemoryStream) -> Output:
    try:
        result = await service(stream)
    except BaseException:
        stream.abort()
        raise
    await stream.close()
    return result


@dataclass(frozen=True)
class Dialled:
    """A connection that a service has made."""

    authority: Authority
    """What it asked for; a :class:`~rama_ebpf.core.Target` where it told its client."""
    peer: Peer
    """The target: what it says, the service reads."""


class Targets:
    """A connector whose targets are the test's: put it where a service wants a connector.

    Each call is answered by a stream in memory, whose other end :meth:`dialled` hands out, in the order of the calls.
    """

    accepts = Authority

    def __init__(self, *, refuse: Exception | None = None) -> None:
        """``refuse`` is raised in place of connecting, for example a :class:`~rama_ebpf.services.ConnectError`."""
        self.refuse = refuse
        self.asked: list[Authority] = []
        """What was asked for, also where it was refused."""
        self._dialled: asyncio.Queue[Dialled] = asyncio.Queue()

    async def __call__(self, target: Authority, /) -> Stream:
        self.asked.append(target)
        if self.refuse is not None:
            raise self.refuse
        near, far = stream_pair(None, _TARGET)
        self._dialled.put_nowait(Dialled(target, Peer(far)))
        return near

    async def dialled(self) -> Dialled:
        """Wait for the next connection. Raises AssertionError if none comes within 10 s (times
        ``$RAMA_EBPF_PATIENCE``)."""
        try:
            async with asyncio.timeout(_PATIENCE * PATIENCE):
                return await self._dialled.get()
        except TimeoutError:
            raise AssertionError(f"no target was connected to; asked for: {self.asked or 'nothing'}") from None
