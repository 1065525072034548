"""Byte streams: what a transport service gets and what a connector returns.

A :class:`Stream` reads, peeks, writes, half-closes and carries :class:`~rama_ebpf.core.extensions.Extensions`.
:class:`SocketStream` is the one over a non-blocking socket; its socket can be taken out and given to the relay.

One task may read and one may write at a time; a second reader (or writer) raises RuntimeError at once instead of
mixing bytes.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import errno
import logging
import os
import select
import socket
import struct
from collections.abc import Callable
from ipaddress import ip_address
from typing import Final

from .address import SocketAddress, unmap
from .errors import LimitExceeded, PeerClosed
from .extensions import Extensions
from .poller import READABLE, SPECIAL, WRITABLE, Poller, Watcher

log = logging.getLogger(__name__)

_socket = socket.socket  # the property `socket` hides the module inside the class body

__all__ = ["MAX_UNREAD", "SocketStream", "Stream", "reset_on_close", "resets_on_close"]

MAX_UNREAD: Final = 64 * 1024
"""Upper bound in bytes of what a stream holds read ahead (peeked but not consumed)."""

_READ_SIZE: Final = 64 * 1024
_LINGER_RST: Final = struct.pack("ii", 1, 0)
_IOV_MAX: Final = 1024
"""How many chunks one sendmsg(2) takes (limits.h)."""
_SPLICE_FLAGS: Final = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
_SO_ORIGINAL_DST: Final = 80
"""linux/netfilter_ipv4.h; IP6T_SO_ORIGINAL_DST has the same number."""
_LINGER_OFF: Final = struct.pack("ii", 0, 0)
_family: Final[Callable[[socket.socket], int]] = _socket.__mro__[1].family.__get__  # type: ignore[attr-defined]
# The number itself: the property of socket.socket makes an enumeration of it at each call.
_UNWATCHED_SECONDS: Final = 0.02
_READ_EVENTS: Final = READABLE | SPECIAL
_WRITE_EVENTS: Final = WRITABLE | select.EPOLLERR | select.EPOLLHUP


def reset_on_close(sock: socket.socket, on: bool) -> None:
    """Say how the connection of ``sock`` ends when its last descriptor is closed: with RST, or in order.

    Unix sockets know no reset; for them this does nothing.
    """
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RST if on else _LINGER_OFF)


def resets_on_close(sock: socket.socket) -> bool:
    """Return what :func:`reset_on_close` has said. Sockets that a listening one accepts inherit it."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, len(_LINGER_RST)) == _LINGER_RST


