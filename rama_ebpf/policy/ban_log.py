"""Bans on disk, so that they outlive the server and the machine's uptime.

Every ban and every lift is a row, appended; at the start the rows are replayed and the log is written anew with what is
still in force.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

from ..core.address import IPAddress
from .lifetime import HasEnded, lifetime_of, lifetime_row
from .row_log import RowLog
from .rule import Action, Ban

__all__ = ["BanLog"]

log = logging.getLogger(__name__)


class BanLog:
    """The log in a file. Calls are made under the store's lock."""

    def __init__(self, path: Path) -> None:
        self._log = RowLog(path)

    def banned(self, ban: Ban) -> None:
        """Note a ban. Raises OSError where the file system refuses; the log is as it was then."""
        self._log.append(_row(ban))

    def lifted(self, address: IPAddress) -> None:
        """Note that a ban was lifted. Raises OSError like :meth:`banned`."""
        self._log.append({"address": str(address), "lifted": True})

    def sync(self) -> None:
        """Have what was noted outlive a power failure, too. A disk that refuses is logged as an error."""
        try:
            self._log.sync()
        except OSError as error:
            log.error("cannot sync %s: %s", self._log.path, error)

    def replay(self) -> list[Ban]:
        """Return the bans that are still in force. Raises OSError for a log that is there and cannot be read."""
        bans: dict[IPAddress, Ban] = {}
        damaged = 0
        for row in self._log.rows():
            try:
                if row is None:
                    raise ValueError("no row")
                address = ip_address(str(row["address"]))
                try:
                    ban = None if row.get("lifted") else _ban(address, row)
                except HasEnded:
                    ban = None
            except (ValueError, KeyError, TypeError, OverflowError):
                damaged += 1
                continue
            if ban is None:
                bans.pop(address, None)
            else:
                bans[address] = ban
        if damaged:
            log.warning("%d lines of %s are damaged and left out", damaged, self._log.path)
        return list(bans.values())

    def overgrown(self) -> bool:
        """Whether so much was appended that it should be written anew."""
        return self._log.overgrown()

    def rewrite(self, bans: list[Ban]) -> None:
        """Replace the log by these bans; where there are none, and never were, no file is made."""
        try:
            self._log.rewrite(map(_row, bans))
        except OSError as error:
            log.error("cannot write %s: %s", self._log.path, error)


def _row(ban: Ban) -> dict[str, object]:
    return {
        "address": str(ban.address),
        "action": ban.action.name.lower(),
        "created": ban.created,
        "reason": ban.reason,
        "automatic": ban.automatic,
        **lifetime_row(ban.expires),
    }


def _ban(address: IPAddress, row: Mapping[str, object]) -> Ban:
    expires, created = lifetime_of(row), int(str(row["created"]))
    automatic = row.get("automatic") is True
    return Ban(address, Action[str(row["action"]).upper()], expires, created, 0, str(row["reason"]), automatic)
