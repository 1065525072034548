"""The server process: where the policy lives, the listeners, the control socket, and the workers that serve.

It is the supervisor of :mod:`rama_ebpf.process` with the gate in its hands. It parses nothing that comes from the
network: that is what the unprivileged workers are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final

import uvloop

from ..core.errors import RamaError
from ..kernel.gate_maps import MAX_FAILSAFE
from ..kernel.instance import ServerLock
from ..kernel.xdp import XdpAttachment
from ..metrics.directory import MetricsDirectory
from ..policy.compiler import CompiledSet
from ..policy.feed_store import FeedStore
from ..policy.kernel_store import KernelStore
from ..policy.refresh import FeedReport, Refresher, with_feeds
from ..policy.rule import PolicyError, RuleSet
from ..process import Plan, Supervisor
from ..services.tcp import bind_tcp
from . import upkeep
from .api import ControlApi
from .cookies import CookieWatch
from .egress import EgressBackstop
from .events import EventHub, GateEvents, rule_names
from .home import Home, open_home
from .kernel_relay import KernelRelay
from .kill import ConnectionKiller
from .listeners import Listeners
from .options import FIXED, DaemonOptions
from .policy_thread import PolicyThread
from .socket import ControlServer
from .verdicts import Verdicts
from .worker_requests import handlers

if TYPE_CHECKING:
    from .exposition import MetricsServer

__all__ = ["serve"]

log = logging.getLogger("rama_ebpf")

_ENFORCE_SECONDS: Final = 1.0
_WORKER_TARGET: Final = "rama_ebpf.control.worker:application"


def serve(options: DaemonOptions, reload: Callable[[], DaemonOptions] | None = None) -> None:
    """Serve until SIGTERM or SIGINT. ``reload`` makes the options for SIGHUP; without it they stay the same, and the
    workers load the application anew.

    Raises :class:`~rama_ebpf.kernel.instance.InstanceBusy`, :class:`~.home.GateUnavailable`,
    :class:`~rama_ebpf.process.WorkersFailed`, or OSError (a port that is taken, say); nothing stays behind then.
    """
    started = time.monotonic()
    early: list[int] = []
    signal.signal(signal.SIGHUP, lambda number, _frame: early.append(number))  # one that comes during the start waits
    with ServerLock(options.instance, create=True), open_home(options) as home, contextlib.ExitStack() as cleanup:
        daemon = _Daemon(options, reload or (lambda: options), home, cleanup, started, lambda: bool(early))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(daemon.run())


@dataclass(frozen=True, slots=True)
class _Prepared:
    """The set of a configuration, ready to be put into force."""

    ruleset: RuleSet
    compiled: CompiledSet
    reports: tuple[FeedReport, ...]


class _Daemon:
    """One run of the server."""

    def __init__(
        self,
        options: DaemonOptions,
        reload: Callable[[], DaemonOptions],
        home: Home,
        cleanup: contextlib.ExitStack,
        started: float,
        hung_up: Callable[[], bool],
    ) -> None:
        self._options = options
        self._hung_up = hung_up
        self._reload = reload
        self._home = home
        self._started = started
        self._cookies = CookieWatch(options.syn_cookies)
        self._listeners = Listeners(home.gate)
        cleanup.callback(self._listeners.close)
        self._metrics: MetricsDirectory | None = None
        if options.metrics is not None:
            self._metrics = cleanup.enter_context(MetricsDirectory(options.user))
        self._egress = EgressBackstop(home.gate)
        self._feeds = FeedStore(options.instance.feeds_dir)
        restored = home.store.restore_bans()
        if restored:
            log.info("%d bans of earlier are in force again", restored)
        self._killer = ConnectionKiller(self._listeners.addresses, () if home.gate is None else home.gate.own_cgroups)
        self._events = EventHub() if home.gate is None else GateEvents(home.gate.maps, rule_names(home.store)).hub
        self._relay = KernelRelay(
            options.workers,
            options.instance.relay_record,
            kernel_headers=options.kernel_headers,
            on_change=self._write_state,
        )
        cleanup.callback(self._relay.close)
        # First closed: a listener's address is under the gate, and the policy in force, before it listens.
        self._listeners.want(options.listen, options.workers)
        self._apply_policy(options)
        self._listeners.open()
        self._pending = options
        self._prepared: _Prepared | None = None
        self._policy_thread = cleanup.enter_context(PolicyThread())
        self._supervisor = Supervisor(
            self._plan(options),
            handlers=handlers(home.store, self._events, self._policy_thread.submit),
            reload=self._reloaded_plan,
            on_prepare=self._prepare_policy,
            on_switch=self._switch_policy,
            on_reloaded=self._after_reload,
            on_ready=self._ready,
            on_spawn=lambda pid: None if home.gate is None else home.gate.adopt_worker(pid),
            on_stopping=self._listeners.stop,
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
            asyncio.create_task(upkeep.sweep(home.store)),
            asyncio.create_task(upkeep.sync(home.store)),
            asyncio.create_task(upkeep.refresh(home.store, Refresher(home.store, self._feeds))),
            asyncio.create_task(self._enforce()),
            asyncio.create_task(self._egress.follow_nameservers()),
            asyncio.create_task(self._cookies.watch(self._write_state)),
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
            home.store.sync()

    def _plan(self, options: DaemonOptions) -> Plan:
        gate = self._home.gate
        return Plan(
            target=_WORKER_TARGET,
            listeners=self._listeners.want(options.listen, options.workers),
            workers=options.workers,
            user=options.user,
            sandbox=options.sandbox,
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
        try:
            return ControlApi(self._home.store, self._feeds).call(method, params)
        finally:
            self._home.store.sync()  # this is a thread of its own; the answer says that it is kept

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

    async def _flows(self, _params: Mapping[str, object]) -> AsyncGenerator[dict[str, object], None]:
        """Answer ``flows``: what each worker says of its tunnels."""
        answers = await self._supervisor.ask("flows")
        yield {"workers": [{"worker": name, **answer} for name, answer in sorted(answers.items())]}

    def _worker_ended(self, identity: str) -> None:
        if self._metrics is not None:
            self._metrics.worker_exited(identity)
        self._relay.worker_ended(identity)

    def _ready(self) -> None:
        self._home.served = True
        where = "kernel" if self._home.gate is not None else "userspace"
        addresses = ", ".join(str(row["address"]) for row in self._listeners.described(self._options.listen))
        seconds, workers = time.monotonic() - self._started, self._options.workers
        log.info("ready after %.2f s: %d workers on %s, policy in %s", seconds, workers, addresses, where)
        if self._hung_up():
            self._supervisor.hang_up()

    # -- reload --------------------------------------------------------------------------------------------------

    def _reloaded_plan(self) -> Plan:
        self._pending = options = self._reload()
        fixed = [name for name in FIXED if getattr(options, name) != getattr(self._options, name)]
        if fixed:
            log.warning("only a restart changes %s", ", ".join(fixed))
        try:
            plan = self._plan(options)
            self._egress.put(options.egress, options.name_servers)  # now, so that the new workers can do what they may
        except (OSError, ValueError) as error:
            raise RamaError(str(error)) from error
        return plan

    async def _prepare_policy(self) -> None:
        """Find out what cannot be carried out, while everything is as it was. Raises RamaError."""
        try:
            self._prepared = await asyncio.to_thread(self._compiled, self._pending)
        except OSError as error:
            raise RamaError(str(error)) from error

    async def _switch_policy(self) -> None:
        """Put the policy of a reload into force and open what is new: nobody accepts connections now."""
        try:
            await asyncio.to_thread(self._apply_policy, self._pending, self._prepared)
            self._listeners.open()
        except OSError as error:
            raise RamaError(str(error)) from error

    def _after_reload(self, succeeded: bool) -> None:
        self._prepared = None
        if succeeded:
            self._options = self._pending
        else:
            self._egress.put(self._options.egress, self._options.name_servers)
        self._listeners.keep(self._options.listen)
        self._write_state()

    def _compiled(self, options: DaemonOptions) -> _Prepared | None:
        store = self._home.store
        if options.failsafe is not None and len(options.failsafe) > MAX_FAILSAFE:
            raise PolicyError(f"{len(options.failsafe)} failsafe networks: use at most {MAX_FAILSAFE}")
        if options.rules is None:
            return None
        settings = store.settings() if options.default is None else replace(store.settings(), default=options.default)
        settings = replace(settings, per_source=options.per_source, overall=options.overall)
        ruleset, reports = with_feeds(RuleSet(options.rules, settings), self._feeds, known=store.ruleset())
        return _Prepared(ruleset, store.compile(ruleset), tuple(reports))

    def _apply_policy(self, options: DaemonOptions, prepared: _Prepared | None = None) -> None:
        prepared = prepared or self._compiled(options)
        self._egress.put(options.egress, options.name_servers)
        if self._home.gate is not None:
            limit = options.rejects
            self._home.gate.limit_rejects(None if limit is None else (limit.emission_ns, limit.tolerance_ns))
        store = self._home.store
        if store.pending is not None and (options.rules is not None or options.default is not None):
            log.warning("the set on trial is undone: the configuration says what is to be in force")
            store.roll_back()
        if options.failsafe is not None:
            store.set_failsafe(list(options.failsafe))  # first: what follows may shut everybody else out
        settings = store.settings()
        if options.default is not None:
            settings = replace(settings, default=options.default)
        if prepared is None:
            if settings != store.settings():
                store.set_settings(settings)
            return
        for report in prepared.reports:
            report.log()
        store.replace(prepared.ruleset, compiled=prepared.compiled, origin="configuration")

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
                "syn_cookies": self._cookies.state,
                "sockmap": asdict(self._relay.status),
                "listeners": self._listeners.described(self._options.listen),
            }
        )

    def _metrics_server(self) -> MetricsServer | None:
        if self._metrics is None or self._options.metrics is None or self._options.metrics.address is None:
            return None
        # Imported only where it is wanted: it brings the HTTP services, a fifth of the time to start.
        from .exposition import (
            MetricsServer,
            silent_rejects_collector,
            supervisor_collector,
            verdict_collector,
        )

        address = self._options.metrics.address
        collectors = [supervisor_collector(self._supervisor)]
        store = self._home.store
        if isinstance(store, KernelStore):
            collectors.append(verdict_collector(Verdicts(store)))
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
