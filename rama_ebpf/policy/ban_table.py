"""Where bans are kept: what :class:`~.bans.Bans` asks of a table, and the table of this process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from .ban_record import BanBlock, with_one_hit

__all__ = ["BanTable", "BanTally", "LocalBanTable", "TableFull"]

_BLOCK: Final = 4096


class TableFull(Exception):
    """A table has no room for one entry more. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class BanTally:
    """``revision`` grows with every ban and lift; ``automatic`` is how many bans services made."""

    revision: int = 0
    automatic: int = 0


class BanTable(Protocol):
    """Bans by key, as :mod:`.ban_record` has them. All may raise OSError where the kernel refuses."""

    @property
    def capacity(self) -> int:
        """How many bans it holds at most."""

    def get(self, key: bytes) -> bytes | None: ...

    def put(self, key: bytes, value: bytes) -> None:
        """Raises :class:`TableFull`."""

    def put_all(self, block: BanBlock) -> int:
        """Put many; return how many, from the first, found room."""

    def drop(self, key: bytes) -> bool:
        """Take a ban away; return whether there was one."""

    def is_empty(self) -> bool: ...

    def blocks(self) -> Iterator[BanBlock]:
        """Yield all. What others change meanwhile may be in it or not."""

    def tally(self) -> BanTally: ...

    def set_tally(self, tally: BanTally) -> None: ...


class LocalBanTable:
    """A table in this process."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._values: dict[bytes, bytes] = {}
        self._tally = BanTally()

    def get(self, key: bytes) -> bytes | None:
        return self._values.get(key)

    def put(self, key: bytes, value: bytes) -> None:
        if key not in self._values and len(self._values) >= self.capacity:
            raise TableFull
        self._values[key] = value

    def put_all(self, block: BanBlock) -> int:
        for done, (key, value) in enumerate(block.rows()):
            try:
                self.put(key, value)
            except TableFull:
                return done
        return len(block)

    def drop(self, key: bytes) -> bool:
        return self._values.pop(key, None) is not None

    def is_empty(self) -> bool:
        return not self._values

    def blocks(self) -> Iterator[BanBlock]:
        rows = list(self._values.items())
        for at in range(0, len(rows), _BLOCK):
            yield BanBlock.of(rows[at : at + _BLOCK])

    def tally(self) -> BanTally:
        return self._tally

    def set_tally(self, tally: BanTally) -> None:
        self._tally = tally

    def count(self, key: bytes) -> None:
        """Count a SYN that a ban turned away."""
        value = self._values.get(key)
        if value is not None:
            self._values[key] = with_one_hit(value)
