"""The server process: where the policy lives, the listeners, the control socket, and the workers that serve.

It is the supervisor of :mod:`rama_ebpf.process` with the gate in its hands. It parses nothing that comes from the
network: that is what the unprivileged workers are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Final

import uvloop

from .. import loader
from ..core.address import Endpoint
from ..core.errors import RamaError
from ..kernel import abi, syn_cookies
from ..kernel.compile import CompileError
from ..kernel.gate_maps import MapSizes
from ..kernel.instance import Instance, ServerLock
from ..kernel.xdp import XdpAttachment, XdpError
from ..layers.strikes import StrikeBook, StrikeLimit
from ..metrics.directory import MetricsDirectory
from ..policy.egress import EgressPolicy
from ..policy.egress_map import put_egress
from ..policy.feed_store import FeedStore
from ..policy.kernel_store import KernelStore
from ..policy.local import CountedPolicy, LocalStore
from ..policy.refresh import Refresher, with_feeds
from ..policy.rule import Action, IPNetwork, PolicyError, Rule, RuleSet, SynLimit
from ..policy.store import PolicyStore
from ..process import Plan, Supervisor
from ..process.channel import Handler
from ..process.plan import Json, UserIds
from ..services.tcp import bind_tcp
from .api import ControlApi
from .events import Event, EventHub, GateEvents
from .kernel_relay import KernelRelay
from .kill import ConnectionKiller
from .listeners import ListenAt, Listeners
from .socket import ControlServer

if TYPE_CHECKING:
    from ..metrics.exposition import MetricsServer

__all__ = ["DaemonOptions", "GateUnavailable", "serve"]

log = logging.getLogger("rama_ebpf")

_SWEEP_SECONDS: Final = 30.0
_ENFORCE_SECONDS: Final = 1.0
_REFRESH_SECONDS: Final = 10.0  # how often feeds are looked at, not read
_COOKIE_SECONDS: Final = 5.0
_WORKER_TARGET: Final = "rama_ebpf.control.worker:application"


class GateUnavailable(RamaError):
    """The gate cannot run in the kernel, and the operator demanded it."""

    kind = "gate"


@dataclass(frozen=True)
class DaemonOptions:
    """What to serve, and how.

    ``target`` is ``module:attribute`` (see :class:`~rama_ebpf.process.Plan`), found with ``directory`` on the module
    path; ``params`` is what it is given. ``default``, ``failsafe`` and ``rules`` are left as they are pinned where
    they are None; ``per_source`` and ``overall`` limit what the default lets in, and go with ``rules``. ``xdp`` are the
    interfaces that get the XDP program; the server does not start if one cannot. With ``syn_cookies`` that program
    sends the stack's cookies. ``rejects`` is how many RST answer ``reject``, None for as many as is usual. ``egress``
    is where workers may connect to, ``user`` who they become, None to stay. ``metrics`` is where metrics are served,
    nowhere if None.
    ``access_log``: a line for each connection. ``sockmap``: load the kernel's relay soon after the start, and not when
    the first tunnel wants it. ``kill``: a source that the policy comes to deny loses its live connections, too.
    """

    instance: Instance
    listen: tuple[ListenAt, ...]
    target: str
    params: Json
    directory: str | None = None
    workers: int = field(default_factory=lambda: min(os.cpu_count() or 1, abi.constants()["SOCKETS_PER_LISTENER"]))
    user: UserIds | None = None
    egress: EgressPolicy = field(default_factory=EgressPolicy)
    drain: float = 10.0
    watchdog: float = 60.0
    default: Action | None = None
    failsafe: tuple[IPNetwork, ...] | None = None
    rules: tuple[Rule, ...] | None = None
    per_source: SynLimit | None = None
    overall: SynLimit | None = None
    sizes: MapSizes = field(default_factory=MapSizes)
    kernel_headers: Path | None = None
    require_kernel: bool = False
    persist: bool = False
    xdp: tuple[str, ...] = ()
    syn_cookies: bool = False
    rejects: SynLimit | None = None
    kill: bool = False
    metrics: Endpoint | None = None
    access_log: bool = True
    log_level: str = "info"
    sockmap: bool = False


_FIXED: Final = (
    "instance",
    "user",
    "sizes",
    "kernel_headers",
    "require_kernel",
    "persist",
    "xdp",
    "syn_cookies",
    "metrics",
)
"""Options that a reload cannot change."""


@dataclass
class _Home:
    """Where the policy lives for this run: in the kernel behind a gate, or in this process."""

    store: PolicyStore
    gate: loader.Gate | None
    why_local: str = ""


def serve(options: DaemonOptions, reload: Callable[[], DaemonOptions] | None = None) -> None:
    """Serve until SIGTERM or SIGINT. ``reload`` makes the options for SIGHUP; without it they stay the same, and the
    workers load the application anew.

    Raises :class:`~rama_ebpf.kernel.instance.InstanceBusy`, :class:`GateUnavailable`,
    :class:`~rama_ebpf.process.WorkersFailed`, or OSError (a port that is taken, say); nothing stays behind then.
    """
    started = time.monotonic()
    with ServerLock(options.instance, create=True), _home(options) as home, contextlib.ExitStack() as cleanup:
        daemon = _Daemon(options, reload or (lambda: options), home, cleanup, started)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(daemon.run())


@contextlib.contextmanager
def _home(options: DaemonOptions) -> Iterator[_Home]:
    gate, why = None, ""
    try:
        gate = loader.load(
            options.instance,
            sizes=options.sizes,
            kernel_headers=options.kernel_headers,
            xdp=bool(options.xdp),
            syn_cookies=options.syn_cookies,
        )
        gate.attach()
        if not gate.guards_workers:
            log.warning("cgroups may not be changed here: egress policy is kept by the services alone")
    except (OSError, CompileError) as error:
        why = str(error)
        if gate is not None:
            gate.close(keep_policy=options.persist)
            gate = None
    if gate is not None:
        try:
            _attach_xdp(gate, options.xdp)
            yield _Home(KernelStore(options.instance, gate.maps), gate)
        finally:
            gate.close(keep_policy=options.persist)
        return
    if options.require_kernel or options.xdp:
        raise GateUnavailable(f"no gate in the kernel: {why} (rama-ebpf doctor says more)")
    log.warning(
        "POLICY IS NOT IN THE KERNEL: unwanted clients are turned away only after accept. Reason: %s "
        "(rama-ebpf doctor says more; --require-kernel refuses to run like this)",
        why.splitlines()[0],
    )
    local = LocalStore()
    local.remember_in(options.instance.state_dir)
    yield _Home(local, None, why)


def _attach_xdp(gate: loader.Gate, interfaces: Iterable[str]) -> None:
    for interface in dict.fromkeys(interfaces):
        try:
            attached = gate.attach_xdp(interface)
        except XdpError as error:
            raise GateUnavailable(str(error)) from error
        if attached.mode == "generic":
            log.warning("XDP on %s is generic, slower: native was refused (%s)", interface, attached.why)
        else:
            log.info("XDP on %s is native", interface)
        if attached.why_silent:
            log.warning("XDP on %s answers nothing, the stack does: %s", interface, attached.why_silent)


class _Daemon:
    """One run of the server."""

    def __init__(
        self,
        options: DaemonOptions,
        reload: Callable[[], DaemonOptions],
        home: _Home,
        cleanup: contextlib.ExitStack,
        started: float,
    ) -> None:
        self._options = options
        self._reload = reload
        self._home = home
        self._started = started
        self._syn_cookies = options.syn_cookies  # the program was loaded so, whatever a reload says
        self._no_cookies = syn_cookies.refusal() if options.syn_cookies else ""
        if self._no_cookies:
            log.warning("%s", self._no_cookies)
        self._listeners = Listeners(home.gate)
        cleanup.callback(self._listeners.close)
        self._metrics: MetricsDirectory | None = None
        if options.metrics is not None:
            self._metrics = cleanup.enter_context(MetricsDirectory(options.user))
        self._feeds = FeedStore(options.instance.feeds_dir)
        restored = home.store.restore_bans()
        if restored:
            log.info("%d bans of earlier are in force again", restored)
        if home.store.pending is not None and (options.rules is not None or options.default is not None):
            log.warning("the set on trial is undone: this start says what is to be in force")
            home.store.roll_back()
        self._killer = ConnectionKiller(self._listeners.addresses, () if home.gate is None else home.gate.own_cgroups)
        self._events = EventHub() if home.gate is None else GateEvents(home.gate.maps, _rule_names(home.store)).hub
        self._relay = KernelRelay(
            options.workers,
            options.instance.relay_record,
            kernel_headers=options.kernel_headers,
            on_change=self._write_state,
        )
        cleanup.callback(self._relay.close)
        self._apply_policy(options)
        self._pending = options
        self._supervisor = Supervisor(
            self._plan(options),
            handlers=_handlers(home.store, self._events),
            reload=self._reloaded_plan,
            on_reloaded=self._after_reload,
            on_ready=self._ready,
            on_spawn=lambda pid: None if home.gate is None else home.gate.adopt_worker(pid),
            on_stopping=self._listeners.close,
            on_start=self._relay.worker_started,
            on_exit=self._worker_ended,
        )

    async def run(self) -> None:
        options, home = self._options, self._home
        control = ControlServer(
            options.instance.control_socket,
            self._control,
            {"events": self._events.stream, "flows": self._flows},
        )
        await control.start()
        metrics = self._metrics_server()
        if metrics is not None:
            metrics.start()
        self._write_state()
        keepers = [
            asyncio.create_task(_sweep(home.store)),
            asyncio.create_task(_refresh(home.store, Refresher(home.store, self._feeds))),
            asyncio.create_task(self._enforce()),
            asyncio.create_task(self._watch_cookies()),
        ]
        try:
            await self._supervisor.run()
        finally:
            for keeper in keepers:
                keeper.cancel()
            self._feeds.cancel()  # their threads are waited for at the end
            if metrics is not None:
                await metrics.stop()
            await control.stop()

    def _plan(self, options: DaemonOptions) -> Plan:
        gate = self._home.gate
        return Plan(
            target=_WORKER_TARGET,
            listeners=self._listeners.want(options.listen, options.workers),
            workers=options.workers,
            user=options.user,
            params={
                "target": options.target,
                "directory": options.directory,
                "params": options.params,
                "egress": {"allow": list(map(str, options.egress.allow)), "deny": list(map(str, options.egress.deny))},
                "accept_slots": self._listeners.accept_slots(options.listen),
                "judge": gate is None,
                "sockmap": options.sockmap,
                "access_log": options.access_log,
                "metrics": self._metrics is not None,
            },
            fds=self._relay.descriptors | ({} if gate is None else {"accepted": gate.maps["accepted"]}),
            environment={} if self._metrics is None else self._metrics.environment,
            drain=options.drain,
            watchdog=options.watchdog,
            log_level=options.log_level,
        )

    def _control(self, method: str, params: Mapping[str, object]) -> dict[str, object]:
        if method == "kill":
            return self._killer.call(params)
        return ControlApi(self._home.store, self._feeds).call(method, params)

    async def _enforce(self) -> None:
        """Where the operator wants it, end live connections that the policy has come to deny."""
        store, seen = self._home.store, -1
        while True:
            await asyncio.sleep(_ENFORCE_SECONDS)
            if not self._options.kill or (revision := store.revision) == seen:
                continue
            try:
                killed = await asyncio.to_thread(self._killer.kill_denied, store)
            except PolicyError as error:
                log.error("%s", error)
            else:
                if killed:
                    log.warning("revision %d of the policy ended %d live connections", revision, killed)
            seen = revision

    async def _watch_cookies(self) -> None:
        """Say when the host's sysctl comes to forbid the SYN cookies that XDP is to send, or to allow them."""
        while self._syn_cookies:
            await asyncio.sleep(_COOKIE_SECONDS)
            if (refusal := syn_cookies.refusal()) != self._no_cookies:
                self._no_cookies = refusal
                log.warning("%s", refusal or "SYN cookies may be sent again")
                self._write_state()

    async def _flows(self, _params: Mapping[str, object]) -> AsyncGenerator[dict[str, object], None]:
        """Answer ``flows``: what each worker says of its tunnels."""
        answers = await self._supervisor.ask("flows")
        yield {"workers": [{"worker": name, **answer} for name, answer in sorted(answers.items())]}

    def _worker_ended(self, identity: str) -> None:
        if self._metrics is not None:
            self._metrics.worker_exited(identity)
        self._relay.worker_ended(identity)

    def _ready(self) -> None:
        where = "kernel" if self._home.gate is not None else "userspace"
        addresses = ", ".join(str(row["address"]) for row in self._listeners.described(self._options.listen))
        seconds, workers = time.monotonic() - self._started, self._options.workers
        log.info("ready after %.2f s: %d workers on %s, policy in %s", seconds, workers, addresses, where)

    # -- reload --------------------------------------------------------------------------------------------------

    def _reloaded_plan(self) -> Plan:
        self._pending = options = self._reload()
        fixed = [name for name in _FIXED if getattr(options, name) != getattr(self._options, name)]
        if fixed:
            log.warning("only a restart changes %s", ", ".join(fixed))
        try:
            plan = self._plan(options)
            self._put_egress(options)  # now, so that the new workers can do what they may
        except (OSError, ValueError) as error:
            raise RamaError(str(error)) from error
        return plan

    def _after_reload(self, succeeded: bool) -> None:
        if succeeded:
            self._options = self._pending
            try:
                self._apply_policy(self._options)
            except PolicyError as error:  # the rest of the configuration is in force already
                log.error("the policy stays as it was: %s", error)
        else:
            self._put_egress(self._options)
        self._listeners.keep(self._options.listen)
        self._write_state()

    def _put_egress(self, options: DaemonOptions) -> None:
        if self._home.gate is not None:
            put_egress(self._home.gate.maps, options.egress)

    def _apply_policy(self, options: DaemonOptions) -> None:
        self._put_egress(options)
        if self._home.gate is not None:
            limit = options.rejects
            self._home.gate.limit_rejects(None if limit is None else (limit.emission_ns, limit.tolerance_ns))
        store = self._home.store
        if options.failsafe is not None:
            store.set_failsafe(list(options.failsafe))  # first: what follows may shut everybody else out
        settings = store.settings()
        if options.default is not None:
            settings = replace(settings, default=options.default)
        if options.rules is None:
            if settings != store.settings():
                store.set_settings(settings)
            return
        settings = replace(settings, per_source=options.per_source, overall=options.overall)
        ruleset, reports = with_feeds(RuleSet(options.rules, settings), self._feeds, known=store.ruleset())
        for report in reports:
            report.log()
        store.replace(ruleset, origin="configuration")

    # -- what is seen from outside -------------------------------------------------------------------------------

    def _write_state(self) -> None:
        home = self._home
        self._options.instance.write_state(
            {
                "pid": os.getpid(),
                "policy": home.store.kind,
                "why_local": home.why_local or None,
                "cgroup": str(home.gate.cgroup) if home.gate is not None else None,
                "egress": "services" if home.gate is None or not home.gate.guards_workers else "services and kernel",
                "xdp": [] if home.gate is None else [_described(attached) for attached in home.gate.xdp],
                "syn_cookies": {"why_never": self._no_cookies or None} if self._syn_cookies else None,
                "sockmap": asdict(self._relay.status),
                "listeners": self._listeners.described(self._options.listen),
            }
        )

    def _metrics_server(self) -> MetricsServer | None:
        if self._metrics is None or self._options.metrics is None or self._options.metrics.address is None:
            return None
        # Imported only where it is wanted: it brings the HTTP services, a fifth of the time to start.
        from ..metrics.exposition import (
            MetricsServer,
            silent_rejects_collector,
            supervisor_collector,
            verdict_collector,
        )

        address = self._options.metrics.address
        collectors = [supervisor_collector(self._supervisor)]
        store = self._home.store
        if isinstance(store, KernelStore):
            collectors.append(verdict_collector(lambda: _verdicts(store)))
            collectors.append(silent_rejects_collector(store.silent_rejects))
        return MetricsServer(bind_tcp(str(address.ip), address.port), self._metrics, collectors)


