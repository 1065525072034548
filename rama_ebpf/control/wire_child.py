"""The process that holds the wire relay: its maps, its programs, and the sockets of the tunnels that were taken over.

Started as ``python -m rama_ebpf.control.wire_child DOOR CHANNEL ENTRANCE UID GID``. Over CHANNEL the server says what
is wanted, and hears once a turn that this process lives; through DOOR workers introduce themselves
(:mod:`..relay.wire_messages`). It loads the programs as root and opens the sockets that it needs; then it keeps two
capabilities, to use the maps (CAP_BPF) and to park sockets and attach to interfaces (CAP_NET_ADMIN), and a sandbox like
that of workers. It trusts nobody: what it is told of a tunnel it asks the kernel.

It does not end with the server: it hears of that by CHANNEL, and resets all tunnels but those that survive (``survive``
of a listener). With the last of these it ends. Later servers come by ENTRANCE, each with a door for its workers, which
adopt what has no owner; ``unload`` comes there, too, to end all of it.
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
from contextlib import suppress
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
from ..relay.splicer import Splicer, Tell, Told
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
_ADOPTED: Final = 1 << 31
"""From here on this process numbers a worker's tunnels: those that it has adopted."""
_WAITING: Final = 16
_MOST_SERVERS: Final = 64
_BPF_COMMANDS: Final = (10, 28)  # BPF_PROG_TEST_RUN, BPF_LINK_CREATE


class _Worker:
    """One worker, by its channel. It may hand tunnels over if it ``takes`` this relay; others only adopt."""

    def __init__(self, holder: _Holder, sock: socket.socket, pid: int, *, takes: bool) -> None:
        self.pid = pid
        self.adopts = False
        self.adopted = 0
        self._takes = takes
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
            elif request.ask in (Ask.ADOPT, Ask.LET_GO):
                self.adopts = request.ask is Ask.ADOPT
                if not self.adopts:
                    self._holder.splicer.let_go(self)
        finally:
            for sock in sockets:
                sock.close()

    # Nothing here may set a time-out of these sockets: whether they block is the worker's business as well.
    def _take(self, request: Request, sockets: tuple[socket.socket, socket.socket]) -> None:
        number = request.number
        try:
            if not self._takes or number >= _ADOPTED:
                for sock in sockets:
                    sock.close()
                raise Refused("it is not this worker's relay")
            pair = self._holder.splicer.take(
                self, number, sockets, request.owed, request.deadline, self._teller(number), request.story
            )
        except Refused as refused:
            self._say(Reply(Answer.REFUSED, number, text=str(refused)))
        except OSError as error:
            self._say(Reply(Answer.REFUSED, number, text=f"the kernel refuses it ({error.strerror or error})"))
        else:
            self._say(Reply(Answer.WATCHED, number, pair))

    def adopt(self, pair: int) -> None:
        """Give it a tunnel that nobody owns."""
        number = _ADOPTED + self.adopted
        self.adopted += 1
        story = self._holder.splicer.adopt(pair, self, number, self._teller(number))
        self._say(Reply(Answer.ORPHAN, number, pair, text=story.decode()))

    def _teller(self, number: int) -> Tell:
        def tell(told: Told, reason: CloseReason, moved: tuple[int, int]) -> None:
            if told is Told.ENDED:
                self._say(Reply.ended(number, reason, moved))
            else:
                self._say(Reply(Answer.TAKEN if told is Told.TAKEN else Answer.SPOILED, number))

        return tell

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


