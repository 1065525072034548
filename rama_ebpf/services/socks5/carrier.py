"""What carries the datagrams of an association where ways out are chosen: this host, or a parent's association."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Final, Protocol

from ...core.address import Authority
from ...core.errors import RamaError
from ...core.extensions import Extensions
from .client import BoundPort, UdpSocket

__all__ = ["Carrier", "ClientWays", "ParentLink", "SocksWays"]

_MAX_WAITING_BYTES: Final = 64 * 1024


class Carrier(Protocol):
    """A way that can carry datagrams."""

    @property
    def name(self) -> str: ...

    @property
    def by_parent(self) -> bool:
        """Whether a parent sends them, and not this host."""

    @property
    def resolves_here(self) -> bool:
        """Whether names of targets are looked up here."""

    def check(self, target: Authority, /) -> None:
        """Raise :class:`~rama_ebpf.core.errors.PolicyDenied` if it may not be sent there."""

    def prepare(self, sock: socket.socket, version: int, /) -> None:
        """Make a socket of ours send by this way. Raises OSError."""

    async def open(self) -> UdpSocket:
        """Open an association at the parent. Raises :class:`~..connect.ConnectError`."""


class ClientWays(Protocol):
    """The ways of one client's datagrams."""

    def choose(self, target: Authority, /) -> Carrier | None:
        """Return what carries datagrams to a target; None if nothing may, or can."""


class SocksWays(Protocol):
    """Chooses the ways of BIND and UDP ASSOCIATE."""

    def of_client(self, extensions: Extensions, /) -> ClientWays | None:
        """Return the ways of a client's datagrams; None if there is none that can carry any."""

    async def bind(self, peer: Authority, extensions: Extensions, /) -> BoundPort | None:
        """Have the way to ``peer`` listen for it; None if that is this host, as it is. Raises what connectors raise."""


class ParentLink:
    """An association at a parent, with what waits until it is open. ``arrived`` is called with each datagram and who
    sent it, ``ended`` when it is over."""

    def __init__(
        self,
        carrier: Carrier,
        arrived: Callable[[bytes, Authority], None],
        ended: Callable[[bool], None],
    ) -> None:
        self._carrier = carrier
        self._arrived = arrived
        self._ended = ended
        self._waiting: list[tuple[bytes, Authority]] = []
        self._waiting_bytes = 0
        self._socket: UdpSocket | None = None
        self.task = asyncio.get_running_loop().create_task(self._run())

    def send(self, payload: bytes, target: Authority) -> bool:
        """Send one datagram, or keep it until the association is open; False if there is no room. Raises OSError."""
        if self._socket is not None:
            try:
                self._socket.send(payload, target)
            except BlockingIOError:
                return False
            return True
        if self._waiting_bytes + len(payload) + 64 > _MAX_WAITING_BYTES:
            return False
        self._waiting_bytes += len(payload) + 64
        self._waiting.append((payload, target))
        return True

    async def _run(self) -> None:
        was_open = False
        try:
            opened = await self._carrier.open()
            was_open = True
            try:
                self._socket = opened
                for payload, target in self._waiting:
                    opened.send(payload, target)
                self._waiting.clear()
                receiving = asyncio.ensure_future(self._receive(opened))
                closing = asyncio.ensure_future(opened.closed())
                try:
                    await asyncio.wait((receiving, closing), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in (receiving, closing):
                        task.cancel()
                    await asyncio.gather(receiving, closing, return_exceptions=True)
            finally:
                self._socket = None
                await opened.close()
        except (RamaError, OSError):
            pass  # the way is blamed by who opened it; the client learns that its datagrams do not come back
        finally:
            self._ended(was_open)

    async def _receive(self, opened: UdpSocket) -> None:
        while True:
            try:
                payload, source = await opened.receive()
            except ConnectionRefusedError:  # ICMP: the relay's port was not open for one of ours
                continue
            except OSError as error:
                if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
                    continue
                raise
            self._arrived(payload, source)

    def close(self) -> None:
        """End it."""
        self.task.cancel()
