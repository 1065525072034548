"""SOCKS in callbacks (:mod:`rama_ebpf.core.at_once`): greeting, a password that is known, CONNECT, and the tunnel.

Passwords that are to be checked, names that are to be asked for, BIND, UDP, and all that goes wrong are left to the
coroutine of :class:`~.server.Socks5Server`. It finds a :class:`Progress` among the extensions and goes on from there,
with the same machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...core.at_once import Visit
from ...core.auth import Credentials
from ...core.errors import HandshakeTimeout, PeerClosed
from ...core.socket_stream import SocketStream
from ...relay import Tunnel, begin_relay, relays_at_once
from ..connect import BeginsAtOnce, Dialling
from ..reaching import Reaching
from .machine import MAX_MESSAGE, Request, ServerMachine
from .wire import Command, Reply

if TYPE_CHECKING:
    from .server import Socks5Server

__all__ = ["Progress", "SocksSession"]


@dataclass(frozen=True, slots=True)
class Progress:
    """An extension: how far callbacks have come. ``credentials`` are to be checked; ``request`` is what is to be served
    if the client has said it, and ``dialling`` what has begun for it; ``failure`` what has gone wrong; ``upstream`` the
    other end of the tunnel, where the client knows of it."""

    machine: ServerMachine
    credentials: Credentials | None = None
    request: Request | None = None
    dialling: Dialling | None = None
    failure: Exception | None = None
    upstream: SocketStream | None = None


class SocksSession:
    """The callbacks of one client."""

    __slots__ = (
        "_connector",
        "_credentials",
        "_data",
        "_dialling",
        "_failure",
        "_machine",
        "_reaching",
        "_request",
        "_server",
        "_told",
        "_tunnel",
        "_visit",
    )

    def __init__(self, server: Socks5Server, connector: BeginsAtOnce, visit: Visit, machine: ServerMachine) -> None:
        self._server = server
        self._connector = connector
        self._visit = visit
        self._machine = machine
        self._data = b""
        self._credentials: Credentials | None = None
        self._request: Request | None = None
        self._failure: Exception | None = None
        self._dialling: Dialling | None = None
        self._reaching: Reaching | None = None
        self._told = False
        self._tunnel: Tunnel | None = None
        visit.session = self
        visit.start_clock(server.handshake_timeout)
        if visit.stream.maybe_readable:
            self._client_ready(0)
        if not visit.over and self._tunnel is None:
            visit.stream.tell(self._client_ready, poller=visit.poller)

    # -- the host's wishes -------------------------------------------------------------------------------------

    def expired(self) -> None:
        """The handshake, or the connect, takes too long."""
        if self._reaching is None:
            self._fail(HandshakeTimeout(f"SOCKS handshake not finished within {self._server.handshake_timeout} s"))
        else:
            self._reaching.expired()

    def stop(self) -> None:
        """A task takes over."""
        stream = self._visit.stream
        stream.tell(None)
        if self._data:
            stream.unread(self._data)
        dialling = self._dialling
        upstream: SocketStream | None = None
        if dialling is not None and dialling.stream is not None:
            dialling.stream.tell(None)
            if self._told:
                upstream, dialling = dialling.stream, None
        progress = Progress(self._machine, self._credentials, self._request, dialling, self._failure, upstream)
        stream.extensions.add(progress)

    def cut(self) -> None:
        """Abort everything."""
        if self._tunnel is not None:
            self._tunnel.cut()  # and so the visit ends
            return
        if self._dialling is not None and self._dialling.stream is not None:
            self._dialling.stream.abort()
        self._visit.stream.abort()
        self._visit.end()

    # -- callbacks: nothing may be raised ----------------------------------------------------------------------

    def _client_ready(self, _requests: int) -> None:
        if self._request is not None:
            return  # what it sends ahead waits in the socket
        try:
            self._read()
        except Exception as error:  # noqa: BLE001 - the coroutine raises it
            self._fail(error)

    # -- the handshake -----------------------------------------------------------------------------------------

    def _read(self) -> None:
        stream, machine = self._visit.stream, self._machine
        while True:
            more = stream.read_now(MAX_MESSAGE - len(self._data))
            if more is None:
                return
            if not more:
                raise PeerClosed(f"client closed during its SOCKS handshake ({machine.state.value})")
            data = self._data + more if self._data else more
            while data:
                event, used = machine.receive(data)
                if event is None:
                    break
                data = data[used:]
                if type(event) is Request:
                    self._data, self._request = data, event
                    self._requested(event)
                    return
                if type(event) is Credentials and not self._server.lets_in(event, stream, machine):
                    self._data, self._credentials = data, event
                    self._visit.take_over()
                    return
                out = machine.data_to_send()
                if stream.write_now(out) < len(out):
                    raise ConnectionAbortedError("client does not take two bytes")
            self._data = data
            if not stream.maybe_readable:
                return

    def _requested(self, request: Request) -> None:
        visit = self._visit
        visit.stop_clock()
        self._server.established(visit.stream.extensions, request)
        if (
            request.command is not Command.CONNECT
            or self._server.has_limits
            or not relays_at_once(visit.stream.extensions)
        ):
            visit.take_over()
            return
        dialling = self._connector.begin(request.target, visit.stream.extensions)
        if dialling is None:
            visit.take_over()
            return
        self._dialling = dialling
        upstream = dialling.stream
        assert upstream is not None
        if upstream.is_connected:
            self._connected(upstream)
            return
        try:
            self._reaching = Reaching(visit, self._connector, request.target, dialling, self._connected, self._fail)
        except OSError:
            visit.take_over()  # the kernel watches no more sockets: the coroutine knows another way

    def _connected(self, upstream: SocketStream) -> None:
        visit, machine = self._visit, self._machine
        machine.reply(Reply.SUCCEEDED, upstream.local)
        out = machine.data_to_send()
        stream = visit.stream
        if stream.write_now(out) < len(out):
            raise ConnectionAbortedError("client does not take a reply")
        self._told = True
        if self._data:
            stream.unread(self._data)
            self._data = b""
        try:
            self._tunnel = begin_relay(stream, upstream, visit.end, visit.poller)
        except OSError:
            visit.take_over()  # the kernel watches no more sockets: relay() knows another way
        else:
            self._dialling = None

    def _fail(self, error: Exception) -> None:
        """Let the coroutine raise ``error``, and tell the client."""
        if self._dialling is not None and self._dialling.stream is not None:
            self._dialling.stream.abort()
        self._dialling = None
        self._failure = error
        self._visit.take_over()
