"""The connector that routes: asks the table, and goes by the way that it names, or by the next one of a group."""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import random
import ssl
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Final

from ...core.address import Authority, IPAddress
from ...core.errors import PolicyDenied, RamaError
from ...core.extensions import Extensions
from ...core.notes import Note
from ...core.socket_stream import SocketStream
from ...core.stream import Stream
from ...core.target import Target
from ...routes.blame import Fault, direct_fault
from ...routes.choice import Board, Chooser, LocalBoard, Member
from ...routes.health import Health, HealthLimits
from ...routes.model import Chain, Choose, Direct, Group, Parent, Protocol, Refuse, Way
from ...routes.table import Decision, Question, RouteTable
from ...routes.ways import WayBook
from ..connect import ConnectError, Connector, Dialling, Egress, WayReset
from ..http.exchange.absolute import NeedsTunnel, ToProxy
from ..http.proxy.tunnel_client import basic
from ..resolver import resolve_for, source_of
from ..tls import ClientTls
from .failure import Budget, Start, WayFailed, race
from .hop import pass_hop, secure
from .private import judge_beyond
from .question import brief_question_of, is_local_name, key_of, literal_of, question_of
from .sources import FamilyEgress, Sources

__all__ = ["RouteConnector"]

log = logging.getLogger("rama_ebpf.routes")

_ADDRESS_LATE: Final = 0.25
_ADDRESSES: Final = 8
_RESOLVED: Final = 3
_ELSEWHERE: Final = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT})


def _note(extensions: Extensions, route: str, way: str) -> None:
    """Say it once, however often it is tried again."""
    said = list(extensions.all(Note))
    for note in _notes(route, way):
        if note not in said:
            extensions.add(note)


@functools.lru_cache(4096)
def _notes(route: str, way: str) -> tuple[Note, Note]:
    return Note("route", route), Note("way", way)


