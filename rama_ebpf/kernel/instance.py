"""Where an instance keeps its things: pins on bpffs, locks and state under /run, a cgroup of its own."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from . import abi
from .bpffs import BPFFS
from .policy_lock import PolicyBusy, PolicyLock
from .suspended import stopped_hint

__all__ = ["Instance", "InstanceBusy", "PolicyBusy", "ServerLock", "state_root"]

_PATIENCE: Final = 30.0
_MOST_BYTES: Final = 4 << 20


def _run_root() -> Path:
    if os.geteuid() == 0:
        return Path("/run/rama-ebpf")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "rama-ebpf" if runtime else Path(f"/tmp/rama-ebpf-{os.getuid()}")


def state_root() -> Path:
    """Return the directory of what outlives the machine's uptime, of all instances."""
    chosen = os.environ.get("RAMA_EBPF_STATE_DIR")
    if chosen:
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/var/lib/rama-ebpf")
    home = os.environ.get("XDG_STATE_HOME")
    if home:
        return Path(home) / "rama-ebpf"
    try:
        return Path.home() / ".local" / "state" / "rama-ebpf"
    except RuntimeError:  # a user without a home, as in containers: what is kept lasts as long as the locks
        return _run_root() / ".state"  # no instance has such a name


class InstanceBusy(RuntimeError):
    """Another server holds the instance. ``pid`` is its process id, 0 if it cannot be told; ``how`` says what it is
    doing, if it does not just serve."""

    def __init__(self, name: str, pid: int, how: str = "") -> None:
        super().__init__(f"instance {name!r} is already served by process {pid or 'unknown'}{how}")
        self.pid = pid


def _whole(path: Path) -> bytes:
    """Read a file. A read that fails raises OSError, whatever its errno: file objects have another word for EAGAIN.
    What is no regular file, or longer than any of ours, raises ValueError: nobody waits for it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
            raise ValueError(f"{path} is none of ours")
        return b"".join(iter(lambda: os.read(fd, 1 << 16), b""))
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class Instance:
    """A named instance of the proxy: 1–32 characters of ``[a-z0-9_-]``. Raises ValueError for another name."""

    name: str = "default"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9_-]{1,32}", self.name):
            raise ValueError(f"instance name {self.name!r}: use 1 to 32 characters of a-z, 0-9, _ and -")

    @property
    def pin_root(self) -> Path:
        return BPFFS / "rama-ebpf" / self.name

    @property
    def pin_dir(self) -> Path:
        """Where the maps are pinned. The layout's number is part of the path: a newer version never misreads them."""
        return self.pin_root / f"layout-{abi.constants()['LAYOUT_VERSION']}"

    @property
    def pinned(self) -> bool:
        """Whether this process finds pinned maps: False too where it may not look, as another user than root."""
        try:
            return self.pin_dir.is_dir()
        except PermissionError:
            return False

    @property
    def run_dir(self) -> Path:
        return _run_root() / self.name

    def make_run_dir(self) -> None:
        """Make :attr:`run_dir`. Raises PermissionError if it, or its parent, belongs to somebody else.

        Without privileges it may lie below ``/tmp``, where anybody could have made it first.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True, mode=0o755)
        for directory in (self.run_dir.parent, self.run_dir):
            if directory.lstat().st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, f"{directory} belongs to another user: remove it")

    @property
    def state_dir(self) -> Path:
        """Where the journal, the bans and the copies of feeds are kept; ``$RAMA_EBPF_STATE_DIR`` chooses the parent."""
        return state_root() / self.name

    @property
    def clients_file(self) -> Path:
        """Where the record of who came is kept, if it is."""
        return self.state_dir / "clients"

    @property
    def feeds_dir(self) -> Path:
        """Where the last good copies of feeds are kept."""
        return self.state_dir / "feeds"

    @property
    def relay_record(self) -> Path:
        """Where it is noted that the running kernel has passed the relay's self-test: for all instances."""
        return self.run_dir.parent / "relay-selftest.json"

    @property
    def diversion(self) -> Path:
        """The file that is there while there may be rules and routes of :mod:`.diversion`."""
        return self.run_dir / "diversion"

    @property
    def control_socket(self) -> Path:
        return self.run_dir / "control.sock"

    @property
    def cgroup_name(self) -> str:
        return f"rama-ebpf-{self.name}"

    def read_state(self) -> dict[str, object]:
        """Return what the server wrote about itself last, or an empty dict."""
        try:
            state = json.loads(_whole(self.run_dir / "state.json"))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}  # never served, torn by a crash while it was written, or none of ours
        return state if isinstance(state, dict) else {}

    def write_state(self, state: dict[str, object]) -> None:
        """Replace the server's description of itself, atomically."""
        temporary = self.run_dir / "state.json.new"
        temporary.write_text(json.dumps(state, indent=1), encoding="utf-8")
        temporary.replace(self.run_dir / "state.json")

    def policy_lock(self, patience: float = _PATIENCE) -> PolicyLock:
        """Return the lock of those who change the policy, to be waited for so many seconds."""
        return PolicyLock(self.name, self.run_dir / "policy.lock", self.make_run_dir, patience)

    def serving_pid(self) -> int | None:
        """Return the pid of the live server, 0 if there is one but its pid is unknown, None if there is none."""
        try:
            with ServerLock(self):
                return None
        except InstanceBusy as busy:
            return busy.pid
        except FileNotFoundError:
            return None
        except PermissionError:
            return self._recorded_pid()

    def doing(self, pid: int) -> str:
        """Say what the server with this pid is doing if it does not just serve, to follow its name; else nothing."""
        if hint := stopped_hint(pid):
            return hint
        state = self.read_state()
        if state.get("pid") != pid or state.get("starting") is True:
            return ", which is starting"
        if state.get("stopping") is not True:
            return ""
        return f", which is stopping: its connections have {self.time_to_stop(state)}to end"

    @staticmethod
    def time_to_stop(state: Mapping[str, object]) -> str:
        """How long the connections of a server that stops may last at most; nothing if it does not say."""
        until = state.get("ends_by")
        return f"up to {max(0.0, until - time.time()):.0f} s " if isinstance(until, int | float) else ""

    def _recorded_pid(self) -> int | None:
        """Of another user's server, whose lock we may not try: what it wrote about itself, if that process lives."""
        pid = self.read_state().get("pid")
        return pid if isinstance(pid, int) and Path(f"/proc/{pid}").exists() else None


