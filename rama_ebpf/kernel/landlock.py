"""Taking files away from a process for good: it opens only what lies beneath paths that it names before.

Landlock rules are of a thread and of those that it starts later, so it is set before there are others. It asks nothing
of what is open already. Reference: landlock(7); ``Documentation/userspace-api/landlock.rst``.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ..core.errors import RamaError

__all__ = ["NOTHING", "LandlockUnavailable", "Network", "abi", "restrict"]

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on every architecture
_VERSION: Final = 1
_PATH_BENEATH: Final = 1
_PATH: Final = struct.Struct("=Qi")  # struct landlock_path_beneath_attr, packed
_RULESET: Final = struct.Struct("=QQQ")  # handled file system and network accesses, scopes
_SIZES: Final = {1: 8, 2: 8, 3: 8, 4: 16, 5: 16}
"""How much of the structure a kernel of this ABI knows; later ones know all that is written here."""
_O_PATH: Final = 0o10000000

_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 9
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_LAST_RIGHT: Final = {1: 12, 2: 13, 3: 14, 4: 14}
"""The last file system right of an ABI; from 5 on it is that of ioctl(2) on devices."""
_LAST_RIGHT_KNOWN: Final = 15
_SCOPES: Final = 1 << 0 | 1 << 1  # abstract Unix sockets, signals
_FIRST_WITH_SCOPES: Final = 6
_FIRST_WITH_NETWORK: Final = 4

_ON_FILES: Final = _WRITE_FILE | _READ_FILE | _TRUNCATE | 1 << 0 | 1 << 15
"""The rights that a rule for something that is no directory may give."""
_READ: Final = _READ_FILE | _READ_DIR
_MAKE: Final = _MAKE_DIR | _MAKE_REG | _MAKE_SOCK
_CHANGE: Final = _READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE | _REFER | _TRUNCATE

_libc = ctypes.CDLL(None, use_errno=True)


class Network(enum.Flag):
    """What may be done with TCP sockets; their values are the kernel's."""

    BIND = 1
    CONNECT = 2


NOTHING: Final = Network(0)


class LandlockUnavailable(RamaError):
    """No rules can be set here; the text says why."""

    kind = "landlock"


def abi() -> int:
    """Return the version of the kernel's interface, 0 if it has none or it is off."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)))


def restrict(read: Iterable[Path], write: Iterable[Path] = (), closed: Network = NOTHING) -> int:
    """Let this thread, and those it starts, open from now on only files beneath ``read``, and change and make them only
    beneath ``write``. Execute nothing. From ABI 4 on nothing that is ``closed`` is done with TCP sockets. From ABI 6 on
    signals reach no process outside, and neither do connections to abstract Unix sockets.

    Paths that are not there are left out; one that is a link stands for where it leads. Returns the kernel's
    :func:`abi`. Needs no_new_privs. Raises :class:`LandlockUnavailable` or OSError.
    """
    version = abi()
    if not version:
        number = ctypes.get_errno()
        why = (
            "is switched off (the kernel's lsm= has no landlock)" if number == errno.EOPNOTSUPP else "is unknown to it"
        )
        raise LandlockUnavailable(f"the kernel takes no file rules: Landlock {why}")
    handled = (2 << _LAST_RIGHT.get(version, _LAST_RIGHT_KNOWN)) - 1
    attributes = _RULESET.pack(
        handled, closed.value if version >= _FIRST_WITH_NETWORK else 0, _SCOPES if version >= _FIRST_WITH_SCOPES else 0
    )
    size = _SIZES.get(version, _RULESET.size)
    ruleset = _call(_CREATE_RULESET, attributes[:size], ctypes.c_size_t(size), 0)
    try:
        for rights, paths in ((_READ, read), (_CHANGE, write)):
            for path in dict.fromkeys(paths):
                _allow(ruleset, path, rights & handled)
        _call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return version


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        fd = os.open(path, _O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # what cannot be reached now cannot be later
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _ON_FILES
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, _PATH.pack(rights, fd), 0)
    finally:
        os.close(fd)


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return result
