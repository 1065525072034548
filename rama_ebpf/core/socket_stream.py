"""Streams over sockets, whose socket can be taken out and given to the relay."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import socket
import struct
from collections.abc import Callable
from typing import Final, TypeVar

from .address import SocketAddress
from .extensions import Extensions
from .poller import READABLE, SPECIAL, WRITABLE, Poller, Watcher
from .redirection import before_redirection
from .stream import Stream

__all__ = ["SocketStream", "is_tuned", "reset_on_close", "resets_on_close", "tune"]

A = TypeVar("A")
R = TypeVar("R")

log = logging.getLogger(__name__)

_socket = socket.socket  # the property `socket` hides the module inside the class body

_AF_UNIX: Final = int(socket.AF_UNIX)
_SOL_SOCKET: Final = socket.SOL_SOCKET
_SO_LINGER: Final = socket.SO_LINGER
_LINGER_RST: Final = struct.pack("ii", 1, 0)
_IOV_MAX: Final = 1024
"""How many chunks one sendmsg(2) takes (limits.h)."""
_SPLICE_FLAGS: Final = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
_LINGER_OFF: Final = struct.pack("ii", 0, 0)
_family: Final[Callable[[socket.socket], int]] = _socket.__mro__[1].family.__get__  # type: ignore[attr-defined]
# The number itself: the property of socket.socket makes an enumeration of it at each call.
_TUNED: Final = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    # Urgent data is in line, as in a connection without a proxy (RFC 6093 section 6).
    (socket.SOL_SOCKET, socket.SO_OOBINLINE),
)
_UNWATCHED_SECONDS: Final = 0.02
_READ_EVENTS: Final = READABLE | SPECIAL
_RESET: Final = select.EPOLLHUP | select.EPOLLERR
_PROBES: Final = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))
"""Seconds of silence before a probe, between two, and how many may stay unanswered."""
_WRITE_EVENTS: Final = WRITABLE | select.EPOLLERR | select.EPOLLHUP


def reset_on_close(sock: socket.socket, on: bool) -> None:
    """Say how the connection of ``sock`` ends when its last descriptor is closed: with RST, or in order.

    Unix sockets know no reset; for them this does nothing.
    """
    if _family(sock) != _AF_UNIX:
        sock.setsockopt(_SOL_SOCKET, _SO_LINGER, _LINGER_RST if on else _LINGER_OFF)


def tune(sock: socket.socket) -> None:
    """Let a TCP socket send small writes at once, and have urgent data in line. Those that a listening socket accepts
    inherit it."""
    for level, option in _TUNED:
        sock.setsockopt(level, option, 1)


def is_tuned(sock: socket.socket) -> bool:
    """Whether :func:`tune` was called on a socket, or on the listening one that accepted it."""
    return _family(sock) != socket.AF_UNIX and all(sock.getsockopt(level, option) for level, option in _TUNED)


def resets_on_close(sock: socket.socket) -> bool:
    """Return what :func:`reset_on_close` has said. Sockets that a listening one accepts inherit it."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, len(_LINGER_RST)) == _LINGER_RST