class ServerLock:
    """The lock that a server holds on its instance as long as it lives; a context manager.

    Entering raises :class:`InstanceBusy` if another process holds it. The kernel releases it when the holder dies,
    however it dies.
    """

    def __init__(self, instance: Instance, *, create: bool = False) -> None:
        self._instance = instance
        self._create = create
        self._fd = -1

    def __enter__(self) -> ServerLock:
        flags = os.O_RDWR | os.O_CLOEXEC
        if self._create:
            self._instance.make_run_dir()
            flags |= os.O_CREAT
        # Nobody else may open it: with any descriptor of it another user could lock the server out.
        self._fd = os.open(self._instance.run_dir / "server.lock", flags, 0o600)
        try:
            if self._create:
                os.fchmod(self._fd, 0o600)  # an earlier version made it readable
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(self._fd, 32, 0).decode(errors="replace").strip()
            self.__exit__()
            pid = int(text) if text.isdigit() else 0
            raise InstanceBusy(self._instance.name, pid, self._instance.doing(pid)) from None
        if self._create:
            self.name_us()
        return self

    @classmethod
    def adopt(cls, instance: Instance, fd: int) -> ServerLock:
        """Return the lock that another process holds, by a descriptor of it, to be held by both: it is free when both
        have let go of it. It is entered already."""
        lock = cls(instance)
        lock._fd = fd
        return lock

    def close(self) -> None:
        """Let go of it."""
        self.__exit__()

    def fileno(self) -> int:
        """The descriptor, for a process that is to hold the lock as well."""
        return self._fd

    def name_us(self) -> None:
        """Have :meth:`Instance.serving_pid` say that this process is the server."""
        text = str(os.getpid()).encode()
        os.pwrite(self._fd, text.ljust(32, b"\n"), 0)  # in one step: never empty, never of two numbers

    def __exit__(self, *_exc: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
