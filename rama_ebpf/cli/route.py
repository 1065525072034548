"""``route``: which way connections go out, why, and how to change that while the server runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

from ..control.socket import call
from .output import NO, OK, duration, print_json, table

__all__ = ["register"]

_PROTOCOLS = ("socks", "connect", "http", "tls", "udp", "bind", "forward")


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    text = "show which way connections go out, and change it while the server runs"
    parser = commands.add_parser("route", parents=[shared], help=text, description=text)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, parents=[shared], help=text, description=text)

    verb("list", "show all routes, and ways with how they do").set_defaults(main=_list)
    test = verb("test", "say which way a connection would take now, who is asked in which order, and why")
    test.add_argument("target", help="host:port")
    test.add_argument("--user", help="who has proven to be")
    test.add_argument("--session", help="the option session of the user name")
    test.add_argument("--client", metavar="IP", help="where from")
    test.add_argument("--listener", metavar="NAME", help="which one was connected to")
    test.add_argument("--protocol", choices=_PROTOCOLS, default="socks", help="how it is asked for (default: socks)")
    test.add_argument("--server-name", metavar="NAME", help="of the ClientHello")
    test.add_argument("--config", type=Path, metavar="FILE", help="by this file, and as if all ways were well")
    test.set_defaults(main=_test)
    change = verb("set", "have a route lead to another way in all workers, until the server ends")
    change.add_argument("route", help="its name")
    group = change.add_mutually_exclusive_group(required=True)
    group.add_argument("way", nargs="?", help="the name of a way, or direct, refuse, reset")
    group.add_argument("--as-written", action="store_true", help="as the configuration has it")
    change.set_defaults(main=_set)
    for name, text in (
        ("drain", "let no new connection take a way; those that live go on"),
        ("enable", "undo that, or have a way that is down or quarantined tried now"),
    ):
        made = verb(name, text)
        made.add_argument("way", help="its name; of a group: all its ways")
        made.set_defaults(main=_change)


def _ask(args: argparse.Namespace, method: str, **params: object) -> dict[str, Any]:
    return cast("dict[str, Any]", call(args.instance.control_socket, method, params))


def _list(args: argparse.Namespace) -> int:
    result = _ask(args, "route-list")
    if args.json:
        print_json(result)
        return OK
    rows = [
        (row["index"], row["name"], _conditions(row), row["set"] or row["way"], "set" if row["set"] else "")
        for row in result["routes"]
    ]
    print(table(("#", "ROUTE", "MATCHES", "WAY", ""), rows))
    print()
    ways = [
        (
            row["name"],
            row.get("state", ""),
            row.get("live", ""),
            row.get("attempts", ""),
            row.get("failed", ""),
            f"{1000 * row['latency']:.0f} ms" if row.get("latency") else "",
            row["is"] + _trouble(row),
        )
        for row in result["ways"]
    ]
    print(table(("WAY", "STATE", "LIVE", "ATTEMPTS", "FAILED", "LATENCY", "IS"), ways))
    return OK


def _conditions(row: dict[str, Any]) -> str:
    said = []
    for name in ("hosts", "regexes", "networks", "ports", "users", "clients", "listeners", "protocols", "server_names"):
        if values := row.get(name):
            more = f" and {len(values) - 3} more" if len(values) > 3 else ""
            said.append(f"{name}: {', '.join(values[:3])}{more}")
    return "; ".join(said) or "everything"


def _trouble(row: dict[str, Any]) -> str:
    if row.get("state") in (None, "up"):
        return ""
    since = "" if row.get("since") is None else f" since {duration(row['since'])}"
    again = "" if row.get("retry_in") is None else f", again in {duration(row['retry_in'])}"
    return f" ({row.get('cause') or row['state']}{since}{again})"


def _test(args: argparse.Namespace) -> int:
    params = {
        name: getattr(args, name)
        for name in ("target", "user", "session", "client", "listener", "protocol", "server_name")
        if getattr(args, name) is not None
    }
    if args.config is None:
        result = _ask(args, "route-test", **params)
    else:
        from ..config.load import load_config  # it knows every service, and takes half a second to import
        from ..config.routes import make_routes
        from ..control.routes import explained_route

        config = load_config(args.config)
        book = make_routes(config.routes, config.ways)
        if book is None:
            raise ValueError(f"{args.config} has no [[routes]]")
        result = cast(
            "dict[str, Any]", explained_route(book, None, bytes(32), params, {}, args.config, config.egress.policy())
        )
    if args.json:
        print_json(result)
    else:
        print("\n".join(_told(result)))
    return NO if result["refused"] else OK


def _told(result: dict[str, Any]) -> list[str]:
    place = f" ({result['file']}:{result['line']})" if result["line"] is not None else ""
    route = f"route {result['route']}{place}" if result["route"] is not None else "no route matches"
    lines = [f"{result['target']}: {route}"]
    if result["looked_up_first"]:
        lines.append("the name is looked up first, for a route with resolve that stands before it")
    how = ", set by an operator" if result["set"] else ""
    lines.append(f"way {result['way']}: {result['kind']}, {result['is']}{how}")
    for number, member in enumerate(result.get("order", ()), 1):
        state = "" if member["state"] == "up" else f" ({member['state']}: one connection at a time tries it)"
        lines.append(f"  {number}. {member['way']}: {member['is']}{state}")
    for member in result.get("left_out", ()):
        cause = f": {member['cause']}" if member.get("cause") else ""
        lines.append(f"  not asked: {member['way']} is {member['state']}{cause}")
    if result["refused"]:
        lines.append(f"refused: {result['why']}")
    return lines


def _set(args: argparse.Namespace) -> int:
    result = _ask(args, "route-set", route=args.route, way=None if args.as_written else args.way)
    if args.json:
        print_json(result)
    elif result["way"] is None:
        print(f"route {result['route']} leads where the configuration says")
    else:
        print(f"route {result['route']} leads to {result['way']}, until the server ends")
    return OK


def _change(args: argparse.Namespace) -> int:
    result = _ask(args, f"route-{args.verb}", way=args.way)
    if args.json:
        print_json(result)
    else:
        ((done, ways),) = result.items()
        print(f"{done}: {', '.join(ways)}")
    return OK
