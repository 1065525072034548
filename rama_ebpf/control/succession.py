"""From one server to the next: the messages between them, and what is handed over.

Both ends of a socket pair (``SOCK_SEQPACKET``) send packets of JSON, with descriptors where something is handed over
(``SCM_RIGHTS``, unix(7)). docs/upgrade.md has the order.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any, Final

from ..core.address import Endpoint
from ..core.binding import Binding
from ..core.errors import PeerClosed, RamaError
from ..kernel.attachments import Handed
from .sockets import ListenAt

__all__ = [
    "PROTOCOL",
    "Estate",
    "HandedListener",
    "Senior",
    "ServerChannel",
    "UpgradeFailed",
    "receive_estate",
    "send_estate",
]

PROTOCOL: Final = 1
"""The number of this protocol: two servers that speak others do not hand over."""
_PACKET_BYTES: Final = 64 * 1024
_MAX_FDS: Final = 253  # SCM_MAX_FD
_MOST_PACKETS: Final = 4096

Message = Mapping[str, Any]


class UpgradeFailed(RamaError):
    """One server could not follow the other; the text names the step and the reason."""

    kind = "upgrade_failed"

    def __init__(self, step: str, why: str) -> None:
        super().__init__(f"{step}: {why}")
        self.step = step


class ServerChannel:
    """One end of the socket pair. Its packets are small, so sending waits for nobody who is alive."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    @classmethod
    def pair(cls) -> tuple[ServerChannel, ServerChannel]:
        """Two ends."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), cls(theirs)

    def send(self, fds: Sequence[int] = (), **message: object) -> None:
        """Send a packet, with at most 253 descriptors. Raises OSError."""
        data = json.dumps(message).encode()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)

    def tell(self, **message: object) -> None:
        """Send a packet to whom may be gone, or not listen."""
        with contextlib.suppress(OSError):
            self.sock.sendmsg([json.dumps(message).encode()], (), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def receive(self, timeout: float | None = None, *, wait: bool = True) -> tuple[Message, list[int]]:
        """Return a packet, and its descriptors. Raises :class:`~rama_ebpf.core.errors.PeerClosed` when the other end
        has gone, TimeoutError after ``timeout`` seconds, and BlockingIOError if it is not to ``wait`` and there is
        none."""
        self.sock.settimeout(timeout)
        flags = socket.MSG_CMSG_CLOEXEC | (0 if wait else socket.MSG_DONTWAIT)
        room = socket.CMSG_SPACE(_MAX_FDS * struct.calcsize("i"))
        try:
            data, control, told, _ = self.sock.recvmsg(_PACKET_BYTES, room, flags)
        except ConnectionError:
            raise PeerClosed("the other server has gone") from None
        fds = [
            fd
            for level, kind, packed in control
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            for (fd,) in struct.iter_unpack("i", packed)
        ]
        if not data:
            raise PeerClosed("the other server has gone")
        try:
            if told & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
                raise OSError("descriptors were lost: the limit of open files is too low (RLIMIT_NOFILE)")
            message = json.loads(data)
            if not isinstance(message, dict):
                raise ValueError("a packet that is no object")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return message, fds

    async def messages(self) -> AsyncGenerator[Message, None]:
        """Yield what the other end says, until it has gone or makes no sense; descriptors are closed."""
        loop, readable, fd = asyncio.get_running_loop(), asyncio.Event(), self.sock.fileno()
        loop.add_reader(fd, readable.set)
        try:
            while True:
                await readable.wait()
                readable.clear()
                with contextlib.suppress(BlockingIOError):
                    while True:
                        message, fds = self.receive(wait=False)
                        for passed in fds:
                            os.close(passed)
                        yield message
        except (PeerClosed, OSError, ValueError):
            return
        finally:
            loop.remove_reader(fd)

    def close(self) -> None:
        """Close this end."""
        self.sock.close()


@dataclass(frozen=True, slots=True)
class HandedListener:
    """A listener, with the sockets that listen for it."""

    at: ListenAt
    sockets: tuple[socket.socket, ...]


@dataclass(frozen=True, slots=True)
class Senior:
    """An earlier server that drains; ``series`` is what its workers' identities have, ``since`` when it handed over
    (seconds since the epoch)."""

    pid: int
    series: str
    since: float
    channel: ServerChannel


@dataclass(slots=True)
class Estate:
    """What one server hands to the next. Descriptors are the receiver's own, to be closed by :meth:`close`.

    ``seniors`` are the earlier servers that drain still; ``facts`` are counters that go on, and other plain things.
    """

    facts: Message
    attachments: Handed
    lock: int
    control: socket.socket
    maps: Mapping[str, int]
    listeners: tuple[HandedListener, ...]
    metrics: socket.socket | None = None
    seniors: tuple[Senior, ...] = ()
    _taken: set[str] = field(default_factory=set)

    def take(self, what: str) -> None:
        """Somebody closes the descriptors of one of the fields now."""
        self._taken.add(what)

    def close(self) -> None:
        """Close all that nobody has taken."""
        rest: dict[str, Iterable[int]] = {
            "attachments": self.attachments.descriptors,
            "lock": (self.lock,),
            "maps": self.maps.values(),
        }
        for what, fds in rest.items():
            if what not in self._taken:
                for fd in fds:
                    with contextlib.suppress(OSError):  # closed by who was about to take it
                        os.close(fd)
        if "listeners" not in self._taken:
            for listener in self.listeners:
                for sock in listener.sockets:
                    sock.close()
        singles = {"control": self.control, "metrics": self.metrics}
        for what, single in singles.items():
            if what not in self._taken and single is not None:
                single.close()
        if "seniors" not in self._taken:
            for senior in self.seniors:
                senior.channel.close()
        self._taken.update((*rest, "listeners", "control", "metrics", "seniors"))


def send_estate(channel: ServerChannel, estate: Estate) -> None:
    """Send everything; links first, whose numbers are to be lower than those of sockets (see
    :mod:`~rama_ebpf.kernel.attachments`). Blocks. Raises OSError."""
    channel.send(estate.attachments.descriptors, attachments=estate.attachments.facts)
    channel.send((estate.lock, estate.control.fileno()), lock=True)
    channel.send(tuple(estate.maps.values()), maps=list(estate.maps))
    for listener in estate.listeners:
        at = listener.at
        row = {
            "name": at.name,
            "endpoint": str(at.endpoint),
            "mode": at.mode,
            "needs_gate": at.needs_gate,
            "transparent": at.transparent,
            "bindings": [[str(one.network), one.first, one.last, one.implied] for one in at.bindings],
        }
        channel.send([sock.fileno() for sock in listener.sockets], listener=row)
    if estate.metrics is not None:
        channel.send((estate.metrics.fileno(),), metrics=True)
    for senior in estate.seniors:
        row = {"pid": senior.pid, "series": senior.series, "since": senior.since}
        channel.send((senior.channel.sock.fileno(),), senior=row)
    channel.send(end=dict(estate.facts))


def receive_estate(channel: ServerChannel, timeout: float) -> Estate:
    """Receive what :func:`send_estate` sends. Raises PeerClosed, OSError, LookupError, TypeError or ValueError; nothing
    stays open then."""
    found: dict[str, tuple[Any, list[int]]] = {}
    listeners: list[HandedListener] = []
    seniors: list[Senior] = []
    unowned: list[int] = []
    try:
        for _ in range(_MOST_PACKETS):
            message, fds = channel.receive(timeout)
            unowned += fds
            what, value = next(iter(message.items()))
            if what == "end":
                maps, map_fds = found["maps"]
                lock, control = found["lock"][1]
                handed = Handed(found["attachments"][0], tuple(found["attachments"][1]))
                metrics = socket.socket(fileno=found["metrics"][1][0]) if "metrics" in found else None
                return Estate(
                    value,
                    handed,
                    lock,
                    socket.socket(fileno=control),
                    dict(zip(maps, map_fds, strict=True)),
                    tuple(listeners),
                    metrics,
                    tuple(seniors),
                )
            if what == "listener":
                bindings = (Binding(ip_network(network), *rest) for network, *rest in value.get("bindings", ()))
                at = ListenAt(
                    value["name"],
                    Endpoint.of(value["endpoint"]),
                    value["mode"],
                    value["needs_gate"],
                    tuple(bindings),
                    value.get("transparent", False),
                )
                listeners.append(HandedListener(at, tuple(socket.socket(fileno=fd) for fd in fds)))
            elif what == "senior":
                seniors.append(
                    Senior(value["pid"], value["series"], value["since"], ServerChannel(socket.socket(fileno=fds[0])))
                )
            else:
                found[what] = value, fds
        raise ValueError("there is no end of what is handed over")
    except BaseException:
        # By number: some have become sockets, whose objects must not close those numbers later.
        for one in listeners:
            for sock in one.sockets:
                sock.detach()
        for senior in seniors:
            senior.channel.sock.detach()
        for fd in unowned:
            os.close(fd)
        raise
