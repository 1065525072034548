"""``block``, ``allow``, ``unblock``, ``list``, ``test``: the policy at run time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import cast

from ..control import socket as control
from ..control.api import Json
from ..control.listing import SORTS
from ..control.reach import call
from ..core.address import Authority
from ..kernel.instance import Instance
from ..policy.rule import PolicyError
from .lifecycle import probe
from .output import NO, OK, duration, print_json, table
from .said import outcome, still_denied

__all__ = ["call", "register", "show_verdict", "split_target"]


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    """Add the commands."""

    def command(name: str, help: str, main: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, parents=[shared], help=help, description=help)
        parser.set_defaults(main=main)
        return parser

    block = command("block", "turn a source away before accept, from now on", _block)
    block.add_argument("source", metavar="CIDR", help="address or network")
    block.add_argument("--ttl", metavar="TIME", help="how long, for example 90s, 15m, 1h, 7d (default: for good)")
    block.add_argument("--reject", action="store_true", help="answer RST instead of silence")
    block.add_argument("--dry-run", action="store_true", help="count what would be turned away, turn nothing away")
    block.add_argument("--kill", action="store_true", help="also end the source's live connections")
    allow = command("allow", "let a source in, also as an exception inside a wider block", _allow)
    allow.add_argument("source", metavar="CIDR", help="address or network")
    allow.add_argument("--ttl", metavar="TIME", help="how long (default: for good)")
    for parser in (block, allow):
        parser.add_argument("--port", type=int, metavar="PORT", help="only on this listener's port (default: on all)")
        parser.add_argument("--reason", metavar="TEXT", help="shown in listings")
    unblock = command("unblock", "take back a block, an allow or a ban of exactly this source", _unblock)
    unblock.add_argument("source", metavar="CIDR")
    unblock.add_argument("--port", type=int, metavar="PORT", help="as it was given when it was blocked")
    listing = command("list", "show everything in force, with counters", _list)
    listing.add_argument("--rule", metavar="PATTERN", help="rules of these names alone: * and ? stand for any letters")
    listing.add_argument("--source", metavar="CIDR", help="what is about this address or network alone")
    listing.add_argument("--sort", choices=SORTS, help="most hits first, for example")
    listing.add_argument("--limit", type=int, metavar="N", help="at most N rules, and N bans")
    test = command("test", "say what would be decided for a client", _test)
    test.add_argument(
        "target", metavar="ADDR[:PORT]", help="the client's address, and the listener's port (default: each listener's)"
    )


def _show_change(args: argparse.Namespace, verb: str, result: Json) -> int:
    until = "" if result["expires_in"] is None else f" for {duration(result['expires_in'])}"
    sources = ", ".join(cast("list[str]", result["sources"]))
    dry = " (dry run)" if result["dry_run"] else ""
    words, code = outcome(f"{verb} {sources}{until}{dry}", result)
    if args.json:
        print_json(result)
    else:
        print(words + (f", {result['killed']} live connections ended" if "killed" in result else ""))
    return code


def _block(args: argparse.Namespace) -> int:
    params = {
        "source": args.source,
        "action": "reject" if args.reject else "drop",
        "ttl": args.ttl,
        "port": args.port,
        "reason": args.reason,
        "dry_run": args.dry_run,
    }
    result = call(args.instance, "add", params)
    if args.kill:
        result["killed"] = _kill(args)
    return _show_change(args, "blocked", result)


def _kill(args: argparse.Namespace) -> int:
    """Have the server end live connections: it is in the network namespace where they are."""
    if args.dry_run or args.instance.serving_pid() is None:
        return 0
    result = control.call(args.instance.control_socket, "kill", {"source": args.source, "port": args.port})
    return cast("int", result["killed"])


def _allow(args: argparse.Namespace) -> int:
    params = {"source": args.source, "action": "allow", "ttl": args.ttl, "port": args.port, "reason": args.reason}
    return _show_change(args, "allowed", call(args.instance, "add", params))


def _unblock(args: argparse.Namespace) -> int:
    result = call(args.instance, "remove", {"source": args.source, "port": args.port})
    found = bool(result["removed"]) or bool(result["ban_lifted"])
    words, code = still_denied(f"unblocked {args.source}", result)
    if args.json:
        print_json(result)
    elif found:
        print(words)
    else:
        wider = result.get("still_banned")
        hint = (
            "rama-ebpf list shows what is in force; rules of a file are changed there"
            if wider is None
            else f"the ban of {wider} covers it"
        )
        print(f"nothing to take back for exactly {args.source} ({hint})")
    return code if found else NO


def _list(args: argparse.Namespace) -> int:
    picked = {"rule": args.rule, "source": args.source, "sort": args.sort, "limit": args.limit}
    result = call(args.instance, "list", picked)
    if args.json:
        print_json(result)
        return OK
    rules, bans = cast("list[Json]", result["rules"]), cast("list[Json]", result["bans"])
    print(f"default {result['default']}, revision {result['revision']}, policy in the {_where(result['store'])}")
    if result["confirm_within"] is not None:
        print(f"ON TRIAL: undone in {duration(result['confirm_within'])} unless confirmed (rama-ebpf policy confirm)")
    failsafe = cast("list[str]", result["failsafe"])
    if failsafe:
        print(f"failsafe {', '.join(failsafe)}")
    rows = []
    for rule in rules:
        sources = cast("list[str]", rule["sources"])
        shown = sources[0] if rule["source_count"] == 1 else f"{rule['source_count']} prefixes"
        action = f"{rule['action']}{' (dry run)' if rule['dry_run'] else ''}"
        hits = rule["dry_hits"] if rule["dry_run"] else rule["hits"]
        left = duration(rule["expires_in"])
        rows.append((shown, rule["port"] or "any", action, hits, left, rule["name"], rule["reason"]))
    if rows:
        print(table(("SOURCE", "PORT", "ACTION", "HITS", "EXPIRES", "RULE", "REASON"), rows))
    if (more := cast("int", result["matched"]) - len(rows)) > 0:
        print(f"and {more} rules more")
    if bans:
        banned = [(b["address"], b["action"], b["hits"], duration(b["expires_in"]), b["reason"]) for b in bans]
        print(table(("BANNED", "ACTION", "HITS", "EXPIRES", "REASON"), banned))
    return OK


def _where(store: object) -> str:
    return "kernel" if store == "kernel" else "proxy process (not in the kernel)"


def _test(args: argparse.Namespace) -> int:
    source, port = split_target(args.target)
    result = call(args.instance, "test", {"source": source, "port": port})
    return show_verdict(args, result | {"guards": _guards(args.instance, port)})


def _guards(instance: Instance, port: int | None) -> list[Json]:
    """How the listeners of the live server, of one port or all, are guarded: a verdict holds where one is."""
    rows = cast("list[Json]", (probe(instance) or {}).get("listeners", []))
    at = [row for row in rows if "guard" in row and (port is None or _has_port(row, port))]
    return [{name: row[name] for name in ("address", "guarded", "guard", "open")} for row in at]


def _has_port(row: Json, port: int) -> bool:
    if "bindings" in row:
        return any(
            first <= port <= last for _, first, last, _ in cast("list[tuple[str, int, int, bool]]", row["bindings"])
        )
    return str(row["address"]).endswith(f":{port}")


def show_verdict(args: argparse.Namespace, result: Json) -> int:
    """Print what is decided for each listener that was asked about; return the exit code: whether all let in."""
    rows = cast("list[Json]", result["decisions"])
    if args.json:
        print_json(result)
    else:
        for row in rows:
            rule = f" by {row['rule']}" if row["rule"] and row["stage"] != "ban" else ""
            if row["stage"] == "ban" and result.get("banned") not in (None, result["source"]):
                rule += f" of {result['banned']}"
            to = f"port {result['port']}" if len(rows) == 1 else row["listener"]
            print(f"{result['source']} to {to}: {row['action']} ({row['stage']}{rule})")
            dry = row.get("dry_run")
            if isinstance(dry, dict):
                print(f"dry run: {dry['rule']} would {dry['action']}")
        for row in cast("list[Json]", result.get("guards", [])):
            print(f"{row['address']} {'is' if row['open'] else 'is CLOSED,'} {row['guard']}")
    for row in cast("list[Json]", result["disagreements"]):
        print(f"the kernel and the list of rules disagree about {row['listener']}: doctor says more", file=sys.stderr)
    return OK if all(row["action"] == "allow" for row in rows) else NO


def split_target(text: str) -> tuple[str, int | None]:
    """Split ``ADDR``, ``ADDR:PORT`` (IPv4) or ``[ADDR]:PORT``; None where no port is given."""
    if text.count(":") == 1 or text.startswith("["):
        host, _, port = text.rpartition(":")
        if host and port.isdigit() and not text.endswith("]"):
            return str(Authority.of(host, int(port)).host), int(port)
        if text.endswith("]"):
            return text[1:-1], None
        raise PolicyError(f"{text!r}: write for example 192.0.2.7:1080 or [2001:db8::7]:1080")
    return text, None
