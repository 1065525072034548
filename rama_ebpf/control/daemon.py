"""The server process: where the policy lives, the listeners, the control socket, and the workers that serve.

It is the supervisor of :mod:`rama_ebpf.process` with the gate in its hands. It parses nothing that comes from the
network: that is what the unprivileged workers are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import uvloop

from .. import loader
from ..core.address import SocketAddress
from ..core.errors import RamaError
from ..kernel import abi
from ..kernel.compile import CompileError
from ..kernel.gate_maps import MapSizes
from ..kernel.instance import Instance, ServerLock
from ..policy.egress import EgressPolicy
from ..policy.kernel_store import KernelStore
from ..policy.local import CountedPolicy, LocalStore
from ..policy.rule import Action, IPNetwork
from ..policy.store import PolicyStore, Settings
from ..process import Listener, Plan, Supervisor
from ..process.channel import Handler
from ..process.plan import Json, UserIds
from ..services.tcp import bind_tcp
from .api import ControlApi
from .socket import ControlServer

__all__ = ["DaemonOptions", "GateUnavailable", "serve"]

log = logging.getLogger("rama_ebpf")

_SWEEP_SECONDS: Final = 30.0
_WORKER_TARGET: Final = "rama_ebpf.control.worker:application"


class GateUnavailable(RamaError):
    """The gate cannot run in the kernel, and the operator demanded it."""

    kind = "gate"


@dataclass(frozen=True)
class DaemonOptions:
    """What to serve, and how.

    ``target`` is ``module:attribute`` (see :class:`~rama_ebpf.process.Plan`), found with ``directory`` on the module
    path; ``params`` is what it is given. ``default`` and ``failsafe`` are left as they are pinned where they are None.
    ``egress`` is where workers may connect to, ``user`` who they become, None to stay.
    """

    instance: Instance
    listen: tuple[tuple[str, int], ...]
    target: str
    params: Json
    directory: str | None = None
    workers: int = field(default_factory=lambda: min(os.cpu_count() or 1, abi.constants()["SOCKETS_PER_LISTENER"]))
    user: UserIds | None = None
    egress: EgressPolicy = field(default_factory=EgressPolicy)
    drain: float = 10.0
    default: Action | None = None
    failsafe: tuple[IPNetwork, ...] | None = None
    sizes: MapSizes = field(default_factory=MapSizes)
    kernel_headers: Path | None = None
    require_kernel: bool = False
    persist: bool = False
    log_level: str = "info"


@dataclass
class _Home:
    """Where the policy lives for this run: in the kernel behind a gate, or in this process."""

    store: PolicyStore
    gate: loader.Gate | None
    why_local: str = ""


def serve(options: DaemonOptions) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises :class:`~rama_ebpf.kernel.instance.InstanceBusy`, :class:`GateUnavailable`,
    :class:`~rama_ebpf.process.WorkersFailed`, or OSError (a port that is taken, say); nothing stays behind then.
    """
    started = time.monotonic()
    with ServerLock(options.instance, create=True), _home(options) as home, contextlib.ExitStack() as stack:
        settings = home.store.settings()
        if options.default is not None and options.default is not settings.default:
            home.store.set_settings(Settings(options.default, settings.per_source, settings.overall))
        if options.failsafe is not None:
            home.store.set_failsafe(list(options.failsafe))
        listeners = []
        for host, port in options.listen:
            sockets = _bind(host, port, options.workers)
            for sock in sockets:
                stack.callback(sock.close)
            listeners.append(Listener(str(SocketAddress.from_sockaddr(sockets[0].getsockname())), sockets))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_supervise(options, home, listeners, started))


def _bind(host: str, port: int, count: int) -> tuple[socket.socket, ...]:
    """One socket a worker on the same address, so that each worker has an accept queue that outlives it."""
    first = bind_tcp(host, port, reuse_port=count > 1)
    sockets = [first]
    try:
        while len(sockets) < count:
            sockets.append(bind_tcp(host, first.getsockname()[1], reuse_port=True))
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return tuple(sockets)


