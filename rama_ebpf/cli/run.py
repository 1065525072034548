"""``run``: load the gate and serve."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..control.daemon import serve
from ..control.options import DaemonOptions
from ..control.predecessor import Predecessor
from ..control.sockets import ListenAt, at_bindings
from ..core.address import Endpoint
from ..core.binding import BindingSet
from ..core.json_lines import JsonFormatter
from ..core.shares import SourceLimits
from ..kernel import abi
from ..kernel.gate_maps import MapSizes
from ..kernel.privileges import FALLBACK, WORKERS, UserIds, can_change_user
from ..policy.egress import EgressPolicy
from ..policy.rule import DEFAULT_ACTIONS, Action, PolicyError, parse_network
from ..process.sandbox import Sandbox
from .output import OK

__all__ = ["register"]

_DEFAULT_TARGET = "rama_ebpf.control.worker:default_proxy"

log = logging.getLogger("rama_ebpf")

_LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    text = "load the gate and serve a SOCKS, HTTP and TLS proxy on one port"
    parser = commands.add_parser("run", parents=[shared], help=text, description=text)
    add = parser.add_argument
    add(
        "app", nargs="?", metavar="MODULE:NAME", help="a stack, or a function that makes one (default: the mixed proxy)"
    )
    add("--config", type=Path, metavar="FILE", help="take everything from a configuration file; SIGHUP reads it again")
    add(
        "--listen",
        action="append",
        metavar="ADDR:PORT",
        help="also unix:/path, or a prefix and ports, as 198.18.0.0/16:1-65535; repeatable (default: 127.0.0.1:1080); "
        "NAME=ADDR:PORT names it in metrics",
    )
    add("--allow-egress", action="append", default=[], metavar="CIDR", help="let clients connect there; repeatable")
    add("--deny-egress", action="append", default=[], metavar="CIDR", help="never connect there; repeatable")
    add("--own-addresses", action="store_true", help="let clients connect to this host's addresses as to others")
    add("--users", type=Path, metavar="FILE", help="demand a password of SOCKS5 and HTTP clients; see passwd")
    add(
        "--default",
        choices=DEFAULT_ACTIONS,
        help="for clients that no rule names (default: as kept, or allow)",
    )
    add("--failsafe", action="append", metavar="CIDR", help="clients that nothing can shut out; repeatable")
    add("--xdp", action="append", default=[], metavar="INTERFACE", help="drop there, before the stack; repeatable")
    add("--syn-cookies", action="store_true", help="with --xdp: send the stack's SYN cookies there")
    most = abi.constants()["SOCKETS_PER_LISTENER"]
    add("--workers", type=_workers, default=min(os.cpu_count() or 1, most), metavar="N", help="default: one a CPU")
    add("--user", metavar="NAME", help=f"who the workers become (default, as root: {WORKERS}, or {FALLBACK})")
    add("--no-sandbox", action="store_true", help="let workers open any file and make any system call")
    add("--sandbox-read", action="append", default=[], metavar="PATH", help="let workers read there; repeatable")
    add("--sandbox-write", action="append", default=[], metavar="PATH", help="let workers write there; repeatable")
    add(
        "--require-sandbox",
        action="store_true",
        help="exit instead of serving with workers that lack a part of the sandbox",
    )
    add(
        "--gate",
        choices=("required", "optional"),
        default="required",
        help="optional: serve also where no gate guards a listener (default: %(default)s)",
    )
    add("--require-kernel", action="store_true", help="exit instead of serving with the policy in userspace")
    add("--kill", action="store_true", help="end live connections of sources that the policy comes to deny")
    add("--persist", action="store_true", help="leave the policy's maps pinned when the server stops")
    add("--kernel-headers", type=Path, metavar="DIR", help="compile against a kernel build tree instead of our stubs")
    add("--handshake-timeout", type=_positive, default=10.0, metavar="S", help="default: %(default)s")
    add("--connect-timeout", type=_positive, default=10.0, metavar="S", help="default: %(default)s")
    add("--idle-timeout", type=_positive, default=300.0, metavar="S", help="of a tunnel (default: %(default)s)")
    add(
        "--connections-per-source",
        type=_limit,
        default=SourceLimits().connections,
        metavar="N",
        help="live connections of one IPv4 address or IPv6 /64, over all workers; 0: any number (default: %(default)s)",
    )
    add("--drain", type=_positive, default=300.0, metavar="S", help="for live tunnels after SIGTERM (default: 300)")
    add("--upgrade-drain", type=_positive, metavar="S", help="for live tunnels after an upgrade (default: no end)")
    sizes = MapSizes()
    add("--metrics", metavar="ADDR:PORT", help="serve metrics there, on loopback (default: nowhere)")
    add("--max-rules", type=_count, default=sizes.rules, metavar="N", help="default: %(default)s")
    add("--max-bans", type=_count, default=sizes.bans, metavar="N", help="default: %(default)s")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    parser.set_defaults(main=functools.partial(_main, parser))


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value <= 31_536_000:
        raise argparse.ArgumentTypeError(f"{text!r}: use a number of seconds above 0")
    return value


def _workers(text: str) -> int:
    value, most = int(text), abi.constants()["SOCKETS_PER_LISTENER"]
    if not 1 <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r}: use 1 to {most}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 16 <= value <= 1 << 26:
        raise argparse.ArgumentTypeError(f"{text!r}: use 16 to {1 << 26}")
    return value


def _limit(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 10_000_000:
        raise argparse.ArgumentTypeError(f"{text!r}: use 0 to 10000000")
    return value


def _listen_at(texts: Sequence[str], *, needs_gate: bool) -> tuple[ListenAt, ...]:
    """Parse --listen: an endpoint, or a name and an endpoint; what has no name is called main, main-2, …"""
    found = []
    for number, text in enumerate(texts, 1):
        name, equals, where = text.rpartition("=")
        name = name if equals else "main" if number == 1 else f"main-{number}"
        try:
            found.append(ListenAt(name, Endpoint.of(where), needs_gate=needs_gate))
        except ValueError as error:
            found += _bound_at(name, where, text, error, needs_gate=needs_gate)
    return tuple(found)


def _bound_at(name: str, where: str, text: str, why: ValueError, *, needs_gate: bool) -> tuple[ListenAt, ...]:
    """A prefix, or a range of ports; if it looks like neither, ``why`` it is no endpoint."""
    if "/" not in where and not re.search(r":\d+-\d+$", where, re.ASCII):
        raise PolicyError(f"--listen {text!r}: {why}") from None
    try:
        bound = at_bindings(name, BindingSet.of(where).bindings)
    except ValueError as error:
        raise PolicyError(f"--listen {text!r}: {error}") from None
    if not needs_gate:
        raise PolicyError(f"--listen {text!r} and --gate optional: nobody but the gate in the kernel serves that")
    return bound


def _user(name: str | None) -> UserIds | None:
    if os.geteuid() != 0:
        if name is not None:
            raise PolicyError(f"--user {name}: only root can change to another user")
        return None
    if name is None and not can_change_user():
        log.warning("no capabilities to change the user (setuid, setgid, setpcap): workers stay root, without any")
        return None
    if name is not None:
        return UserIds.of(name)
    return UserIds.of_workers()


def _sandbox(args: argparse.Namespace) -> Sandbox:
    if args.no_sandbox and args.require_sandbox:
        raise PolicyError("--no-sandbox and --require-sandbox: only one of them can be meant")
    if args.no_sandbox:
        log.warning("NO SANDBOX: workers may open any file and make any system call that their user may (--no-sandbox)")
        return Sandbox.OFF
    return Sandbox.REQUIRED if args.require_sandbox else Sandbox.WANTED


def _main(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    def make() -> DaemonOptions:
        return _from_arguments(args) if args.config is None else _from_file(parser, args)

    # Before the options are known, for what is to be said of them.
    logging.basicConfig(format=_LINE, stream=sys.stderr)
    predecessor = Predecessor.of_environment()
    with contextlib.nullcontext() if predecessor is None else predecessor.reporting():
        _serve(make, predecessor)
    return OK


def _serve(make: Callable[[], DaemonOptions], predecessor: Predecessor | None) -> None:
    def made() -> DaemonOptions:
        options = make()
        formatter = JsonFormatter() if options.log_format == "json" else logging.Formatter(_LINE)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(formatter)
        return options

    options = made()
    logging.getLogger().setLevel(options.log_level.upper())
    if options.user is not None and options.user.name == FALLBACK:
        text = "workers become %s, whom other daemons may be as well: packaging/sysusers.d makes a user %s"
        log.info(text, FALLBACK, WORKERS)
    serve(options, made, predecessor)


def _read_by_workers(args: argparse.Namespace) -> tuple[str, ...]:
    """The application's directory, that of the password file, which is replaced as a whole, and what is named."""
    found = [*_existing("--sandbox-read", args.sandbox_read)]
    if args.app:
        found += _unless_root(os.getcwd())
    if args.users is not None:
        found += _unless_root(os.path.dirname(os.path.abspath(args.users)))
    return tuple(found)


