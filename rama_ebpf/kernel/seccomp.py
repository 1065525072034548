"""Leaving a process only the system calls that a service of a proxy makes.

The filter stays over ``fork`` and ``execve``, and nobody can take it off (seccomp(2), seccomp_rule_add(3)). Refused
calls fail, they do not kill: a library that tries one falls back. The kernel's audit log names each (``seccomp``
records, where ``/proc/sys/kernel/seccomp/actions_logged`` has ``errno`` and audit runs).

:mod:`.system_calls` has the lists.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from typing import Any, Final

from ..core.errors import RamaError
from .system_calls import ALLOWED, REFUSED

__all__ = ["SeccompUnavailable", "keep_system_calls", "load_library"]

_FAMILIES: Final = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
_TYPES: Final = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)
_LAST_FAMILY: Final = 64
_SOCKET_TYPE_MASK: Final = 0xF
_CLONE_THREAD: Final = 0x10000
_CLONE_NEW: Final = 0x7E020080  # all of CLONE_NEW…: namespaces
# Of bpf(2) the relay and the local policy need what reads and writes maps whose descriptors they were given.
_BPF_ON_MAPS: Final = (1, 2, 3, 4, 15, 21, 24, 25, 26, 27)
_LAST_BPF_COMMAND: Final = 64
# Not, among many: TIOCSTI, which types on a terminal, and what configures devices and interfaces.
_REQUESTS: Final = (
    *(0x5401, 0x5411, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),  # TCGETS, TIOCOUTQ, TIOCGWINSZ, FIONREAD, FIO*
    *(0x894B, 0x8910, 0x8933),  # SIOCOUTQNSD; SIOCGIFNAME and SIOCGIFINDEX, for zones
)
# GET_DUMPABLE, SET_NAME, GET_NAME, CAPBSET_READ, GET_NO_NEW_PRIVS, SET_VMA
_PRCTLS: Final = (3, 15, 16, 23, 39, 0x53564D41)


class SeccompUnavailable(RamaError):
    """No filter can be set here; the text says why."""

    kind = "seccomp"


def load_library() -> Any:
    """Return libseccomp's binding. To find the library it starts ldconfig(8), or writes files: not in a sandbox. Raises
    :class:`SeccompUnavailable`."""
    try:
        import pyseccomp  # looks for the library when it is imported, and raises if there is none
    except (ImportError, RuntimeError, OSError) as error:
        raise SeccompUnavailable(f"libseccomp cannot be used ({error}): install libseccomp2") from error
    return pyseccomp


def keep_system_calls() -> None:
    """Set the filter for all threads of this process. Raises :class:`SeccompUnavailable`.

    Calls that are neither allowed nor known to be refused do not exist (ENOSYS), so that libraries take older ones. Of
    those that are allowed, signals may be sent to this very process only, threads started but no processes and no
    namespaces, sockets made of the families Unix, IPv4 and IPv6 and not raw. Needs no_new_privs, as :mod:`.privileges`
    leaves a process.
    """
    seccomp = load_library()
    try:
        rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.ENOSYS))
        rules.set_attr(seccomp.Attr.CTL_TSYNC, 1)
        rules.set_attr(seccomp.Attr.CTL_LOG, 1)
        rules.set_attr(seccomp.Attr.CTL_OPTIMIZE, 2)
        for name in sorted(ALLOWED):
            _add(rules, seccomp.ALLOW, name)
        for name in REFUSED:
            _add(rules, seccomp.ERRNO(errno.EPERM), name)
        _judge_arguments(rules, seccomp)
        rules.load()
    except (OSError, ValueError, RuntimeError) as error:
        raise SeccompUnavailable(f"the kernel takes no seccomp filter: {error}") from error


def _add(rules: Any, action: int, name: str, *arguments: Any) -> None:
    try:
        rules.add_rule(action, name, *arguments)
    except ValueError:
        return  # a call that this libseccomp, or this architecture, does not know: it stays what is not there


def _judge_arguments(rules: Any, seccomp: Any) -> None:
    """The calls that are allowed with some arguments only. The rules of one call exclude each other."""
    refuse = seccomp.ERRNO(errno.EPERM)

    def one_of(name: str, index: int, values: Iterable[int]) -> None:
        for value in values:
            _add(rules, seccomp.ALLOW, name, seccomp.Arg(index, seccomp.EQ, value))

    def only(name: str, index: int, value: int) -> None:
        one_of(name, index, (value,))
        _add(rules, refuse, name, seccomp.Arg(index, seccomp.NE, value))

    namespaces_or_thread = seccomp.Arg(0, seccomp.MASKED_EQ, _CLONE_NEW | _CLONE_THREAD, _CLONE_THREAD)
    _add(rules, seccomp.ALLOW, "clone", namespaces_or_thread)
    _add(rules, refuse, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, _CLONE_THREAD, 0))
    for name in ("kill", "tgkill"):
        only(name, 0, os.getpid())
    only("prlimit64", 0, 0)
    one_of("ioctl", 1, _REQUESTS)
    one_of("prctl", 0, _PRCTLS)
    _judge_sockets(rules, seccomp)
    for command in range(_LAST_BPF_COMMAND + 1):
        action = seccomp.ALLOW if command in _BPF_ON_MAPS else refuse
        _add(rules, action, "bpf", seccomp.Arg(0, seccomp.EQ, command))
    _add(rules, refuse, "bpf", seccomp.Arg(0, seccomp.GT, _LAST_BPF_COMMAND))


def _judge_sockets(rules: Any, seccomp: Any) -> None:
    other_family = seccomp.ERRNO(errno.EAFNOSUPPORT)  # as where there is none: getaddrinfo(3) goes on without netlink
    for family in range(_LAST_FAMILY + 1):
        this = seccomp.Arg(0, seccomp.EQ, family)
        if family not in _FAMILIES:
            _add(rules, other_family, "socket", this)
            continue
        for kind in range(_SOCKET_TYPE_MASK + 1):
            action = seccomp.ALLOW if kind in _TYPES else seccomp.ERRNO(errno.EPERM)
            _add(rules, action, "socket", this, seccomp.Arg(1, seccomp.MASKED_EQ, _SOCKET_TYPE_MASK, kind))
    _add(rules, other_family, "socket", seccomp.Arg(0, seccomp.GT, _LAST_FAMILY))