class RouteConnector:
    """A service from :class:`Authority` (better a :class:`Target`, which says who asks) to a connected stream.

    ``table`` decides, ``ways`` are what it names, and ``connector`` is how this host connects. ``timeout`` (seconds) is
    the one deadline over looking up, connecting, TLS, handshakes and all members; ``tries`` how many attempts there may
    be; ``late`` how long one has before the next is begun beside it. ``board`` keeps the health of ways, ``secret``
    what keys are hashed with; both are one for all workers. ``observe`` is told the way and the outcome of attempts.

    Nothing ever goes out by a way that was not chosen: what no route names is refused. Raises :class:`PolicyDenied`,
    :class:`~..connect.WayReset`, :class:`~.failure.WayFailed` or :class:`~..connect.ResolveError`.
    """

    accepts = Authority

    def __init__(
        self,
        table: RouteTable,
        ways: WayBook,
        connector: Connector,
        *,
        timeout: float = 10.0,
        tries: int = 6,
        late: float = 0.5,
        board: Board | None = None,
        secret: bytes = b"",
        overrides: Callable[[], Mapping[str, str]] = dict,
        observe: Callable[[str, str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        ways.check_routes(table.routes)
        self.table = table
        self.ways = ways
        self.timeout = timeout
        self.board: Board = LocalBoard() if board is None else board
        self.chooser = Chooser(ways, self.board, secret)
        self._base = connector
        self._tries = tries
        self._late = late
        self.overrides = overrides
        self._observe = observe
        self.clock = clock
        self._secret = secret
        self._direct = {
            name: _DirectWay(way, connector, secret) for name, way in ways.items() if isinstance(way, Direct)
        }
        self._contexts: dict[str, ssl.SSLContext] = {}
        for way in ways.values():
            if isinstance(way, Parent) and way.in_tls:
                self._contexts.setdefault(str(way.ca), ClientTls(ca=way.ca).context())
        # For these the live connections of ways are counted.
        self._counted = frozenset(
            leaf
            for name, way in ways.items()
            if isinstance(way, Group) and way.choose in (Choose.LEAST, Choose.HASH)
            for leaf in ways.leaves(name)
        )

    # -- deciding ------------------------------------------------------------------------------------------------

    def decide(self, question: Question) -> Decision:
        """Return what the table says, and an operator's word on the route that decides."""
        decision = self.table.decide(question)
        overrides = self.overrides()
        if overrides and (way := overrides.get(decision.name)) is not None and way in self.ways:
            return replace(decision, way=way)
        return decision

    async def _decided(self, question: Question, target: Authority) -> tuple[Question, Decision]:
        decision = self.decide(question)
        if decision.asks:
            try:
                ips = await resolve_for(self._base.resolver, str(target.host), source_of(target))
            except RamaError:
                ips = ()  # in none of the networks; whoever has to look it up will say so
            question = replace(question, ips=tuple(ips))
            decision = self.decide(question)
        return question, decision

    # -- for BIND and UDP (:mod:`.datagrams`) --------------------------------------------------------------------

    @property
    def egress(self) -> Egress:
        """What judges addresses."""
        return self._base.egress

    def now(self, name: str, question: Question, extensions: Extensions | None) -> list[str]:
        """Return the ways to ask now, the best first, of which all but the freely usable are claimed."""
        way = self.ways[name]
        if isinstance(way, Direct):
            return [] if name != "direct" and self.board.read(name).drained else [name]
        members = self.chooser.order(name, self._key(way, question, extensions), self.clock())
        return [member.name for member in members if member.free or self._claim(member.name)]

    def key(self, name: str, question: Question, extensions: Extensions | None) -> bytes:
        """Return what a direct way keeps its source for."""
        return self._key(self.ways[name], question, extensions)

    def direct(self, name: str, key: bytes) -> Connector:
        """Return how a direct way connects."""
        return self._direct[name].connector(key)

    def context(self, way: Parent) -> ssl.SSLContext | None:
        """Return the settings of TLS with a parent."""
        return self._contexts.get(str(way.ca))

    async def reach(self, way: Parent) -> Stream:
        """Connect to a parent. Raises :class:`WayFailed`."""
        try:
            return await self._base(way.address)
        except (RamaError, OSError) as error:
            raise WayFailed(errno.EIO, f"cannot reach the proxy {way.address}: {error}", Fault.WAY) from error

    def blame(self, name: str, error: WayFailed) -> None:
        """It has failed."""
        self._blame(name, error, self.clock(), _Attempts(Budget(1)))

    def praise(self, name: str, seconds: float) -> None:
        """It has done what it was asked for."""
        self._succeed(name, seconds)

    note = staticmethod(_note)

    def _key(self, way: Way, question: Question, extensions: Extensions | None) -> bytes:
        key = way.key if isinstance(way, Group | Direct) else None
        return b"" if key is None else key_of(key, question, extensions)

    # -- connecting ----------------------------------------------------------------------------------------------

    def _at_once(
        self, target: Authority, extensions: Extensions | None
    ) -> tuple[_DirectWay, Decision, Question] | None:
        """Return the direct way of a target that is an address; None for everything else."""
        if target.ip is None:
            return None
        question = brief_question_of(target, extensions, self.table)
        decision = self.decide(question)
        direct = self._direct.get(decision.way)
        if direct is None or decision.asks or (decision.way != "direct" and self.board.read(decision.way).drained):
            return None
        if direct.way.key is not None:
            question = question_of(target, extensions)
        return direct, decision, question

    def begins(self, target: Authority, extensions: Extensions | None = None) -> bool:
        """As :meth:`Connector.begins`."""
        return self._at_once(target, extensions) is not None

    def begin(self, target: Authority, extensions: Extensions | None = None) -> Dialling | None:
        """As :meth:`Connector.begin`, for a target that is an address and goes directly; None for everything else."""
        found = self._at_once(target, extensions)
        if found is None:
            return None
        direct, decision, question = found
        if extensions is not None:
            for note in _notes(decision.name, decision.way):
                extensions.add(note)
        if direct.plain:
            return self._base.begin(target)
        return direct.connector(self._key(direct.way, question, extensions)).begin(target)

    async def finish(self, target: Authority, dialling: Dialling) -> SocketStream:
        """As :meth:`Connector.finish`."""
        return await self._base.finish(target, dialling)

    def failure(self, target: Authority, error: OSError, *, late: bool = False) -> ConnectError:
        """As :meth:`Connector.failure`."""
        return self._base.failure(target, error, late=late)

    async def __call__(self, target: Authority, /) -> Stream:
        extensions = target.extensions if isinstance(target, Target) else None
        attempts = _Attempts(Budget(self._tries))
        decision: Decision | None = None
        try:
            async with asyncio.timeout(self.timeout) as timer:
                question, decision = await self._decided(question_of(target, extensions), target)
                return await self._take(decision, question, target, extensions, attempts)
        except TimeoutError as error:
            if not timer.expired():
                raise
            raise self._too_late(target, attempts) from error
        finally:
            if extensions is not None and decision is not None:
                way = attempts.winner or (attempts.tried[-1][0] if attempts.tried else decision.way)
                _note(extensions, decision.name, way)
                if len(attempts.tried) > 1:
                    extensions.add(Note("tried", attempts.told()))

    async def _take(
        self,
        decision: Decision,
        question: Question,
        target: Authority,
        extensions: Extensions | None,
        attempts: _Attempts,
    ) -> Stream:
        name, way = decision.way, self.ways[decision.way]
        if isinstance(way, Refuse):
            rule, text = f"route:{decision.name}", f"{target}: the route {decision.name} refuses it"
            if decision.route is None:
                text = f"{target}: no route leads there"
            raise WayReset(text, rule) if way.reset else PolicyDenied(text, rule)
        key = self._key(way, question, extensions)
        if isinstance(way, Direct):
            if name != "direct" and self.board.read(name).drained:
                raise WayFailed(errno.EIO, f"way {name} is drained", Fault.UNABLE)
            return await self._direct[name].connector(key)(target)
        now = self.clock()
        members = self.chooser.order(name, key, now) or self._last_resort(name, now)
        if not members:
            raise self._all_down(name, now)

        def starts() -> Iterator[Start]:
            for member in members:
                if not attempts.budget.left:
                    return
                if member.free or self._claim(member.name):
                    yield functools.partial(self._attempt, member.name, target, question, key, extensions, attempts)

        try:
            stream = await race(starts(), self._late, _is_final)
        except LookupError:
            raise self._all_down(name, now) from None
        self._won(attempts)
        assert attempts.winner is not None
        if isinstance(way, Group):
            self.chooser.chosen(name, attempts.winner, key, now)
        if attempts.winner in self._counted:
            self.board.enter(attempts.winner)
            weakref.finalize(stream, self.board.leave, attempts.winner).atexit = False
        return stream

    def _claim(self, name: str) -> bool:
        now = self.clock()
        return self.board.change(name, lambda health: health.claim(now, self.timeout))

    def _last_resort(self, name: str, now: float) -> list[Member]:
        """All members are down: the one that did well last, once a second. If all fell at once it was hardly they."""
        if not isinstance(self.ways[name], Group):
            return []
        leaves = [(leaf, self.board.read(leaf)) for leaf in self.ways.leaves(name)]
        for leaf, _ in sorted(leaves, key=lambda pair: -pair[1].answered):
            if self.board.change(leaf, lambda health: health.last_resort(now)):
                return [Member(leaf, free=True)]
        return []

    def _all_down(self, name: str, now: float) -> WayFailed:
        states = [(leaf, self.board.read(leaf)) for leaf in self.ways.leaves(name)]
        texts = [_down(leaf, health, now) for leaf, health in states[:4]]
        more = f" and {len(states) - 4} more" if len(states) > 4 else ""
        what = "no member of the group" if isinstance(self.ways[name], Group) else "the way"
        not_now = "is asked now" if what.startswith("no ") else "is not asked now"
        return WayFailed(errno.EIO, f"{what} {name} {not_now}: {'; '.join(texts)}{more}", Fault.UNABLE)

    async def _attempt(
        self,
        name: str,
        target: Authority,
        question: Question,
        key: bytes,
        extensions: Extensions | None,
        attempts: _Attempts,
    ) -> Stream:
        started = attempts.start(name, self.clock())
        try:
            stream = await self._open(name, target, question, key, extensions, attempts.budget)
        except WayFailed as error:
            attempts.end(name, _word(error))
            self._blame(name, error, started, attempts)
            raise
        except asyncio.CancelledError:
            if attempts.winner is not None and self.clock() - started >= self._late:
                self._silent(name, started, f"slower than {attempts.winner} by more than {self._late:g} s")
            raise
        except (RamaError, OSError) as error:
            attempts.end(name, getattr(error, "kind", "error"))
            self._released(name)
            raise
        attempts.end(name, "")
        attempts.winner = attempts.winner or name
        self._succeed(name, self.clock() - started)
        return stream

    async def _open(
        self,
        name: str,
        target: Authority,
        question: Question,
        key: bytes,
        extensions: Extensions | None,
        budget: Budget,
    ) -> Stream:
        if name in self._direct:
            budget.take()
            try:
                return await self._direct[name].connector(key)(target)
            except ConnectError as error:
                raise WayFailed(error.errno or errno.EIO, str(error.strerror), direct_fault(error.errno)) from error
        hops = self.ways.hops(name)
        last = hops[-1]
        self._judge(last, target)
        absolute = (
            question.protocol is Protocol.HTTP
            and last.speaks_http
            and not (extensions is not None and NeedsTunnel in extensions)
        )
        asked = [target]
        if last.resolve_here and isinstance(target.host, str) and not absolute:
            asked = await self._resolved(last, target)
        failure: WayFailed | None = None
        for at in asked:
            try:
                return await self._through(name, hops, at, budget, absolute=absolute)
            except WayFailed as error:
                failure = error
                if error.errno not in _ELSEWHERE or error.fault is Fault.WAY:
                    raise
        assert failure is not None
        raise failure

    def _judge(self, last: Parent, target: Authority) -> None:
        ip = literal_of(target.host)
        if ip is not None:
            judge_beyond(self._base.egress, ip, target.port, trusted=last.trusted)
        elif is_local_name(str(target.host)):
            raise PolicyDenied(
                f"{target.host} is whoever looks it up: the parent itself", rule="egress-default:loopback"
            )

    async def _resolved(self, last: Parent, target: Authority) -> list[Authority]:
        ips = await resolve_for(self._base.resolver, str(target.host), source_of(target))
        allowed: list[Authority] = []
        denied: PolicyDenied | None = None
        for ip in ips:
            try:
                judge_beyond(self._base.egress, ip, target.port, trusted=last.trusted)
            except PolicyDenied as error:
                denied = error
            else:
                allowed.append(Authority(ip, target.port))
        if not allowed:
            raise denied or WayFailed(errno.EHOSTUNREACH, f"{target.host} has no address", Fault.TARGET)
        if last.scheme.startswith("socks4"):
            allowed = [at for at in allowed if at.ip is not None and at.ip.version == 4] or allowed
        return allowed[:_RESOLVED]

    async def _through(
        self, name: str, hops: tuple[Parent, ...], target: Authority, budget: Budget, *, absolute: bool
    ) -> Stream:
        """Walk the addresses of the nearest parent, each through its whole handshake."""
        first = hops[0]
        ips = [first.address.ip] if first.address.ip is not None else await self._parent_addresses(first)

        def starts() -> Iterator[Start]:
            for ip in ips[:_ADDRESSES]:
                if not budget.take():
                    return
                yield functools.partial(self._dial, name, hops, ip, target, absolute)

        if len(ips) == 1:
            budget.take()
            return await self._dial(name, hops, ips[0], target, absolute)
        try:
            return await race(starts(), _ADDRESS_LATE, _is_final)
        except LookupError:
            raise WayFailed(errno.EIO, f"{target}: no attempt is left for {first.address}", Fault.UNABLE) from None

    async def _parent_addresses(self, parent: Parent) -> list[IPAddress]:
        try:
            ips = list(await resolve_for(self._base.resolver, str(parent.address.host), None))
        except (RamaError, OSError) as error:
            raise WayFailed(errno.EIO, f"cannot look up the proxy {parent.address}: {error}", Fault.WAY) from error
        if not ips:
            raise WayFailed(errno.EIO, f"the proxy {parent.address} has no address", Fault.WAY)
        return ips

    async def _dial(
        self, name: str, hops: tuple[Parent, ...], ip: IPAddress, target: Authority, absolute: bool
    ) -> Stream:
        first = hops[0]
        try:
            stream: Stream = await self._base(Authority(ip, first.address.port))
        except (RamaError, OSError) as error:
            raise WayFailed(errno.EIO, f"cannot reach the proxy {first.address}: {error}", Fault.WAY) from error
        try:
            for number, parent in enumerate(hops):
                stream = await secure(stream, parent, self._contexts.get(str(parent.ca)))
                last = number == len(hops) - 1
                if last and absolute:
                    login = None if parent.credentials is None else basic(parent.credentials)
                    stream.extensions.add(ToProxy(login, functools.partial(self._quarantine, name, "407")))
                    return stream
                await pass_hop(stream, parent, target if last else hops[number + 1].address, last=last)
        except BaseException:
            stream.abort()
            raise
        return stream

    # -- blame ---------------------------------------------------------------------------------------------------

    def _limits(self, name: str) -> HealthLimits:
        way = self.ways[name]
        assert isinstance(way, Direct | Parent | Chain)
        return way.limits

    def _blame(self, name: str, error: WayFailed, started: float, attempts: _Attempts) -> None:
        self._tell(name, error.fault.value)
        if error.fault is Fault.WAY:
            self._fail(name, str(error.strerror))
        elif error.fault is Fault.LOGIN:
            self._quarantine(name, str(error.strerror))
        elif error.fault is Fault.DOUBT:
            attempts.doubts.append((name, started, str(error.strerror)))
            self._released(name)
        elif name not in self._direct:
            now = self.clock()
            self.board.change(name, lambda health: health.answer(now))
        else:
            self._released(name)

    def _tell(self, name: str, outcome: str) -> None:
        self.board.tried(name, outcome not in ("connected", "target"))
        if self._observe is not None:
            self._observe(name, outcome)

    def _succeed(self, name: str, seconds: float) -> None:
        now, limits = self.clock(), self._limits(name)
        self._tell(name, "connected")
        if self.board.change(name, lambda health: health.succeed(now, limits, seconds)):
            log.warning("way %s is up again", name)

    def _fail(self, name: str, cause: str) -> None:
        now, limits = self.clock(), self._limits(name)
        jitter = random.random()
        if self.board.change(name, lambda health: health.fail(now, limits, cause, jitter)):
            log.warning("way %s is down: %s", name, cause)

    def _quarantine(self, name: str, cause: str) -> None:
        now = self.clock()
        if self.board.change(name, lambda health: health.quarantine(now, cause)):
            log.error(
                "ALARM: way %s refuses our log-in (%s): quarantined; mend its user and password, then: "
                "rama-ebpf route enable %s",
                name,
                cause,
                name,
            )

    def _released(self, name: str) -> None:
        """An attempt has ended that says nothing of the way: if it was a trial the next may be."""
        if self.board.read(name).trial_until:
            self.board.change(name, lambda health: health.release())

    def _won(self, attempts: _Attempts) -> None:
        """Whom another way has proven wrong."""
        for name, _, cause in attempts.doubts:
            if name != attempts.winner:
                self._fail(name, f"{cause}; {attempts.winner} got there")

    def _silent(self, name: str, started: float, cause: str) -> None:
        """It has said nothing: dead, if it said nothing to anybody else either."""
        if self.board.read(name).answered < started:
            self._fail(name, cause)

    def _too_late(self, target: Authority, attempts: _Attempts) -> WayFailed:
        for name, started in attempts.running.items():
            if name not in self._direct:
                self._tell(name, "late")
                self._silent(name, started, f"no answer within {self.timeout:g} s")
            self._released(name)
            attempts.tried.append((name, "no answer"))
        by = ", ".join(attempts.running) or "any way"
        text = f"cannot reach {target} by {by}: no answer within {self.timeout:g} s"
        return WayFailed(errno.ETIMEDOUT, text, Fault.DOUBT)


class _DirectWay:
    """One direct way."""

    def __init__(self, way: Direct, base: Connector, secret: bytes) -> None:
        self.way = way
        self.sources = Sources(way, secret)
        self.plain = not (way.sources or way.interface or way.mark)
        options = base.options
        if way.interface is not None or way.mark is not None or self.sources.freebind:
            options = replace(
                options,
                interface=way.interface if way.interface is not None else options.interface,
                mark=way.mark if way.mark is not None else options.mark,
                freebind=self.sources.freebind,
            )
        self._base = base
        if not self.plain:
            egress = FamilyEgress(base.egress, way) if way.sources else base.egress
            self._base = replace(base, options=options, egress=egress)

    def connector(self, key: bytes) -> Connector:
        """Return what connects, from the source for a key."""
        if not self.way.sources:
            return self._base
        pick = self.sources.pick
        return replace(self._base, source_v4=pick(4, key), source_v6=pick(6, key))


class _Attempts:
    """Of one connection."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.running: dict[str, float] = {}
        self.tried: list[tuple[str, str]] = []
        self.doubts: list[tuple[str, float, str]] = []
        self.winner: str | None = None

    def start(self, name: str, now: float) -> float:
        self.running[name] = now
        return now

    def end(self, name: str, outcome: str) -> None:
        self.running.pop(name, None)
        self.tried.append((name, outcome))

    def told(self) -> str:
        return ",".join(f"{name}:{outcome}" if outcome else name for name, outcome in self.tried[:16])


def _is_final(error: BaseException) -> bool:
    if isinstance(error, WayFailed):
        return not error.fault.moves_on
    return not isinstance(error, PolicyDenied)


def _word(error: WayFailed) -> str:
    number = error.errno or 0
    return errno.errorcode.get(number, str(number)).lower()


def _down(name: str, health: Health, now: float) -> str:
    if health.drained:
        return f"{name} is drained"
    cause = f" ({health.cause})" if health.cause else ""
    return f"{name} is {health.state.name.lower()} since {max(now - health.since, 0):.0f} s{cause}"
