"""The lock of those who change an instance's policy: one file, whoever they are."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from .suspended import stopped_hint

__all__ = ["PolicyBusy", "PolicyLock", "flock_within", "stop_without_locks"]

_TERMINAL_STOPS: Final = {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
_LET_GO_SECONDS: Final = 2.0
_FIRST_PAUSE: Final = 0.001
_LAST_PAUSE: Final = 0.05


def flock_within(fd: int, seconds: float) -> None:
    """Lock a file for this descriptor alone (flock(2)). Raises BlockingIOError if somebody does not let go of it."""
    deadline, pause = time.monotonic() + seconds, _FIRST_PAUSE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LAST_PAUSE)


class _Turnstile:
    """Who of this process is about to have, or has, a policy's lock; closed while the process is stopped."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False

    def enter(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._inside += 1

    def leave(self) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._inside, _LET_GO_SECONDS)
            try:
                os.kill(os.getpid(), signal.SIGSTOP)
            finally:
                self._closed = False
                self._changed.notify_all()


_turnstile = _Turnstile()


def stop_without_locks() -> None:
    """Stop this process, as Ctrl-Z does, when no thread of it has a policy's lock, or after 2 s; return when it goes
    on. It waits: never on an event loop."""
    _turnstile.stop()


class PolicyBusy(TimeoutError):
    """Somebody else has been changing the policy for longer than we wait. The text names the holder."""


class PolicyLock:
    """A context manager, which the thread that has it may enter again. The kernel releases it if the holder dies.

    A terminal does not stop the thread that has it: Ctrl-Z waits until it is let go of.

    It waits: never on an event loop, where entering raises RuntimeError. ``patience`` is for how many seconds; then
    entering raises :class:`PolicyBusy`, which names the holder.
    """

    def __init__(self, name: str, path: Path, prepare: Callable[[], None], patience: float) -> None:
        """``name`` is the instance's, ``path`` the file, and ``prepare`` makes its directory."""
        self.patience = patience
        self._name = name
        self._path = path
        self._prepare = prepare
        self._fd = -1
        self._holder: int | None = None  # a thread of ours
        self._entered = 0
        self._mask: set[signal.Signals | int] = set()

    def __enter__(self) -> PolicyLock:
        if self._holder == threading.get_ident():
            self._entered += 1
            return self
        _refuse_event_loop()
        self._prepare()
        _turnstile.enter()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _TERMINAL_STOPS)
        try:
            fd = self._take()
        except BaseException:
            _go_on(mask)
            raise
        self._fd, self._holder, self._entered, self._mask = fd, threading.get_ident(), 1, mask
        return self

    def _take(self) -> int:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._wait(fd)
            holder = {"pid": os.getpid(), "command": " ".join(sys.argv)[:200], "since": time.time()}
            os.pwrite(fd, json.dumps(holder).encode().ljust(512), 0)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def __exit__(self, *_exc: object) -> None:
        self._entered -= 1
        if not self._entered:
            self._holder = None
            os.close(self._fd)
            _go_on(self._mask)

    def _wait(self, fd: int) -> None:
        try:
            flock_within(fd, self.patience)
        except BlockingIOError:
            raise PolicyBusy(errno.ETIMEDOUT, self._held_by(fd)) from None

    def _held_by(self, fd: int) -> str:
        try:
            holder = json.loads(os.pread(fd, 512, 0))
            since, pid = max(0.0, time.time() - float(holder["since"])), int(holder["pid"])
            who = f"process {pid} ({holder['command']}) has held it for {since:.0f} s{stopped_hint(pid)}"
        except (OSError, ValueError, KeyError, TypeError):
            who = "who holds it cannot be told"
        return f"the policy of instance {self._name!r} is being changed by somebody else: {who}"


def _go_on(mask: set[signal.Signals | int]) -> None:
    """Without the lock the terminal may stop us again; if it was to, it does now."""
    _turnstile.leave()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _refuse_event_loop() -> None:
    events = sys.modules.get("asyncio")  # most commands never import it, and then there is no loop
    if events is not None and events._get_running_loop() is not None:
        raise RuntimeError("the policy's lock waits: take it in a thread, not on an event loop")
