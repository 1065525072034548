"""The journal: who changed the policy, when, and what. It survives restarts.

One JSON object a line, appended with a single write, so that several processes can write at once and a crash can tear
the last line at most; a torn line is skipped when reading. At ``max_bytes`` the file is renamed to ``.1``, which
replaces the one before, so two files are the most there is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeGuard

from ..kernel.policy_lock import flock_within
from .atomic import bring_to_disk, open_regular

__all__ = ["Journal", "acting_for", "actor"]

log = logging.getLogger(__name__)

_NO_LOGIN: Final = 2**32 - 1
_PATIENCE: Final = 2.0
"""Seconds to wait for others who write an entry."""


_asking: ContextVar[Mapping[str, object] | None] = ContextVar("asking", default=None)


@contextlib.contextmanager
def acting_for(uid: int, pid: int) -> Iterator[None]:
    """Changes made inside are noted as those of another process, which asked for them."""
    found: dict[str, object] = {"uid": uid, "pid": pid}
    with contextlib.suppress(OSError):  # it has ended already
        found["command"] = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
        found |= _login(pid)
    token = _asking.set(found)
    try:
        yield
    finally:
        _asking.reset(token)


def actor() -> Mapping[str, object]:
    """Return who changes something: for whom this process acts, or who runs it - the login user behind sudo, the
    effective one, the process and its command."""
    asking = _asking.get()
    if asking is not None:
        return asking
    pid = os.getpid()
    found: dict[str, object] = {"uid": os.geteuid(), "pid": pid, "command": Path(sys.argv[0]).name, **_login(pid)}
    sudo = os.environ.get("SUDO_USER")
    if sudo:
        found["sudo_user"] = sudo
    return found


def _login(pid: int) -> dict[str, object]:
    try:
        uid = int(Path(f"/proc/{pid}/loginuid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return {}  # no audit support
    return {} if uid == _NO_LOGIN else {"login_uid": uid}


class Journal:
    """The journal in a file."""

    def __init__(self, path: Path, *, max_bytes: int = 4 * 1024 * 1024) -> None:
        self._path = path
        self._max_bytes = max_bytes

    def append(self, what: str, details: Mapping[str, object], at: float | None = None) -> None:
        """Write one entry, of what was done ``at`` a time of :func:`time.time`, or just now.

        A file system that refuses is logged as an error: a change that is in force stays so."""
        when = datetime.now(tz=UTC) if at is None else datetime.fromtimestamp(at, tz=UTC)
        entry = {
            "time": when.isoformat(timespec="milliseconds"),
            "what": what,
            **details,
            "who": dict(actor()),
        }
        line = json.dumps(entry, default=str).encode() + b"\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = open_regular(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            try:
                flock_within(fd, _PATIENCE)
                size = os.fstat(fd).st_size
                if size and os.pread(fd, 1, size - 1) != b"\n":
                    line = b"\n" + line  # the last line was torn by a crash
                os.write(fd, line)
                if size + len(line) > self._max_bytes and self._is_current(fd):
                    os.rename(self._path, self._path.with_name(self._path.name + ".1"))
            finally:
                os.close(fd)
        except OSError as error:
            log.error("cannot write the journal %s: %s", self._path, error)

    def sync(self) -> None:
        """Have what was appended outlive a power failure, too. A disk that refuses is logged as an error."""
        try:
            bring_to_disk(self._path)
        except FileNotFoundError:
            return  # it was renamed this moment
        except OSError as error:
            log.error("cannot sync the journal %s: %s", self._path, error)

    def _is_current(self, fd: int) -> bool:
        """Whether nobody has renamed the file since it was opened."""
        mine = os.fstat(fd)
        return os.path.samestat(mine, os.stat(self._path))

    def read(self, count: int | None = None) -> list[dict[str, object]]:
        """Return the last ``count`` entries (None: all there are), the oldest first."""
        entries: list[dict[str, object]] = []
        for path in (self._path.with_name(self._path.name + ".1"), self._path):
            try:
                fd = open_regular(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            with open(fd, "rb") as file:
                file.seek(max(0, os.fstat(fd).st_size - 2 * self._max_bytes))
                data = file.read(2 * self._max_bytes)
            for line in data.splitlines():
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    continue  # torn
                if _is_entry(entry):
                    entries.append(entry)
        return entries if count is None else entries[len(entries) - min(count, len(entries)) :]


def _is_entry(entry: object) -> TypeGuard[dict[str, object]]:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("time"), str)
        and isinstance(entry.get("what"), str)
        and isinstance(entry.get("who", {}), dict)
    )
