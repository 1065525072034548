"""``ban`` and ``bans``: sources shut out before all rules. ``unblock`` lifts a ban."""

from __future__ import annotations

import argparse
from typing import cast

from ..control.api import Json
from .output import OK, duration, print_json, table
from .policy import call
from .said import outcome

__all__ = ["register"]


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    """Add the commands."""
    text = "shut out one address before all rules; it is kept over restarts (lifted by unblock)"
    ban = commands.add_parser("ban", parents=[shared], help=text, description=text)
    ban.add_argument(
        "address", metavar="ADDR", help="or the prefix by which strikes are counted: for IPv6 a /64, unless configured"
    )
    ban.add_argument("--ttl", metavar="TIME", help="how long, for example 15m, 1h, 7d (default: for good)")
    ban.add_argument("--reject", action="store_true", help="answer RST instead of silence")
    ban.add_argument("--reason", metavar="TEXT", help="shown in listings")
    ban.set_defaults(main=_ban)
    text = "list the addresses that services or operators have banned"
    bans = commands.add_parser("bans", parents=[shared], help=text, description=text)
    bans.set_defaults(main=_bans)


def _ban(args: argparse.Namespace) -> int:
    action = "reject" if args.reject else "drop"
    params = {"address": args.address, "ttl": args.ttl, "reason": args.reason, "action": action}
    result = call(args.instance, "ban", params)
    until = "" if result["expires_in"] is None else f" for {duration(result['expires_in'])}"
    words, code = outcome(f"banned {result['address']}{until}", result)
    if args.json:
        print_json(result)
    else:
        print(words)
    return code


def _bans(args: argparse.Namespace) -> int:
    bans = cast("list[Json]", call(args.instance, "bans", {})["bans"])
    if args.json:
        print_json({"bans": bans})
        return OK
    rows = [(b["address"], b["action"], b["hits"], duration(b["expires_in"]), b["created"], b["reason"]) for b in bans]
    print(table(("ADDRESS", "ACTION", "HITS", "EXPIRES", "SINCE", "REASON"), rows) if rows else "nobody is banned")
    return OK
