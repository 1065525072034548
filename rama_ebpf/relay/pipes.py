"""Pipes for splice(2), kept for reuse and bounded in number."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import Final

__all__ = ["Pipe", "PipePool"]

Pipe = tuple[int, int]
"""Read end, write end."""

_PIPE_SIZE: Final = 256 * 1024
"""Bytes: four times the kernel's own choice saves a sixth of the CPU and moves a fifth more; more gains little."""
_LARGE: Final = 64
"""So many pipes are made that large: a user has 64 MiB for all (pipe(7), pipe-user-pages-soft)."""


class PipePool:
    """Empty pipes for reuse: at most ``limit`` are out at once, and ``keep`` are held while nobody needs them.

    ``refused`` counts how often there was none to be had.
    """

    def __init__(self, *, limit: int = 1024, keep: int = 16) -> None:
        self.refused = 0
        self._limit: Final = limit
        self._keep: Final = keep
        self._free: list[Pipe] = []
        self._out = 0

    def take(self) -> Pipe | None:
        """Return an empty pipe, or None if the limit is reached or the system gives no more."""
        if self._free:
            self._out += 1
            return self._free.pop()
        if self._out < self._limit:
            try:
                pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                self.refused += 1  # EMFILE, ENFILE: the caller copies instead
                return None
            if self._out < _LARGE:
                with contextlib.suppress(OSError):  # EPERM: this user has no pages left for it, and it is as it is
                    fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
            self._out += 1
            return pipe
        self.refused += 1
        return None

    def give(self, pipe: Pipe) -> None:
        """Take an empty pipe back."""
        self._out -= 1
        if len(self._free) < self._keep:
            self._free.append(pipe)
        else:
            _close(pipe)

    def destroy(self, pipe: Pipe) -> None:
        """Take a pipe back that may still hold bytes; they are lost."""
        self._out -= 1
        _close(pipe)

    def clear(self) -> None:
        """Close the pipes that nobody uses."""
        while self._free:
            _close(self._free.pop())

    def __del__(self) -> None:
        self.clear()


def _close(pipe: Pipe) -> None:
    os.close(pipe[0])
    os.close(pipe[1])
