"""``policy``: the loaded set as a whole - load it, compare it, undo it, and see who changed what."""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

from ..control.api import Json
from ..policy.rule import PolicyError, parse_ttl
from .output import NO, OK, duration, print_json, table, working
from .policy import call, show_verdict, split_target
from .said import outcome_of_set

__all__ = ["logged_in_from", "register"]

_MOST_PARENTS: Final = 64
_LEFT_OUT: Final = {"wide": "too wide", "private": "private", "own": "this host's own", "never": "never to be closed"}


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    """Add the command and its verbs."""
    text = "load, compare, export and undo the set of rules as a whole"
    policy = commands.add_parser("policy", help=text, description=text)
    verbs = policy.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=type(policy))

    def verb(name: str, help: str, main: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        parser = verbs.add_parser(name, parents=[shared], help=help, description=help)
        parser.set_defaults(main=main)
        return parser

    load = verb("load", "put the set of a policy file into force at once; runtime rules, bans and failsafe stay", _load)
    load.add_argument("file", metavar="FILE", help="a policy file, or a rama.toml, of which [policy] is used")
    load.add_argument("--revision", type=int, metavar="N", help="only if the policy is still at this revision")
    load.add_argument(
        "--confirm-timeout",
        metavar="TIME",
        help="undo it after so long unless policy confirm is given; the kernel does",
    )
    load.add_argument("--yes", action="store_true", help="load it although it cuts many clients, or your own session")
    diff = verb("diff", "say what loading a policy file would change", _diff)
    diff.add_argument("file", metavar="FILE", nargs="?")
    diff.add_argument("--revision", type=int, metavar="N", help="what the set of that revision would, in place of FILE")
    diff.add_argument(
        "--replay",
        metavar="TIME",
        help="also what it would do to those who came within this time, for example 24h",
    )
    verb("history", "show the sets that were in force before and are kept", _history)
    verb("export", "print the set in force as a policy file", _export)
    verb("confirm", "keep the set that is on trial", _confirm)
    verb("rollback", "undo the set that is on trial", _rollback)
    refresh = verb("refresh", "read all feeds again now", _refresh)
    refresh.add_argument("--accept", action="store_true", help="take lists that have changed by more than max_change")
    verb("feeds", "show the feeds in force: networks, age, and what is wrong with them", _feeds)
    test = verb("test", "say what would be decided for a client", _test)
    test.add_argument("target", metavar="ADDR[:PORT]", help="the client's address, and the listener's port")
    log = verb("log", "show who changed what, when", _log)
    log.add_argument("-n", "--count", type=int, default=20, metavar="N", help="the last N changes (default: 20)")


def _load(args: argparse.Namespace) -> int:
    within = None if args.confirm_timeout is None else parse_ttl(args.confirm_timeout) / 1e9
    params: Json = {"path": os.path.abspath(args.file), "revision": args.revision, "confirm_within": within}
    params |= {"yes": args.yes, "operators": logged_in_from()}
    with working("reading feeds and compiling"):
        result = call(args.instance, "load", params)
    done = f"loaded {result['rules']} rules with {result['prefixes']} prefixes: revision {result['revision']}"
    words, code = outcome_of_set(done, result)
    if args.json:
        print_json(result)
        return code
    print(words)
    _show_replay(result, ("turns away", "lets in"))
    for futile in cast("list[str]", result["futile"]):
        print(futile)
    _show_feeds(result)
    for row in cast("list[Json]", result["overlaps"]):
        print(f"{row['rule']}: {row['networks']} networks are in {row['inside']} too")
    if (trial := result["confirm_within"]) is not None:
        print(f"ON TRIAL: undone in {duration(trial)} unless confirmed (rama-ebpf policy confirm)")
    return code


def _show_replay(result: Json, words: tuple[str, str]) -> None:
    """Say what becomes of those who came, where anything does; ``words`` are for who is cut, and who is let in."""
    told = cast("Json | None", result.get("replay"))
    if told is None or not (told["cut"] or told["let_in"]):
        return
    cut, let_in, span = told["cut"], told["let_in"], duration(told["seconds"])
    if cut:
        print(f"{words[0]} {cut} of {told['connected']} clients that connected in the last {span}:")
        for row in cast("list[Json]", told["cut_top"]):
            print(f"    {row['source']} to port {row['port']}, {row['let_in']} times, by {row['rule']}")
    if let_in:
        print(f"{words[1]} {let_in} clients that were turned away in the last {span}")
    if told["missed"]:
        print(f"({told['missed']} denials came too fast to be in the record)")


def logged_in_from() -> list[str]:
    """The address that this command's user is logged in from by ssh, found in the environment of the nearest process
    above that has it: sudo takes it out of its own."""
    pid = os.getpid()
    for _ in range(_MOST_PARENTS):
        with contextlib.suppress(OSError, ValueError, IndexError):
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                name, _, value = entry.partition(b"=")
                if name in (b"SSH_CONNECTION", b"SSH_CLIENT"):
                    return [value.split()[0].decode("ascii", "replace")]
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
        if pid <= 1:
            break
    return []


def _show_feeds(result: Json) -> None:
    for feed in cast("list[Json]", result["feeds"]):
        if feed["stale"]:
            print(f"{feed['rule']}: {feed['stale']}")
        if "networks" not in feed:
            continue
        notes = [
            f"{feed[key]} {what}"
            for key, what in (("bad_lines", "bad lines"), ("duplicates", "duplicates"), ("covered", "inside others"))
            if feed[key]
        ]
        print(f"{feed['rule']}: {feed['networks']} networks{': ' if notes else ''}{', '.join(notes)}")
        for line in cast("list[str]", feed["bad"])[:10]:
            print(f"  {line}")
        left = [f"{count} {_LEFT_OUT[why]}" for why, count in cast("Json", feed["left_out"]).items() if count]
        if left:
            print(f"  left out: {', '.join(left)}")


def _diff(args: argparse.Namespace) -> int:
    if (args.file is None) == (args.revision is None):
        raise PolicyError("name a FILE, or a --revision (policy history shows those that are kept)")
    path = None if args.file is None else os.path.abspath(args.file)
    result = call(args.instance, "diff", {"path": path, "revision": args.revision, "replay": args.replay})
    if args.json:
        print_json(result)
    elif result["same"]:
        print("nothing would change")
    else:
        for sign, key in (("+", "added"), ("-", "removed")):
            for rule in cast("list[Json]", result[key]):
                print(f"{sign} {rule['name']}: {rule['action']}, {rule['sources']} prefixes")
        for rule in cast("list[Json]", result["changed"]):
            print(f"~ {rule['name']}")
            for name, change in rule.items():
                if name == "sources":
                    sources = cast("Json", change)
                    examples = " ".join(cast("list[str]", sources["examples"]))
                    print(f"    sources: {sources['added']} more, {sources['removed']} fewer: {examples}")
                elif name != "name":
                    was, will = cast("list[object]", change)
                    print(f"    {name}: {was} -> {will}")
        for name, change in cast("Json", result["settings"]).items():
            was, will = cast("list[object]", change)
            print(f"~ {name}: {was} -> {will}")
        if result["reordered"]:
            print("~ rules change places: of two that rank the same, another one decides")
    if not args.json:
        _show_replay(result, ("would cut", "would let in"))
    return OK if result["same"] else NO


def _history(args: argparse.Namespace) -> int:
    result = call(args.instance, "history", {})
    if args.json:
        print_json(result)
        return OK
    rows = [(row["revision"], row["written"], row["bytes"]) for row in cast("list[Json]", result["sets"])]
    print(table(("REVISION", "WRITTEN", "BYTES"), rows) if rows else "no earlier set is kept")
    return OK


def _export(args: argparse.Namespace) -> int:
    result = call(args.instance, "export", {})
    if args.json:
        print_json(result)
    else:
        print(result["toml"], end="")
    return OK


def _confirm(args: argparse.Namespace) -> int:
    return _done(args, "confirm", "confirmed")


def _rollback(args: argparse.Namespace) -> int:
    return _done(args, "rollback", "undone")


def _done(args: argparse.Namespace, method: str, said: str) -> int:
    result = call(args.instance, method, {})
    words, code = outcome_of_set(f"{said}: revision {result['revision']}", result)
    if args.json:
        print_json(result)
    else:
        print(words)
    return code


def _refresh(args: argparse.Namespace) -> int:
    result = call(args.instance, "refresh", {"accept": args.accept})
    feeds = cast("list[Json]", result["feeds"])
    if args.json:
        print_json(result)
    elif not feeds:
        print("no rule in force has a feed")
    else:
        _show_feeds(result)
    return NO if any(feed["stale"] for feed in feeds) else OK


def _feeds(args: argparse.Namespace) -> int:
    feeds = cast("list[Json]", call(args.instance, "feeds", {})["feeds"])
    if args.json:
        print_json({"feeds": feeds})
    elif not feeds:
        print("no rule in force has a feed")
    else:
        rows = [
            (
                row["rule"],
                row["networks"],
                "none kept" if row["age"] is None else duration(row["age"]),
                duration(row["refresh"]),
                row["format"],
                row["source"],
            )
            for row in feeds
        ]
        print(table(("RULE", "NETWORKS", "AGE", "REFRESH", "FORMAT", "SOURCE"), rows))
        for row in feeds:
            if row["trouble"]:
                print(f"{row['rule']}: {row['trouble']}")
    return NO if any(row["trouble"] for row in feeds) else OK


def _test(args: argparse.Namespace) -> int:
    source, port = split_target(args.target)
    return show_verdict(args, call(args.instance, "test", {"source": source, "port": port}))


def _user_name(uid: object) -> object:
    """The name of a user of this host; the number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name if isinstance(uid, int) else uid
    except (KeyError, OverflowError):
        return uid


def _log(args: argparse.Namespace) -> int:
    entries = cast("list[Json]", call(args.instance, "log", {"count": args.count})["entries"])
    if args.json:
        print_json({"entries": entries})
        return OK
    rows = []
    for entry in entries:
        who = cast("Json", entry.get("who", {}))
        name = who.get("sudo_user") or _user_name(who.get("login_uid", who.get("uid")))
        details = {key: value for key, value in entry.items() if key not in ("time", "what", "who", "revision")}
        told = ", ".join(f"{key} {value}" for key, value in details.items())
        rows.append((entry["time"], entry.get("revision"), name, who.get("command"), entry["what"], told))
    print(table(("TIME", "REVISION", "WHO", "COMMAND", "WHAT", "DETAILS"), rows) if rows else "the journal is empty")
    return OK