def _existing(option: str, paths: Sequence[str]) -> tuple[str, ...]:
    """A path that is not there when a worker is confined stays closed."""
    for path in paths:
        if not os.path.exists(path):
            raise PolicyError(f"{option} {path}: there is no such file or directory")
    return tuple(map(os.path.abspath, paths))


def _unless_root(directory: str) -> list[str]:
    """A file in the root directory is no reason to leave all files to workers."""
    return [] if directory == "/" else [directory]


def _password_file(args: argparse.Namespace) -> str:
    if args.app:
        raise PolicyError("--users is for the proxy that is served without an application: yours takes it as it likes")
    from ..layers.auth import PasswordFile  # see _from_file

    # Its mistakes are the operator's to see now, and not each worker's.
    PasswordFile(args.users).warn_of_dear_hashes()
    return str(args.users.absolute())


_BESIDE_A_FILE = frozenset(
    {"command", "config", "instance", "json", "kernel_headers", "main", "no_sandbox", "require_sandbox", "whole"}
)


def _from_file(parser: argparse.ArgumentParser, args: argparse.Namespace) -> DaemonOptions:
    for name, value in vars(args).items():
        if name not in _BESIDE_A_FILE and value != parser.get_default(name):
            raise PolicyError(f"--config and {name.replace('_', '-')}: put that into {args.config}")
    # Imported only where there is a file: the model knows every service, and takes half a second to import them all.
    from ..config.files import watched_directories
    from ..config.load import load_config
    from ..config.modes import exposures
    from ..config.show import effective
    from ..control.routes import route_key

    config = load_config(args.config)
    for text in exposures(config, args.config):
        log.warning("%s", text)
    server, policy, limits = config.server, config.policy, config.limits
    sizes = MapSizes()
    return DaemonOptions(
        instance=args.instance,
        listen=tuple(
            at
            for name, listener in config.listeners.items()
            for at in (
                at_bindings(name, listener.bindings, transparent=listener.transparent)
                if listener.address is None
                else (ListenAt(name, listener.address, int(listener.mode, 8), listener.gate == "required"),)
            )
        ),
        target="rama_ebpf.config.application:application",
        params={
            "config": effective(config),
            "directory": str(args.config.absolute().parent),
            "file": str(args.config.absolute()),
            "route_key": route_key(args.instance).hex() if config.ways else "",
        },
        workers=server.workers,
        user=_user(server.user),
        sandbox=_sandbox(args),
        read=(*config.sandbox.read, *watched_directories(config), *_unless_root(str(args.config.absolute().parent))),
        write=config.sandbox.write,
        egress=config.egress.policy(),
        name_servers=config.resolver.name_servers(),
        drain=server.drain,
        linger=server.linger or 0.0,
        watchdog=server.watchdog,
        upgrade_drain=server.upgrade_drain,
        max_generations=server.max_generations,
        default=None if policy.default is None else Action[policy.default.upper()],
        failsafe=policy.failsafe,
        rules=policy.set_rules(),
        per_source=None if policy.per_source is None else policy.per_source.limit(),
        overall=None if policy.overall is None else policy.overall.limit(),
        sizes=MapSizes(rules=limits.max_rules or sizes.rules, bans=limits.max_bans or sizes.bans),
        kernel_headers=args.kernel_headers,
        require_kernel=policy.require_kernel,
        persist=policy.persist,
        kill=policy.kill,
        record_keep=policy.record.keep,
        source_lengths=policy.bans.lengths(),
        xdp=policy.xdp,
        syn_cookies=policy.syn_cookies,
        rejects=None if policy.rejects is None else policy.rejects.limit(),
        metrics=server.metrics,
        access_log=config.logging.access,
        log_level=config.logging.level,
        log_format=config.logging.format,
        sockmap=any(listener.relay == "sockmap" for listener in config.listeners.values()),
        wire=any(listener.relay == "wire" for listener in config.listeners.values()),
    )


