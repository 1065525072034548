"""Leaving a process only the system calls that a service of a proxy makes.

The filter stays over ``fork`` and ``execve``, and nobody can take it off (seccomp(2), seccomp_rule_add(3)). Refused
calls fail, they do not kill: a library that tries one falls back. Who supervises the process may be asked for each
call that no service should want (:mod:`.denials`), and counts it; the kernel's audit log names the others (``seccomp``
records, where ``/proc/sys/kernel/seccomp/actions_logged`` has ``errno`` and audit runs).

:mod:`.system_calls` has the lists.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Final

from ..core.errors import RamaError
from .system_calls import ALLOWED, REFUSED

__all__ = ["FAMILIES", "SeccompUnavailable", "available", "call_name", "keep_system_calls", "load_library"]

FAMILIES: Final = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
"""Of sockets that there may be."""
_LISTENER: Final = "anon_inode:seccomp notify"
_TYPES: Final = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)
_LAST_FAMILY: Final = 64
_GET_ACTION_AVAIL: Final = 2
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


def call_name(number: int) -> str:
    """Return the name of a system call of this architecture, or its number where nobody knows it."""
    try:
        seccomp = load_library()
        return str(seccomp.resolve_syscall(seccomp.Arch.NATIVE, number), "ascii")
    except (SeccompUnavailable, ValueError):
        return str(number)


def available(*, listener: bool = False) -> bool:
    """Whether the kernel takes filters, or filters with a listener, as far as it says so itself (seccomp(2))."""
    try:
        seccomp = load_library()
        number = seccomp.resolve_syscall(seccomp.Arch.NATIVE, "seccomp")
    except (SeccompUnavailable, ValueError):
        return False
    action = ctypes.c_uint32(seccomp.NOTIFY if listener else seccomp.ERRNO(0))
    return bool(ctypes.CDLL(None).syscall(ctypes.c_long(number), _GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0)


def keep_system_calls(
    *,
    network: bool = True,
    listener: bool = False,
    bpf_commands: Iterable[int] = (),
    ioctls: Iterable[int] = (),
) -> int | None:
    """Set the filter for all threads of this process; ``bpf_commands`` are allowed besides those on maps, ``ioctls``
    besides those of sockets and terminals.

    Raises :class:`SeccompUnavailable`.

    Without ``network`` no sockets but Unix ones may be made. With ``listener`` the descriptor is returned of which
    :class:`.denials.DenialCounts` is to be told, and which is to be closed then; None where the kernel gives none.

    Calls that are neither allowed nor known to be refused do not exist (ENOSYS), so that libraries take older ones. Of
    those that are allowed, signals may be sent to this very process only, threads started but no processes and no
    namespaces, sockets made of the families Unix, IPv4 and IPv6 and not raw. Needs no_new_privs, as :mod:`.privileges`
    leaves a process.
    """
    seccomp = load_library()
    more = _Allowed(frozenset((*_BPF_ON_MAPS, *bpf_commands)), frozenset((*_REQUESTS, *ioctls)))
    if listener:
        # Another filter over us may have one already, and old kernels know none.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            _rules(seccomp, seccomp.NOTIFY, network, more).load()
            return _listener()
    try:
        _rules(seccomp, seccomp.ERRNO(errno.EPERM), network, more).load()
    except (OSError, ValueError, RuntimeError) as error:
        raise SeccompUnavailable(f"the kernel takes no seccomp filter: {error}") from error
    return None


def _listener() -> int | None:
    """The descriptor that came with the filter."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing
            if os.readlink(f"/proc/self/fd/{name}") == _LISTENER:
                return int(name)
    return None


@dataclass(frozen=True, slots=True)
class _Allowed:
    """Arguments of calls that are judged by them."""

    bpf_commands: Collection[int]
    ioctls: Collection[int]


def _rules(seccomp: Any, refuse: int, network: bool, allowed: _Allowed) -> Any:
    rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.ENOSYS))
    rules.set_attr(seccomp.Attr.CTL_TSYNC, 1)
    rules.set_attr(seccomp.Attr.CTL_LOG, 1)
    rules.set_attr(seccomp.Attr.CTL_OPTIMIZE, 2)
    for name in sorted(ALLOWED):
        _add(rules, seccomp.ALLOW, name)
    for name in REFUSED:
        _add(rules, refuse, name)
    _judge_arguments(rules, seccomp, refuse, allowed)
    _judge_sockets(rules, seccomp, refuse, FAMILIES if network else (socket.AF_UNIX,))
    return rules


def _add(rules: Any, action: int, name: str, *arguments: Any) -> None:
    try:
        rules.add_rule(action, name, *arguments)
    except ValueError:
        return  # a call that this libseccomp, or this architecture, does not know: it stays what is not there


def _judge_arguments(rules: Any, seccomp: Any, refuse: int, allowed: _Allowed) -> None:
    """The calls that are allowed with some arguments only. The rules of one call exclude each other."""

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
    one_of("ioctl", 1, sorted(allowed.ioctls))
    one_of("prctl", 0, _PRCTLS)
    for command in range(_LAST_BPF_COMMAND + 1):
        action = seccomp.ALLOW if command in allowed.bpf_commands else refuse
        _add(rules, action, "bpf", seccomp.Arg(0, seccomp.EQ, command))
    _add(rules, refuse, "bpf", seccomp.Arg(0, seccomp.GT, _LAST_BPF_COMMAND))


def _judge_sockets(rules: Any, seccomp: Any, refuse: int, families: Collection[int]) -> None:
    none_such = seccomp.ERRNO(errno.EAFNOSUPPORT)
    for family in range(_LAST_FAMILY + 1):
        this = seccomp.Arg(0, seccomp.EQ, family)
        if family not in families:
            # getaddrinfo(3) asks for netlink at each look-up, and goes on without.
            plain = family == socket.AF_NETLINK or refuse == seccomp.ERRNO(errno.EPERM)
            _add(rules, none_such if plain else refuse, "socket", this)
            continue
        for kind in range(_SOCKET_TYPE_MASK + 1):
            action = seccomp.ALLOW if kind in _TYPES else refuse
            _add(rules, action, "socket", this, seccomp.Arg(1, seccomp.MASKED_EQ, _SOCKET_TYPE_MASK, kind))
    _add(rules, none_such, "socket", seccomp.Arg(0, seccomp.GT, _LAST_FAMILY))
