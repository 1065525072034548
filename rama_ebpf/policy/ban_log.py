"""Bans on disk, so that they outlive the server and the machine's uptime.

Every ban and every lift is one line of JSON, appended; at the start the lines are replayed and the file is written anew
with what is still in force. Expiries are on the wall clock here, because the kernel's clock begins anew with each boot.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import time
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from ..core.address import IPAddress
from .atomic import bring_to_disk, write_atomically
from .rule import Action, Ban, boottime_ns

__all__ = ["BanLog"]

log = logging.getLogger(__name__)

_SMALL_BYTES: Final = 16 * 1024 * 1024


class BanLog:
    """The log in a file. Calls are made under the store's lock."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rewritten = 0  # bytes

    def banned(self, ban: Ban) -> None:
        """Note a ban. Raises OSError where the file system refuses; the log is as it was then."""
        self._append(_row(ban))

    def lifted(self, address: IPAddress) -> None:
        """Note that a ban was lifted. Raises OSError like :meth:`banned`."""
        self._append({"address": str(address), "lifted": True})

    def _append(self, row: dict[str, object]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(fd).st_size
                torn = size and os.pread(fd, 1, size - 1) != b"\n"
                line = (b"\n" if torn else b"") + json.dumps(row).encode() + b"\n"
                try:
                    if os.write(fd, line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    os.ftruncate(fd, size)
                    raise
            finally:
                os.close(fd)
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self._path}: {error.strerror}") from error

    def sync(self) -> None:
        """Have what was noted outlive a power failure, too. A disk that refuses is logged as an error."""
        try:
            bring_to_disk(self._path)
        except FileNotFoundError:
            return  # nothing was ever noted
        except OSError as error:
            log.error("cannot sync %s: %s", self._path, error)

    def replay(self) -> list[Ban]:
        """Return the bans that are still in force. Raises OSError for a log that is there and cannot be read."""
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        bans: dict[IPAddress, Ban] = {}
        damaged = 0
        for line in lines:
            try:
                row = json.loads(line)
                address = ip_address(row["address"])
                if row.get("lifted"):
                    bans.pop(address, None)
                    continue
                ban = _ban(address, row)
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                damaged += 1
                continue
            if ban is None:
                bans.pop(address, None)
            else:
                bans[address] = ban
        if damaged:
            log.warning("%d lines of %s are damaged and left out", damaged, self._path)
        return list(bans.values())

    def overgrown(self) -> bool:
        """Whether so much was appended that it should be written anew: 16 MiB, and as much as there was before."""
        try:
            return self._path.stat().st_size > max(_SMALL_BYTES, 2 * self._rewritten)
        except OSError:
            return False

    def rewrite(self, bans: list[Ban]) -> None:
        """Replace the log by these bans; where there are none, and never were, no file is made."""
        if not bans and not self._path.exists():
            return
        data = b"".join(json.dumps(_row(ban)).encode() + b"\n" for ban in bans)
        self._rewritten = len(data)
        try:
            write_atomically(self._path, data)
        except OSError as error:
            log.error("cannot write %s: %s", self._path, error)


def _row(ban: Ban) -> dict[str, object]:
    until = None if ban.expires is None else time.time() + (ban.expires - boottime_ns()) / 1e9
    return {
        "address": str(ban.address),
        "action": ban.action.name.lower(),
        "until": until,
        "created": ban.created,
        "reason": ban.reason,
        "automatic": ban.automatic,
        "boot": _boot_id(),
        "boot_until": ban.expires,
        "left": None if until is None else until - time.time(),
    }


def _ban(address: IPAddress, row: dict[str, object]) -> Ban | None:
    """Return the ban of a row, None if it has expired."""
    until, expires = row["until"], None
    if until is not None:
        left = _left(float(str(until)), row)
        if left <= 0:
            return None
        expires = boottime_ns() + round(left * 1e9)
    action, created, automatic = (
        Action[str(row["action"]).upper()],
        int(str(row["created"])),
        row.get("automatic") is True,
    )
    return Ban(address, action, expires, created, 0, str(row["reason"]), automatic)


def _left(until: float, row: dict[str, object]) -> float:
    """Return for how many seconds a ban still holds.

    Within one boot the kernel's clock says it, whatever was done to the wall clock. After a reboot the wall clock does,
    but for no longer than was left when the row was written: a clock that begins in 1970 makes no ban last for decades.
    """
    if row.get("boot") == _boot_id() and row.get("boot_until") is not None:
        return (int(str(row["boot_until"])) - boottime_ns()) / 1e9
    left = until - time.time()
    written = row.get("left")
    return left if written is None else min(left, float(str(written)))


@functools.cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
