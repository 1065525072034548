"""Accepted connections until their service begins: sources take turns, and first bytes are judged in callbacks."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable
from ipaddress import IPv6Address
from typing import Final

from ..core.address import SocketAddress
from ..core.first_bytes import FirstBytes, Refused
from ..core.poller import SPECIAL, Poller
from ..core.socket_stream import SocketStream, reset_on_close
from ..core.turns import Turns

__all__ = ["Arrivals"]

_Raw = tuple[str, int] | tuple[str, int, int, int] | None
"""A peer as accept(2) tells it; None for a Unix socket."""
_MOST: Final = 4096
"""Accepted connections that wait for their turn, of all sources."""
_PER_TURN: Final = 64
_FIRST: Final = 1024
"""Bytes that are read to judge by; who sends as many at once is for the service to judge."""
_SILENT_SECONDS: Final = 0.25
"""How long a client that says nothing costs no task. Its service's own time-outs begin after that."""
_TOLD: Final = 1024
_TOLD_SECONDS: Final = 1.0
_SOURCE_BITS: Final = 64
_CROWDED: Final = Refused("source_queue", "too many of this source wait", reset=True)
_RESET: Final = Refused("client_reset", "reset before its first byte", reset=True)


class Arrivals:
    """Hands accepted sockets on to ``begin``, as streams, or refuses them and tells ``refused``.

    Of many that wait each source has its turn; when :data:`_MOST` wait, the source that has most loses its newest.
    With ``first_bytes`` a client is judged by what it sends first, before there is a stream or a task for it.
    ``resets`` says that the sockets reset on close, ``tuned`` what
    :func:`~rama_ebpf.core.socket_stream.is_tuned` says of them, as inherited from their listener.
    """

    def __init__(
        self,
        begin: Callable[[SocketStream], None],
        refused: Callable[[Refused, SocketAddress | None], None],
        *,
        first_bytes: FirstBytes | None,
        resets: bool,
        tuned: bool,
        name: str | None,
    ) -> None:
        self._begin = begin
        self._refused = refused
        self._look = first_bytes
        self._resets = resets
        self._tuned = tuned
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._poller = Poller.current()
        self._turns: Turns[tuple[socket.socket, _Raw]] = Turns(_MOST)
        self._scheduled: asyncio.Handle | None = None
        self._told: dict[int, socket.socket] = {}
        self._silent: dict[int, _Silent] = {}
        self._order: deque[_Silent] = deque()
        self._sweep: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many have not begun."""
        return len(self._turns) + len(self._silent)

    def add(self, sock: socket.socket, raw: _Raw) -> None:
        """Take an accepted socket and its peer."""
        if raw is None or len(raw) == 2:
            source: object = None if raw is None else raw[0]
        else:
            source = int(IPv6Address(raw[0].partition("%")[0])) >> _SOURCE_BITS
        crowded = self._turns.add(source, (sock, raw))
        if crowded is not None:
            self._end(crowded[0], _address(crowded[1]), _CROWDED, 0)

    def take_turns(self) -> None:
        """Begin with those whose turn it is, a bounded number; the rest follows when others have had the loop."""
        self._scheduled = None
        turns = self._turns
        for _ in range(min(_PER_TURN, len(turns))):
            sock, raw = turns.take()
            if self._look is None:
                self._hand_over(sock, _address(raw), b"")
            else:
                self._judge(sock, raw, self._look)
        if turns and self._scheduled is None:
            self._scheduled = self._loop.call_soon(self.take_turns)

    def begin_all(self) -> None:
        """Hand on all that wait, silent ones too: nobody is accepted after them."""
        if self._scheduled is not None:
            self._scheduled.cancel()
        while self._turns:
            sock, raw = self._turns.take()
            self._hand_over(sock, _address(raw), b"")
        for silent in list(self._silent.values()):
            silent.speak_no_more()
        for fd, sock in list(self._told.items()):
            self._let_go(sock, fd)
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None

    def _judge(self, sock: socket.socket, raw: _Raw, look: FirstBytes) -> None:
        try:
            data = sock.recv(_FIRST, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._park(sock, raw, look)
            return
        except OSError:
            self._end(sock, _address(raw), _RESET, 0)
            return
        verdict = None if len(data) == _FIRST else look.judge(data)
        if verdict is None:
            self._hand_over(sock, _address(raw), data)
        else:
            self._end(sock, _address(raw), verdict, len(data))

    def _hand_over(self, sock: socket.socket, peer: SocketAddress | None, data: bytes) -> None:
        stream = SocketStream(sock, peer=peer, reset=self._resets, tuned=self._tuned)
        stream.already_received(data)
        self._begin(stream)

    def _end(self, sock: socket.socket, peer: SocketAddress | None, why: Refused, received: int) -> None:
        self._refused(why, peer)
        pending: list[asyncio.Future[None]] = []
        if self._look is not None:
            for watcher in self._look.watchers:
                future = watcher(why, peer, self._name, received)
                if future is not None:
                    pending.append(future)
        if pending:
            # A ban, say: it is in force before the connection ends.
            done = asyncio.gather(*pending, return_exceptions=True)
            done.add_done_callback(lambda _: self._close(sock, why))
        else:
            self._close(sock, why)

    def _close(self, sock: socket.socket, why: Refused) -> None:
        if not why.reset:
            reset_on_close(sock, False)
            if why.wire and self._say(sock, why.wire):
                return
        sock.close()

    def _say(self, sock: socket.socket, wire: bytes) -> bool:
        """Tell the client why. It is closed when it has closed, or soon: a reset for what it still sends could
        overtake this (RFC 1122 section 4.2.2.13)."""
        try:
            sock.send(wire, socket.MSG_DONTWAIT)
            sock.shutdown(socket.SHUT_WR)
            if len(self._told) >= _TOLD:
                return False
            self._poller.add(sock.fileno(), lambda _events: self._drop(sock))
        except OSError:
            return False  # it has gone, or the kernel watches no more sockets
        self._told[sock.fileno()] = sock
        self._loop.call_later(_TOLD_SECONDS, self._let_go, sock, sock.fileno())
        return True

    def _drop(self, sock: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                for _ in range(16):
                    if not sock.recv(4096, socket.MSG_DONTWAIT):
                        break
                else:
                    return  # so much is not worth reading; its time will come
            except ConnectionError:
                pass
            self._let_go(sock, sock.fileno())

    def _let_go(self, sock: socket.socket, fd: int) -> None:
        if self._told.get(fd) is sock:
            del self._told[fd]
            self._poller.closing(fd)
            sock.close()

    # -- those that have not spoken --------------------------------------------------------------------------------

    def _park(self, sock: socket.socket, raw: _Raw, look: FirstBytes) -> None:
        silent = _Silent(self, sock, raw, look, self._loop.time() + _SILENT_SECONDS)
        try:
            self._poller.add(silent.fd, silent.told)
        except OSError:  # the kernel watches no more sockets
            self._hand_over(sock, _address(raw), b"")
            return
        self._silent[silent.fd] = silent
        self._order.append(silent)
        if self._sweep is None:
            self._sweep = self._loop.call_later(_SILENT_SECONDS, self._look_for_silent)

    def _look_for_silent(self) -> None:
        now, order = self._loop.time(), self._order
        while order and (order[0].spoken or order[0].due <= now):
            order.popleft().speak_no_more()
        self._sweep = None
        if order:
            self._sweep = self._loop.call_at(order[0].due, self._look_for_silent)


class _Silent:
    """An accepted connection that has sent nothing yet."""

    __slots__ = ("_arrivals", "_look", "_raw", "_sock", "due", "fd", "spoken")

    def __init__(self, arrivals: Arrivals, sock: socket.socket, raw: _Raw, look: FirstBytes, due: float) -> None:
        self._arrivals = arrivals
        self._sock = sock
        self._raw = raw
        self._look = look
        self.fd = sock.fileno()
        self.due = due
        self.spoken = False

    def told(self, events: int) -> None:
        """The poller has an event: bytes, an end, or a reset."""
        arrivals, sock = self._arrivals, self._sock
        try:
            data = sock.recv(_FIRST, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            verdict, data = _RESET, b""
        else:
            judged = None if len(data) == _FIRST else self._look.judge(data)
            if judged is None:
                self._leave(data, events)
                return
            verdict = judged
        self._forget()
        arrivals._poller.remove(self.fd)
        arrivals._end(sock, _address(self._raw), verdict, len(data))

    def speak_no_more(self) -> None:
        """Let the service wait for it."""
        if not self.spoken:
            self._leave(b"", 0)

    def _leave(self, data: bytes, events: int) -> None:
        self._forget()
        arrivals = self._arrivals
        stream = SocketStream(self._sock, peer=_address(self._raw), reset=arrivals._resets, tuned=arrivals._tuned)
        stream.take_watch(arrivals._poller, ended=bool(events & SPECIAL), drained=0 < len(data) < _FIRST)
        stream.already_received(data)
        arrivals._begin(stream)

    def _forget(self) -> None:
        self.spoken = True
        del self._arrivals._silent[self.fd]


def _address(raw: _Raw) -> SocketAddress | None:
    return None if raw is None else SocketAddress.from_sockaddr(raw)
