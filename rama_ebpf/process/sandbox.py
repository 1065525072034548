"""What a worker gives up once its application is loaded, besides its user: files and system calls."""

from __future__ import annotations

import enum
import logging
from collections.abc import Iterable
from pathlib import Path

from ..core.errors import RamaError
from ..kernel.confine import Confinement, confine

__all__ = ["Sandbox", "SandboxUnavailable", "enter"]

log = logging.getLogger("rama_ebpf.worker")


class Sandbox(enum.Enum):
    """Whether workers run in a sandbox."""

    WANTED = "wanted"
    """As far as the host has what it takes."""
    REQUIRED = "required"
    """A worker that cannot have all of it does not start."""
    OFF = "off"


class SandboxUnavailable(RamaError):
    """The sandbox is required, and cannot be had; the text says why."""

    kind = "sandbox"


def enter(sandbox: Sandbox, read: Iterable[str] = (), write: Iterable[str] = ()) -> Confinement:
    """Confine this process for good; beneath ``read`` files may be opened besides those that Python needs, beneath
    ``write`` changed. Raises :class:`SandboxUnavailable` where it is required and cannot be."""
    if sandbox is Sandbox.OFF:
        return Confinement(seccomp=False, landlock=0)
    confinement = confine(map(Path, read), map(Path, write), listener=True)
    if confinement.missing:
        why = "; ".join(confinement.missing)
        if sandbox is Sandbox.REQUIRED:
            raise SandboxUnavailable(why)
        log.warning("no whole sandbox: %s (--require-sandbox refuses to run like this)", why)
    return confinement
