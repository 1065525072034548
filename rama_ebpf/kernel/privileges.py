"""Becoming an unprivileged user for good."""

from __future__ import annotations

import ctypes
import os
import pwd
import resource
import signal
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from ..core.errors import RamaError

__all__ = [
    "CAP_BPF",
    "CAP_NET_ADMIN",
    "FALLBACK",
    "WORKERS",
    "UserError",
    "UserIds",
    "can_change_user",
    "die_with_parent",
    "drop_privileges",
    "give_up_capabilities",
    "keep_capabilities",
    "outlive_parent",
    "raise_descriptor_limit",
]

WORKERS: Final = "rama-ebpf"
"""The system user that packages make (``packaging/sysusers.d``)."""
FALLBACK: Final = "nobody"
"""Whom other daemons may be as well."""

CAP_NET_ADMIN: Final = 12
CAP_BPF: Final = 39

_CAP_SETGID, _CAP_SETUID, _CAP_SETPCAP = 6, 7, 8
_CAPABILITY_VERSION_3: Final = 0x20080522
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_KEEPCAPS: Final = 8
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_LAST_CAP_PATH: Final = "/proc/sys/kernel/cap_last_cap"


class UserError(RamaError, ValueError):
    """There is no such user, or it is root; the text names the value and the remedy."""

    kind = "user"


@dataclass(frozen=True, slots=True)
class UserIds:
    """The numbers of an unprivileged user and its primary group, and its name."""

    uid: int
    gid: int
    name: str = ""

    @classmethod
    def of(cls, name: str) -> UserIds:
        """Look up a user by name or number. Raises :class:`UserError` if there is none, or if it is root."""
        try:
            entry = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
        except KeyError:
            raise UserError(f"there is no user {name!r} on this host (getent passwd lists them)") from None
        if entry.pw_uid == 0:
            raise UserError(f"workers must not run as {name!r} (uid 0): name an unprivileged user, e.g. nobody")
        return cls(entry.pw_uid, entry.pw_gid, entry.pw_name)

    @classmethod
    def of_workers(cls) -> UserIds:
        """The system user that is there for workers, or where there is none :data:`FALLBACK`."""
        try:
            return cls.of(WORKERS)
        except UserError:
            return cls.of(FALLBACK)


_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}, {argument}): {os.strerror(number)}")


def raise_descriptor_limit() -> None:
    """Raise the limit of open files to the hard limit: each tunnel takes two descriptors, or six with its pipes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, even if it hangs. Call it after a change of user,
    which clears the setting (prctl(2))."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def outlive_parent() -> None:
    """Take :func:`die_with_parent` back."""
    _prctl(_PR_SET_PDEATHSIG, 0)


def can_change_user() -> bool:
    """Whether this process may become another user: it may lack the capabilities even as root, in a container."""
    with open("/proc/self/status", encoding="ascii") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    return all(effective >> capability & 1 for capability in (_CAP_SETGID, _CAP_SETUID, _CAP_SETPCAP))


def give_up_capabilities() -> None:
    """Give up all capabilities, and the ways to regain them by executing a program, but stay the same user."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _set_capabilities(())


def drop_privileges(user: UserIds) -> None:
    """Become ``user`` with no supplementary groups, no capabilities and no way to get any back.

    Order matters: groups before the user, who could not change them any more; all three user ids, so that none is
    left to return to; and no_new_privs, so that no set-user-ID program restores what is gone. Raises OSError.
    """
    _empty_bounding_set()
    os.setgroups([])
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def keep_capabilities(capabilities: Collection[int], user: UserIds | None) -> None:
    """Keep these capabilities and no others, as ``user`` or as whom we are, with no way to get any back. Raises
    OSError."""
    _empty_bounding_set()
    if user is not None:
        _prctl(_PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _set_capabilities(capabilities)


def _empty_bounding_set() -> None:
    with open(_LAST_CAP_PATH, encoding="ascii") as file:
        last = int(file.read())
    for capability in range(last + 1):
        _prctl(_PR_CAPBSET_DROP, capability)


def _set_capabilities(capabilities: Collection[int]) -> None:
    """Make these the effective and the permitted set; the inheritable one is empty (capset(2))."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    bits = sum(1 << capability for capability in capabilities)
    words = [part for half in (bits & 0xFFFFFFFF, bits >> 32) for part in (half, half, 0)]
    if _libc.capset(header, struct.pack("=6I", *words)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"capset: {os.strerror(number)}")
