"""What a worker gives up once its application is loaded, besides its user: system calls."""

from __future__ import annotations

import enum
import logging

from ..kernel.seccomp import SeccompUnavailable, refuse_system_calls

__all__ = ["Sandbox", "enter"]

log = logging.getLogger("rama_ebpf.worker")


class Sandbox(enum.Enum):
    """Whether workers run in a sandbox."""

    WANTED = "wanted"
    """As far as the host has what it takes."""
    REQUIRED = "required"
    """A worker that cannot have it does not start."""
    OFF = "off"


def enter(sandbox: Sandbox) -> None:
    """Confine this process for good. Raises :class:`SeccompUnavailable` where it is required and cannot be."""
    if sandbox is Sandbox.OFF:
        return
    try:
        refuse_system_calls()
    except SeccompUnavailable as error:
        if sandbox is Sandbox.REQUIRED:
            raise
        log.warning("no sandbox: %s (--require-sandbox refuses to run like this)", error)
