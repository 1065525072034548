"""``run``: load the gate and serve."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from .. import loader
from ..control.api import ControlApi
from ..control.socket import ControlServer
from ..core.address import Authority, SocketAddress
from ..core.service import Service, stack
from ..core.stream import Stream
from ..kernel.compile import CompileError
from ..kernel.gate_maps import MapSizes
from ..kernel.instance import Instance, ServerLock
from ..layers.access_log import AccessLogLayer
from ..layers.policy import PolicyLayer
from ..policy.egress import EgressPolicy
from ..policy.kernel_store import KernelStore
from ..policy.local import CountedPolicy, LocalStore
from ..policy.rule import Action, PolicyError, parse_network
from ..policy.store import PolicyStore, Settings
from ..relay import TunnelLimits
from ..services.connect import Connector, SystemResolver
from ..services.proxy import mixed_proxy
from ..services.tcp import TcpServer, bind_tcp
from .output import ENVIRONMENT, OK

__all__ = ["register"]

log = logging.getLogger("rama_ebpf")

_SWEEP_SECONDS = 30.0


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    text = "load the gate and serve a SOCKS, HTTP and TLS proxy on one port"
    parser = commands.add_parser("run", parents=[shared], help=text, description=text)
    add = parser.add_argument
    add("--listen", action="append", metavar="ADDR:PORT", help="repeatable (default: 127.0.0.1:1080)")
    add("--allow-egress", action="append", default=[], metavar="CIDR", help="let clients connect there; repeatable")
    add("--deny-egress", action="append", default=[], metavar="CIDR", help="never connect there; repeatable")
    add(
        "--default",
        choices=("allow", "drop", "reject"),
        help="for clients that no rule names (default: as pinned, or allow)",
    )
    add("--failsafe", action="append", metavar="CIDR", help="clients that nothing can shut out; repeatable")
    add("--require-kernel", action="store_true", help="exit instead of serving with the policy in userspace")
    add("--persist", action="store_true", help="leave the policy pinned when the server stops")
    add("--kernel-headers", type=Path, metavar="DIR", help="compile against a kernel build tree instead of our stubs")
    add("--handshake-timeout", type=_positive, default=10.0, metavar="S", help="default: %(default)s")
    add("--connect-timeout", type=_positive, default=10.0, metavar="S", help="default: %(default)s")
    add("--idle-timeout", type=_positive, default=300.0, metavar="S", help="of a tunnel (default: %(default)s)")
    add("--drain", type=_positive, default=10.0, metavar="S", help="time for live tunnels after SIGTERM (default: 10)")
    sizes = MapSizes()
    add("--max-rules", type=_count, default=sizes.rules, metavar="N", help="default: %(default)s")
    add("--max-addresses", type=_count, default=sizes.exact, metavar="N", help="default: %(default)s")
    add("--max-prefixes", type=_count, default=sizes.prefixes, metavar="N", help="default: %(default)s")
    add("--max-bans", type=_count, default=sizes.bans, metavar="N", help="default: %(default)s")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    parser.set_defaults(main=_main)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value <= 31_536_000:
        raise argparse.ArgumentTypeError(f"{text!r}: use a number of seconds above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 16 <= value <= 1 << 26:
        raise argparse.ArgumentTypeError(f"{text!r}: use 16 to {1 << 26}")
    return value


def _listen_address(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    with contextlib.suppress(ValueError):
        if separator and port.isdigit():
            authority = Authority.of(host, int(port))
            if authority.ip is not None:
                return str(authority.ip), authority.port
    raise PolicyError(f"--listen {text!r}: write for example 127.0.0.1:1080 or [::1]:1080")


@dataclass(frozen=True)
class _Options:
    """The arguments, checked before anything is touched."""

    listen: list[tuple[str, int]]
    egress: EgressPolicy
    failsafe: list[Any] | None
    default: Action | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> _Options:
        try:
            egress = EgressPolicy(
                tuple(parse_network(cidr) for cidr in args.allow_egress),
                tuple(parse_network(cidr) for cidr in args.deny_egress),
            )
        except PolicyError as error:
            raise PolicyError(f"egress: {error}") from None
        return cls(
            listen=[_listen_address(text) for text in args.listen or ["127.0.0.1:1080"]],
            egress=egress,
            failsafe=None if args.failsafe is None else [parse_network(cidr) for cidr in args.failsafe],
            default=None if args.default is None else Action[args.default.upper()],
        )


def _main(args: argparse.Namespace) -> int:
    logging.basicConfig(
        level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    started = time.monotonic()
    options = _Options.of(args)
    instance: Instance = args.instance
    with ServerLock(instance, create=True), _policy(args, instance) as policy:
        if policy is None:
            return ENVIRONMENT
        settings = policy.store.settings()
        if options.default is not None and options.default is not settings.default:
            policy.store.set_settings(Settings(options.default, settings.per_source, settings.overall))
        if options.failsafe is not None:
            policy.store.set_failsafe(options.failsafe)
        listeners = [bind_tcp(host, port) for host, port in options.listen]
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(_serve(args, options, policy, listeners, started))
        finally:
            for listener in listeners:
                listener.close()


@dataclass
class _Policy:
    """Where the policy lives for this run: in the kernel behind a gate, or in this process."""

    instance: Instance
    store: PolicyStore
    gate: loader.Gate | None
    why_local: str = ""


@contextlib.contextmanager
def _policy(args: argparse.Namespace, instance: Instance) -> Iterator[_Policy | None]:
    sizes = MapSizes(rules=args.max_rules, exact=args.max_addresses, prefixes=args.max_prefixes, bans=args.max_bans)
    why = ""
    gate = None
    try:
        gate = loader.load(instance, sizes=sizes, kernel_headers=args.kernel_headers)
        gate.attach()
    except (OSError, CompileError) as error:
        why = str(error)
        if gate is not None:
            gate.close(keep_policy=args.persist)
            gate = None
    if gate is None and args.require_kernel:
        print(f"rama-ebpf run: no gate in the kernel: {why} (rama-ebpf doctor says more)", file=sys.stderr)
        yield None
        return
    if gate is None:
        log.warning(
            "POLICY IS NOT IN THE KERNEL: unwanted clients are turned away only after accept. Reason: %s "
            "(rama-ebpf doctor says more; --require-kernel refuses to run like this)",
            why.splitlines()[0],
        )
        yield _Policy(instance, LocalStore(), None, why)
        return
    try:
        yield _Policy(instance, KernelStore(instance, gate.maps), gate)
    finally:
        gate.close(keep_policy=args.persist)


async def _serve(
    args: argparse.Namespace, options: _Options, policy: _Policy, listeners: list[socket.socket], started: float
) -> int:
    resolver = SystemResolver()
    app = _application(args, options, policy, resolver)
    servers = []
    described = []
    for listener in listeners:
        address = SocketAddress.from_sockaddr(listener.getsockname())
        on_accept: Callable[[], None] | None = None
        row: dict[str, object] = {"address": str(address)}
        if policy.gate is not None:
            policy.gate.add_listener([listener])
            on_accept = policy.gate.accept_counter(address).increment
            row["id"] = policy.gate.listener_id(address)
        servers.append(TcpServer(listener, app, on_accept=on_accept))
        described.append(row)
    policy.instance.write_state(
        {
            "pid": os.getpid(),
            "policy": policy.store.kind,
            "why_local": policy.why_local or None,
            "cgroup": str(policy.gate.cgroup) if policy.gate is not None else None,
            "listeners": described,
        }
    )
    control = ControlServer(policy.instance.control_socket, ControlApi(policy.store).call)
    await control.start()
    stop, cut = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: (cut if stop.is_set() else stop).set())
    sweeper = asyncio.create_task(_sweep(policy.store))
    try:
        for server in servers:
            server.start()
        where = "kernel" if policy.gate is not None else "userspace"
        addresses = ", ".join(str(row["address"]) for row in described)
        log.info("ready after %.2f s: serving %s, policy in %s", time.monotonic() - started, addresses, where)
        await stop.wait()
        for server in servers:
            server.stop_accepting()
        live = sum(server.live for server in servers)
        log.info("stopping: %d connections have up to %g s to end (a second signal cuts them)", live, args.drain)
        await _drain(servers, args.drain, cut)
    finally:
        sweeper.cancel()
        await control.stop()
        resolver.close()
    return OK


async def _drain(servers: list[TcpServer], timeout: float, cut: asyncio.Event) -> None:
    draining = {asyncio.create_task(server.drain(timeout)) for server in servers}
    cutting = asyncio.create_task(cut.wait())
    drained = asyncio.gather(*draining)
    cutting.add_done_callback(lambda _: drained.cancel())
    try:
        await drained
    except asyncio.CancelledError:
        if not cut.is_set():
            raise
        await asyncio.gather(*(server.drain(0) for server in servers))
    finally:
        cutting.cancel()


async def _sweep(store: PolicyStore) -> None:
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        freed = await asyncio.to_thread(store.sweep)
        if freed:
            log.info("policy: %d expired rules and bans removed", freed)


def _application(
    args: argparse.Namespace, options: _Options, policy: _Policy, resolver: SystemResolver
) -> Service[Stream, Any]:
    connector = Connector(resolver, options.egress, timeout=args.connect_timeout)
    limits = TunnelLimits(idle=args.idle_timeout)
    proxy = mixed_proxy(connector, handshake_timeout=args.handshake_timeout, tunnel_limits=limits)
    layers: list[object] = [AccessLogLayer()]
    if isinstance(policy.store, LocalStore):
        layers.append(PolicyLayer(CountedPolicy(policy.store)))
    return stack(*layers, proxy)