@contextlib.contextmanager
def _home(options: DaemonOptions) -> Iterator[_Home]:
    gate, why = None, ""
    try:
        gate = loader.load(options.instance, sizes=options.sizes, kernel_headers=options.kernel_headers)
        gate.attach()
    except (OSError, CompileError) as error:
        why = str(error)
        if gate is not None:
            gate.close(keep_policy=options.persist)
            gate = None
    if gate is not None:
        try:
            yield _Home(KernelStore(options.instance, gate.maps), gate)
        finally:
            gate.close(keep_policy=options.persist)
        return
    if options.require_kernel:
        raise GateUnavailable(f"no gate in the kernel: {why} (rama-ebpf doctor says more)")
    log.warning(
        "POLICY IS NOT IN THE KERNEL: unwanted clients are turned away only after accept. Reason: %s "
        "(rama-ebpf doctor says more; --require-kernel refuses to run like this)",
        why.splitlines()[0],
    )
    yield _Home(LocalStore(), None, why)


async def _supervise(options: DaemonOptions, home: _Home, listeners: list[Listener], started: float) -> None:
    described: list[dict[str, object]] = []
    fds: dict[str, int] = {}
    slots: dict[str, int] = {}
    for listener in listeners:
        row: dict[str, object] = {"address": listener.name}
        if home.gate is not None:
            address = home.gate.add_listener(listener.sockets)
            row["id"] = home.gate.listener_id(address)
            slots[listener.name] = home.gate.accept_slot(address)
            fds["accepted"] = home.gate.maps["accepted"]
        described.append(row)
    plan = Plan(
        target=_WORKER_TARGET,
        listeners=tuple(listeners),
        workers=options.workers,
        user=options.user,
        params={
            "target": options.target,
            "directory": options.directory,
            "params": options.params,
            "egress": {"allow": list(map(str, options.egress.allow)), "deny": list(map(str, options.egress.deny))},
            "accept_slots": slots,
            "judge": home.gate is None,
        },
        fds=fds,
        drain=options.drain,
        log_level=options.log_level,
    )
    where = "kernel" if home.gate is not None else "userspace"

    def ready() -> None:
        addresses = ", ".join(listener.name for listener in listeners)
        seconds = time.monotonic() - started
        log.info("ready after %.2f s: %d workers on %s, policy in %s", seconds, options.workers, addresses, where)

    supervisor = Supervisor(plan, handlers=_handlers(home.store), on_ready=ready)
    options.instance.write_state(
        {
            "pid": os.getpid(),
            "policy": home.store.kind,
            "why_local": home.why_local or None,
            "cgroup": str(home.gate.cgroup) if home.gate is not None else None,
            "listeners": described,
        }
    )
    control = ControlServer(options.instance.control_socket, ControlApi(home.store).call)
    await control.start()
    sweeper = asyncio.create_task(_sweep(home.store))
    try:
        await supervisor.run()
    finally:
        sweeper.cancel()
        await control.stop()


def _handlers(store: PolicyStore) -> dict[str, Handler]:
    """What workers may ask. They parse bytes from the network: each request is bounded and checked."""
    judge = CountedPolicy(store) if isinstance(store, LocalStore) else store

    def verdict(body: Json) -> Json:
        answer = judge.verdict(ip_address(str(body["source"])), int(str(body["port"])))
        return {"action": int(answer.action), "stage": int(answer.stage), "rule": answer.rule}

    def ban(body: Json) -> Json:
        ttl = float(str(body["ttl"]))
        source = ip_address(str(body["source"]))
        done = store.ban(source, ttl=ttl, reason=str(body["reason"]))
        log.warning("banned %s for %g s: %s", done.address, ttl, done.reason)
        return {}

    return {"verdict": verdict, "ban": ban}


async def _sweep(store: PolicyStore) -> None:
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        freed = await asyncio.to_thread(store.sweep)
        if freed:
            log.info("policy: %d expired rules and bans removed", freed)
