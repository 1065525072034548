"""The process that holds the wire relay: its maps, its programs, and the sockets of the tunnels that were taken over.

Started as ``python -m rama_ebpf.control.wire_child DOOR CHANNEL UID GID``. Over CHANNEL the server says what is wanted,
and hears once a turn that this process lives; through DOOR workers introduce themselves
(:mod:`..relay.wire_messages`). It loads the programs as root and opens the sockets that it needs; then it keeps two
capabilities, to use the maps (CAP_BPF) and to park sockets and attach to interfaces (CAP_NET_ADMIN), and a sandbox like
that of workers. It trusts nobody: what it is told of a tunnel it asks the kernel.

It does not end with the server: it hears of that by CHANNEL, resets all tunnels, and ends then.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, Final

from ..core.reactor import Reactor
from ..kernel.btf import BtfUnavailable
from ..kernel.compile import CompileError
from ..kernel.confine import NO_NETWORK, confine
from ..kernel.netdev import SIOCETHTOOL
from ..kernel.privileges import (
    CAP_BPF,
    CAP_NET_ADMIN,
    UserIds,
    die_with_parent,
    keep_capabilities,
    outlive_parent,
    raise_descriptor_limit,
)
from ..kernel.wire import WireMaps, WireUnavailable
from ..relay.report import CloseReason
from ..relay.splicer import Splicer, Told
from ..relay.wire_messages import Answer, Ask, Reply, Request, receive, send
from ..relay.wire_rules import Refused

__all__: list[str] = []

log = logging.getLogger("rama_ebpf.wire")

_TURN_SECONDS: Final = 0.25
_MESSAGES: Final = 64
"""That are read of one worker before the others have their turn."""
_CREDENTIALS: Final = struct.Struct("=III")  # struct ucred
_QUEUE_BYTES: Final = 1 << 20
_OWN_DESCRIPTORS: Final = 256
_WORDS_BYTES: Final = 1 << 16
_BPF_COMMANDS: Final = (10, 28)  # BPF_PROG_TEST_RUN, BPF_LINK_CREATE


class _Worker:
    """One worker, by its channel."""

    def __init__(self, holder: _Holder, sock: socket.socket, pid: int) -> None:
        self.pid = pid
        self._holder = holder
        self._sock = sock
        self._unsent: deque[bytes] = deque()
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _QUEUE_BYTES)
        send(sock, Reply(Answer.WELCOME).pack(), (holder.pairs,))
        holder.reactor.add(sock.fileno(), select.EPOLLIN, self._told)

    def _told(self, events: int) -> None:
        try:
            if events & select.EPOLLOUT:
                self._flush()
            for _ in range(_MESSAGES if events & ~select.EPOLLOUT else 0):
                data, fds = receive(self._sock, 2)
                if not data:
                    self.close()
                    return
                self._obey(data, _sockets(fds))
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            log.error("a worker is not listened to any more: %s", error)
            self.close()

    def _obey(self, data: bytes, sockets: list[socket.socket]) -> None:
        try:
            request = Request.unpack(data)
            if request.ask is Ask.TAKE and len(sockets) == 2:
                client, target = sockets
                sockets.clear()
                self._take(request, (client, target))
            elif request.ask is Ask.TAKE:  # the kernel had no descriptors for us
                self._say(Reply(Answer.REFUSED, request.number, text="all places are taken"))
            elif request.ask is Ask.GIVE_UP:
                self._holder.splicer.give_up(self, request.number)
            elif request.ask is Ask.CUT:
                self._holder.splicer.cut(self, request.number)
        finally:
            for sock in sockets:
                sock.close()

    # Nothing here may set a time-out of these sockets: whether they block is the worker's business as well.
    def _take(self, request: Request, sockets: tuple[socket.socket, socket.socket]) -> None:
        number = request.number

        def tell(told: Told, reason: CloseReason, moved: tuple[int, int]) -> None:
            if told is Told.ENDED:
                self._say(Reply.ended(number, reason, moved))
            else:
                self._say(Reply(Answer.TAKEN if told is Told.TAKEN else Answer.SPOILED, number))

        try:
            pair = self._holder.splicer.take(self, number, sockets, request.owed, request.deadline, tell)
        except Refused as refused:
            self._say(Reply(Answer.REFUSED, number, text=str(refused)))
        except OSError as error:
            self._say(Reply(Answer.REFUSED, number, text=f"the kernel refuses it ({error.strerror or error})"))
        else:
            self._say(Reply(Answer.WATCHED, number, pair))

    def _say(self, reply: Reply) -> None:
        self._unsent.append(reply.pack())
        self._flush()

    def _flush(self) -> None:
        while self._unsent:
            try:
                send(self._sock, self._unsent[0])
            except BlockingIOError:
                self._holder.reactor.change(self._sock.fileno(), select.EPOLLIN | select.EPOLLOUT)
                return
            except OSError:
                self._unsent.clear()  # it has ended, which its channel tells
                return
            self._unsent.popleft()
        self._holder.reactor.change(self._sock.fileno(), select.EPOLLIN)

    def close(self) -> None:
        """It is no more: its tunnels end."""
        if self not in self._holder.workers:
            return
        self._holder.workers.discard(self)
        self._holder.reactor.remove(self._sock.fileno())
        self._sock.close()
        self._holder.splicer.leave(self)


class _Holder:
    def __init__(self, door: socket.socket, channel: socket.socket, wanted: dict[str, Any]) -> None:
        self.reactor = Reactor()
        self.workers: set[_Worker] = set()
        self.stopping = False
        self._door = door
        self._channel = channel
        self._listeners = _places(wanted)
        headers = wanted["kernel_headers"]
        # Two sockets each.
        most = (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OWN_DESCRIPTORS) // 2
        self.maps = WireMaps.load(
            min(wanted["count"], max(most, 1)), kernel_headers=None if headers is None else Path(headers)
        )
        self.pairs = self.maps.readable_pairs()  # opened now: it takes more than what is kept
        self.splicer = Splicer(self.maps, self.reactor, quota=wanted["quota"], listeners=lambda: self._listeners)
        door.setblocking(False)
        channel.setblocking(False)
        self.reactor.add(door.fileno(), select.EPOLLIN, lambda _: self._introduced())
        self.reactor.add(channel.fileno(), select.EPOLLIN, lambda _: self._hear())

    def _introduced(self) -> None:
        """A worker has sent its end of a channel."""
        try:
            data, fds = receive(self._door, 1)
        except BlockingIOError:
            return
        if not data:
            self.reactor.remove(self._door.fileno())  # the server ends, or a worker has shut it: those we know go on
        for fd in fds:
            try:
                [sock] = _sockets([fd])
            except OSError:
                continue
            try:
                # Who made the pair, as the kernel has noted it.
                pid, _, _ = _CREDENTIALS.unpack(
                    sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                )
                for former in [worker for worker in self.workers if worker.pid == pid]:
                    former.close()  # or else one of them had the places of many
                self.workers.add(_Worker(self, sock, pid))
            except OSError as error:
                log.error("a worker cannot be heard: %s", error)
                sock.close()

    def _hear(self) -> None:
        """The server says what has changed, or is no more."""
        try:
            data = self._channel.recv(_WORDS_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._listeners = _places(json.loads(data))
        else:
            self.stopping = True

    def run(self) -> None:
        """Serve until the server ends."""
        said = 0.0
        while not self.stopping:
            self.reactor.turn(_TURN_SECONDS)
            now = time.monotonic()
            if now - said >= _TURN_SECONDS:
                said = now
                self.splicer.turn()
                self._say({"tunnels": len(self.splicer), "taken": self.splicer.counts.taken})
        self.splicer.close()
        self.maps.close()

    def _say(self, what: dict[str, object]) -> None:
        try:
            self._channel.send(json.dumps(what).encode())
        except BlockingIOError:
            return  # it is slow: the next word will do
        except OSError:
            self.stopping = True


def _sockets(fds: list[int]) -> list[socket.socket]:
    """Make sockets of descriptors. Raises OSError where one is none; then all are closed."""
    made: list[socket.socket] = []
    try:
        for fd in fds:
            made.append(socket.socket(fileno=fd))
    except OSError:
        for sock in made:
            sock.close()
        for fd in fds[len(made) :]:
            os.close(fd)
        raise
    return made


def _places(wanted: dict[str, Any]) -> frozenset[tuple[bytes, int]]:
    """The addresses of listeners as :class:`~..relay.splicer.Splicer` wants them."""
    return frozenset((bytes.fromhex(address), int(port)) for address, port in wanted["listeners"])


def _refuse(channel: socket.socket, why: str) -> None:
    channel.send(json.dumps({"refused": why}).encode())


def main() -> None:
    door, channel = (socket.socket(fileno=int(text)) for text in sys.argv[1:3])
    uid, gid = map(int, sys.argv[3:5])
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s wire %(name)s: %(message)s", stream=sys.stderr)
    for sock in (door, channel):
        sock.set_inheritable(False)
    die_with_parent()  # until it listens to the server: the compiler may take its time
    data = channel.recv(_WORDS_BYTES)
    if not data:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    raise_descriptor_limit()
    try:
        holder = _Holder(door, channel, json.loads(data))
    except (WireUnavailable, BtfUnavailable, CompileError, OSError) as error:
        _refuse(channel, str(error).splitlines()[0])
        return
    keep_capabilities({CAP_BPF, CAP_NET_ADMIN}, UserIds(uid, gid) if uid else None)
    outlive_parent()
    confinement = confine(closed=NO_NETWORK, bpf_commands=_BPF_COMMANDS, ioctls=(SIOCETHTOOL,))
    if confinement.missing:
        log.warning("no whole sandbox: %s", "; ".join(confinement.missing))
    holder.run()


if __name__ == "__main__":
    main()
