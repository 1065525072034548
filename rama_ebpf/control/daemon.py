"""The server process: where the policy lives, the listeners, the control socket, and the workers that serve.

It is the supervisor of :mod:`rama_ebpf.process` with the gate in its hands. It parses nothing that comes from the
network: that is what the unprivileged workers are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from ..core.address import SocketAddress
from ..core.errors import RamaError
from ..core.event_loop import run_loop
from ..kernel.denials import DenialCounts
from ..kernel.feed_cgroup import GrantedChild, confined_to_grants
from ..kernel.instance import ServerLock
from ..metrics.directory import MetricsDirectory
from ..policy.feed_store import FeedStore
from ..policy.integrity import EgressCheck, Integrity
from ..policy.kernel_store import KernelStore
from ..policy.refresh import Refresher
from ..policy.rule import PolicyError
from ..process import Nursery, Plan, Supervisor, WorkerObserver, WorkerProcess
from ..process.plan import nothing_held
from ..process.service_manager import notify
from ..services.tcp import bind_tcp
from . import upkeep
from .api import ControlApi, feed_rows
from .audit import Audit
from .cookies import CookieWatch
from .divert import Diverter
from .egress import Egress
from .enforced import Judge, KernelJudge, StoreJudge
from .events import EventHub, GateEvents, rule_names
from .guard import Guard
from .held import HANDSHAKE_SECONDS, HeldAddresses
from .incumbent import Duties, Parts, ServedIncumbent, metrics_directory
from .kernel_relay import KernelRelay
from .kill import ConnectionKiller, Denials
from .listeners import Listeners
from .options import FIXED, DaemonOptions
from .policy_host import PolicyHost, open_policy_host, refuse_without_gate, take_over_policy
from .policy_thread import PolicyThread
from .predecessor import Predecessor, Seniors
from .refusals import RefusalBook
from .replaying import generation_of
from .revision import Deployment, Policy, ServedRevision
from .routes import RouteControl
from .signals import EarlyStop, end_after, stopping_early, suspend
from .socket import ControlServer
from .sockets import SocketSet
from .state import Seen, ServerState
from .successor import Upgrades
from .takeover import Inherited, TakeOver, lock_and_estate
from .verdicts import Verdicts
from .why import ServerSide, Why
from .wire import WireRelay
from .wire_elders import WireElders
from .worker_requests import WorkerRequests

if TYPE_CHECKING:
    from .exposition import MetricsServer

__all__ = ["serve"]

log = logging.getLogger("rama_ebpf")

_ENFORCE_SECONDS: Final = 1.0
_STOP_SECONDS: Final = 1.9
_SYNC_SECONDS: Final = 0.5
_SENIORS_SECONDS: Final = 1.0
_OOM_SCORE: Final = -800
_WORKER_TARGET: Final = "rama_ebpf.control.worker:application"


def serve(
    options: DaemonOptions,
    reload: Callable[[], DaemonOptions] | None = None,
    predecessor: Predecessor | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, or until another server has taken over. ``reload`` makes the options for SIGHUP;
    without it they stay the same, and the workers load the application anew. ``predecessor`` is a server that waits to
    hand over: until this one serves, that one does.

    Raises :class:`~rama_ebpf.kernel.instance.InstanceBusy`, :class:`~.policy_host.GateUnavailable`,
    :class:`~rama_ebpf.process.WorkersFailed`, or OSError (a port that is taken, say); nothing stays behind then.
    """
    started = time.monotonic()
    _be_spared_by_oom()
    # Logs go on where a terminal stops who writes to it from the background (stty tostop).
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    early: list[int] = []
    signal.signal(signal.SIGHUP, lambda number, _frame: early.append(number))  # one that comes during the start waits
    with (
        stopping_early() as stop,
        lock_and_estate(options.instance, predecessor) as (lock, estate),
        open_policy_host(options) if estate is None else take_over_policy(options, estate) as host,
        PolicyThread() as thread,
        contextlib.ExitStack() as cleanup,
    ):
        stop.wait_from_now_on()
        inherited = None if predecessor is None or estate is None else Inherited(predecessor, estate)
        make = reload or (lambda: options)
        daemon = _Daemon(options, make, host, thread, cleanup, started, early, stop, lock, inherited)
        run_loop(daemon.run())


