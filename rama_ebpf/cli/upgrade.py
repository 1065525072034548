"""``upgrade``: have a new server process, of the code that is installed now, take over from the one that runs."""

from __future__ import annotations

import argparse
import sys

from ..control.socket import ControlUnavailable, follow
from .output import NO, OK, print_json

__all__ = ["register"]


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    text = "start the server anew, with the code and configuration that are there now, without refusing a client"
    parser = commands.add_parser("upgrade", parents=[shared], help=text, description=text)
    parser.set_defaults(main=_upgrade)


def _upgrade(args: argparse.Namespace) -> int:
    for line in follow(args.instance.control_socket, "upgrade", {}):
        if "upgraded" not in line:
            if not args.json:
                print(line["said"], flush=True)
            continue
        if args.json:
            print_json(line)
        if not line["upgraded"]:
            print(f"rama-ebpf upgrade: {line['error']}; process {line['pid']} serves on", file=sys.stderr)
            return NO
        if not args.json:
            print(f"process {line['pid']} has taken over; process {line['before']} ends when its connections have")
        return OK
    raise ControlUnavailable(None, "the server ended before it said what became of the upgrade: see its log and status")