class Stream(abc.ABC):
    """A bidirectional, half-closable stream of bytes with a read-ahead buffer.

    ``bytes_received`` and ``bytes_sent`` count what crossed the transport, including bytes that are still unread.
    """

    def __init__(self, extensions: Extensions | None = None) -> None:
        self.extensions = Extensions() if extensions is None else extensions
        self.bytes_received = 0
        self.bytes_sent = 0
        self._unread = bytearray()

    # -- what a transport implements ---------------------------------------------------------------------------

    @abc.abstractmethod
    async def _receive(self, max_bytes: int) -> bytes:
        """Return 1..max_bytes bytes from the transport as soon as there are any, or b"" at EOF."""

    async def _receive_into(self, view: memoryview) -> int:
        """Like :meth:`_receive`, into memory of the caller's. A transport may do better than this copy."""
        data = await self._receive(len(view))
        view[: len(data)] = data
        return len(data)

    @abc.abstractmethod
    async def write(self, *chunks: bytes | bytearray | memoryview) -> None:
        """Write all chunks, in order, and return when the transport has taken them (back-pressure).

        Raises ConnectionError if the peer has gone.
        """

    @abc.abstractmethod
    async def write_eof(self) -> None:
        """Half-close: tell the peer that no more bytes follow; reading goes on. A second call does nothing."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Close both directions in the orderly way of the transport. Idempotent; never raises for a dead peer."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Close at once; the peer learns that the stream did not end in order (TCP: RST). Idempotent."""

    @property
    @abc.abstractmethod
    def peer(self) -> SocketAddress | None:
        """The peer's address, None for a Unix socket."""

    @property
    @abc.abstractmethod
    def local(self) -> SocketAddress | None:
        """Our own address on this stream, None for a Unix socket."""

    async def close_after(self, last: bytes = b"", *, timeout: float = 1.0, max_discard: int = 64 * 1024) -> None:
        """Send ``last``, a reply that refuses the peer, and close so that it arrives. Never raises for a dead peer.

        Closing while bytes of the peer are unread would send RST, which may overtake the reply and discard it
        (RFC 1122 section 4.2.2.13). So: half-close, then read and drop for at most ``timeout`` seconds and
        ``max_discard`` bytes until the peer closes too.
        """
        try:
            # OSError includes TimeoutError: the peer has gone, or does not close but has had its reply.
            with contextlib.suppress(OSError):
                async with asyncio.timeout(timeout):
                    await self.write(last)
                    await self.write_eof()
                    while max_discard > 0 and (data := await self.read(4096)):
                        max_discard -= len(data)
        finally:
            await self.close()

    def quiet(self) -> bool:
        """Whether the stream is open and has nothing to read, EOF included: a kept connection that may be used again.

        False for a transport that cannot tell without waiting.
        """
        return False

    # -- reading, the same for every transport -----------------------------------------------------------------

    @property
    def buffered(self) -> bytes:
        """The bytes that were read ahead and not consumed yet."""
        return bytes(self._unread)

    async def read(self, max_bytes: int = _READ_SIZE) -> bytes:
        """Return up to ``max_bytes`` bytes as soon as there are any, or b"" at EOF."""
        if self._unread:
            data = bytes(self._unread[:max_bytes])
            del self._unread[:max_bytes]
            return data
        return await self._receive(max_bytes)

    async def read_into(self, buffer: bytearray | memoryview) -> int:
        """Read into ``buffer``, as soon as there are any bytes; return how many came, 0 at EOF or for an empty buffer.

        Spares large readers an allocation for each read where the transport can (recv_into(2)).
        """
        view = memoryview(buffer).cast("B")
        if self._unread or not len(view):
            data = bytes(self._unread[: len(view)])
            del self._unread[: len(view)]
            view[: len(data)] = data
            return len(data)
        return await self._receive_into(view)

    async def read_exactly(self, count: int) -> bytes:
        """Return exactly ``count`` bytes. Raises :class:`PeerClosed` at an earlier EOF."""
        data = await self.peek(count)
        if len(data) < count:
            raise PeerClosed(f"stream ended after {len(data)} of {count} bytes")
        del self._unread[:count]
        return data[:count]

    async def peek(self, count: int) -> bytes:
        """Return at least ``count`` bytes without consuming them; fewer only at EOF.

        Raises :class:`LimitExceeded` if ``count`` is above :data:`MAX_UNREAD`.
        """
        while len(self._unread) < count and await self.fill(max(count, len(self._unread) + 1)):
            pass
        return bytes(self._unread)

    async def fill(self, limit: int = MAX_UNREAD) -> int:
        """Read once from the transport into the read-ahead buffer; return how many bytes came, 0 at EOF.

        This is what drives a sans-I/O parser that wants more. Raises :class:`LimitExceeded` when the buffer already
        holds ``limit`` bytes (at most :data:`MAX_UNREAD`).
        """
        limit = min(limit, MAX_UNREAD)
        room = limit - len(self._unread)
        if room <= 0:
            raise LimitExceeded(f"peer sent {len(self._unread)} bytes where at most {limit} are expected")
        data = await self._receive(room)
        self._unread += data
        return len(data)

    def consume(self, count: int) -> None:
        """Drop ``count`` bytes of :attr:`buffered`. Raises ValueError if there are fewer."""
        if count > len(self._unread):
            raise ValueError(f"cannot consume {count} bytes, only {len(self._unread)} are buffered")
        del self._unread[:count]

    def unread(self, data: bytes) -> None:
        """Put ``data`` back in front of everything not yet read."""
        self._unread[:0] = data


