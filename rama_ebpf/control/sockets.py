"""The sockets that listen for a server: where they are wanted, what there is of each revision, and how an address gets
them, and nobody else's."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from ..core.address import Endpoint, IPAddress, SocketAddress
from ..core.binding import Binding
from ..kernel import sock_diag
from ..process import Listener
from ..services.tcp import BACKLOG, bind_tcp

__all__ = [
    "Key",
    "ListenAt",
    "OpenListener",
    "SocketSet",
    "answer_from_anywhere",
    "at_bindings",
    "bind",
    "close_all",
    "key_of",
    "listen",
    "other_owner",
    "overlap",
    "stolen_from",
]

log = logging.getLogger("rama_ebpf")


@dataclass(frozen=True, slots=True)
class ListenAt:
    """Where to listen, under a name. ``mode`` is that of a Unix socket's file. A TCP listener without ``needs_gate`` is
    served also where the gate does not guard it. With ``bindings``, all of one family, it serves these, and
    ``endpoint`` is where its sockets are bound, which nobody can connect to; ``transparent``: also what is only routed
    through this host."""

    name: str
    endpoint: Endpoint
    mode: int = 0o660
    needs_gate: bool = True
    bindings: tuple[Binding, ...] = ()
    transparent: bool = False

    def __str__(self) -> str:
        return ", ".join(map(str, self.bindings)) if self.bindings else str(self.endpoint)


_HOMES: Final = {version: Endpoint(SocketAddress(ip_address(ip), 0)) for version, ip in ((4, "127.0.0.1"), (6, "::1"))}


def at_bindings(name: str, bindings: Iterable[Binding], *, transparent: bool = False) -> tuple[ListenAt, ...]:
    """Listen at sets of addresses and ports, under one name: one for each family that there is."""
    bindings = tuple(bindings)
    found = []
    for version, home in _HOMES.items():
        if own := tuple(binding for binding in bindings if binding.network.version == version):
            found.append(ListenAt(name, home, bindings=own, transparent=transparent))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class OpenListener:
    """Sockets of one revision that listen at one address, None for Unix sockets. ``is_home``: they serve bindings."""

    sockets: tuple[socket.socket, ...]
    address: SocketAddress | None
    is_home: bool = False


_TRANSPARENT: Final = ((socket.IPPROTO_IP, 19), (socket.IPPROTO_IPV6, 75))

Key = tuple[Endpoint, str]
"""By what the listeners of two revisions are known to be one."""


def key_of(at: ListenAt) -> Key:
    """Return what a listener is known by."""
    # A reload may give an address another name. Only where the kernel picks the port is the name what tells two
    # listeners apart.
    picked = at.endpoint.address is not None and at.endpoint.address.port == 0
    return at.endpoint, at.name if picked else ""


@dataclass(frozen=True, slots=True, eq=False)
class SocketSet:
    """The sockets of one revision, by what they listen at."""

    wanted: tuple[ListenAt, ...]
    opened: Mapping[Key, OpenListener]

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """As a plan has them: of one name those of both families, one after the other."""
        named: dict[str, tuple[socket.socket, ...]] = {}
        for at in self.wanted:
            named[at.name] = named.get(at.name, ()) + self.opened[key_of(at)].sockets
        return tuple(Listener(name, sockets) for name, sockets in named.items())

    def first_index(self, at: ListenAt) -> int:
        """The index of its first socket among those of its name."""
        before = self.wanted[: self.wanted.index(at)]
        return sum(len(self.opened[key_of(one)].sockets) for one in before if one.name == at.name)

    def address(self, at: ListenAt) -> SocketAddress | None:
        """Where it listens; None for a Unix socket."""
        return self.opened[key_of(at)].address

    @property
    def addresses(self) -> dict[SocketAddress, tuple[socket.socket, ...]]:
        """The TCP addresses with their sockets."""
        return {entry.address: entry.sockets for entry in self.opened.values() if entry.address is not None}

    @property
    def diverted(self) -> tuple[Binding, ...]:
        """What is to be taken also where it is only routed through this host."""
        return tuple(binding for at in self.wanted if at.transparent for binding in at.bindings)

    @property
    def bindings(self) -> dict[SocketAddress, tuple[Binding, ...]]:
        """What is served by the sockets at each home."""
        opened = ((self.opened.get(key_of(at)), at.bindings) for at in self.wanted if at.bindings)
        found = ((entry.address, bindings) for entry, bindings in opened if entry is not None)
        return {address: bindings for address, bindings in found if address is not None}


def answer_from_anywhere(sock: socket.socket) -> None:
    """Let a socket have connections at addresses that are not this host's (IP_TRANSPARENT, ip(7)). Raises OSError."""
    level, option = _TRANSPARENT[sock.family == socket.AF_INET6]
    try:
        sock.setsockopt(level, option, 1)
    except OSError as error:
        raise OSError(error.errno, f"transparent listeners take CAP_NET_ADMIN: {error.strerror}") from error


