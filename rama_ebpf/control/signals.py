"""Signals of a server besides those of a supervisor: SIGTERM while it starts, SIGTSTP of its terminal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator

from ..kernel.policy_lock import stop_without_locks

__all__ = ["EarlyStop", "end_after", "stopping_early", "suspend"]

log = logging.getLogger("rama_ebpf")


class _Stopped(BaseException):
    """Not an Exception: nothing in between takes it for a failure of its own."""


class EarlyStop:
    """Whether SIGTERM has come. Until :meth:`wait_from_now_on` it ends the start at once, afterwards it is noted."""

    def __init__(self) -> None:
        self.asked = False
        self._waits = False

    def wait_from_now_on(self) -> None:
        """There will be an event loop, in whose callbacks nothing may be raised; it asks for :attr:`asked`."""
        self._waits = True

    def handle(self, _number: int, _frame: object) -> None:
        """The signal's handler."""
        if self.asked:
            return  # what was begun is being taken back
        self.asked = True
        if not self._waits:
            raise _Stopped


@contextlib.contextmanager
def stopping_early() -> Iterator[EarlyStop]:
    """Have SIGTERM stop what is done in the block; then the process ends by that signal, as whoever sent it expects."""
    stop = EarlyStop()
    before = signal.signal(signal.SIGTERM, stop.handle)
    try:
        yield stop
    except _Stopped:
        log.warning("stopped while starting: nothing was served")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # of end_after: it has ended by itself
        signal.signal(signal.SIGTERM, before)


async def suspend() -> None:
    """Stop, as Ctrl-Z wants it, with no lock in our hands: whoever changes the policy is not to wait for us."""
    text = (
        "stopped by its terminal: workers serve by the policy as it is, and nothing else goes on (kill -CONT %d, or fg)"
    )
    log.warning(text, os.getpid())
    began = time.monotonic()
    await asyncio.to_thread(stop_without_locks)
    log.warning("going on after %.1f s", time.monotonic() - began)


def end_after(seconds: float) -> None:
    """End this process in so many seconds, whatever holds it up: by a thread, or where there can be none by SIGALRM. To
    be called in the block of :func:`stopping_early`."""
    timer = threading.Timer(seconds, _end_at_once)
    timer.daemon = True
    try:
        timer.start()
    except RuntimeError:
        signal.signal(signal.SIGALRM, lambda *_: _end_at_once())
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _end_at_once() -> None:
    log.critical("something holds the server up after its drain: it ends now, and the kernel takes the gate away")
    os._exit(1)