def _from_arguments(args: argparse.Namespace) -> DaemonOptions:
    if args.app and args.connections_per_source != SourceLimits().connections:
        raise PolicyError("--connections-per-source is for the proxy that is served without an application: use shares")
    if args.syn_cookies and not args.xdp:
        raise PolicyError("--syn-cookies: XDP sends them, so name at least one interface with --xdp")
    try:
        allow, deny = (tuple(map(parse_network, some)) for some in (args.allow_egress, args.deny_egress))
        egress = EgressPolicy(allow, deny, own_addresses=args.own_addresses)
    except PolicyError as error:
        raise PolicyError(f"egress: {error}") from None
    failsafe = None if args.failsafe is None else tuple(map(parse_network, args.failsafe))  # before anything is logged
    metrics = None
    if args.metrics is not None:
        from ..config.kinds import LOOPBACK_ENDPOINT  # see _from_file

        try:
            metrics = LOOPBACK_ENDPOINT.parse(args.metrics)
        except ValueError as error:
            raise PolicyError(f"--metrics {args.metrics!r}: {error}") from None
    return DaemonOptions(
        instance=args.instance,
        listen=_listen_at(args.listen or ["127.0.0.1:1080"], needs_gate=args.gate == "required"),
        target=args.app or _DEFAULT_TARGET,
        directory=str(Path.cwd()) if args.app else None,
        params={
            "handshake_timeout": args.handshake_timeout,
            "connect_timeout": args.connect_timeout,
            "idle_timeout": args.idle_timeout,
            "connections_per_source": args.connections_per_source,
            "users": None if args.users is None else _password_file(args),
        },
        workers=args.workers,
        user=_user(args.user),
        sandbox=_sandbox(args),
        read=_read_by_workers(args),
        write=_existing("--sandbox-write", args.sandbox_write),
        egress=egress,
        drain=args.drain,
        upgrade_drain=args.upgrade_drain,
        default=None if args.default is None else Action[args.default.upper()],
        failsafe=failsafe,
        sizes=MapSizes(rules=args.max_rules, bans=args.max_bans),
        kernel_headers=args.kernel_headers,
        require_kernel=args.require_kernel,
        persist=args.persist,
        kill=args.kill,
        xdp=tuple(args.xdp),
        syn_cookies=args.syn_cookies,
        metrics=metrics,
        log_level=args.log_level,
    )
