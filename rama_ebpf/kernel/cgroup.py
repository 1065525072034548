"""cgroup v2: find it, make a child of our own cgroup, move processes in and out.

A socket belongs to the cgroup that its creator was in, and programs attached to a cgroup see only the sockets of it.
So the proxy lives in a cgroup of its own, below the one it was started in (which keeps a service manager's
accounting and delegation intact), and the gate cannot touch any other service of the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import time
from pathlib import Path, PurePosixPath
from typing import Final

__all__ = [
    "CgroupUnavailable",
    "cgroup2_mount",
    "enter_child",
    "leave_and_remove",
    "make_child",
    "move",
    "move_all",
    "move_here",
    "open_by_id",
    "own_cgroup",
    "remove_if_empty",
]

_DYING_SECONDS: Final = 2.0
_KERNFS_HANDLE: Final = 0xFE  # FILEID_KERNFS of include/linux/exportfs.h
_HANDLE: Final = struct.Struct("=IiQ")  # struct file_handle with the id of a cgroup


class CgroupUnavailable(OSError):
    """No cgroup v2 hierarchy is mounted, or this process has no place in it."""


def cgroup2_mount() -> Path:
    """Return where cgroup v2 is mounted (on hybrid hosts not ``/sys/fs/cgroup``). Raises CgroupUnavailable."""
    return _mount()[0]


def _mount() -> tuple[Path, str]:
    """Return the mount point, and which cgroup is mounted there, as our cgroup namespace names it."""
    with open("/proc/self/mountinfo", encoding="utf-8") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            if after.startswith("cgroup2 "):
                fields = before.split()
                return Path(fields[4].encode().decode("unicode_escape")), fields[3]
    raise CgroupUnavailable(errno.ENOENT, "no cgroup2 file system is mounted (mount -t cgroup2 none /sys/fs/cgroup)")


def own_cgroup(pid: int | str = "self") -> Path:
    """Return the directory of a process's cgroup v2. Raises CgroupUnavailable."""
    mount, root = _mount()
    with open(f"/proc/{pid}/cgroup", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("0::"):
                path = PurePosixPath(line.rstrip("\n")[3:])
                # In a container that was given the host's hierarchy but a cgroup namespace of its own, the root is
                # "/../..": our cgroup is somewhere below, and nobody can tell where.
                if path.is_relative_to(root) and ".." not in path.parts and (mount / path.relative_to(root)).is_dir():
                    return mount / path.relative_to(root)
                raise CgroupUnavailable(
                    errno.ENOENT,
                    f"the cgroup of this process is not visible below {mount} (in a container: --cgroupns=host)",
                )
    raise CgroupUnavailable(errno.ENOENT, "this process is in no cgroup v2")


def open_by_id(identity: int) -> int:
    """Open a cgroup's directory by its id, which is its inode, and return a descriptor: open_by_handle_at(2).

    Raises OSError: ESTALE if it is gone, EPERM without CAP_DAC_READ_SEARCH.
    """
    mount = os.open(cgroup2_mount(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        handle = ctypes.create_string_buffer(_HANDLE.pack(8, _KERNFS_HANDLE, identity), _HANDLE.size)
        libc = ctypes.CDLL(None, use_errno=True)
        fd = int(libc.open_by_handle_at(mount, handle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        if fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"cgroup {identity}: {os.strerror(number)}")
        return fd
    finally:
        os.close(mount)


def enter_child(name: str) -> Path:
    """Move this process into the child ``name`` of its cgroup, made if it is not there; return where it is now.

    Where cgroups may not be changed (in a container, under systemd's ``ProtectControlGroups=``) it stays, and the
    cgroup it is in is returned: the one that was made for this service. Sockets that it already has stay where they
    were.
    """
    own = own_cgroup()
    if own.name == name:
        return own
    child = own / name
    try:
        child.mkdir(exist_ok=True)
        move_here(child)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
        return own
    return child


def make_child(cgroup: Path, name: str) -> Path:
    """Make a cgroup below another, if it is not there, and return it."""
    child = cgroup / name
    child.mkdir(exist_ok=True)
    return child


def move(pid: int, cgroup: Path) -> None:
    """Move a process, with all its threads, into ``cgroup``. Raises ProcessLookupError if it has ended."""
    (cgroup / "cgroup.procs").write_text(str(pid), encoding="ascii")


def move_all(cgroup: Path, to: Path) -> None:
    """Move the processes of one cgroup, not those of its children, to another. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):  # it has been removed: nobody is there
        for pid in (cgroup / "cgroup.procs").read_text(encoding="ascii").split():
            with contextlib.suppress(ProcessLookupError):
                move(int(pid), to)


def move_here(cgroup: Path) -> None:
    """Move this process, with all its threads, into ``cgroup``."""
    move(os.getpid(), cgroup)


def leave_and_remove(cgroup: Path) -> None:
    """Move this process to the parent if it is inside, and remove the cgroup with its children.

    Workers of a server that was killed may take a moment to die: they have up to two seconds. Raises OSError EBUSY if
    other processes live in it then; a cgroup that is gone already is fine.
    """
    if not cgroup.is_dir():
        return
    if own_cgroup() == cgroup:
        move_here(cgroup.parent)
    deadline = time.monotonic() + _DYING_SECONDS
    while "populated 1" in (cgroup / "cgroup.events").read_text(encoding="ascii") and time.monotonic() < deadline:
        time.sleep(0.01)
    with contextlib.suppress(FileNotFoundError):  # somebody else removes it as well
        _remove_tree(cgroup)


def _remove_tree(cgroup: Path) -> None:
    for child in cgroup.iterdir():
        if child.is_dir():
            with contextlib.suppress(FileNotFoundError):
                _remove_tree(child)
    cgroup.rmdir()


def remove_if_empty(cgroup: Path) -> None:
    """Remove a cgroup with its children if no process lives in it."""
    with contextlib.suppress(OSError):  # gone already, or somebody still lives there
        _remove_tree(cgroup)
