"""When something ends, as it is kept on disk.

The kernel's clock begins anew with each boot, and the wall clock may be set wrong. Within one boot the kernel's clock
says it, whatever was done to the wall clock. After a reboot the wall clock does, but for no longer than was left when
it was written: a clock that begins in 1970 makes nothing last for decades.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from pathlib import Path

from .rule import boottime_ns

__all__ = ["HasEnded", "boot_id", "lifetime_of", "lifetime_row"]


class HasEnded(Exception):
    """It is over."""


def lifetime_row(expires: int | None) -> dict[str, object]:
    """Return what is written of an end (CLOCK_BOOTTIME nanoseconds, None: never)."""
    left = None if expires is None else (expires - boottime_ns()) / 1e9
    return {
        "until": None if left is None else time.time() + left,
        "boot": boot_id(),
        "boot_until": expires,
        "left": left,
    }


def lifetime_of(row: Mapping[str, object]) -> int | None:
    """Return the end that a row says, in the clock of this boot. Raises :class:`HasEnded`; KeyError, TypeError,
    ValueError or OverflowError for what was not written by :func:`lifetime_row`."""
    until = row["until"]
    if until is None:
        return None
    if row.get("boot") == boot_id() and row.get("boot_until") is not None:
        expires = int(str(row["boot_until"]))
    else:
        left, written = float(str(until)) - time.time(), row.get("left")
        if written is not None:
            left = min(left, float(str(written)))
        expires = boottime_ns() + round(left * 1e9)
    if expires <= boottime_ns():
        raise HasEnded
    return expires


@functools.cache
def boot_id() -> str:
    """Return the id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
