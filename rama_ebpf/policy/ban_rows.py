"""Bans as rows of the log on disk: one line of JSON a ban or a lift.

They are read here and not with :mod:`.lifetime`, whose rules these are, because there may be a million.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Final

import msgspec
from msgspec import UNSET, UnsetType

from ..kernel import abi
from .ban_record import reason_text
from .lifetime import boot_id, lifetime_row
from .prefixes import IPNetwork
from .rule import Action, Ban, boottime_ns, source_text

__all__ = ["RowReader", "lift_row", "row_of"]

_MAPPED: Final = b"\0" * 10 + b"\xff\xff"
_LATEST: Final = 2**63 - 1
_DENYING: Final = {"drop": int(Action.DROP), "reject": int(Action.REJECT)}
_NULL: Final = b"null"
_REASONS: Final = 1000


class _Row(msgspec.Struct, gc=False):
    """A row. Its times on the wall clock are read where they are needed only."""

    address: str
    lifted: bool = False
    action: str | UnsetType = UNSET
    until: msgspec.Raw | UnsetType = UNSET
    created: int | UnsetType = UNSET
    reason: str | UnsetType = UNSET
    automatic: bool = False
    boot: str | None = None
    boot_until: int | None = None
    left: msgspec.Raw | UnsetType = UNSET


def row_of(ban: Ban) -> dict[str, object]:
    """Return the row of a ban."""
    return {
        "address": ban.source,
        "action": ban.action.name.lower(),
        "created": ban.created,
        "reason": reason_text(ban.reason).decode(),
        "automatic": ban.automatic,
        **lifetime_row(ban.expires),
    }


def lift_row(network: IPNetwork) -> dict[str, object]:
    """Return the row that says that a ban was lifted."""
    return {"address": source_text(network), "lifted": True}


class RowReader:
    """Reads rows. Each is (key, value) of a ban, which may have ended, without a value where it was lifted. What was
    left of a ban of an earlier boot is counted from ``since`` on; ``by_wall`` is whether there was one that ends."""

    def __init__(self, since: int) -> None:
        self.by_wall = False
        self._since = since
        self._decoder = msgspec.json.Decoder(_Row)
        self._boot = boot_id()
        self._now, self._wall = boottime_ns(), time.time()
        self._reasons: dict[str, bytes] = {}

    def read_all(self, lines: bytes, damaged: Callable[[], None]) -> list[tuple[bytes, bytes | None]]:
        """Read whole lines; ``damaged`` is called for each that is none."""
        try:
            rows = self._decoder.decode_lines(lines)
        except (msgspec.DecodeError, RecursionError, ValueError):
            rows = []
            for line in lines.split(b"\n"):
                try:
                    if line.strip():
                        rows.append(self._decoder.decode(line))
                except (msgspec.DecodeError, RecursionError, ValueError):
                    damaged()
        pairs = []
        for row in rows:
            try:
                pairs.append(self._read(row))
            except (ValueError, OSError, OverflowError):
                damaged()
        return pairs

    def _read(self, row: _Row) -> tuple[bytes, bytes | None]:
        """Raises ValueError, OSError or OverflowError for what is no ban."""
        key = _key(row.address)
        if row.lifted:
            return key, None
        until, created, reason = row.until, row.created, row.reason
        action = None if row.action is UNSET else _DENYING.get(row.action)
        if action is None or until is UNSET or created is UNSET or reason is UNSET:
            raise ValueError("no ban")
        expires = 0
        if bytes(until) != _NULL:
            expires = max(1, self._expires(until, row))
        text = self._reasons.get(reason)
        if text is None:
            if len(self._reasons) >= _REASONS:
                self._reasons.clear()
            text = self._reasons[reason] = reason_text(reason)
        return key, abi.BAN.pack(expires, min(max(created, 0), _LATEST), 0, action, row.automatic, text)

    def _expires(self, until: msgspec.Raw, row: _Row) -> int:
        """Return when a ban ends, in CLOCK_BOOTTIME nanoseconds."""
        if row.boot_until is not None and row.boot == self._boot:
            return min(row.boot_until, _LATEST)
        self.by_wall = True
        expires = self._now + round((float(bytes(until)) - self._wall) * 1e9)
        if row.left is not UNSET and bytes(row.left) != _NULL:
            expires = min(expires, self._since + round(float(bytes(row.left)) * 1e9))
        return min(expires, _LATEST)


def _key(text: str) -> bytes:
    """Raises ValueError or OSError for what is no address or network."""
    address, slash, bits = text.partition("/")
    if ":" in address:
        packed, length = socket.inet_pton(socket.AF_INET6, address), int(bits) if slash else 128
    else:
        packed, length = _MAPPED + socket.inet_pton(socket.AF_INET, address), 96 + int(bits) if slash else 128
    if slash:
        shortest = 97 if packed.startswith(_MAPPED) else 1
        if not shortest <= length <= 128 or int.from_bytes(packed, "big") & ((1 << 128 - length) - 1):
            raise ValueError("no network, or everybody")
    return abi.BAN_KEY.pack(packed, length)
