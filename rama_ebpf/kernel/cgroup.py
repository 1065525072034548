"""cgroup v2: find it, make a child of our own cgroup, move processes in and out.

A socket belongs to the cgroup that its creator was in, and programs attached to a cgroup see only the sockets of it.
So the proxy lives in a cgroup of its own, below the one it was started in (which keeps a service manager's
accounting and delegation intact), and the gate cannot touch any other service of the host.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

__all__ = ["CgroupUnavailable", "cgroup2_mount", "leave_and_remove", "make_child", "move_here", "own_cgroup"]


class CgroupUnavailable(OSError):
    """No cgroup v2 hierarchy is mounted, or this process has no place in it."""


def cgroup2_mount() -> Path:
    """Return where cgroup v2 is mounted (on hybrid hosts not ``/sys/fs/cgroup``). Raises CgroupUnavailable."""
    with open("/proc/self/mountinfo", encoding="utf-8") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            if after.startswith("cgroup2 "):
                return Path(before.split()[4].encode().decode("unicode_escape"))
    raise CgroupUnavailable(errno.ENOENT, "no cgroup2 file system is mounted (mount -t cgroup2 none /sys/fs/cgroup)")


def own_cgroup(pid: int | str = "self") -> Path:
    """Return the directory of a process's cgroup v2. Raises CgroupUnavailable."""
    mount = cgroup2_mount()
    with open(f"/proc/{pid}/cgroup", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("0::"):
                path = mount / line.rstrip("\n")[3:].lstrip("/")
                if path.is_dir():
                    return path
                raise CgroupUnavailable(errno.ENOENT, f"the cgroup of this process is not visible below {mount}")
    raise CgroupUnavailable(errno.ENOENT, "this process is in no cgroup v2")


def make_child(name: str) -> Path:
    """Make (or reuse) the child ``name`` of our own cgroup and return its directory.

    If this process already is in a cgroup of that name, that one is returned.
    """
    own = own_cgroup()
    child = own if own.name == name else own / name
    child.mkdir(exist_ok=True)
    return child


def move_here(cgroup: Path) -> None:
    """Move this process, with all its threads, into ``cgroup``. Sockets that it already has stay where they were."""
    (cgroup / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")


def leave_and_remove(cgroup: Path) -> None:
    """Move this process to the parent if it is inside, and remove the cgroup.

    Raises OSError EBUSY while other processes live in it; a cgroup that is gone already is fine.
    """
    if not cgroup.is_dir():
        return
    if own_cgroup() == cgroup:
        move_here(cgroup.parent)
    try:
        cgroup.rmdir()
    except FileNotFoundError:
        return
