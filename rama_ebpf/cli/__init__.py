"""The ``rama-ebpf`` command."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Entry point of the console command."""
    print("rama-ebpf: no command yet", file=sys.stderr)
    return 2
