"""``complete``: what a shell needs to complete commands and options."""

from __future__ import annotations

import argparse
import importlib
import sys

from .output import ENVIRONMENT, OK

__all__ = ["register"]


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    text = "write a shell's completion of commands and options to standard output"
    parser = commands.add_parser(
        "complete",
        parents=[shared],
        help=text,
        description=text,
        epilog="example: rama-ebpf complete bash > /etc/bash_completion.d/rama-ebpf",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    parser.set_defaults(main=_complete)


def _complete(args: argparse.Namespace) -> int:
    try:
        shtab = importlib.import_module("shtab")
    except ModuleNotFoundError:
        print("rama-ebpf complete: shtab is missing: pip install 'rama-ebpf[completion]'", file=sys.stderr)
        return ENVIRONMENT
    print(shtab.complete(args.whole(), shell=args.shell))
    return OK