class SocketStream(Stream):
    """A stream over a connected non-blocking stream socket (TCP or Unix).

    Only :meth:`close` ends a TCP connection in order. If the process dies, by whatever signal, its kernel resets the
    connection: a peer must not take what was cut short for the whole.

    ``peer`` is the peer's address where the caller knows it, from accept(2) for example; else the socket is asked.
    ``reset`` says that the socket resets on close already (:func:`reset_on_close`), ``tuned`` that :func:`tune` was
    called; accepted sockets inherit both.

    ``original_destination`` is where the client meant to connect. That is our local address, also for connections
    steered here (sk_lookup, TPROXY), unless netfilter redirected it: then connection tracking knows.
    """

    __slots__ = (
        "__weakref__",
        "_closed",
        "_connected",
        "_ended",
        "_eof_sent",
        "_fd",
        "_local",
        "_maybe_readable",
        "_peer",
        "_poller",
        "_reader",
        "_redirected",
        "_reset",
        "_sock",
        "_teller",
        "_tuned",
        "_unix",
        "_writer",
    )

    def __init__(
        self,
        sock: socket.socket,
        extensions: Extensions | None = None,
        *,
        peer: SocketAddress | None = None,
        reset: bool = False,
        tuned: bool = False,
    ) -> None:
        super().__init__(extensions)
        if sock.gettimeout() != 0.0:
            sock.setblocking(False)
        self._tuned = tuned
        unix = self._unix = _family(sock) == _AF_UNIX
        if not (reset or unix):
            sock.setsockopt(_SOL_SOCKET, _SO_LINGER, _LINGER_RST)
        self._sock = sock
        self._fd = sock.fileno()
        self._poller: Poller | None = None
        self._maybe_readable = True
        self._ended = False
        self._reset = False
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._teller: Watcher | None = None
        self._eof_sent = False
        self._closed = False
        self._connected = True
        self._peer = _address(sock.getpeername) if peer is None and not unix else peer
        self._local: SocketAddress | None = None
        self._redirected: SocketAddress | None = None

    @classmethod
    def connecting(cls, sock: socket.socket, address: SocketAddress, *, tuned: bool = False) -> SocketStream:
        """Begin to connect a TCP socket; until :meth:`connected` has returned the stream is good for nothing else.

        Raises OSError; the socket is closed then.
        """
        try:
            stream = cls(sock, peer=address, tuned=tuned)
            code = sock.connect_ex(sockaddr := address.to_sockaddr())
            if code == errno.EINPROGRESS:
                # The answer of a target on this host was waiting for the call to end, and is known to the next.
                code = sock.connect_ex(sockaddr)
            if code == errno.EALREADY:
                stream._connected = False
            elif code:
                raise OSError(code, os.strerror(code))
        except BaseException:
            sock.close()
            raise
        return stream

    @property
    def is_connected(self) -> bool:
        """Whether nothing has to be waited for before bytes can flow; on this host often so at once."""
        return self._connected

    async def connected(self) -> None:
        """Wait until the stream is connected. Raises OSError; the stream is aborted then, and when the caller is
        cancelled."""
        try:
            while not self._connected:
                await self._wait_writable()
                self.is_connected_now()
        except BaseException:
            self.abort()
            raise

    def is_connected_now(self) -> bool:
        """Ask the kernel whether the stream is connected by now. Raises OSError if it will never be."""
        assert self._peer is not None
        if not self._connected:
            code = self._sock.connect_ex(self._peer.to_sockaddr())  # connect(2): how a second call answers
            if code not in (0, errno.EISCONN, errno.EALREADY):
                raise OSError(code, os.strerror(code))
            self._connected = code != errno.EALREADY
        return self._connected

    def tune(self) -> None:
        """Have small writes sent at once and urgent data in line (:func:`tune`), unless that is so already."""
        if not (self._tuned or self._unix):
            tune(self._sock)
            self._tuned = True

    @property
    def socket(self) -> _socket:
        """The socket itself, for options and tcp_info. Do not read or write it: see :meth:`detach`."""
        return self._sock

    @property
    def is_unix(self) -> bool:
        """Whether it is a Unix socket, which has no addresses and knows no reset."""
        return self._unix

    @property
    def peer(self) -> SocketAddress | None:
        return self._peer

    @property
    def local(self) -> SocketAddress | None:
        """Our own address; None for a Unix socket, and after the end of a stream that was not asked before."""
        if self._local is None and not (self._closed or self._unix):
            self._local = _address(self._sock.getsockname)
        return self._local

    @property
    def original_destination(self) -> SocketAddress | None:
        if self._redirected is None:
            self._redirected = before_redirection(self._sock) or self.local
        return self._redirected

    @property
    def closed(self) -> bool:
        return self._closed

    def already_received(self, data: bytes) -> None:
        """Take over what somebody has read from the socket before there was this stream: it is read again from here."""
        self._unread += data
        self.bytes_received += len(data)

    def take_watch(self, poller: Poller, *, ended: bool, drained: bool = False) -> None:
        """Take over the watch of the socket from whoever had it added to ``poller``; ``ended`` if that one has been
        told that the peer has ended or reset the connection, for it is told once; ``drained`` if it has read all that
        there was."""
        poller.replace(self._fd, self._told)
        self._poller = poller
        self._ended = ended
        self._maybe_readable = ended or not drained

    async def _receive(self, max_bytes: int) -> bytes:
        data = await self._when_readable(self._sock.recv, max_bytes)
        self._count_received(len(data), max_bytes)
        return data

    async def _receive_into(self, view: memoryview) -> int:
        count = await self._when_readable(self._sock.recv_into, view)
        self._count_received(count, len(view))
        return count

    async def _when_readable(self, call: Callable[[A], R], argument: A) -> R:
        while True:
            self._check_open()
            self._check_only_reader()
            if self._maybe_readable:
                try:
                    return call(argument)
                except BlockingIOError:
                    pass
            await self._wait_readable()

    def _count_received(self, count: int, asked: int) -> None:
        self.bytes_received += count
        if not count:
            self._ended = True  # and the next read says so, too
        elif count < asked and self._poller is not None and not (self._ended or self._unix):
            # TCP gives all that it has. What comes later is told, also if it has come by now.
            self._maybe_readable = False

    async def write(self, *chunks: bytes | bytearray | memoryview) -> None:
        if len(chunks) == 1 and self._writer is None and not self._closed and isinstance(chunks[0], bytes):
            # The send queue nearly always takes it whole.
            try:
                sent = self._sock.send(chunks[0])
            except BlockingIOError:
                sent = 0
            self.bytes_sent += sent
            if sent == len(chunks[0]):
                return
            chunks = (memoryview(chunks[0])[sent:],)
        pending = [memoryview(chunk).cast("B") for chunk in chunks if len(chunk)]
        while pending:
            self._check_open()
            self._check_only_writer()
            try:
                sent = self._sock.send(pending[0]) if len(pending) == 1 else self._sock.sendmsg(pending[:_IOV_MAX])
            except BlockingIOError:
                await self._wait_writable()
                continue
            self.bytes_sent += sent
            done = 0
            while done < len(pending) and sent >= len(pending[done]):
                sent -= len(pending[done])
                done += 1
            del pending[:done]
            if sent:
                pending[0] = pending[0][sent:]

    def tell(self, watcher: Watcher | None, *, writes: bool = False, poller: Poller | None = None) -> None:
        """Let ``watcher`` be told of events (:mod:`.poller`), until another is; it reads by :meth:`read_now`. No task
        may read meanwhile. With ``writes`` it is told of room as well. ``poller`` is that of the running loop, where
        the caller knows it. Raises OSError if the kernel watches no more sockets."""
        if watcher is not None:
            self._check_open()
            if self._poller is None:
                self._watch(poller, writes=writes)
            elif writes:
                self._poller.want_writes(self._fd)
        self._teller = watcher

    @property
    def maybe_readable(self) -> bool:
        """Whether :meth:`read_now` may have something now of which nobody is told any more."""
        return bool(self._unread) or (self._maybe_readable and self._poller is not None)

    def read_now(self, max_bytes: int) -> bytes | None:
        """Return what there is, up to ``max_bytes`` bytes, b"" at EOF, or None if there is nothing now. Raises
        OSError."""
        if self._unread:
            data = bytes(self._unread[:max_bytes])
            del self._unread[:max_bytes]
            return data
        if self._closed:
            self._check_open()
        if not self._maybe_readable:
            return None
        try:
            data = self._sock.recv(max_bytes)
        except BlockingIOError:
            self._maybe_readable = False
            return None
        count = len(data)
        if 0 < count < max_bytes and not (self._ended or self._unix):
            self.bytes_received += count
            self._maybe_readable = self._poller is None
        else:
            self._count_received(count, max_bytes)
        return data

    def write_now(self, data: bytes) -> int:
        if self._writer is not None or self._closed:
            return 0
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            return 0
        self.bytes_sent += sent
        return sent

    def splice_to(self, pipe: int, most: int) -> int:
        """Move up to ``most`` received bytes into an empty pipe, within the kernel (splice(2)), and return how many.

        It does not wait: 0 if there is nothing to move now, at EOF, and while bytes are read ahead or a task reads.
        Raises OSError if the connection is lost.
        """
        self._check_open()
        if self._unread or self._reader is not None:
            return 0
        try:
            count = os.splice(self._sock.fileno(), pipe, most, flags=_SPLICE_FLAGS)
        except BlockingIOError:
            return 0
        self.bytes_received += count
        return count

    async def splice_from(self, pipe: int, count: int) -> None:
        """Write ``count`` bytes that are in a pipe; otherwise as :meth:`write`."""
        while count:
            self._check_open()
            self._check_only_writer()
            try:
                sent = os.splice(pipe, self._sock.fileno(), count, flags=_SPLICE_FLAGS)
            except BlockingIOError:
                await self._wait_writable()
                continue
            self.bytes_sent += sent
            count -= sent

    async def write_eof(self) -> None:
        self.write_eof_now()

    def write_eof_now(self) -> None:
        """As :meth:`write_eof`, which need not wait for anything here."""
        if self._eof_sent or self._closed:
            return
        self._eof_sent = True
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise ConnectionResetError(error.errno, f"cannot half-close: {error.strerror}") from error

    async def close(self) -> None:
        self.close_now()

    def close_now(self) -> None:
        """As :meth:`close`, which need not wait for anything here."""
        if not self._closed:
            reset_on_close(self._sock, False)
        self._close()

    def abort(self) -> None:
        self._close()

    async def reset_by_peer(self) -> None:
        # A client that has closed its socket looks like one that has half-closed it until we send something. So the
        # kernel is made to: the peer's answers to keep-alive probes while it waits for our FIN, and then resets
        # (tcp_fin_timeout, 60 s by default on Linux).
        if not self._unix:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _PROBES:
                self._sock.setsockopt(socket.IPPROTO_TCP, option, value)
        while not self._reset:
            self._check_open()
            self._check_only_reader()
            try:
                await self._wait_readable()
            finally:
                self._maybe_readable = True  # the EOF stays, and is told once

    @property
    def told_quiet(self) -> bool:
        """Whether the poller, which watches the socket, has told of nothing since all was read. What has come since
        its last round is not known; :meth:`quiet` asks the kernel."""
        return not (self._maybe_readable or self._ended or self._closed or self._unread or self._poller is None)

    def quiet(self) -> bool:
        if self._closed or self._unread:
            return False
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def detach(self) -> tuple[_socket, bytes]:
        """Take the socket out: return it with the bytes that were read ahead; the stream is closed from then on.

        The caller owns the socket and must forward those bytes first. Closing it resets the connection unless
        :func:`reset_on_close` says otherwise. Raises RuntimeError while a task is waiting on the stream.
        """
        self._check_idle()
        if self._poller is not None:
            self._poller.remove(self._fd)
        return self._give_up()

    def poll(self, poller: Poller | None = None) -> None:
        """Let the poller watch the socket, and :meth:`tune` it, for :meth:`detach_polled`. Raises OSError if the kernel
        watches no more sockets, and RuntimeError while a task is waiting on the stream."""
        self._check_idle()
        if self._poller is None:
            self._watch(poller)
        self.tune()

    def detach_polled(self, watcher: Watcher) -> tuple[_socket, bytes, bool]:
        """As :meth:`detach`, but the poller goes on watching the socket (:meth:`poll`), and tells ``watcher``.

        The third item says whether there may be something to read that the watcher is not told of.
        """
        assert self._poller is not None
        assert self._reader is None
        assert self._writer is None
        self._poller.replace(self._fd, watcher)
        return *self._give_up(), self._maybe_readable

    def _check_idle(self) -> None:
        if self._closed:
            self._check_open()
        if self._reader is not None or self._writer is not None:
            raise RuntimeError("cannot detach a stream that a task is reading or writing")

    def _give_up(self) -> tuple[_socket, bytes]:
        self._closed = True
        self._poller = self._teller = None
        if not self._unread:
            return self._sock, b""
        unread = bytes(self._unread)
        self._unread.clear()
        return self._sock, unread

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._teller = None
        if self._poller is not None:
            self._poller.closing(self._fd)
        for waiter in (self._reader, self._writer):
            if waiter is not None and not waiter.done():
                waiter.set_exception(ConnectionAbortedError("stream closed"))
        self._sock.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionAbortedError("stream closed")

    def _check_only_reader(self) -> None:
        if self._reader is not None:
            raise RuntimeError("two tasks read one stream")

    def _check_only_writer(self) -> None:
        if self._writer is not None:
            raise RuntimeError("two tasks write one stream")

    def _told(self, events: int) -> None:
        """The poller tells of a change."""
        if events & _READ_EVENTS:
            self._maybe_readable = True
            if events & SPECIAL:
                self._ended = True
                self._reset = self._reset or bool(events & _RESET)
            if self._reader is not None and not self._reader.done():
                self._reader.set_result(None)
        if events & _WRITE_EVENTS and self._writer is not None and not self._writer.done():
            self._writer.set_result(None)
        if self._teller is not None:
            self._teller(events)

    def _watch(self, poller: Poller | None = None, *, writes: bool = False) -> None:
        if poller is None:
            poller = Poller.current()
        poller.add(self._fd, self._told, writes=writes)
        self._poller = poller
        self._maybe_readable = False  # if it is, that is what is told first

    def _can_watch(self, *, writes: bool = False) -> bool:
        """Have the socket watched; false if the kernel watches no more: then it is tried again after a nap."""
        try:
            self._watch(writes=writes)
        except OSError as error:
            log.debug("descriptor %d is not watched: %s", self._fd, error)
            return False
        return True

    async def _wait_readable(self) -> None:
        if not (self._poller or self._can_watch()):
            await asyncio.sleep(_UNWATCHED_SECONDS)
            return
        assert self._poller is not None
        self._maybe_readable = False
        self._reader = self._poller.loop.create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    async def _wait_writable(self) -> None:
        if self._poller is not None:
            self._poller.want_writes(self._fd)
        elif not self._can_watch(writes=True):
            await asyncio.sleep(_UNWATCHED_SECONDS)
            return
        assert self._poller is not None
        self._writer = self._poller.loop.create_future()
        try:
            await self._writer
        finally:
            self._writer = None


def _address(getter: object) -> SocketAddress | None:
    assert callable(getter)
    try:
        return SocketAddress.from_sockaddr(getter())
    except OSError:
        return None  # the peer reset the connection between accept(2) and here; the first read reports it
