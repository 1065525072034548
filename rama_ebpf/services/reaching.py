"""Waiting in callbacks (:mod:`rama_ebpf.core.at_once`) for a target that does not answer at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..core.address import Authority
from ..core.at_once import Visit
from ..core.poller import SPECIAL
from ..core.socket_stream import SocketStream
from ..relay import Tunnel, TunnelLimits, begin_relay, relays_at_once
from .connect import BeginsAtOnce, Dialling

__all__ = ["BegunForward", "ForwardSession", "Reaching", "begin_forward"]


class Reaching:
    """What ``connector`` has begun for ``target``: ``connected`` or ``failed`` is called once, unless a task takes over
    before, as it does where other addresses are to be tried as well. Raises OSError if the kernel watches no more
    sockets; then nothing has happened."""

    __slots__ = ("_connected", "_connector", "_dialling", "_failed", "_target", "_visit")

    def __init__(
        self,
        visit: Visit,
        connector: BeginsAtOnce,
        target: Authority,
        dialling: Dialling,
        connected: Callable[[SocketStream], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._visit = visit
        self._connector = connector
        self._target = target
        self._dialling = dialling
        self._connected = connected
        self._failed = failed
        stream = dialling.stream
        assert stream is not None
        stream.tell(self._ready, writes=True, poller=visit.poller)
        visit.start_clock(dialling.delay if dialling.rest else connector.timeout)

    def expired(self) -> None:
        """Its time is up."""
        if self._dialling.rest:
            self._visit.take_over()
            return
        self._give_up(self._connector.failure(self._target, TimeoutError(), late=True))

    def _ready(self, _events: int) -> None:
        stream = self._dialling.stream
        if stream is None:
            return
        try:
            if not stream.is_connected_now():
                return
        except OSError as error:
            self._give_up(self._connector.failure(self._target, error))
            return
        self._visit.stop_clock()
        stream.tell(None)
        try:
            self._connected(stream)
        except Exception as error:  # noqa: BLE001 - a callback's: the coroutine raises it
            self._failed(error)

    def _give_up(self, error: Exception) -> None:
        stream, self._dialling.stream = self._dialling.stream, None
        if stream is not None:
            stream.abort()
        if self._dialling.rest:
            self._visit.take_over()
        else:
            self._failed(error)


@dataclass(eq=False, slots=True)
class BegunForward:
    """An extension: how far callbacks have come with ``stream``, all of which goes to one target. ``failure`` is why
    there is nothing under way."""

    stream: SocketStream
    connector: BeginsAtOnce
    target: Authority
    dialling: Dialling | None = None
    failure: Exception | None = None

    async def finish(self) -> SocketStream:
        """Return the connection to the target. Raises as a call of the connector."""
        dialling, self.dialling = self.dialling, None
        if dialling is None:
            assert self.failure is not None
            raise self.failure
        return await self.connector.finish(self.target, dialling)

    @classmethod
    def of(cls, stream: object, found: BegunForward | None) -> BegunForward | None:
        """Return what was ``found`` among the extensions of ``stream`` if it is about that one."""
        return found if found is not None and found.stream is stream else None


def begin_forward(
    visit: Visit, connector: BeginsAtOnce, target: Authority, limits: TunnelLimits | None = None
) -> ForwardSession | None:
    """Connect a visit to ``target``, or let a task do so."""
    stream = visit.stream
    if not relays_at_once(stream.extensions):
        visit.take_over()
        return None
    return ForwardSession(visit, BegunForward(stream, connector, target), limits)


class ForwardSession:
    """The callbacks of a client whose bytes all go to one target."""

    __slots__ = ("_begun", "_limits", "_reaching", "_tunnel", "_visit")

    def __init__(self, visit: Visit, begun: BegunForward, limits: TunnelLimits | None) -> None:
        self._visit = visit
        self._begun = begun
        self._limits = limits
        self._reaching: Reaching | None = None
        self._tunnel: Tunnel | None = None
        visit.session = self
        try:
            self._dial(begun)
        except Exception as error:  # noqa: BLE001 - the coroutine raises it
            self._fail(error)

    def _dial(self, begun: BegunForward) -> None:
        dialling = begun.connector.begin(begun.target, begun.stream.extensions)
        if dialling is None:
            self._visit.take_over()
            return
        begun.dialling = dialling
        stream = dialling.stream
        assert stream is not None
        if stream.is_connected:
            self._connected(stream)
            return
        visit = self._visit
        try:
            self._reaching = Reaching(visit, begun.connector, begun.target, dialling, self._connected, self._fail)
            begun.stream.tell(self._client_ready, poller=visit.poller)
        except OSError:
            visit.take_over()  # the kernel watches no more sockets: the coroutine knows another way

    def _client_ready(self, events: int) -> None:
        if events & SPECIAL and not self._visit.over and self._tunnel is None:
            self._visit.take_over()  # it may be gone; what it sends waits in the socket

    def _connected(self, upstream: SocketStream) -> None:
        visit = self._visit
        try:
            self._tunnel = begin_relay(self._begun.stream, upstream, visit.end, visit.poller, self._limits)
        except OSError:
            visit.take_over()
        else:
            self._begun.dialling = None

    def expired(self) -> None:
        """The connect takes too long."""
        if self._reaching is not None:
            self._reaching.expired()

    def stop(self) -> None:
        """A task takes over."""
        begun = self._begun
        begun.stream.tell(None)
        if begun.dialling is not None and begun.dialling.stream is not None:
            begun.dialling.stream.tell(None)
        if begun.dialling is not None or begun.failure is not None:
            begun.stream.extensions.add(begun)

    def cut(self) -> None:
        """Abort everything."""
        if self._tunnel is not None:
            self._tunnel.cut()  # and so the visit ends
            return
        dialling = self._begun.dialling
        if dialling is not None and dialling.stream is not None:
            dialling.stream.abort()
        self._begun.stream.abort()
        self._visit.end()

    def _fail(self, error: Exception) -> None:
        begun = self._begun
        if begun.dialling is not None and begun.dialling.stream is not None:
            begun.dialling.stream.abort()
        begun.dialling, begun.failure = None, error
        self._visit.take_over()
