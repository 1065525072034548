"""``why``: what would happen to a client now, which rule of which file says so, and what it was refused lately."""

from __future__ import annotations

import argparse
import re
import socket
import time
from typing import cast

from ..control import socket as control
from ..control.api import Json
from ..control.enforced import StoreJudge
from ..control.why import Why, target_of
from ..kernel.gate_maps import LayoutMismatch
from ..kernel.instance import Instance
from ..policy.kernel_store import KernelStore
from ..policy.rule import PolicyError
from .output import NO, OK, print_json
from .policy import split_target

__all__ = ["register"]

_SECONDS = 30.0


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    text = "say what a client meets from the gate to its target, what turns it away, and what it was refused lately"
    parser = commands.add_parser("why", parents=[shared], help=text, description=text)
    parser.set_defaults(main=_why)
    parser.add_argument(
        "client",
        metavar="ADDR[:PORT]",
        help="the client's address, and the listener's port (default: each listener's); or the id of an HTTP refusal",
    )
    parser.add_argument("--listener", metavar="NAME", help="this listener alone: its name, or address:port")
    parser.add_argument("--user", metavar="NAME", help="whether the stack knows this user")
    parser.add_argument("--target", metavar="HOST:PORT", help="whether it may connect there")


def _why(args: argparse.Namespace) -> int:
    client, port = (args.client, None) if re.fullmatch("[0-9a-f]{8}", args.client) else split_target(args.client)
    params: Json = {"client": client, "port": port, "listener": args.listener, "user": args.user}
    if args.target is not None:
        params |= {"target": args.target, "addresses": _resolved(args.target)}
    result = _ask(args.instance, params)
    if args.json:
        print_json(result)
    else:
        _show(result)
    return OK if result["let_in"] else NO


def _ask(instance: Instance, params: Json) -> Json:
    if instance.control_socket.exists():
        return control.call(instance.control_socket, "why", params, timeout=_SECONDS)
    try:
        opened = KernelStore(instance)
    except (FileNotFoundError, LayoutMismatch) as error:
        raise PolicyError(f"instance {instance.name!r} is not loaded: start it with rama-ebpf run") from error
    with opened as store:
        return Why(store, StoreJudge(store, serving=False)).call(params)


def _resolved(target: str) -> list[str]:
    """The addresses of a target as this host resolves its name; none if it has none."""
    host = str(target_of(target).host)
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(row[4][0]).partition("%")[0] for row in found))


def _show(result: Json) -> None:
    if not result["serving"]:
        print("no server runs: the gate's part is what the next one would use")
    for walk in cast("list[Json]", result["listeners"]):
        name = f"{walk['name']} ({walk['listener']})" if walk["name"] else walk["listener"]
        cause = cast("Json | None", walk["cause"])
        print(f"{result['client']} to {name}: {_outcome(cause)}")
        for step in cast("list[Json]", walk["steps"]):
            where = f" [{step['where']}]" if step["where"] else ""
            print(f"  {step['part']:<8} {step['answer']:<4} {step['text']}{where}")
    for row in cast("list[Json]", result["seen"]):
        parts = []
        if row["let_in"]:
            parts.append(f"let in {row['let_in']} times, last at {_clock(row['let_in_last'])}")
        if row["denied"]:
            parts.append(f"turned away {row['denied']} times, last at {_clock(row['denied_last'])} by {row['by']}")
        print(f"port {row['port']}: {'; '.join(parts)}")
    refusals = cast("list[Json]", result["refusals"])
    asked = cast("Json | None", result["refusal"])
    if asked is not None:
        print(f"refusal {asked['id']}: {_refusal(asked)}")
        refusals = [row for row in refusals if row != asked]
    if refusals:
        print("refused lately:")
    for row in refusals:
        print(f"  {_refusal(row)}")
    if result["missed"]:
        print(f"{result['missed']} refusals came too fast to be kept")


def _outcome(cause: Json | None) -> str:
    return "let in" if cause is None else f"turned away ({cause['part']}: {cause['kind']})"


def _refusal(row: Json) -> str:
    pairs = [f"{name} {row[name]}" for name in ("listener", "user", "target", "rule") if row[name]]
    status = f" ({row['status']})" if row["status"] else ""
    text = row["text"] or row["event"]
    return f"{_clock(row['when'])} {row['kind']}{status}: {text}" + (f" [{', '.join(pairs)}]" if pairs else "")


def _clock(seconds: object) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(cast("float", seconds)))
