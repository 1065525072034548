"""The SOCKS server service: drives the machine over a stream, connects, and relays."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from ...core.address import Authority, SocketAddress
from ...core.at_once import AtOnce, Visit
from ...core.auth import Authenticator, Credentials, User, known_at_once
from ...core.blame import speaks_another_protocol
from ...core.client import client_address
from ...core.counts import Counts, LocalCounts, SharesCounts
from ...core.errors import (
    AuthFailed,
    HandshakeTimeout,
    LimitExceeded,
    PeerClosed,
    PolicyDenied,
    ProtocolError,
    RamaError,
)
from ...core.extensions import Extensions
from ...core.first_bytes import FirstBytes, Refused
from ...core.lifecycle import Lifecycle, Stage
from ...core.service import Service, check_fit
from ...core.stream import MAX_UNREAD, Stream
from ...core.target import Target
from ...relay import TunnelLimits, TunnelReport, relay
from ..connect import ConnectError, WayReset, connects_at_once, upstream_failure
from .associate import AssociationReport, UdpAssociator
from .at_once import Progress, SocksSession
from .bind import Binder, Listening
from .carrier import SocksWays
from .client import BoundPort
from .machine import MAX_MESSAGE, Event, Request, ServerMachine
from .replies import reply_for
from .wire import Command, Method, Reply

__all__ = ["ReplyTiming", "Socks5Server", "UserLimits"]


T = TypeVar("T")

_LEFT: Final = Refused("peer_closed", "closed without a word")
_STRAY: Final = Refused("wrong_protocol", "the first byte is not a SOCKS version that is served here")
_NOISE: Final = Refused("protocol", "the first byte is not a SOCKS version that is served here")


class ReplyTiming(enum.Enum):
    """When CONNECT is answered."""

    LAZY = "lazy"
    """When the outcome is known: the client learns of every failure, and our address towards the target."""
    EAGER = "eager"
    """At once, which saves the client a round trip to the target: it may send data ahead, but a failure reaches it
    only as a reset, and it is told no address."""


@dataclass(frozen=True, slots=True)
class UserLimits:
    """What one user may do: ``connections`` at a time (None: any number), ``commands``, and the bounds of each of
    its tunnels and associations (None: those that apply to everybody).

    Connections are counted by each :class:`Socks5Server`, for itself or, with ``shared``, for all worker processes.
    """

    connections: int | None = None
    commands: frozenset[Command] = frozenset(Command)
    tunnel: TunnelLimits | None = None


class Socks5Server:
    """A service that serves one SOCKS5, SOCKS4 or SOCKS4a client on a :class:`Stream`.

    ``connector`` turns a target into a connected stream, with DNS and egress policy inside it; ``binder`` and ``udp``
    serve BIND and UDP ASSOCIATE, which are refused (REP 07) without them. ``auth`` demands a user name and password;
    with ``auth_optional`` clients that offer none are served too. ``limits`` says what a user may do;
    with ``shared`` (``context.shared`` in a worker) a user's connections are counted over all workers. ``ways`` choose
    how BIND and UDP ASSOCIATE go out, as ``connector`` may for CONNECT.
    ``handshake_timeout`` (seconds) bounds the time from the first byte due to the complete request.

    After a handshake the stream's extensions hold the :class:`Request`, its target and, if one was proven, the
    :class:`~rama_ebpf.core.auth.User`. Returns the report of the tunnel or association. Every failure is raised after
    the client has been sent the reply that its RFC prescribes and the stream is closed: :class:`ProtocolError`,
    :class:`AuthFailed`, :class:`HandshakeTimeout`, :class:`PeerClosed`, :class:`LimitExceeded`, or what the connector
    raised.
    """

    accepts = Stream

    def __init__(
        self,
        connector: Service[Target, Stream],
        *,
        binder: Binder | None = None,
        udp: UdpAssociator | None = None,
        auth: Authenticator | None = None,
        auth_optional: bool = False,
        limits: Callable[[User], UserLimits] | None = None,
        shared: SharesCounts | None = None,
        ways: SocksWays | None = None,
        socks4: bool = True,
        reply: ReplyTiming = ReplyTiming.LAZY,
        handshake_timeout: float = 10.0,
    ) -> None:
        if handshake_timeout <= 0:
            raise ValueError(f"handshake_timeout must be positive, not {handshake_timeout}")
        if auth is None and (auth_optional or limits is not None):
            raise ValueError("auth_optional and limits need an authenticator")
        check_fit(self, Target, connector)
        if auth is not None:
            check_fit(self, Credentials, auth)
        self._connector = connector
        self._binder = binder
        self._udp = udp
        self._ways = ways
        self._auth = auth
        self._limits = limits
        self._socks4 = socks4
        self._eager = reply is ReplyTiming.EAGER
        self.handshake_timeout = handshake_timeout
        self._connections: Counts = LocalCounts() if shared is None else shared.counts()
        if auth is None:
            self._methods: tuple[Method, ...] = (Method.NONE,)
        else:
            self._methods = (Method.PASSWORD, Method.NONE) if auth_optional else (Method.PASSWORD,)
        served = {Command.CONNECT: connector, Command.BIND: binder, Command.UDP_ASSOCIATE: udp}
        self._commands = frozenset(command for command, by in served.items() if by is not None)
        self.first_bytes = FirstBytes(self._refuse_beforehand)
        self._at_once_connector = connects_at_once(connector)
        plain = type(self).__call__ is Socks5Server.__call__ and self._at_once_connector is not None
        self._known = None if auth is None else known_at_once(auth)
        knows = auth is None or self._known is not None
        self.at_once = AtOnce(self, self._begin) if plain and knows and not self._eager else None

    def _refuse_beforehand(self, data: bytes) -> Refused | None:
        if not data:
            return _LEFT
        if data[0] == 5 or (data[0] == 4 and self._socks4):
            return None
        return _STRAY if data[0] == 4 or speaks_another_protocol(data) else _NOISE

    def _begin(self, visit: Visit) -> SocksSession:
        assert self._at_once_connector is not None
        return SocksSession(self, self._at_once_connector, visit, self._machine())

    def _machine(self) -> ServerMachine:
        return ServerMachine(self._methods, commands=self._commands, socks4=self._socks4)

    @property
    def has_limits(self) -> bool:
        """Whether users are held to limits of their own, as a coroutine does."""
        return self._limits is not None

    def lets_in(self, credentials: Credentials, stream: Stream, machine: ServerMachine) -> bool:
        """Accept credentials that are known to be right; false if they are to be checked."""
        client = client_address(stream)
        if client is not None:
            credentials = replace(credentials, source=client.ip)
        user = None if self._known is None else self._known(credentials)
        if user is None:
            return False
        machine.accept()
        stream.extensions.add(user)
        return True

    def established(self, extensions: Extensions, request: Request) -> None:
        """The handshake is over: add to the client's extensions what it was about."""
        extensions.add(request)
        extensions.add(request.target)
        lifecycle = extensions.get(Lifecycle)
        if lifecycle is not None:
            lifecycle.reached(Stage.ESTABLISHED)

    async def __call__(self, stream: Stream, /) -> TunnelReport | AssociationReport:
        progress = stream.extensions.get(Progress)
        machine = self._machine() if progress is None else progress.machine
        try:
            if progress is not None and progress.failure is not None:
                raise progress.failure
            if progress is not None and progress.upstream is not None:
                return await relay(stream, progress.upstream)
            if progress is not None and progress.request is not None:
                request = progress.request
                if progress.dialling is not None and self._at_once_connector is not None:
                    upstream = await self._at_once_connector.finish(request.target, progress.dialling)
                    machine.reply(Reply.SUCCEEDED, upstream.local)
                    return await self._tunnel(stream, upstream, machine)
            else:
                request = await self._handshake(stream, machine, None if progress is None else progress.credentials)
                self.established(stream.extensions, request)
            if self._limits is None:
                return await self._carry_out(request, stream, machine)
            with self._admit(request.command, stream.extensions, self._limits):
                return await self._carry_out(request, stream, machine)
        except WayReset:
            stream.abort()
            raise
        except (RamaError, OSError) as error:
            if machine.owes_reply:
                machine.reply(reply_for(error))
            last = machine.data_to_send()
            await (stream.close_after(last) if last else stream.close())
            raise

    async def _carry_out(
        self, request: Request, stream: Stream, machine: ServerMachine
    ) -> TunnelReport | AssociationReport:
        if request.command is Command.CONNECT:
            return await self._connect(request, stream, machine)
        if request.command is Command.BIND:
            return await self._bind(request, stream, machine)
        return await self._associate(request, stream, machine)

    async def _handshake(self, stream: Stream, machine: ServerMachine, begun: Credentials | None = None) -> Request:
        """Return the request of a client, of whom credentials have been read if it has ``begun``."""
        try:
            async with asyncio.timeout(self.handshake_timeout) as clock:
                while True:
                    event = begun or await _next_event(stream, machine)
                    begun = None
                    if isinstance(event, Credentials):
                        with Lifecycle.of(stream.extensions).owed(), _stopped(clock):
                            await self._authenticate(event, stream, machine)
                    if isinstance(event, Request):
                        return event
                    await stream.write(machine.data_to_send())
        except TimeoutError as error:
            raise HandshakeTimeout(f"SOCKS handshake not finished within {self.handshake_timeout} s") from error

    async def _authenticate(self, credentials: Credentials, stream: Stream, machine: ServerMachine) -> None:
        assert self._auth is not None
        try:
            client = client_address(stream)
            user = await _unless_gone(
                stream, self._auth(credentials if client is None else replace(credentials, source=client.ip))
            )
        except (RamaError, OSError):  # AuthFailed, or the authenticator cannot tell: nobody gets in without proof
            machine.refuse()
            raise
        machine.accept()
        stream.extensions.add(user)

    @contextlib.contextmanager
    def _admit(
        self, command: Command, extensions: Extensions, limits_of: Callable[[User], UserLimits]
    ) -> Iterator[None]:
        """Hold the user to what it may do while the command is served. Raises :class:`LimitExceeded`."""
        user = extensions.get(User)
        if user is None:
            yield
            return
        limits = limits_of(user)
        if command not in limits.commands:
            raise PolicyDenied(f"user {user.name!r} may not use {command.name}", rule="user")
        if limits.tunnel is not None:
            extensions.add(limits.tunnel)
        if limits.connections is None:
            yield
            return
        if not self._connections.enter(user.name, limits.connections):
            raise LimitExceeded(f"user {user.name!r} has {limits.connections} connections, the limit")
        try:
            yield
        finally:
            self._connections.leave(user.name)

    async def _connect(self, request: Request, stream: Stream, machine: ServerMachine) -> TunnelReport:
        if self._eager:
            machine.reply(Reply.SUCCEEDED)
            await stream.write(machine.data_to_send())
            try:
                upstream = await self._dial(request.target, stream)
            except (RamaError, OSError):
                stream.abort()  # the client believes that it is connected: an orderly close would be a false EOF
                raise
            return await relay(stream, upstream)
        upstream = await self._dial(request.target, stream)
        machine.reply(Reply.SUCCEEDED, upstream.local)
        return await self._tunnel(stream, upstream, machine)

    async def _dial(self, target: Authority, stream: Stream) -> Stream:
        try:
            return await self._connector(Target(target.host, target.port, stream.extensions))
        except (ProtocolError, AuthFailed, HandshakeTimeout, PeerClosed) as error:
            # Of somebody upstream. Raised as it is, it would be held against our client.
            failure = upstream_failure(error, f"cannot connect to {target}")
            assert failure is not None
            raise failure from error

    async def _bind(self, request: Request, stream: Stream, machine: ServerMachine) -> TunnelReport:
        assert self._binder is not None
        client = client_address(stream)
        if self._ways is not None:
            bound = await self._ways.bind(request.target, stream.extensions)
            if bound is not None:
                return await self._bind_at_parent(bound, self._binder, stream, machine)
        with (
            self._binder.share.hold(None if client is None else client.ip),
            await self._binder.listen(request.target, stream.local) as listening,
        ):
            machine.reply(Reply.SUCCEEDED, listening.address, listening=True)
            await stream.write(machine.data_to_send())
            upstream = await self._await_peer(stream, listening)
        machine.reply(Reply.SUCCEEDED, upstream.peer)
        return await self._tunnel(stream, upstream, machine)

    async def _bind_at_parent(
        self, bound: BoundPort, binder: Binder, stream: Stream, machine: ServerMachine
    ) -> TunnelReport:
        """A parent listens; its second reply is ours."""
        client = client_address(stream)
        accepted: list[tuple[Stream, Authority]] = []

        async def accept() -> None:
            accepted.append(await bound.accept(timeout=binder.timeout))

        try:
            with binder.share.hold(None if client is None else client.ip):
                machine.reply(Reply.SUCCEEDED, _told(bound.address), listening=True)
                await stream.write(machine.data_to_send())
                await _while_open(stream, accept())
        except BaseException:
            await bound.close()
            raise
        upstream, peer = accepted[0]
        machine.reply(Reply.SUCCEEDED, _told(peer))
        return await self._tunnel(stream, upstream, machine)

    async def _await_peer(self, stream: Stream, listening: Listening) -> Stream:
        assert self._binder is not None
        seconds = self._binder.timeout
        try:
            async with asyncio.timeout(seconds):
                while True:
                    await _while_open(stream, listening.readable())
                    if (upstream := listening.accept()) is not None:
                        return upstream
        except TimeoutError as error:
            message = f"no peer has connected to {listening.address} within {seconds} s"
            raise ConnectError(errno.ETIMEDOUT, message) from error

    async def _associate(self, request: Request, stream: Stream, machine: ServerMachine) -> AssociationReport:
        assert self._udp is not None
        client = client_address(stream) or stream.peer
        if client is None or stream.local is None:
            raise ConnectError(errno.EAFNOSUPPORT, "UDP ASSOCIATE needs a client with an IP address")
        ways = None
        if self._ways is not None and (ways := self._ways.of_client(stream.extensions)) is None:
            machine.reply(Reply.COMMAND_NOT_SUPPORTED)
            raise ConnectError(errno.EOPNOTSUPP, "UDP ASSOCIATE: no way of this client's can carry datagrams")
        association = self._udp.open(client.ip, stream.local, request.target, ways)
        try:
            machine.reply(Reply.SUCCEEDED, association.bound)
            await stream.write(machine.data_to_send())
            Lifecycle.of(stream.extensions).reached(Stage.TUNNEL)
            return await association.run(stream)
        finally:
            association.close()

    async def _tunnel(self, stream: Stream, upstream: Stream, machine: ServerMachine) -> TunnelReport:
        return await relay(stream, upstream, reply=machine.data_to_send())


