"""``flows``: the live tunnels, which relay moves the bytes of each, and the HTTP requests that are being served."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

from ..control.socket import call
from ..kernel.instance import Instance
from .output import OK, print_json, table

__all__ = ["live_flows", "register"]


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    text = "show live tunnels and HTTP requests: source, user, target, relay and why, bytes each way, spills, age"
    parser = commands.add_parser("flows", parents=[shared], help=text, description=text)
    parser.set_defaults(main=_flows)


def live_flows(instance: Instance) -> dict[str, Any]:
    """Collect what the command shows. Raises :class:`~rama_ebpf.control.socket.ControlUnavailable`."""
    workers = cast("list[dict[str, Any]]", call(instance.control_socket, "flows", {})["workers"])
    refused: Counter[str] = Counter()
    ended: Counter[tuple[str, str]] = Counter()
    for worker in workers:
        refused.update(worker["refused"])
        ended.update({(row["relay"], row["reason"]): row["count"] for row in worker["ended"]})
    return {
        "flows": sorted(
            ({"worker": worker["worker"], **flow} for worker in workers for flow in worker["flows"]),
            key=lambda flow: -float(flow["age"]),
        ),
        "refused": dict(refused),
        "ended": [{"relay": relay, "reason": reason, "count": ended[relay, reason]} for relay, reason in sorted(ended)],
    }


def _flows(args: argparse.Namespace) -> int:
    result = live_flows(args.instance)
    if args.json:
        print_json(result)
        return OK
    print(_table(result["flows"]))
    for reason, count in result["refused"].items():
        print(f"{count} went another way: {reason}")
    return OK


def _table(flows: Iterable[dict[str, Any]]) -> str:
    header = ("SOURCE", "USER", "TARGET", "RELAY", "UP", "DOWN", "SPILLS", "AGE", "WHY")
    columns = ("source", "user", "target", "relay", "to_upstream", "to_client", "spills")
    rows = [[*(flow[column] for column in columns), f"{flow['age']:.0f}s", flow["why"]] for flow in flows]
    return table(header, rows)
