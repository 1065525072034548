"""``guard``: listeners of other programs under the policy, as long as the command runs."""

from __future__ import annotations

import argparse
import signal
import threading

from ..gate import Guard, SyncGate
from ..process.service_manager import notify
from .output import OK, print_json

__all__ = ["register"]

_LOOK_SECONDS = 0.5


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    text = "put listeners of other programs (sshd, nginx) under the policy, before accept, as long as this runs"
    parser = commands.add_parser(
        "guard",
        parents=[shared],
        help=text,
        description=text,
        epilog="example: rama-ebpf guard --port 22 --failsafe 192.0.2.0/24 (then: rama-ebpf block 198.51.100.0/24)",
    )
    parser.add_argument(
        "--port", type=int, action="append", metavar="PORT", help="of this network namespace; repeatable"
    )
    parser.add_argument("--address", metavar="ADDR", help="only at this address (default: at all)")
    parser.add_argument(
        "--failsafe",
        action="append",
        default=[],
        metavar="CIDR",
        help="keep this network open whatever the policy says; where a server runs its own counts; repeatable",
    )
    parser.set_defaults(main=_guard)


def _guard(args: argparse.Namespace) -> int:
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: over.set())
    listeners = [port if args.address is None else (args.address, port) for port in args.port or []]
    with SyncGate(args.instance.name) as gate, gate.guard(*listeners, failsafe=args.failsafe) as guard:
        _say(args, guard)
        notify("READY=1")
        while not over.wait(_LOOK_SECONDS):
            guard.wait(0)
    return OK


def _say(args: argparse.Namespace, guard: Guard) -> None:
    if args.json:
        print_json({"instance": guard.instance.name, "ports": list(guard.ports), "address": args.address})
    else:
        ports = ", ".join(map(str, guard.ports))
        print(
            f"guarding port{'s' * (len(guard.ports) > 1)} {ports} by the policy of instance {guard.instance.name}: "
            "block, allow, ban and list work at once; it ends with this process",
            flush=True,
        )
