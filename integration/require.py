"""What a suite needs from the machine: say all that is missing, and how to get it, before anything is begun.

``python -m integration.require docker`` prints what is missing and exits 3, or prints nothing and exits 0.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["CACHE", "SCRATCH", "SUITES", "Missing", "require"]

CACHE = Path(__file__).resolve().parent.parent / ".cache"
"""What takes long to make and is made once: images, kernels, boxes. ``make clean`` removes it."""

SCRATCH = Path("/var/tmp")
"""Where large things live while a suite runs: on disk, unlike /tmp on many hosts."""

_GIB = 1 << 30


class Missing(RuntimeError):
    """The machine lacks something. The text has one line for each thing, with the way to get it."""


def _root() -> str | None:
    return None if os.geteuid() == 0 else "root is needed: run it with sudo"


def _command(name: str, packages: str) -> Callable[[], str | None]:
    def check() -> str | None:
        return None if shutil.which(name) else f"{name} is not installed: {packages}"

    return check


def _disk(where: Path, gib: int) -> Callable[[], str | None]:
    def check() -> str | None:
        existing = next(path for path in (where, *where.parents) if path.exists())
        free = shutil.disk_usage(existing).free / _GIB
        return None if free >= gib else f"{existing} has {free:.1f} GiB free, {gib} are needed: make room"

    return check


SUITES: dict[str, Sequence[Callable[[], str | None]]] = {
    "docker": (
        _root,
        _command("dockerd", "apt install docker.io (Fedora: dnf install moby-engine)"),
        _command("docker", "apt install docker.io (Debian 13 and Fedora: docker-cli)"),
        _command("mmdebstrap", "apt install mmdebstrap"),
        _command("unshare", "apt install util-linux"),
        _disk(SCRATCH, 3),
        _disk(CACHE, 1),
    ),
}


def require(suite: str) -> None:
    """Raise :class:`Missing` unless the machine has all that a suite needs. Raises KeyError for an unknown suite."""
    missing = [text for check in SUITES[suite] if (text := check()) is not None]
    if missing:
        raise Missing("\n".join(missing))


if __name__ == "__main__":
    try:
        require(sys.argv[1])
    except Missing as error:
        print(f"{sys.argv[1]}: this machine lacks something:\n{error}", file=sys.stderr)
        raise SystemExit(3) from None
