"""The SOCKS5 client: connecting, binding and sending datagrams through a proxy."""

from __future__ import annotations

import asyncio
import errno
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from ...core.address import Authority, SocketAddress
from ...core.auth import Credentials
from ...core.errors import PeerClosed
from ...core.service import Service, check_fit
from ...core.stream import Stream
from ..connect import ConnectError, reach_proxy, upstream_failure
from .client_machine import MAX_REPLY, ClientMachine, Refused
from .wire import Command, MalformedAddress, Reply, decode_datagram, encode_datagram

__all__ = ["ERRNO", "BoundPort", "Socks5Client", "UdpSocket", "handshake"]

ERRNO: Final = {
    Reply.GENERAL_FAILURE: errno.EIO,
    Reply.NOT_ALLOWED: errno.EACCES,
    Reply.NETWORK_UNREACHABLE: errno.ENETUNREACH,
    Reply.HOST_UNREACHABLE: errno.EHOSTUNREACH,
    Reply.CONNECTION_REFUSED: errno.ECONNREFUSED,
    Reply.TTL_EXPIRED: errno.ETIMEDOUT,
    Reply.COMMAND_NOT_SUPPORTED: errno.EOPNOTSUPP,
    Reply.ADDRESS_TYPE_NOT_SUPPORTED: errno.EAFNOSUPPORT,
}
"""What a proxy means by its reply, in the terms in which a connector fails."""


async def handshake(
    stream: Stream, command: Command, target: Authority, credentials: Credentials | None = None
) -> tuple[ClientMachine, Authority]:
    """Shake hands with the server at the other end of ``stream`` and have ``command`` granted; return the machine
    (for BIND's second reply) and the bound address.

    Bytes that follow the reply stay in the stream's read-ahead buffer. Raises :class:`ProtocolError`,
    :class:`AuthFailed`, :class:`~.client_machine.Refused`, :class:`PeerClosed` or OSError; the caller closes.
    """
    machine = ClientMachine(command, target, credentials)
    return machine, await _next_grant(stream, machine)


async def _next_grant(stream: Stream, machine: ClientMachine) -> Authority:
    while True:
        await stream.write(machine.data_to_send())
        granted, used = machine.receive(stream.buffered)
        stream.consume(used)
        if granted is not None:
            return granted.bound
        if not used and not await stream.fill(MAX_REPLY):
            raise PeerClosed(f"the SOCKS5 proxy closed: {machine.state.value}")


class Socks5Client:
    """Reaches targets through the SOCKS5 server at ``proxy``; itself a service from :class:`Authority` to
    :class:`Stream`, like the ``connector`` by which it reaches the proxy, so that chains are built by nesting.

    A target that is a name is resolved by the proxy. ``timeout`` (seconds) bounds a handshake. Whatever goes wrong
    raises :class:`ConnectError`, with the errno that stands for the proxy's reply and the first cause attached: to
    those who use a connector it makes no difference how far away a failure is, and a failing proxy must not look like
    a misbehaving client.
    """

    accepts = Authority

    def __init__(
        self,
        connector: Service[Authority, Stream],
        proxy: Authority,
        *,
        credentials: Credentials | None = None,
        timeout: float = 10.0,
    ) -> None:
        check_fit(self, Authority, connector)
        self._connector = connector
        self._proxy = proxy
        self._credentials = credentials
        self._timeout = timeout

    async def __call__(self, target: Authority, /) -> Stream:
        """CONNECT: return the stream to ``target``."""
        stream, _machine, _bound = await self._request(Command.CONNECT, target)
        return stream

    async def bind(self, peer: Authority) -> BoundPort:
        """BIND: have the proxy listen for ``peer``."""
        stream, machine, address = await self._request(Command.BIND, peer)
        return BoundPort(stream, machine, address, self._proxy)

    async def associate(self) -> UdpSocket:
        """UDP ASSOCIATE: return a socket whose datagrams go through the proxy."""
        stream, _machine, bound = await self._request(Command.UDP_ASSOCIATE, Authority(IPv4Address(0), 0))
        try:
            return await UdpSocket.open(stream, bound)
        except BaseException:
            await stream.close()
            raise

    async def _request(self, command: Command, target: Authority) -> tuple[Stream, ClientMachine, Authority]:
        stream = await reach_proxy(self._connector, self._proxy)
        try:
            async with asyncio.timeout(self._timeout):
                machine, bound = await handshake(stream, command, target, self._credentials)
        except BaseException as error:
            await stream.close()
            if (failure := _failure(error, f"cannot reach {target} through {self._proxy}")) is None:
                raise
            raise failure from error
        return stream, machine, bound


