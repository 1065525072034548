"""The SOCKS server service: drives the machine over a stream, connects, and relays."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from ...core.address import Authority
from ...core.auth import Authenticator, Credentials
from ...core.errors import AuthFailed, HandshakeTimeout, PeerClosed, ProtocolError, RamaError
from ...core.lifecycle import Lifecycle, Stage
from ...core.service import Service
from ...core.stream import Stream
from ...relay import TunnelReport, relay
from .machine import MAX_MESSAGE, Event, Request, ServerMachine
from .replies import reply_for
from .wire import Command, Method, Reply

__all__ = ["Socks5Server"]

_LINGER_SECONDS: Final = 1.0
_LINGER_BYTES: Final = 64 * 1024


class Socks5Server:
    """A service that serves one SOCKS5, SOCKS4 or SOCKS4a client on a :class:`Stream`.

    ``connector`` turns a target into a connected stream, with DNS and egress policy inside it. ``auth`` demands a
    user name and password; with ``auth_optional`` clients that offer none are served too. ``handshake_timeout``
    (seconds) bounds the time from the first byte due to the complete request.

    After a handshake the stream's extensions hold the :class:`Request` and, if one was proven, the
    :class:`~rama_ebpf.core.auth.User`. Returns the tunnel's report. Every failure is raised after the client has
    been sent the reply that its RFC prescribes and the stream is closed: :class:`ProtocolError`,
    :class:`AuthFailed`, :class:`HandshakeTimeout`, :class:`PeerClosed`, or what the connector raised.
    """

    accepts = Stream

    def __init__(
        self,
        connector: Service[Authority, Stream],
        *,
        auth: Authenticator | None = None,
        auth_optional: bool = False,
        socks4: bool = True,
        handshake_timeout: float = 10.0,
    ) -> None:
        if handshake_timeout <= 0:
            raise ValueError(f"handshake_timeout must be positive, not {handshake_timeout}")
        if auth_optional and auth is None:
            raise ValueError("auth_optional needs an authenticator")
        self._connector = connector
        self._auth = auth
        self._socks4 = socks4
        self._timeout = handshake_timeout
        if auth is None:
            self._methods: tuple[Method, ...] = (Method.NONE,)
        else:
            self._methods = (Method.PASSWORD, Method.NONE) if auth_optional else (Method.PASSWORD,)

    async def __call__(self, stream: Stream, /) -> TunnelReport:
        machine = ServerMachine(self._methods, socks4=self._socks4)
        try:
            request = await self._handshake(stream, machine)
            stream.extensions.add(request)
            Lifecycle.of(stream.extensions).reached(Stage.ESTABLISHED)
            upstream = await self._connect(request, machine)
        except (RamaError, OSError):
            await self._close(stream, machine)
            raise
        try:
            await stream.write(machine.data_to_send())
        except BaseException:
            upstream.abort()
            raise
        return await relay(stream, upstream)

    async def _handshake(self, stream: Stream, machine: ServerMachine) -> Request:
        try:
            async with asyncio.timeout(self._timeout):
                while True:
                    event = await _next_event(stream, machine)
                    if isinstance(event, Credentials):
                        await self._authenticate(event, stream, machine)
                    if isinstance(event, Request):
                        return event
                    await stream.write(machine.data_to_send())
        except TimeoutError as error:
            raise HandshakeTimeout(f"SOCKS handshake not finished within {self._timeout} s") from error

    async def _authenticate(self, credentials: Credentials, stream: Stream, machine: ServerMachine) -> None:
        assert self._auth is not None
        try:
            user = await self._auth(credentials)
        except AuthFailed:
            machine.refuse()
            raise
        machine.accept()
        stream.extensions.add(user)

    async def _connect(self, request: Request, machine: ServerMachine) -> Stream:
        if request.command is not Command.CONNECT:
            machine.reply(Reply.COMMAND_NOT_SUPPORTED)
            raise ProtocolError(f"command {request.command.name} is not served here")
        try:
            upstream = await self._connector(request.target)
        except (RamaError, OSError) as error:
            machine.reply(reply_for(error))
            raise
        machine.reply(Reply.SUCCEEDED, upstream.local)
        return upstream

    async def _close(self, stream: Stream, machine: ServerMachine) -> None:
        """Send what the client is still to be told and close so that it arrives.

        Closing while bytes of the client are unread would send RST, which may overtake the reply and discard it
        (RFC 1122 section 4.2.2.13). So: half-close, then read on for a bounded while until the client closes too.
        """
        try:
            # OSError includes TimeoutError: the peer has gone, or does not close but has had its reply.
            with contextlib.suppress(OSError):
                async with asyncio.timeout(_LINGER_SECONDS):
                    reply = machine.data_to_send()
                    if reply:
                        await stream.write(reply)
                        await stream.write_eof()
                        budget = _LINGER_BYTES
                        while budget > 0 and (data := await stream.read(4096)):
                            budget -= len(data)
        finally:
            await stream.close()


async def _next_event(stream: Stream, machine: ServerMachine) -> Event:
    while True:
        event, used = machine.receive(stream.buffered)
        if event is not None:
            stream.consume(used)
            return event
        if not await stream.fill(MAX_MESSAGE):
            raise PeerClosed(f"client closed during its SOCKS handshake ({machine.state.value})")