class _Daemon(WorkerObserver):
    """One run of the server."""

    def __init__(
        self,
        options: DaemonOptions,
        reload: Callable[[], DaemonOptions],
        host: PolicyHost,
        thread: PolicyThread,
        cleanup: contextlib.ExitStack,
        started: float,
        early: list[int],
        stop: EarlyStop,
        lock: ServerLock,
        inherited: Inherited | None,
    ) -> None:
        self._options = options
        self._reload = reload
        self._host = host
        self._thread = thread
        self._started = started
        self._early = early
        self._stop_early = stop
        self._lock = lock
        self._inherited = inherited
        self._facts: Mapping[str, Any] = {} if inherited is None else inherited.facts
        self._takeover: TakeOver | None = None
        self._cookies = CookieWatch(options.syn_cookies)
        held = HeldAddresses.of_manager() if inherited is None else HeldAddresses()
        cleanup.callback(held.close)
        self._listeners = Listeners(host.gate, host.why_local, held)
        cleanup.callback(self._listeners.close)
        if inherited is not None:
            inherited.estate.take("listeners")
            self._listeners.adopt((one.at, one.sockets) for one in inherited.estate.listeners)
        self._guard = Guard(host.gate, self._listeners, self._worker_pids, self._write_state)
        cleanup.callback(self._guard.close)
        self._metrics: MetricsDirectory | None = None
        if options.metrics is not None:
            self._metrics = cleanup.enter_context(metrics_directory(None if inherited is None else inherited.estate))
        user = options.user
        self._denials = DenialCounts((0, 0) if user is None else (user.uid, user.gid))
        cleanup.callback(self._denials.close)
        self._feeds = FeedStore(options.instance.feeds_dir, self)
        self._egress = Egress(host.gate)
        self._killer = ConnectionKiller(self._listeners.served, self._clients_cgroups)
        self._events = EventHub() if host.gate is None else GateEvents(host.gate.maps, rule_names(host.store)).hub
        self._refusals = RefusalBook()
        self._cleanup = cleanup
        self._routes = RouteControl(
            lambda: self._options.params,
            lambda: self._supervisor.board,
            lambda: self._why().egress(self._server_side()),
        )
        self._audit = self._make_audit()
        diverter = Diverter(options.instance)
        cleanup.callback(lambda: diverter.close() if self._listeners.owns else None)
        self._deployment = Deployment(
            host,
            self._listeners,
            self._egress,
            self._feeds,
            thread,
            self._guard.probe,
            self._in_force,
            self._alone,
            diverter,
        )

    def admit(self, pid: int) -> contextlib.AbstractContextManager[GrantedChild]:
        """Confine a child that reads a feed (:class:`~rama_ebpf.policy.feed_room.FeedRoom`)."""
        gate = self._host.gate
        if gate is None:
            return confined_to_grants(None, None, pid, self._denials)
        return gate.confine_feed(pid, self._denials)

    def _place_holder(self, pid: int) -> None:
        """Put the wire relay's process above the cgroup that ends with us."""
        if self._host.gate is not None:
            self._host.gate.place_beside(pid)

    def _clients_cgroups(self) -> frozenset[int]:
        """Those that sockets of our clients belong to, tunnels of earlier servers among them."""
        own = self._own_cgroups()
        return own | self._elders.cgroups if own else own

    def _own_cgroups(self) -> frozenset[int]:
        return frozenset() if self._host.gate is None else self._host.gate.attachments.own_cgroups

    async def run(self) -> None:
        options, host = self._options, self._host
        async with Nursery() as nursery:
            self._relay = KernelRelay(
                options.workers,
                options.instance.relay_record,
                nursery,
                kernel_headers=options.kernel_headers,
                on_change=self._write_state,
            )
            self._cleanup.callback(self._relay.close)
            self._elders = WireElders(options.instance, nursery, self._write_state)
            self._wire = WireRelay(
                options.instance,
                nursery,
                self._listeners.addresses,
                workers=options.workers,
                user=options.user,
                kernel_headers=options.kernel_headers,
                on_change=self._write_state,
                place=self._place_holder,
                cgroups=self._own_cgroups,
            )
            self._cleanup.callback(self._wire.close)
            self._cleanup.callback(self._elders.close)
            self._elders.meet()
            revision = await self._first_revision()
            observers: list[WorkerObserver] = [
                WorkerRequests(host.store, self._thread, self._events),
                self._relay,
                self._listeners,
                self._egress,
                self._refusals,
                self,
            ]
            if self._metrics is not None:
                from .exposition import MetricsFiles  # see _metrics_server

                observers.append(MetricsFiles(self._metrics))
            self._supervisor = Supervisor(
                revision,
                nursery,
                prepare=self._prepare,
                observers=observers,
                on_ready=self._ready,
                on_stopping=self._stopping,
                denials=self._denials,
                on_left=lambda: self._incumbent.left(),
                series=str(self._facts.get("series", "")),
                restarts=int(self._facts.get("restarts", 0)),
                reloads=int(self._facts.get("reloads", 0)),
            )
            if self._early:
                self._supervisor.hang_up()
            if self._stop_early.asked:
                self._supervisor.stop()
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGTSTP, lambda: nursery.start("stopping for the terminal", suspend()))
            await self._serve(nursery)
        self._supervisor.close()

    async def _first_revision(self) -> ServedRevision:
        """The one of the start: where another server hands over it is as one for a reload."""
        options, policy, predecessor = self._options, None, None
        if self._inherited is not None:
            predecessor = self._inherited.predecessor
            predecessor.at("policy")
            policy = await asyncio.to_thread(Policy.of, options, self._host.store, self._feeds)
            predecessor.at("listeners")
        sockets = self._listeners.prepare(options.listen, options.workers)
        before = None if predecessor is None else options
        if predecessor is not None:
            predecessor.at("workers")
        plan = self._plan(options, sockets)
        return ServedRevision(options, plan, sockets, self._deployment, before, policy, predecessor)

    async def _serve(self, nursery: Nursery) -> None:
        store, thread = self._host.store, self._thread
        self._seniors = Seniors(nursery, self._write_state)
        metrics = self._metrics_server()
        self._duties = Duties(nursery, lambda: self._work(metrics))
        self._make_incumbent(metrics, nursery)
        self._state = ServerState(
            Seen(
                options=lambda: self._options,
                host=self._host,
                supervisor=self._supervisor,
                incumbent=self._incumbent,
                seniors=self._seniors,
                listeners=self._listeners,
                guard=self._guard,
                audit=self._audit,
                denials=self._denials,
                cookies=self._cookies,
                relay=self._relay,
                wire=self._wire,
                ways=lambda: self._supervisor.board.troubled(),
                elders=self._elders,
            )
        )
        upgrades = Upgrades(self._incumbent, nursery)
        control = self._control_server = ControlServer(
            self._options.instance.control_socket,
            self._control,
            {
                "events": self._events.stream,
                "flows": self._flows,
                "probe": self._probed,
                "upgrade": upgrades.stream,
            },
        )
        if self._inherited is not None:
            self._incumbent.own(False)
        nursery.keep("keeping bans on disk", lambda: upkeep.sync(store, thread))
        if self._inherited is None:
            await control.start()
            self._write_state()
            self._duties.start()
        try:
            await self._supervisor.run()
        finally:
            await upgrades.end()
            self._feeds.cancel()  # their threads are waited for at the end
            if metrics is not None:
                metrics.stop()
            await control.stop()
            await self._duties.stop()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SENIORS_SECONDS):
                    await self._seniors.ended()
            with contextlib.suppress(TimeoutError):  # held up: then it is no clean stop
                async with asyncio.timeout(_SYNC_SECONDS):
                    await thread.run(store.sync if self._incumbent.retired else store.finish)

    def _work(self, metrics: MetricsServer | None) -> dict[str, Callable[[], Awaitable[None]]]:
        """What is done as long as this server is the one that serves, by name."""
        store, thread = self._host.store, self._thread
        work: dict[str, Callable[[], Awaitable[None]]] = {
            "sweeping the policy": lambda: upkeep.sweep(store, thread),
            "noting the end of trials": lambda: upkeep.settle(store, thread),
            "watching the wall clock": lambda: upkeep.watch_clock(store, thread),
            "refreshing feeds": lambda: upkeep.refresh(store, Refresher(store, self._feeds)),
            "ending denied connections": self._enforce,
            "following the nameservers": self._egress.follow_nameservers,
            "probing the gate": self._guard.watch,
            "keeping the record of clients": lambda: upkeep.keep_record(
                store, self._options.instance.clients_file, generation_of(store), lambda: self._options.record_keep
            ),
            "following this host's addresses": self._egress.follow_addresses,
            "watching SYN cookies": lambda: self._cookies.watch(self._write_state),
        }
        if (audit := self._audit) is not None:
            work["auditing the policy"] = lambda: audit.watch(thread)
        if metrics is not None:
            work["serving metrics"] = metrics.run
        return work

    def _plan(self, options: DaemonOptions, sockets: SocketSet) -> Plan:
        gate = self._host.gate
        return Plan(
            target=_WORKER_TARGET,
            listeners=sockets.listeners,
            workers=options.workers,
            user=options.user,
            sandbox=options.sandbox,
            read=options.read,
            write=options.write,
            params={
                "target": options.target,
                "directory": options.directory,
                "params": options.params,
                "egress": Egress.parameters(
                    options.egress,
                    self._egress.networks,
                    self._own_listeners(sockets),
                    [binding for bindings in sockets.bindings.values() for binding in bindings],
                ),
                "accept_slots": self._listeners.accept_slots(sockets),
                "judge": gate is None,
                "sockmap": options.sockmap,
                "access_log": options.access_log,
                "metrics": self._metrics is not None,
            },
            fds=self._relay.descriptors
            | self._wire.descriptors(wanted=options.wire)
            | self._elders.descriptors
            | ({} if gate is None else {"accepted": gate.maps["accepted"]}),
            held=nothing_held if gate is None else gate.attachments.guarding,
            environment={} if self._metrics is None else self._metrics.environment,
            drain=options.drain,
            linger=options.linger,
            watchdog=options.watchdog,
            log_level=options.log_level,
            log_format=options.log_format,
        )

    def _own_listeners(self, sockets: SocketSet) -> list[SocketAddress]:
        """Where clients must not be connected to, or they would be connected to us again."""
        return [*sockets.addresses, *self._metrics_address()]

    def _metrics_address(self) -> list[SocketAddress]:
        metrics = None if self._options.metrics is None else self._options.metrics.address
        return [] if metrics is None else [metrics]

    def _control(self, method: str, params: Mapping[str, object]) -> dict[str, object]:
        if method == "kill":
            return self._killer.call(params)
        if method.startswith("route-"):
            return self._routes.call(method, params)
        if method == "why":
            return self._why().call(params)
        try:
            return ControlApi(self._host.store, self._feeds, self._judge(), self._options.instance.clients_file).call(
                method, params
            )
        finally:
            self._host.store.sync()  # this is a thread of its own; the answer says that it is kept

    def _server_side(self) -> ServerSide:
        return ServerSide(
            options=lambda: self._options,
            listeners=self._listeners.described,
            networks=lambda: self._egress.networks,
            own=lambda: [*self._listeners.addresses(), *self._metrics_address()],
            refusals=self._refusals,
        )

    def _why(self) -> Why:
        return Why(self._host.store, self._judge(), self._server_side())

    def _make_audit(self) -> Audit | None:
        store, gate, judge = self._host.store, self._host.gate, self._kernel_judge()
        if gate is None or judge is None or not isinstance(store, KernelStore):
            return None  # there is one copy of the policy
        integrity = Integrity(store, gate.witness)
        self._cleanup.callback(integrity.close)
        egress = None if self._egress.table is None else EgressCheck(self._egress.table, gate.grants)
        return Audit(store, judge, integrity, self._write_state, egress)

    def _judge(self) -> Judge:
        return self._kernel_judge() or StoreJudge(self._host.store, self._listeners.addresses, serving=True)

    def _kernel_judge(self) -> KernelJudge | None:
        """Who asks the programs, where there are some."""
        store, gate = self._host.store, self._host.gate
        if gate is None or not isinstance(store, KernelStore):
            return None
        witness = gate.witness
        return KernelJudge(store, lambda: contextlib.nullcontext(witness), self._listeners.described)

    async def _enforce(self) -> None:
        """Where the operator wants it, end live connections that the policy has come to deny."""
        store, said = self._host.store, ""
        denials = Denials(store, self._killer)
        while True:
            await asyncio.sleep(_ENFORCE_SECONDS)
            if not self._options.kill or not denials.due:
                continue
            try:
                killed = await asyncio.to_thread(denials.end)
            except PolicyError as error:
                if str(error) != said:
                    log.error("%s; it is tried again", error)
                said = str(error)
                continue
            said = ""
            if killed:
                log.warning("revision %d of the policy ended %d live connections", store.revision, killed)

    async def _flows(self, _params: Mapping[str, object]) -> AsyncGenerator[dict[str, object], None]:
        """Answer ``flows``: what each worker says of its tunnels."""
        answers = await self._supervisor.ask("flows")
        yield {"workers": [{"worker": name, **answer} for name, answer in sorted(answers.items())]}

    def _worker_pids(self) -> list[int]:
        return list(self._supervisor.pids.values())

    async def _probed(self, _params: Mapping[str, object]) -> AsyncGenerator[dict[str, object], None]:
        """Answer ``probe``: how the listeners are guarded now."""
        await self._guard.probe()
        yield self._state.guarded()

    # -- workers -------------------------------------------------------------------------------------------------

    def spawned(self, pid: int) -> None:
        if self._host.gate is not None:
            self._host.gate.adopt_worker(pid)

    def serving(self, worker: WorkerProcess) -> None:
        self._write_state()

    def silent(self, worker: WorkerProcess) -> None:
        self._write_state()

    def ended(self, worker: WorkerProcess) -> None:
        self._write_state()

    # -- from one server to the next -----------------------------------------------------------------------------

    def _make_incumbent(self, metrics: MetricsServer | None, nursery: Nursery) -> None:
        parts = Parts(
            options=lambda: self._options,
            host=self._host,
            lock=self._lock,
            listeners=self._listeners,
            guard=self._guard,
            supervisor=self._supervisor,
            control=lambda: self._control_server,
            seniors=self._seniors,
            thread=self._thread,
            metrics=self._metrics,
            metrics_listener=lambda: None if metrics is None else metrics.listener,
            duties=self._duties,
            put_settings=self._deployment.put_settings,
            on_change=self._write_state,
        )
        self._incumbent = ServedIncumbent(parts, str(self._facts.get("series", "")), nursery)
        self._incumbent.serves = self._inherited is None
        if self._inherited is not None:
            self._takeover = TakeOver(self._inherited, parts, self._incumbent, nursery)
        self._nursery = nursery

    async def _end_seniors(self) -> None:
        """They stop with us."""
        self._seniors.stop()
        await asyncio.wait((self._supervisor.cutting,))
        for senior in self._seniors.live:
            self._seniors.cut(senior)

    async def _alone(self) -> None:
        if self._takeover is not None:
            await self._takeover.alone()

    # -- start, reload, stop -------------------------------------------------------------------------------------

    def _in_force(self, options: DaemonOptions) -> None:
        self._options = options
        self._wire.follow_listeners()
        self._write_state()

    def _ready(self) -> None:
        self._host.served = True
        self._state.serves()
        self._wire.follow_listeners()
        if self._takeover is not None:
            self._takeover.serve()
        else:
            self._incumbent.may_hand_over = True
            self._listeners.held.let_go()
            notify("READY=1")
        self._write_state()
        where = "kernel" if self._host.gate is not None else "userspace"
        addresses = ", ".join(str(row["address"]) for row in self._listeners.described())
        seconds, workers = time.monotonic() - self._started, self._options.workers
        log.info("ready after %.2f s: %d workers on %s, policy in %s", seconds, workers, addresses, where)

    async def _prepare(self) -> ServedRevision:
        """Make the revision for SIGHUP. What cannot be carried out is refused here, before anything changes."""
        options = await asyncio.to_thread(self._reload)
        if self._host.gate is None:
            refuse_without_gate(options, self._host.why_local)
        await self._guard.probe()  # follows the server to the cgroup that its new sockets will belong to
        fixed = [name for name in FIXED if getattr(options, name) != getattr(self._options, name)]
        if fixed:
            log.warning("only a restart changes %s", ", ".join(fixed))
        policy = await asyncio.to_thread(Policy.of, options, self._host.store, self._feeds)
        try:
            sockets = self._listeners.prepare(options.listen, options.workers)
        except (OSError, ValueError) as error:
            raise RamaError(str(error)) from error
        try:
            return ServedRevision(
                options, self._plan(options, sockets), sockets, self._deployment, self._options, policy
            )
        except BaseException:
            self._listeners.give_up(sockets)
            raise

    def _stopping(self) -> float:
        """Whatever holds us up, the server is gone soon after its drain. Return for how long workers accept at least:
        what has begun before our addresses are held ends well."""
        notify("STOPPING=1")
        linger, least = self._options.linger, 0.0
        if linger > HANDSHAKE_SECONDS:
            later = linger - HANDSHAKE_SECONDS
            asyncio.get_running_loop().call_later(later, self._listeners.leave_to_manager)
        elif self._listeners.leave_to_manager():
            least = HANDSHAKE_SECONDS
        limit = max(linger, least) + self._options.drain + _STOP_SECONDS
        end_after(limit)
        self._state.stops(limit)
        self._nursery.start("the end of earlier servers", self._end_seniors())
        self._write_state()
        return least

    # -- what is seen from outside -------------------------------------------------------------------------------

    def _write_state(self) -> None:
        self._state.write()

    def _unready(self) -> dict[str, str]:
        return self._state.unready()

    def _metrics_server(self) -> MetricsServer | None:
        if self._metrics is None or self._options.metrics is None or self._options.metrics.address is None:
            return None
        # Imported only where it is wanted: it brings the HTTP services, a fifth of the time to start.
        from .exposition import (
            MetricsServer,
            denials_collector,
            disagreements_collector,
            feeds_collector,
            guard_collector,
            silent_rejects_collector,
            supervisor_collector,
            verdict_collector,
            ways_collector,
        )

        address, inherited = self._options.metrics.address, self._inherited
        collectors = [supervisor_collector(self._supervisor), guard_collector(self._guard.losses, self._unready)]
        collectors.append(denials_collector(self._denials))
        collectors.append(ways_collector(lambda: self._supervisor.board.states()))
        store = self._host.store
        collectors.append(feeds_collector(lambda: feed_rows(store, self._feeds)))
        if isinstance(store, KernelStore):
            collectors.append(verdict_collector(Verdicts(store)))
            collectors.append(silent_rejects_collector(store.counters.silent_rejects))
        if (audit := self._audit) is not None:
            collectors.append(disagreements_collector(lambda: audit.disagreements))
        return MetricsServer(
            bind_tcp(str(address.ip), address.port) if inherited is None else inherited.metrics_listener(address),
            self._metrics,
            collectors,
            self._unready,
            user=self._options.user,
            adopt=self.spawned,
            denials=self._denials,
        )


def _be_spared_by_oom() -> None:
    """Have the kernel take others first when memory runs out: who holds the gate goes last (proc(5))."""
    try:
        with open("/proc/self/oom_score_adj", "r+", encoding="ascii") as file:
            score = min(int(file.read()), _OOM_SCORE)
            file.write(str(score))
    except OSError as error:
        log.debug("the OOM score stays: %s", error)
