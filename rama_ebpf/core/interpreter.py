"""How processes of our own are started from Python."""

from __future__ import annotations

import sys

__all__ = ["module_command"]


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs a module of ours in a new interpreter.

    ``-P``: the working directory is not searched for modules (docs.python.org, "Command line and environment"), which
    ``-m`` alone would do first of all. Whoever starts the server as root in a directory that others write would run
    their ``rama_ebpf/`` or ``json.py``.
    """
    return [sys.executable, "-P", "-m", module, *arguments]
