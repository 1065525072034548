"""TCP server: accepts connections and gives each, as a stream over its socket, to a service."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from ..core.address import SocketAddress
from ..core.at_once import Visit, at_once_of
from ..core.client import ClientAddress, ListenerName, LocalAddress
from ..core.errors import RamaError
from ..core.first_bytes import Refused
from ..core.graceful import Drain
from ..core.lean_socket import LeanSocket
from ..core.poller import Poller
from ..core.service import Service, check_complete, check_fit
from ..core.socket_stream import SocketStream, is_tuned, reset_on_close, resets_on_close, tune
from ..core.stream import Stream
from ..core.wheel import WheelTimer
from .arrivals import Arrivals
from .refusal import refuse_now

__all__ = ["BACKLOG", "TcpServer", "bind_tcp"]

log = logging.getLogger(__name__)

BACKLOG: Final = 4096
"""How many connections a listening socket holds that nobody has accepted yet (as far as net.core.somaxconn lets)."""
_ACCEPTS_PER_WAKE: Final = 256
"""More than are begun a turn: what waits is to do so where sources have turns, not in the kernel's one queue."""
_CLOCK_SECONDS: Final = 0.1
_BACK_OFF_SECONDS: Final = 0.1
_COMPLAIN_SECONDS: Final = 60.0
_LINES_PER_MINUTE: Final = 100
_REFUSALS_PER_WAKE: Final = 1024
_NO_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE})
_OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def bind_tcp(host: str, port: int, *, backlog: int | None = BACKLOG, reuse_port: bool = False) -> socket.socket:
    """Return a listening non-blocking socket on an IPv4 or IPv6 literal and port (0: the kernel picks one).

    With a ``backlog`` of None it is bound, and does not listen yet. An IPv6 socket takes IPv6 only, so that one address
    means one family. Raises OSError naming the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # Accepted sockets inherit it. Without it a second small write waits for the peer's delayed ACK (40 ms).
        tune(sock)
        reset_on_close(sock, True)  # inherited, too, also by those that nobody has accepted yet
        sock.bind((host, port))
        if backlog is not None:
            sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot listen on {host} port {port}: {error.strerror}") from error
    return sock


@dataclass(slots=True)
class _Refusals:
    """How many connections were refused for one kind of first bytes since that was last said."""

    count: int = 0
    told_at: float = float("-inf")


class TcpServer:
    """Accepts on a listening socket and runs ``service`` once per connection.

    Of many connections that wait each source has its turn. Where the service judges first bytes
    (:mod:`~rama_ebpf.core.first_bytes`), what it refuses never becomes a stream, and is logged once a minute.

    Where the service serves in callbacks (:mod:`~rama_ebpf.core.at_once`), a connection has a task only once it needs
    one. The server closes the stream when its service returns, and aborts it (RST) when it raises. An error ends
    that connection only. ``on_accept`` is called once per accepted connection (for counters). When the process is
    out of descriptors the server stops accepting for 100 ms instead of spinning, and if there is still none it refuses
    those who wait, each in its protocol (``refused``), through a descriptor that is held for this. ``resource_errors``
    counts both, ``on_pause`` is told, and the log once a minute. ``name`` is what the listener is called in metrics.
    """

    def __init__(
        self,
        listener: socket.socket,
        service: Service[Stream, Any],
        *,
        on_accept: Callable[[], None] | None = None,
        on_pause: Callable[[], None] | None = None,
        name: str | None = None,
    ) -> None:
        self.listener = listener
        self.accepted = 0
        self.resource_errors = 0
        self.refused = 0
        """Connections that were refused because there was no descriptor for them."""
        self._spare: int | None = None
        self._complain_at = 0.0
        self._ends: dict[str, tuple[float, int]] = {}
        self._cut = 0
        check_fit(self, Stream, service)
        check_complete(self, service)
        self._service = service
        self._on_accept = on_accept
        self._on_pause = on_pause
        self.name = name
        self._name = None if name is None else ListenerName(name)
        self._way = at_once_of(service)
        self._connections: dict[asyncio.Task[None], SocketStream] = {}
        self._visits: set[Visit] = set()
        self._emptied: asyncio.Future[None] | None = None
        self._poller: Poller | None = None
        self._clock: WheelTimer[Visit] | None = None
        self._accepting = False
        self._drain = Drain()
        self._unix = listener.family == socket.AF_UNIX
        self._resets = resets_on_close(listener)
        self._made_of = int(listener.family), int(listener.type), listener.proto
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrivals: Arrivals | None = None
        self._refusals: dict[str, _Refusals] = {}
        self._resume: asyncio.TimerHandle | None = None

    @property
    def live(self) -> int:
        """How many connections are being served, or wait for their turn."""
        return len(self._connections) + len(self._visits) + (0 if self._arrivals is None else self._arrivals.waiting)

    def start(self) -> None:
        """Start to accept, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._poller = Poller.current()  # made now, and so there when descriptors run out
        self._clock = WheelTimer(self._poller, _CLOCK_SECONDS)
        self._hold_spare()
        self._arrivals = Arrivals(
            self._begin,
            self._note_refusal,
            first_bytes=getattr(self._service, "first_bytes", None),
            resets=self._resets,
            tuned=is_tuned(self.listener),
            name=self.name,
        )
        self._accepting = True
        self._loop.add_reader(self.listener.fileno(), self._accept_ready)

    def accept_waiting(self) -> None:
        """Accept what waits in the queue now, if the server accepts at all."""
        if self._accepting and self._resume is None:
            for _ in range(BACKLOG // _ACCEPTS_PER_WAKE):
                before = self.accepted
                self._accept_ready()
                if self.accepted - before < _ACCEPTS_PER_WAKE:
                    break

    def stop_accepting(self) -> None:
        """Accept no more; live connections go on. The listening socket stays open and keeps its queue. Idempotent."""
        if self._accepting and self._loop is not None:
            self._accepting = False
            self._loop.remove_reader(self.listener.fileno())
            if self._spare is not None:
                os.close(self._spare)
                self._spare = None
            if self._resume is not None:
                self._resume.cancel()
                self._resume = None
            if self._arrivals is not None:
                self._arrivals.begin_all()

    def adopt(self, sock: socket.socket) -> None:
        """Serve a connected socket that was accepted elsewhere, for example by a process that handed it to us."""
        self._begin(SocketStream(sock))

    def _begin(self, stream: SocketStream) -> None:
        known = self._introduce(stream)
        way = self._way
        if (
            way is None
            or self._clock is None
            or stream.peer is None
            or not (way.takes is None or way.takes(stream.buffered))
        ):
            self._start(stream, known)
            return
        visit = Visit(self, stream)
        self._visits.add(visit)
        visit.begin(way)

    def _start(self, stream: SocketStream, known: bool) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(stream, known))
        self._connections[task] = stream
        task.add_done_callback(self._ended)

    # -- connections that are served in callbacks (core/at_once.py) ------------------------------------------------

    @property
    def poller(self) -> Poller:
        """That of the loop on which it serves."""
        assert self._poller is not None
        return self._poller

    @property
    def clock(self) -> WheelTimer[Visit]:
        """The time-outs of its visits."""
        assert self._clock is not None
        return self._clock

    def take_over(self, visit: Visit) -> None:
        """See :class:`~rama_ebpf.core.at_once.VisitHost`."""
        self._visits.discard(visit)
        self._start(visit.stream, True)

    def ended(self, visit: Visit) -> None:
        """See :class:`~rama_ebpf.core.at_once.VisitHost`."""
        self._visits.discard(visit)
        self._note_gone()

    # -- the end ---------------------------------------------------------------------------------------------------

    async def drain(self, timeout: float) -> int:
        """Stop accepting, ask live connections to end (:class:`Drain`), wait for them up to ``timeout`` seconds, then
        cut the rest; return how many were cut. :meth:`cut` ends the wait."""
        self.stop_accepting()
        self._drain.start()
        before = self._cut
        if timeout > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._until_empty(), timeout)
        self.cut("drain deadline")
        await self._until_empty()
        self._arrivals = self._poller = self._clock = None  # the poller goes with its loop, not with us
        return self._cut - before

    async def _until_empty(self) -> None:
        while self._connections or self._visits:
            self._emptied = asyncio.get_running_loop().create_future()
            await self._emptied

    def _note_gone(self) -> None:
        if self._emptied is not None and not (self._connections or self._visits or self._emptied.done()):
            self._emptied.set_result(None)

    def cut(self, why: str) -> None:
        """Abort all live connections (TCP: RST). ``why`` is what their log lines will say."""
        for task in self._connections:
            self._cut += not task.cancelling()
            task.cancel(why)
        for visit in list(self._visits):
            self._cut += 1
            visit.cut(why)

    def _accept_ready(self, waited: bool = False) -> None:
        assert self._arrivals is not None
        try:
            self._accept_waiting(self._arrivals, waited)
        finally:
            self._arrivals.take_turns()

    def _accept_waiting(self, arrivals: Arrivals, waited: bool) -> None:
        accept = self.listener._accept  # type: ignore[attr-defined]  # what accept() is made of; typeshed has it not
        family, kind, protocol = self._made_of
        for number in range(_ACCEPTS_PER_WAKE):
            try:
                # As accept() does it, which looks up family and type as enumerations each time.
                fd, peer = accept()
                sock = LeanSocket(family, kind, protocol, fd)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    stuck = waited and not number and error.errno in _NO_DESCRIPTORS
                    if not (stuck and self._refuse(error)):
                        self._back_off(error)
                    return
                # accept(2) hands on errors of the connection that was to be accepted (ECONNABORTED, EPROTO, …).
                log.info("connection lost before accept: %s", error)
                continue
            self.accepted += 1
            if self._on_accept is not None:
                self._on_accept()
            arrivals.add(sock, None if self._unix else peer)

    def _refuse(self, error: OSError) -> bool:
        """Close the connections that a pause has brought no descriptors for, through the one that is held for this:
        their clients learn that they must go elsewhere. Return False if not even that is possible."""
        if self._spare is None:
            return False
        os.close(self._spare)
        self._spare = None
        try:
            for _ in range(_REFUSALS_PER_WAKE):
                sock, _peer = self.listener.accept()
                refuse_now(sock)
                self.refused += 1
        except BlockingIOError:
            pass  # nobody waits any more
        except OSError:
            return False
        finally:
            self._hold_spare()
        self._complain(error, "closing new connections")
        return True

    def _hold_spare(self) -> None:
        try:
            self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._spare = None  # somebody else was quicker: the next pause tries again

    def _complain(self, error: OSError, then: str) -> None:
        assert self._loop is not None
        self.resource_errors += 1
        if self._on_pause is not None:
            self._on_pause()
        if self._loop.time() >= self._complain_at:  # once a minute: the log's disk is not endless, too
            self._complain_at = self._loop.time() + _COMPLAIN_SECONDS
            log.warning("cannot accept (%s): %s (raise the limit of open files)", error.strerror, then)

    def _back_off(self, error: OSError) -> None:
        assert self._loop is not None
        self._complain(error, f"pausing for {_BACK_OFF_SECONDS * 1000:.0f} ms")
        if self._spare is None:
            self._hold_spare()
        self._loop.remove_reader(self.listener.fileno())
        self._resume = self._loop.call_later(_BACK_OFF_SECONDS, self._resume_accepting)

    def _resume_accepting(self) -> None:
        self._resume = None
        if self._accepting and self._loop is not None:
            self._loop.add_reader(self.listener.fileno(), self._accept_ready)
            self._accept_ready(waited=True)

    def _note_end(self, stream: SocketStream, error: Exception) -> None:
        """One line, up to :data:`_LINES_PER_MINUTE` of a kind; what is above that is counted in the next minute's."""
        kind = error.kind if isinstance(error, RamaError) else type(error).__name__
        now = asyncio.get_running_loop().time()
        since, count = self._ends.get(kind, (now, 0))
        if now - since >= _COMPLAIN_SECONDS:
            if count > _LINES_PER_MINUTE:
                log.info("%d more connections ended with %s since the last line", count - _LINES_PER_MINUTE, kind)
            since, count = now, 0
        self._ends[kind] = since, count + 1
        if count < _LINES_PER_MINUTE:
            log.info("%s: connection ended: %s", stream.peer, error)

    def _note_refusal(self, why: Refused, peer: SocketAddress | None) -> None:
        """One line a minute for each kind; a flood costs a number."""
        refusals = self._refusals.get(why.kind)
        if refusals is None:
            refusals = self._refusals[why.kind] = _Refusals()
        refusals.count += 1
        assert self._loop is not None
        now = self._loop.time()
        if now - refusals.told_at >= _COMPLAIN_SECONDS:
            more = "" if refusals.count == 1 else f" and {refusals.count - 1} others since the last line"
            log.info("%s%s: connection refused: %s (%s)", peer, more, why.text, why.kind)
            refusals.count, refusals.told_at = 0, now

    def _ended(self, task: asyncio.Task[None]) -> None:
        # Only a task that was cancelled before its first step leaves its stream open: none of its code ran.
        self._connections.pop(task).abort()
        self._note_gone()

    def _introduce(self, stream: SocketStream) -> bool:
        """Add what is known of a connection; return false if that is not enough to serve it."""
        extensions = stream.extensions
        if stream.peer is not None:
            extensions.add(ClientAddress(stream.peer))
        elif not stream.is_unix:
            return False
        extensions.add(self._drain)
        if self._name is not None:
            extensions.add(self._name)
        return True

    async def _serve(self, stream: SocketStream, known: bool) -> None:
        if not known:
            stream.abort()  # reset before we could ask who it was: policy could not judge it
            return
        if stream.local is not None:
            stream.extensions.add(LocalAddress(stream.local))
        try:
            await self._service(stream)
        except asyncio.CancelledError:
            stream.abort()
            raise
        except (RamaError, OSError) as error:
            # Expected on a hostile network: one line, no traceback.
            self._note_end(stream, error)
            stream.abort()
        except Exception:
            # A bug in a service must not take the other connections down; it is reported in full.
            log.exception("%s: service failed", stream.peer)
            stream.abort()
        else:
            await stream.close()