def _told(address: Authority) -> SocketAddress | None:
    return None if address.ip is None else SocketAddress(address.ip, address.port)


async def _next_event(stream: Stream, machine: ServerMachine) -> Event:
    while True:
        if data := stream.buffered:
            event, used = machine.receive(data)
            if event is not None:
                stream.consume(used)
                return event
        if not await stream.fill(MAX_MESSAGE):
            raise PeerClosed(f"client closed during its SOCKS handshake ({machine.state.value})")


@contextlib.contextmanager
def _stopped(clock: asyncio.Timeout) -> Iterator[None]:
    """Stop the clock: what the client waits for meanwhile we owe it."""
    loop, when = asyncio.get_running_loop(), clock.when()
    assert when is not None
    left = when - loop.time()
    clock.reschedule(None)
    try:
        yield
    finally:
        clock.reschedule(loop.time() + left)


async def _unless_gone(stream: Stream, work: Awaitable[T]) -> T:
    """Await ``work``, and drop it if the client leaves meanwhile. Raises :class:`PeerClosed` then, OSError if it
    resets."""
    task = asyncio.ensure_future(work)
    watch: asyncio.Task[None] | None = None
    try:
        await asyncio.sleep(0)
        if not task.done():
            watch = asyncio.create_task(_leaves(stream))
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                watch.result()
        return await task
    finally:
        left = [one for one in (task, watch) if one is not None and not one.done()]
        for one in left:
            one.cancel()
        await asyncio.gather(*left, return_exceptions=True)


async def _leaves(stream: Stream) -> None:
    """Wait until the client has gone. One that has sent its request ahead and ended its side is still there."""
    while len(stream.buffered) < MAX_UNREAD:
        if not await stream.fill():
            if not stream.buffered:
                raise PeerClosed("client closed while its password was checked")
            break
    await asyncio.Event().wait()


async def _while_open(stream: Stream, waiting: Coroutine[None, None, None]) -> None:
    """Await ``waiting``. Raises :class:`PeerClosed` if the client closes first, OSError if it resets."""
    tasks = {asyncio.create_task(waiting), asyncio.create_task(_watch(stream))}
    try:
        done, _pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # the first failure is on its way already


async def _watch(stream: Stream) -> None:
    """Read ahead, as far as the stream's buffer goes, until the client closes; return only by :class:`PeerClosed`."""
    while len(stream.buffered) < MAX_UNREAD:
        if not await stream.fill():
            raise PeerClosed("client closed while BIND waited for its peer")
    await asyncio.Event().wait()  # a client that sends this much ahead is stopped by its window, and is still there
