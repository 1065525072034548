"""Hearing of the end of a child on the event loop (pidfd_open(2))."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator

__all__ = ["exit_watch"]


@contextlib.contextmanager
def exit_watch(pid: int, ended: Callable[[], None]) -> Iterator[None]:
    """Have ``ended`` called once, on the running loop, when a child that was not waited for has ended. Raises OSError,
    as for want of descriptors."""
    loop = asyncio.get_running_loop()
    fd = os.pidfd_open(pid)

    def told() -> None:
        loop.remove_reader(fd)
        ended()

    loop.add_reader(fd, told)
    try:
        yield
    finally:
        loop.remove_reader(fd)
        os.close(fd)