def _described(attached: XdpAttachment) -> dict[str, object]:
    return {
        "interface": attached.interface,
        "mode": attached.mode,
        "why": attached.why or None,
        "why_silent": attached.why_silent or None,
        "link": attached.link_id,
    }


def _verdicts(store: KernelStore) -> dict[tuple[str, str, str], int]:
    """How many verdicts took effect, by (stage, rule, action)."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for (_, stage, action), count in store.totals().items():
        if stage != "rule":
            counts[stage, "", action] += count
    for record in store.records():
        counts["rule", record.rule.name, record.rule.action.name.lower()] += record.hits
    return dict(counts)


def _rule_names(store: PolicyStore) -> Callable[[int], str]:
    """Names of rules by their id, remembered until the policy changes."""
    known: dict[int, str] = {}
    revision = -1

    def name(rule_id: int) -> str:
        nonlocal revision
        if store.revision != revision:
            known.clear()
            revision = store.revision
        if rule_id not in known:
            known[rule_id] = store.rule_name(rule_id)
        return known[rule_id]

    return name


def _handlers(store: PolicyStore, events: EventHub) -> dict[str, Handler]:
    """What workers may ask. They parse bytes from the network: each request is bounded and checked."""
    judge = CountedPolicy(store) if isinstance(store, LocalStore) else store

    def verdict(body: Json) -> Json:
        source, port = ip_address(str(body["source"])), int(str(body["port"]))
        answer = judge.verdict(source, port)
        if events.is_watched:
            details = (answer.rule, answer.action, answer.stage, "accept", answer.dry_rule, answer.dry_action)
            events.publish(Event(time.time(), source, port, *details))
        return {"action": int(answer.action), "stage": int(answer.stage), "rule": answer.rule}

    def ban(body: Json) -> Json:
        ttl = float(str(body["ttl"]))
        source = ip_address(str(body["source"]))
        done = store.ban(source, ttl=ttl, reason=str(body["reason"]))
        log.warning("banned %s for %g s: %s", done.address, ttl, done.reason)
        return {}

    book = StrikeBook()

    def strike(body: Json) -> Json:
        limit = StrikeLimit(int(str(body["strikes"])), float(str(body["window"])), float(str(body["ban"])))
        if book.add(ip_address(str(body["source"])), limit, time.monotonic()):
            ban({**body, "ttl": limit.ban, "reason": f"{limit.strikes} strikes, the last: {body['reason']}"})
        return {}

    return {"verdict": verdict, "ban": ban, "strike": strike}


async def _sweep(store: PolicyStore) -> None:
    """Forget what has expired and what nobody confirmed."""

    def sweep() -> None:
        freed = store.sweep()
        if freed:
            log.info("policy: %d expired rules and bans removed", freed)

    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        await _keep("the policy in order", sweep)


async def _refresh(store: PolicyStore, refresher: Refresher) -> None:
    """Keep feeds fresh: all at the start, then each as it falls due. It may take as long as their servers do."""

    def refresh(*, all_feeds: bool = False) -> None:
        if store.pending is None:
            for report in refresher.run(all_feeds=all_feeds):
                report.log()

    await _keep("feeds fresh", lambda: refresh(all_feeds=True))
    while True:
        await asyncio.sleep(_REFRESH_SECONDS)
        await _keep("feeds fresh", refresh)


async def _keep(what: str, work: Callable[[], None]) -> None:
    try:
        await asyncio.to_thread(work)
    except PolicyError as error:
        log.warning("cannot keep %s, trying again: %s", what, error)
    except OSError:
        log.exception("cannot keep %s, trying again", what)