class _Server:
    """A server, or a command, by its channel: the ``first`` has started this process. ``door`` is where its workers
    come in."""

    def __init__(self, holder: _Holder, channel: socket.socket, door: socket.socket | None, *, first: bool) -> None:
        self.first = first
        self._holder = holder
        self._channel = channel
        self._door: socket.socket | None = None
        channel.setblocking(False)
        holder.reactor.add(channel.fileno(), select.EPOLLIN, lambda _: self._hear())
        if door is not None:
            self._listen(door)

    def _listen(self, door: socket.socket) -> None:
        if self._door is not None:
            door.close()
            return
        self._door = door
        door.setblocking(False)
        self._holder.reactor.add(door.fileno(), select.EPOLLIN, lambda _: self._introduced())

    def _introduced(self) -> None:
        """A worker has sent its end of a channel."""
        assert self._door is not None
        try:
            data, fds = receive(self._door, 1)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            self._shut()  # the server ends, or a worker has shut it: those we know go on
        for fd in fds:
            try:
                [sock] = _sockets([fd])
            except OSError:
                continue
            self._holder.meet(sock, takes=self.first)

    def _hear(self) -> None:
        """It says what has changed, or is no more."""
        fds: list[int] = []
        try:
            data, fds, _, _ = socket.recv_fds(self._channel, _WORDS_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            doors = _sockets(fds)
        except BlockingIOError:
            return
        except OSError:
            data, doors = b"", []
        try:
            said = json.loads(data) if data else {}
        except ValueError:
            data, said = b"", {}
        for door in doors:
            self._listen(door)
        if not data:
            self._holder.left(self)
        elif "end" in said:
            self._holder.ended = True
        elif "leave" in said:
            self._holder.splicer.reset_mortals()
            self.say({"stays": self._holder.splicer.survivors})
        elif "listeners" in said and self.first:
            self._holder.listeners, self._holder.cgroups = _places(said), said["cgroups"]

    def say(self, what: dict[str, object]) -> None:
        """Send it a word."""
        try:
            self._channel.send(json.dumps(what).encode())
        except BlockingIOError:
            return  # it is slow: the next word will do
        except OSError:
            self._holder.left(self)

    def _shut(self) -> None:
        if self._door is not None:
            self._holder.reactor.remove(self._door.fileno())
            self._door.close()
            self._door = None

    def close(self) -> None:
        self._shut()
        self._holder.reactor.remove(self._channel.fileno())
        self._channel.close()


class _Holder:
    def __init__(
        self, door: socket.socket, channel: socket.socket, entrance: socket.socket, wanted: dict[str, Any]
    ) -> None:
        self.reactor = Reactor()
        self.workers: set[_Worker] = set()
        self.ended = False
        self.listeners = _places(wanted)
        self.cgroups: list[int] = wanted["cgroups"]
        headers = wanted["kernel_headers"]
        # Two sockets each.
        most = (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OWN_DESCRIPTORS) // 2
        self.maps = WireMaps.load(
            min(wanted["count"], max(most, 1)), kernel_headers=None if headers is None else Path(headers)
        )
        self.pairs = self.maps.readable_pairs()  # opened now: it takes more than what is kept
        self.splicer = Splicer(self.maps, self.reactor, quota=wanted["quota"], listeners=lambda: self.listeners)
        self._servers = {_Server(self, channel, door, first=True)}
        self._entrance = entrance
        entrance.listen(_WAITING)
        entrance.setblocking(False)
        self.reactor.add(entrance.fileno(), select.EPOLLIN, lambda _: self._enter())

    def meet(self, sock: socket.socket, *, takes: bool) -> None:
        """A worker has introduced itself by this channel."""
        try:
            # Who made the pair, as the kernel has noted it.
            pid, _, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
            for former in [worker for worker in self.workers if worker.pid == pid]:
                former.close()  # or else one of them had the places of many
            self.workers.add(_Worker(self, sock, pid, takes=takes))
        except OSError as error:
            log.error("a worker cannot be heard: %s", error)
            sock.close()

    def _enter(self) -> None:
        """Another server, or ``unload``, comes by the entrance, which is open to root alone."""
        with suppress(BlockingIOError, ConnectionAbortedError):
            sock, _ = self._entrance.accept()
            if len(self._servers) < _MOST_SERVERS:
                self._servers.add(_Server(self, sock, None, first=False))
            else:
                sock.close()

    def left(self, server: _Server) -> None:
        """A server is no more. With the first one what does not survive it ends."""
        if server not in self._servers:
            return
        self._servers.discard(server)
        server.close()
        if server.first:
            self.splicer.reset_mortals()
            if self.splicer.survivors:
                log.info("the server has ended: %d tunnels go on without it", self.splicer.survivors)

    @property
    def _goes_on(self) -> bool:
        return not self.ended and (any(server.first for server in self._servers) or self.splicer.survivors > 0)

    def run(self) -> None:
        """Serve until the server ends, and all tunnels that survive it."""
        said = 0.0
        while self._goes_on:
            self.reactor.turn(_TURN_SECONDS)
            self._hand_out()
            now = time.monotonic()
            if now - said >= _TURN_SECONDS:
                said = now
                self.splicer.turn()
                words: dict[str, object] = {"tunnels": len(self.splicer), "taken": self.splicer.counts.taken}
                words["cgroups"] = self.cgroups
                for server in list(self._servers):
                    server.say(words)
        self.splicer.close()
        self.maps.close()

    def _hand_out(self) -> None:
        """Give what nobody owns to those who adopt it, one after the other."""
        adopting = [worker for worker in self.workers if worker.adopts]
        if adopting:
            for pair in self.splicer.orphans:
                min(adopting, key=lambda worker: worker.adopted).adopt(pair)


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
    door, channel, entrance = (socket.socket(fileno=int(text)) for text in sys.argv[1:4])
    uid, gid = map(int, sys.argv[4:6])
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s wire %(name)s: %(message)s", stream=sys.stderr)
    for sock in (door, channel, entrance):
        sock.set_inheritable(False)
    die_with_parent()  # until it listens to the server: the compiler may take its time
    data = channel.recv(_WORDS_BYTES)
    if not data:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    raise_descriptor_limit()
    try:
        holder = _Holder(door, channel, entrance, json.loads(data))
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