class SocketStream(Stream):
    """A stream over a connected non-blocking stream socket (TCP or Unix).

    Only :meth:`close` ends a TCP connection in order. If the process dies, by whatever signal, its kernel resets the
    connection: a peer must not take what was cut short for the whole.

    ``peer`` is the peer's address where the caller knows it, from accept(2) for example; else the socket is asked.
    ``reset`` says that the socket resets on close already (:func:`reset_on_close`), which accepted sockets inherit.

    ``original_destination`` is where the client meant to connect. That is our local address, also for connections
    steered here (sk_lookup, TPROXY), unless netfilter redirected it: then connection tracking knows.
    """

    def __init__(
        self,
        sock: socket.socket,
        extensions: Extensions | None = None,
        *,
        peer: SocketAddress | None = None,
        reset: bool = False,
    ) -> None:
        super().__init__(extensions)
        sock.setblocking(False)
        self._unix = _family(sock) == socket.AF_UNIX
        if not (reset or self._unix):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RST)
        self._sock = sock
        self._fd = sock.fileno()
        self._loop = asyncio.get_running_loop()
        self._poller: Poller | None = None
        self._maybe_readable = True
        self._ended = False
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._eof_sent = False
        self._closed = False
        self._connected = True
        self._peer = _address(sock.getpeername) if peer is None and not self._unix else peer
        self._local: SocketAddress | None = None
        self._redirected: SocketAddress | None = None

    @classmethod
    def connecting(cls, sock: socket.socket, address: SocketAddress) -> SocketStream:
        """Begin to connect a TCP socket; until :meth:`connected` has returned the stream is good for nothing else.

        Raises OSError; the socket is closed then.
        """
        try:
            stream = cls(sock, peer=address)
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
        if self._connected:
            return
        try:
            await self._wait_writable()
            code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
        except BaseException:
            self.abort()
            raise
        self._connected = True

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
            self._redirected = _before_redirection(self._sock) or self.local
        return self._redirected

    @property
    def closed(self) -> bool:
        return self._closed

    async def _receive(self, max_bytes: int) -> bytes:
        while True:
            self._check_open()
            self._check_only_reader()
            if not self._maybe_readable:
                await self._wait_readable()
                continue
            try:
                data = self._sock.recv(max_bytes)
            except BlockingIOError:
                await self._wait_readable()
                continue
            self._count_received(len(data), max_bytes)
            return data

    async def _receive_into(self, view: memoryview) -> int:
        while True:
            self._check_open()
            self._check_only_reader()
            if not self._maybe_readable:
                await self._wait_readable()
                continue
            try:
                count = self._sock.recv_into(view)
            except BlockingIOError:
                await self._wait_readable()
                continue
            self._count_received(count, len(view))
            return count

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
        if self._eof_sent or self._closed:
            return
        self._eof_sent = True
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise ConnectionResetError(error.errno, f"cannot half-close: {error.strerror}") from error

    async def close(self) -> None:
        if not (self._closed or self._unix):
            reset_on_close(self._sock, False)
        self._close()

    def abort(self) -> None:
        self._close()

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

    def poll(self) -> None:
        """Let the poller watch the socket, for :meth:`detach_polled`. Raises OSError if the kernel watches no more
        sockets, and RuntimeError while a task is waiting on the stream."""
        self._check_idle()
        if self._poller is None:
            self._watch()

    def detach_polled(self, watcher: Watcher) -> tuple[_socket, bytes, bool]:
        """As :meth:`detach`, but the poller goes on watching the socket (:meth:`poll`), and tells ``watcher``.

        The third item says whether there may be something to read that the watcher is not told of.
        """
        self._check_idle()
        assert self._poller is not None
        self._poller.replace(self._fd, watcher)
        maybe_readable = self._maybe_readable
        return *self._give_up(), maybe_readable

    def _check_idle(self) -> None:
        self._check_open()
        if self._reader is not None or self._writer is not None:
            raise RuntimeError("cannot detach a stream that a task is reading or writing")

    def _give_up(self) -> tuple[_socket, bytes]:
        self._closed = True
        self._poller = None
        unread = bytes(self._unread)
        self._unread.clear()
        return self._sock, unread

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._poller is not None:
            self._poller.remove(self._fd)
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
            if self._reader is not None and not self._reader.done():
                self._reader.set_result(None)
        if events & _WRITE_EVENTS and self._writer is not None and not self._writer.done():
            self._writer.set_result(None)

    def _watch(self, *, writes: bool = False) -> None:
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
        self._maybe_readable = False
        if not (self._poller or self._can_watch()):
            self._maybe_readable = True
            await asyncio.sleep(_UNWATCHED_SECONDS)
            return
        self._reader = self._loop.create_future()
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
        self._writer = self._loop.create_future()
        try:
            await self._writer
        finally:
            self._writer = None


def _before_redirection(sock: _socket) -> SocketAddress | None:
    """Return the destination before netfilter's REDIRECT or DNAT, None where connection tracking knows nothing."""
    try:
        if sock.family == socket.AF_INET:
            port, packed = struct.unpack_from("!2xH4s", sock.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, 16))
        elif sock.family == socket.AF_INET6:
            port, packed = struct.unpack_from("!2xH4x16s", sock.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, 28))
        else:
            return None
    except OSError:
        return None  # ENOPROTOOPT without the module, ENOENT for connections that are not tracked
    return SocketAddress(unmap(ip_address(packed)), port)


def _address(getter: object) -> SocketAddress | None:
    assert callable(getter)
    try:
        return SocketAddress.from_sockaddr(getter())
    except OSError:
        return None  # the peer reset the connection between accept(2) and here; the first read reports it
