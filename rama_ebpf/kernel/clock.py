"""The wall clock: whether it can be trusted, and when it is set. timerfd_create(2), adjtimex(2)."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import struct
import time
from collections.abc import Iterator
from typing import Final

__all__ = ["ClockSteps", "is_synchronized"]

_TIMER_ABSTIME: Final = 1  # TFD_TIMER_ABSTIME, linux/timerfd.h
_CANCEL_ON_SET: Final = 2  # TFD_TIMER_CANCEL_ON_SET
_FLAGS: Final = os.O_NONBLOCK | os.O_CLOEXEC  # TFD_NONBLOCK, TFD_CLOEXEC
_FAR: Final = 10**9  # seconds: a time that is not reached, and fits wherever time_t does not

_TIMEX_BYTES: Final = 208  # struct timex, linux/timex.h: `modes` is the first member, `status` the sixth
_STATUS_AT: Final = struct.calcsize("@iqqqq")
_UNSYNCHRONIZED: Final = 0x40  # STA_UNSYNC
_TIME_ERROR: Final = 5

_libc = ctypes.CDLL(None, use_errno=True)


def is_synchronized() -> bool:
    """Whether the kernel has been told (by NTP or PTP) that the wall clock is right. False where nobody tells it."""
    buffer = ctypes.create_string_buffer(_TIMEX_BYTES)
    state = _libc.adjtimex(buffer)
    if state < 0:
        return False
    (status,) = struct.unpack_from("@i", buffer, _STATUS_AT)
    return state != _TIME_ERROR and not status & _UNSYNCHRONIZED


class ClockSteps:
    """Tells when the wall clock is set to another time. A context manager."""

    def __init__(self) -> None:
        self._fd = _libc.timerfd_create(time.CLOCK_REALTIME, _FLAGS)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), f"timerfd_create: {os.strerror(ctypes.get_errno())}")
        self._arm()

    def _arm(self) -> None:
        value = struct.pack("@qqqq", 0, 0, int(time.time()) + _FAR, 0)
        if _libc.timerfd_settime(self._fd, _TIMER_ABSTIME | _CANCEL_ON_SET, value, None) < 0:
            raise OSError(ctypes.get_errno(), f"timerfd_settime: {os.strerror(ctypes.get_errno())}")

    def __enter__(self) -> ClockSteps:
        return self

    def __exit__(self, *_exc: object) -> None:
        os.close(self._fd)

    async def wait(self) -> None:
        """Return when the clock has been set since the last call."""
        loop = asyncio.get_running_loop()
        while True:
            with self._readable(loop) as readable:
                await readable
            try:
                os.read(self._fd, 8)
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno != errno.ECANCELED:
                    raise
                self._arm()
                return
            self._arm()  # it has run for thirty years

    @contextlib.contextmanager
    def _readable(self, loop: asyncio.AbstractEventLoop) -> Iterator[asyncio.Future[None]]:
        future: asyncio.Future[None] = loop.create_future()

        def once() -> None:
            if not future.done():
                future.set_result(None)

        loop.add_reader(self._fd, once)
        try:
            yield future
        finally:
            loop.remove_reader(self._fd)