def bind(address: SocketAddress, count: int, *, shared: bool) -> tuple[socket.socket, ...]:
    """Bind sockets to one address. If it is not ``shared`` with others of ours, nobody else may listen there: then
    SO_REUSEPORT, which would let two servers share it unseen, is set after that is known."""
    host = str(address.ip)
    try:
        sockets = [bind_tcp(host, address.port, reuse_port=shared, backlog=None)]
    except OSError as error:
        owner = other_owner(address) if error.errno == errno.EADDRINUSE else ""
        if not owner:
            raise
        raise OSError(error.errno, f"{error.strerror} ({owner})") from error
    try:
        sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        while len(sockets) < count:
            sockets.append(bind_tcp(host, sockets[0].getsockname()[1], reuse_port=True, backlog=None))
    except BaseException:
        close_all(sockets)
        raise
    return tuple(sockets)


def listen(sock: socket.socket, address: SocketAddress) -> None:
    """Have a socket listen. Raises OSError naming the address."""
    try:
        sock.listen(BACKLOG)
    except OSError as error:
        text = f"cannot listen on {address.ip} port {address.port}: {error.strerror}"
        raise OSError(error.errno or errno.EIO, text) from error


def overlap(one: SocketAddress, other: SocketAddress) -> bool:
    """Whether two addresses have connections in common: equal, or one of them a wildcard."""
    if one.port != other.port or one.ip.version != other.ip.version:
        return False
    return one.ip == other.ip or one.ip.is_unspecified or other.ip.is_unspecified


def other_owner(address: SocketAddress, ours: Container[int] = ()) -> str:
    """Say who else listens on connections of an address; ``ours`` are the cookies of sockets that may. Empty if nobody
    does, or it cannot be told."""
    try:
        listening = sock_diag.listening()
    except OSError as error:
        log.debug("who else listens at %s cannot be told: %s", address, error)
        return ""
    for other in listening:
        if other.cookie not in ours and other.meets(address.ip, address.port):
            return f"{sock_diag.owner_of(other.inode)} listens at {SocketAddress(other.address, other.port)}"
    return ""


def stolen_from(
    bindings: Iterable[Binding], listening: Iterable[sock_diag.ListeningSocket], own: Iterable[IPAddress]
) -> str:
    """Say whose connections would be steered to us, of those that listen: at an address of ``bindings``, or at all
    addresses where one of the host's ``own`` is among these. Empty if nobody's."""
    own = tuple(own)
    for other in listening:
        for binding in bindings:
            at = own if other.address.is_unspecified else (other.address,)
            families = {other.address.version, 4 if other.takes_ipv4 else other.address.version}
            taken = next((ip for ip in at if ip.version in families and binding.holds(ip, other.port)), None)
            if taken is not None:
                where = SocketAddress(other.address, other.port)
                return (
                    f"{binding} would take the connections to {SocketAddress(taken, other.port)} from "
                    f"{sock_diag.owner_of(other.inode)}, which listens at {where}: leave that out"
                )
    return ""


def close_all(sockets: Iterable[socket.socket]) -> None:
    """Close sockets."""
    for sock in sockets:
        sock.close()
