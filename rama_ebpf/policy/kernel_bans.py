"""The bans in a gate's maps: ``bans``, which the programs read, and ``ban_account``, which is userspace's."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Final

from ..kernel import abi, bpf
from ..kernel.gate_maps import GateMaps
from .ban_record import KEY_SIZE, VALUE_SIZE, BanBlock
from .ban_table import BanTally, TableFull

__all__ = ["KernelBanTable"]

_FULL: Final = (errno.E2BIG, errno.ENOSPC, errno.ENOMEM)
_FIRST: Final = bytes(4)


class KernelBanTable:
    """A :class:`~.ban_table.BanTable`."""

    def __init__(self, maps: GateMaps) -> None:
        self.capacity = maps.capacity("bans")
        self._fd, self._account = maps["bans"], maps["ban_account"]

    def get(self, key: bytes) -> bytes | None:
        return bpf.map_lookup(self._fd, key, VALUE_SIZE)

    def put(self, key: bytes, value: bytes) -> None:
        try:
            bpf.map_update(self._fd, key, value)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise TableFull from error

    def put_all(self, block: BanBlock) -> int:
        return bpf.map_update_batch(self._fd, block.keys, block.values, len(block))

    def drop(self, key: bytes) -> bool:
        return bpf.map_delete(self._fd, key)

    def is_empty(self) -> bool:
        return bpf.map_next_key(self._fd, None, KEY_SIZE) is None

    def blocks(self) -> Iterator[BanBlock]:
        for keys, values in bpf.map_batches(self._fd, KEY_SIZE, VALUE_SIZE):
            yield BanBlock(keys, values)

    def tally(self) -> BanTally:
        raw = bpf.map_lookup(self._account, _FIRST, abi.BAN_ACCOUNT.size)
        assert raw is not None  # an array has all its elements
        return BanTally(*abi.BAN_ACCOUNT.unpack(raw))

    def set_tally(self, tally: BanTally) -> None:
        bpf.map_update(self._account, _FIRST, abi.BAN_ACCOUNT.pack(tally.revision, tally.automatic))
