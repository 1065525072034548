"""``events``: verdicts as they happen."""

from __future__ import annotations

import argparse
import json
from typing import cast

from ..control.api import Json
from ..control.socket import follow
from .output import OK

__all__ = ["register"]


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    text = "show verdicts as they happen: a sample of them where there are many"
    parser = commands.add_parser("events", parents=[shared], help=text, description=text)
    parser.add_argument("--rule", metavar="NAME", help="only where this rule decided, or would have (as in list)")
    parser.add_argument("--count", type=int, metavar="N", help="end after so many (default: go on)")
    parser.set_defaults(main=_events)


def _events(args: argparse.Namespace) -> int:
    left = args.count
    for line in follow(args.instance.control_socket, "events", {} if args.rule is None else {"rule": args.rule}):
        if "watching" in line:
            continue
        print(json.dumps(line.get("event", line)) if args.json else _shown(line), flush=True)
        if "event" in line and left is not None:
            left -= 1
            if left <= 0:
                break
    return OK


def _shown(line: Json) -> str:
    if "lost" in line:
        return f"({line['lost']} more were not shown)"
    event = cast("Json", line["event"])
    dry = cast("Json | None", event.get("dry_run"))
    shown = f"{event['time']} {event['hook']} {event['source']} to port {event['port']}: {event['action']}"
    shown += f" ({event['rule']})" if event["rule"] == event["stage"] else f" ({event['stage']} {event['rule']})"
    return shown + (f", dry run: {dry['rule']} would {dry['action']}" if dry else "")
