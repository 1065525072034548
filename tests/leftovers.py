"""What runs that were killed left behind. The next run ends their processes and removes the rest.

Whatever a run makes carries the id of the process that made it in its name; directories in /tmp, which PID namespaces
may share, are locked by it instead. It is left when that process is gone; what a process holds that we may not end,
because it lives in another PID namespace, stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from rama_ebpf.kernel import cgroup
from rama_ebpf.kernel.bpffs import BPFFS
from rama_ebpf.kernel.instance import Instance, InstanceBusy
from rama_ebpf.loader import unload

from .lab import PREFIX, TEMPORARY, wait_for

__all__ = ["has_ended", "left_of", "sweep"]

_NAMESPACES = Path("/run/netns")
_INSTANCES = Path("/run/rama-ebpf")
_CGROUPS = ("rama-ebpf-test-", "elsewhere-")
_NEW = 60.0
_OWNED = re.compile(rf"(?:{PREFIX}|test|rama-ebpf-test|elsewhere)-(\d+)(?:-.*)?")


def left_of(pid: int) -> list[Path]:
    """Return what a process has made that is there now: namespaces, pins, files below /run, cgroups."""
    return [path for path in _made() if _maker(path) == pid]


def sweep() -> list[Path]:
    """Remove what processes that have ended left behind; return what that was."""
    found = [path for path in _made() if _is_left(path)]
    for path in found:
        with contextlib.suppress(FileNotFoundError):
            _end(_inside(path))
    for path in found:
        with contextlib.suppress(FileNotFoundError):  # another run sweeps beside us
            _remove(path)
    for path in _forsaken():
        found.append(path)
        shutil.rmtree(path, ignore_errors=True)
    return [path for path in found if not os.path.lexists(path)]


def _made() -> list[Path]:
    made = [*_NAMESPACES.glob(f"{PREFIX}-*"), *(BPFFS / "rama-ebpf").glob("test-*"), *_INSTANCES.glob("test-*")]
    with contextlib.suppress(cgroup.CgroupUnavailable):
        # Of our own cgroup only: elsewhere may be runs of other PID namespaces, to which an id says something else.
        made += [path for name in _CGROUPS for path in cgroup.own_cgroup().glob(f"{name}*")]
    return [path for path in made if _OWNED.fullmatch(path.name)]


def _forsaken() -> Iterator[Path]:
    """Directories in /tmp whose maker is gone; not new ones, which it may be about to lock."""
    for path in Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*"):
        with contextlib.suppress(FileNotFoundError):
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(held).st_ctime > _NEW:
                    yield path
            except BlockingIOError:
                pass  # it lives
            finally:
                os.close(held)


def _is_cgroup(path: Path) -> bool:
    return path.name.startswith(_CGROUPS)


def _maker(path: Path) -> int:
    owned = _OWNED.fullmatch(path.name)
    assert owned is not None
    return int(owned[1])


def _is_left(path: Path) -> bool:
    """Whether its maker is gone. A process of that id which began after it was made is another one."""
    try:
        ticks = Path(f"/proc/{_maker(path)}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return True
    booted = re.search(r"^btime (\d+)", Path("/proc/stat").read_text(), flags=re.M)
    assert booted is not None
    began = int(booted[1]) + int(ticks) / os.sysconf("SC_CLK_TCK")
    try:
        return began > path.lstat().st_mtime + 2
    except FileNotFoundError:
        return False


def _inside(path: Path) -> list[int]:
    """The processes in a namespace or a cgroup, and the server of an instance."""
    if path.parent == _NAMESPACES:
        listed = subprocess.run(["ip", "netns", "pids", path.name], check=False, capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]
    if _is_cgroup(path):
        return [int(pid) for procs in path.rglob("cgroup.procs") for pid in procs.read_text().split()]
    if path.parent == _INSTANCES:
        pid = Instance(path.name).serving_pid()
        return [pid] if pid else []
    return []


def _end(pids: Iterable[int]) -> None:
    here = os.readlink("/proc/self/ns/pid")
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if pid > 1 and pid != os.getpid() and os.readlink(f"/proc/{pid}/ns/pid") == here:
                os.kill(pid, signal.SIGKILL)
                wait_for(lambda pid=pid: has_ended(pid), what=f"the end of process {pid}")


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits for its parent only."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _remove(path: Path) -> None:
    if path.parent == _NAMESPACES:
        if not _inside(path):
            subprocess.run(["ip", "netns", "delete", path.name], check=False, capture_output=True)
    elif _is_cgroup(path):
        for directory in sorted(path.glob("**/"), reverse=True):
            with contextlib.suppress(OSError):  # somebody lives there
                directory.rmdir()
    else:
        with contextlib.suppress(InstanceBusy):
            unload(Instance(path.name))
