"""``check``, ``config show`` and ``passwd``: what concerns the configuration and the files it names."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import sys
from pathlib import Path

from ..config.load import ConfigError, load_config
from ..config.model import Config
from ..config.modes import exposures
from ..config.show import effective, to_toml
from ..control.sockets import stolen_from
from ..core.address import SocketAddress
from ..kernel import sock_diag
from ..kernel.instance import Instance
from ..kernel.own_addresses import own_addresses
from ..layers.auth import hash_password
from .output import OK, USAGE, print_json

__all__ = ["examine", "register"]

_DEFAULT_FILE = "rama.toml"


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    """Add the commands."""
    text = "find every mistake in a configuration file"
    check = commands.add_parser("check", parents=[shared], help=text, description=text)
    check.add_argument("file", nargs="?", type=Path, default=_DEFAULT_FILE, help=f"default: {_DEFAULT_FILE}")
    check.set_defaults(main=_check)
    text = "show a configuration with its defaults filled in"
    config = commands.add_parser("config", parents=[shared], help=text, description=text)
    verbs = config.add_subparsers(dest="verb", required=True, metavar="show")
    show = verbs.add_parser("show", parents=[shared], help=text, description=text)
    show.add_argument("file", nargs="?", type=Path, default=_DEFAULT_FILE, help=f"default: {_DEFAULT_FILE}")
    show.set_defaults(main=_show)
    text = "print a line for a password file: name and scrypt hash; reads the password from the terminal or a pipe"
    passwd = commands.add_parser("passwd", parents=[shared], help=text, description=text)
    passwd.add_argument("name", help="the user")
    passwd.set_defaults(main=_passwd)


def _check(args: argparse.Namespace) -> int:
    try:
        config, warnings = examine(args.file, args.instance)
    except ConfigError as error:
        if args.json:
            rows = [{"line": m.line, "setting": m.where, "text": m.text} for m in error.mistakes]
            print_json({"file": str(args.file), "mistakes": rows})
        else:
            print(error, file=sys.stderr)
        return USAGE
    if args.json:
        print_json({"file": str(args.file), "mistakes": [], "warnings": warnings})
    else:
        for text in warnings:
            print(f"warning: {text}", file=sys.stderr)
        listeners = ", ".join(f"{name} on {listener}" for name, listener in config.listeners.items())
        print(f"{args.file}: good: {listeners}")
    return OK


def examine(file: Path, instance: Instance) -> tuple[Config, list[str]]:
    """Read and check a file as ``check`` does; return also what it warns of. Raises :class:`ConfigError`."""
    config = load_config(file, compile_rules=True)
    return config, [*exposures(config, file), *_taken(instance, config)]


def _taken(instance: Instance, config: Config) -> list[str]:
    """Which addresses somebody else than the server of the instance listens at, in this network namespace."""
    try:
        listening = sock_diag.listening()
    except OSError:
        return []  # no netlink for us: a start will tell
    server = instance.serving_pid() or 0
    foreign = [other for other in listening if not sock_diag.has_socket(server, other.inode)]
    taken = [
        f"{address} is taken: {sock_diag.owner_of(other.inode)} listens at {SocketAddress(other.address, other.port)}"
        for listener in config.listeners.values()
        if listener.address is not None and (address := listener.address.address) is not None
        for other in foreign
        if other.meets(address.ip, address.port)
    ]
    bindings = [binding for listener in config.listeners.values() for binding in listener.bindings]
    with contextlib.suppress(OSError):
        taken += filter(None, [stolen_from(bindings, foreign, own_addresses())] if bindings else [])
    return list(dict.fromkeys(taken))  # a server has a socket there for each of its workers


def _show(args: argparse.Namespace) -> int:
    values = effective(load_config(args.file), hidden=True)
    if args.json:
        print_json(values)
    else:
        print(to_toml(values), end="")
    return OK


def _passwd(args: argparse.Namespace) -> int:
    if not args.name or ":" in args.name or not args.name.isprintable() or args.name.startswith("#"):
        raise ValueError(f"user {args.name!r}: use a name without colon and control characters, not beginning with #")
    if sys.stdin.isatty():
        password = getpass.getpass(f"password of {args.name}: ")
        if getpass.getpass("once more: ") != password:
            raise ValueError("the two passwords differ")
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise ValueError("the password is empty")
    print(f"{args.name}:{hash_password(password)}")
    return OK
