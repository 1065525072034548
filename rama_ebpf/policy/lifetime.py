"""When something ends, as it is kept on disk.

The kernel's clock begins anew with each boot, and the wall clock may be set wrong. Within one boot the kernel's clock
says it, whatever was done to the wall clock. After a reboot the wall clock does, but for no longer than was left when
it was written: a clock that begins in 1970 makes nothing last for decades. And what has ended by the wall clock after a
reboot may have not, while nobody has told the kernel that the clock is right: that is not in force, and not forgotten.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path

from ..kernel.clock import is_synchronized
from .rule import boottime_ns

__all__ = ["HasEnded", "MayHaveEnded", "boot_id", "host_id", "is_of_this_boot", "lifetime_of", "lifetime_row"]


class HasEnded(Exception):
    """It is over."""


class MayHaveEnded(HasEnded):
    """It is over if the wall clock is right: it is judged again when that is set, or known to be right."""


def lifetime_row(expires: int | None) -> dict[str, object]:
    """Return what is written of an end (CLOCK_BOOTTIME nanoseconds, None: never)."""
    left = None if expires is None else (expires - boottime_ns()) / 1e9
    return {
        "until": None if left is None else time.time() + left,
        "boot": boot_id(),
        "boot_until": expires,
        "left": left,
    }


def is_of_this_boot(row: Mapping[str, object]) -> bool:
    """Whether a row needs no wall clock: it was written in this boot, or never ends."""
    return row["until"] is None or (row.get("boot") == boot_id() and row.get("boot_until") is not None)


def lifetime_of(row: Mapping[str, object], since: int | None = None) -> int | None:
    """Return the end that a row says, in the clock of this boot. ``since`` is when it was first read in this boot: it
    holds for no longer than was left, from then on (by default from now on).

    Raises :class:`HasEnded`; KeyError, TypeError, ValueError or OverflowError for what was not written by
    :func:`lifetime_row`."""
    until, now = row["until"], boottime_ns()
    if until is None:
        return None
    if is_of_this_boot(row):
        expires = int(str(row["boot_until"]))
    else:
        by_wall, written = float(str(until)) - time.time(), row.get("left")
        expires = now + round(by_wall * 1e9)
        latest = expires if written is None else (since or now) + round(float(str(written)) * 1e9)
        if expires <= now < latest and not is_synchronized():
            raise MayHaveEnded
        expires = min(expires, latest)
    if expires <= now:
        raise HasEnded
    return expires


@functools.cache
def boot_id() -> str:
    """Return the id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


@functools.cache
def host_id() -> str:
    """Return what tells this host from others, made of its machine-id(5); the empty text if it has none."""
    try:
        machine = Path("/etc/machine-id").read_bytes().strip()
    except OSError:
        return ""
    return hashlib.blake2b(machine, digest_size=8, person=b"rama_ebpf").hexdigest() if machine else ""
