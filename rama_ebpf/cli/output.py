"""Output for people (tables) and for programs (JSON), and the exit codes."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Final

__all__ = ["ENVIRONMENT", "NO", "OK", "USAGE", "duration", "print_json", "table", "working"]

OK: Final = 0
NO: Final = 1
USAGE: Final = 2
ENVIRONMENT: Final = 3


def print_json(value: object) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=2, sort_keys=False))


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Tell who sits at a terminal, on standard error, that something takes longer than a second, and for how long."""
    done, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(1.0):
            print(f"\r{what}: {time.monotonic() - began:.0f} s", end="", file=sys.stderr, flush=True)

    if not sys.stderr.isatty():
        yield
        return
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
        if time.monotonic() - began >= 1.0:
            print(file=sys.stderr)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return an aligned table; the last column is not padded."""
    lines = [list(header), *([("" if cell is None else str(cell)) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    )


def duration(seconds: object) -> str:
    """Show a number of seconds as its two largest units; ``never`` for None."""
    if not isinstance(seconds, (int, float)):
        return "never"
    left = math.ceil(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if left >= size or (unit == "s" and not parts):
            parts.append(f"{left // size}{unit}")
            left %= size
    return "".join(parts[:2])