def _failure(error: BaseException, doing: str) -> ConnectError | None:
    if isinstance(error, Refused):
        return ConnectError(ERRNO[error.reply], f"{doing}: {error}")
    return upstream_failure(error, doing)


@dataclass(frozen=True, slots=True)
class BoundPort:
    """A port on which the proxy waits for the peer: tell it ``address``, then :meth:`accept`."""

    _stream: Stream
    _machine: ClientMachine
    address: Authority
    _proxy: Authority

    async def accept(self, *, timeout: float = 60.0) -> tuple[Stream, Authority]:
        """Return the stream to the peer and the peer's address. Raises :class:`ConnectError`; closes on failure."""
        try:
            async with asyncio.timeout(timeout):
                peer = await _next_grant(self._stream, self._machine)
        except BaseException as error:
            await self._stream.close()
            if (failure := _failure(error, f"no peer at {self.address} of {self._proxy}")) is None:
                raise
            raise failure from error
        return self._stream, peer

    async def close(self) -> None:
        """Give the port up."""
        await self._stream.close()


class UdpSocket:
    """Sends and receives datagrams through the proxy while its TCP connection to the proxy lives."""

    def __init__(self, stream: Stream, sock: socket.socket, relay: SocketAddress) -> None:
        self.relay = relay
        self._stream = stream
        self._sock = sock
        self._waiter: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, stream: Stream, bound: Authority) -> UdpSocket:
        """Open a socket towards the relay at ``bound``; the unspecified address stands for the proxy's own (as many
        servers answer). Raises :class:`ConnectError` if it is a name or cannot be reached."""
        ip = bound.ip
        if ip in (IPv4Address(0), IPv6Address(0)) and stream.peer is not None:
            ip = stream.peer.ip
        if ip is None:
            raise ConnectError(errno.EAFNOSUPPORT, f"the proxy names its UDP relay {bound}: an address is needed")
        relay = SocketAddress(ip, bound.port)
        sock = socket.socket(relay.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.connect(relay.to_sockaddr())
        except OSError as error:
            sock.close()
            raise ConnectError(
                error.errno or errno.EIO, f"cannot reach the UDP relay {relay}: {error.strerror}"
            ) from error
        return cls(stream, sock, relay)

    def send(self, payload: bytes, target: Authority) -> None:
        """Send one datagram now. Raises BlockingIOError if the kernel's buffer is full, and OSError: EMSGSIZE if it is
        longer, with its header of up to 262 octets, than 65,507 octets."""
        self._sock.send(encode_datagram(target, payload))

    async def receive(self) -> tuple[bytes, Authority]:
        """Return the next datagram and who sent it; what is malformed is skipped. Raises OSError; one task at a
        time."""
        while True:
            try:
                data = self._sock.recv(65535)
                source, start = decode_datagram(data)
            except BlockingIOError:
                await self._readable()
            except MalformedAddress:
                continue
            else:
                return data[start:], source

    async def _readable(self) -> None:
        if self._waiter is not None:
            raise RuntimeError("two tasks receive on one socket")
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        fd = self._sock.fileno()
        loop.add_reader(fd, _wake, self._waiter)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if self._sock.fileno() == fd:  # after close() the number may be another socket's
                loop.remove_reader(fd)

    async def closed(self) -> None:
        """Return when the proxy has ended the association."""
        while await self._stream.read(4096):
            pass

    async def close(self) -> None:
        """End the association; a pending :meth:`receive` raises ConnectionAbortedError. Idempotent."""
        if self._waiter is not None and not self._waiter.done():
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            self._waiter.set_exception(ConnectionAbortedError("UDP socket closed"))
        self._sock.close()
        await self._stream.close()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
