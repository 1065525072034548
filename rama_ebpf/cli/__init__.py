"""The ``rama-ebpf`` command: one module a command group.

Exit codes: 0 done, 1 the answer is no (not found, denied), 2 bad input (nothing was changed), 3 this host lacks
something, or the kernel refused. As with other commands 130 is Ctrl-C, and 141 that whoever read the output left.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Final, NoReturn

from .. import __version__
from .output import ENVIRONMENT, USAGE, print_json

__all__ = ["main"]

_GROUPS: Final = {
    "run": ("run",),
    "init": ("init",),
    "config": ("check", "config", "passwd"),
    "policy": ("block", "allow", "unblock", "list", "test"),
    "ruleset": ("policy",),
    "why": ("why",),
    "bans": ("ban", "bans"),
    "lifecycle": ("status", "unload"),
    "flows": ("flows",),
    "route": ("route",),
    "upgrade": ("upgrade",),
    "ca": ("ca",),
    "events": ("events",),
    "doctor": ("doctor",),
    "guard": ("guard",),
    "complete": ("complete",),
}
"""The modules and their commands. Only the module of the given command is imported: some bring in half the package."""


_NOBODY_READS: Final = 128 + 13
"""As a shell shows the end by SIGPIPE."""


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(USAGE)


def _groups(argv: Sequence[str]) -> list[str]:
    """The modules that may be needed: the command's, or all for help and for a command that is not known."""
    command = next((word for word in argv if not word.startswith("-")), None)
    return [group for group, commands in _GROUPS.items() if command in commands] or list(_GROUPS)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="rama-ebpf", description="A proxy whose unwanted clients are turned away before accept(2).")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--instance",
        default=os.environ.get("RAMA_EBPF_INSTANCE", "default"),
        metavar="NAME",
        help="which instance (default: $RAMA_EBPF_INSTANCE, or default)",
    )
    shared.add_argument("--json", action="store_true", help="machine-readable output")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for group in _groups(argv):
        importlib.import_module(f"{__name__}.{group}").register(commands, shared)
    parser.set_defaults(whole=lambda: _parser([]))
    return parser


@contextlib.contextmanager
def _ended_by_interrupts() -> Iterator[None]:
    """Have Ctrl-C end the process without a word, where Python's handler would raise in the middle of an import."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the exit code."""
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the interpreter's end
        return _NOBODY_READS
    return code


def _run(argv: Sequence[str]) -> int:
    with _ended_by_interrupts():
        args = _parser(argv).parse_args(argv)
        from ..control.socket import ControlUnavailable
        from ..core.errors import RamaError
        from ..kernel.compile import CompileError
        from ..kernel.instance import Instance, InstanceBusy
        from ..policy.rule import PolicyError
    prefix = f"rama-ebpf {args.command}"
    try:
        args.instance = Instance(args.instance)
        code = args.main(args)
        return int(code)
    except BrokenPipeError:
        raise
    except (PolicyError, ValueError, InstanceBusy) as error:
        return _fail(prefix, error, USAGE, as_json=getattr(args, "json", False))
    except (ControlUnavailable, CompileError, RamaError, OSError) as error:
        return _fail(prefix, error, ENVIRONMENT, as_json=getattr(args, "json", False))
    except KeyboardInterrupt:
        return 130


def _fail(prefix: str, error: Exception, code: int, *, as_json: bool) -> int:
    print(f"{prefix}: {error}", file=sys.stderr)
    if as_json:
        print_json({"error": str(error), "exit": code})
    return code
