"""Reading a large hash map in slices: each goes on where the last one ended, and the first follows the last.

Reference: ``generic_map_lookup_batch`` and ``__htab_map_lookup_and_delete_batch`` in ``kernel/bpf``.
"""

from __future__ import annotations

from . import bpf

__all__ = ["MapWalk"]


class MapWalk:
    """Walks round and round through a map. What is there all the time is met once a round; of what others write
    meanwhile, some may be."""

    def __init__(self, fd: int, key_size: int, value_size: int) -> None:
        self._fd = fd
        self._sizes = key_size, value_size
        self._token: bytes | None = None
        self._met = 0
        self.known = 0
        """How many entries the last whole round has met."""

    @property
    def is_at_end(self) -> bool:
        """Whether the next call begins a round."""
        return self._token is None

    def next(self, count: int) -> list[tuple[bytes, bytes]]:
        """Return about ``count`` entries more; fewer, or none, at the end of a round."""
        key_size, value_size = self._sizes
        keys, values, self._token = bpf.map_lookup_slice(self._fd, key_size, value_size, self._token, count)
        entries = [
            (keys[key_size * i : key_size * (i + 1)], values[value_size * i : value_size * (i + 1)])
            for i in range(len(keys) // key_size)
        ]
        self._met += len(entries)
        if self._token is None:
            self.known, self._met = self._met, 0
        return entries
