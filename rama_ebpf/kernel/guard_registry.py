"""Which listeners are under a guard: one lock file each, which the kernel releases when the guard's process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from pathlib import Path

from .instance import Instance

__all__ = ["GuardEntry", "GuardTaken", "guarding_pids", "sweep"]


class GuardTaken(Exception):
    """A guard of another process has this port."""


def _directory(instance: Instance) -> Path:
    return instance.run_dir.parent / ".guards"  # no instance has such a name


class GuardEntry:
    """That this process guards a port of a network namespace. Raises :class:`GuardTaken` if another one does."""

    def __init__(self, instance: Instance, namespace: int, port: int) -> None:
        directory = _directory(instance)
        directory.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        if directory.lstat().st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, f"{directory} belongs to another user: remove it")
        self._path = directory / f"{namespace:x}-{port}"
        while True:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held = _described(self._fd)
                os.close(self._fd)
                raise GuardTaken(
                    f"port {port} is under the guard of process {held.get('pid', 'unknown')} (instance "
                    f"{held.get('instance', 'unknown')!r}): end that one first, or have it guard all of them"
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if self._path.stat().st_ino == os.fstat(self._fd).st_ino:
                    break
            os.close(self._fd)  # it was removed before it was locked
        os.pwrite(self._fd, json.dumps({"pid": os.getpid(), "instance": instance.name}).encode().ljust(96), 0)

    def close(self) -> None:
        """Guard it no longer."""
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1
            with contextlib.suppress(OSError):  # others are in there
                self._path.parent.rmdir()


def _described(fd: int) -> dict[str, object]:
    try:
        found = json.loads(os.pread(fd, 256, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def guarding_pids(instance: Instance) -> set[int]:
    """Return the processes that guard listeners by the policy of an instance."""
    found: set[int] = set()
    for path in _directory(instance).glob("*"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                held = _described(fd)
                if held.get("instance") == instance.name and _is_held(fd) and isinstance(held.get("pid"), int):
                    found.add(int(str(held["pid"])))
            finally:
                os.close(fd)
    return found


def _is_held(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def sweep(instance: Instance) -> None:
    """Remove what guards left that were killed."""
    directory = _directory(instance)
    for path in directory.glob("*"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if not _is_held(fd):
                    path.unlink()
            finally:
                os.close(fd)
    with contextlib.suppress(OSError):
        directory.rmdir()
