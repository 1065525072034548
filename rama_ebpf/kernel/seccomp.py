"""Taking system calls away from a process for good: what no service of a proxy needs, and much that breaks out needs.

The filter stays over ``fork`` and ``execve``, and nobody can take it off (seccomp(2), seccomp_rule_add(3)). Refused
calls fail, they do not kill: a library that tries one falls back. The kernel's audit log names each (``seccomp``
records, where ``/proc/sys/kernel/seccomp/actions_logged`` has ``errno`` and audit runs).
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Final

from ..core.errors import RamaError

__all__ = ["NO_SUCH_CALL", "REFUSED", "SeccompUnavailable", "refuse_system_calls"]

REFUSED: Final[tuple[str, ...]] = (
    # other programs
    *("execve", "execveat", "fork", "vfork"),
    # other processes
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "process_mrelease", "kcmp"),
    *("pidfd_open", "pidfd_getfd", "pidfd_send_signal", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"),
    *("move_pages", "migrate_pages"),
    # namespaces, mounts, roots
    *("unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "mount_setattr"),
    *("fsopen", "fsconfig", "fsmount", "fspick"),
    # the kernel's keys, memory, modules, clocks and counters
    *("add_key", "request_key", "keyctl", "userfaultfd", "memfd_secret", "perf_event_open", "fanotify_init"),
    *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "syslog"),
    *("settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "sethostname", "setdomainname"),
    *("iopl", "ioperm", "modify_ldt", "personality", "acct", "quotactl", "swapon", "swapoff", "vhangup"),
    # files by other ways than their path, devices, and what outlives the process
    *("open_by_handle_at", "name_to_handle_at", "mknod", "mknodat"),
    *("shmget", "shmat", "semget", "msgget", "mq_open"),
)
"""Calls that fail with EPERM."""

NO_SUCH_CALL: Final[tuple[str, ...]] = ("clone3", "io_uring_setup", "io_uring_enter", "io_uring_register")
"""Calls that fail with ENOSYS, so that libraries use the older ones, which can be judged."""

_FAMILIES: Final = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
_LAST_FAMILY: Final = 64
_SOCKET_TYPE_MASK: Final = 0xF
_CLONE_THREAD: Final = 0x10000
# Of bpf(2) the relay and the local policy need what reads and writes maps whose descriptors they were given.
_BPF_ON_MAPS: Final = (1, 2, 3, 4, 15, 21, 24, 25, 26, 27)
_LAST_BPF_COMMAND: Final = 64


class SeccompUnavailable(RamaError):
    """No filter can be set here; the text says why."""

    kind = "seccomp"


def refuse_system_calls() -> None:
    """Set the filter for all threads of this process. Raises :class:`SeccompUnavailable`.

    Signals may be sent to this very process only, threads started but no processes, sockets made of the families
    Unix, IPv4 and IPv6 and not raw. The rest of :data:`REFUSED` and :data:`NO_SUCH_CALL` is refused whatever the
    arguments. Needs no_new_privs, as :mod:`.privileges` leaves a process.
    """
    try:
        import pyseccomp as seccomp  # looks for the library when it is imported, and raises if there is none
    except (ImportError, RuntimeError, OSError) as error:
        raise SeccompUnavailable(f"libseccomp cannot be used ({error}): install libseccomp2") from error
    refuse, other_family = seccomp.ERRNO(errno.EPERM), seccomp.ERRNO(errno.EAFNOSUPPORT)
    equal, differs, beyond = seccomp.EQ, seccomp.NE, seccomp.GT
    try:
        rules = seccomp.SyscallFilter(seccomp.ALLOW)
        rules.set_attr(seccomp.Attr.CTL_TSYNC, 1)
        rules.set_attr(seccomp.Attr.CTL_LOG, 1)
        for name in REFUSED:
            rules.add_rule(refuse, name)
        for name in NO_SUCH_CALL:
            rules.add_rule(seccomp.ERRNO(errno.ENOSYS), name)
        rules.add_rule(refuse, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, _CLONE_THREAD, 0))
        for name in ("kill", "tgkill"):
            rules.add_rule(refuse, name, seccomp.Arg(0, differs, os.getpid()))
        rules.add_rule(refuse, "prlimit64", seccomp.Arg(0, differs, 0))
        for family in range(_LAST_FAMILY + 1):
            if family not in _FAMILIES:
                rules.add_rule(other_family, "socket", seccomp.Arg(0, equal, family))
        rules.add_rule(other_family, "socket", seccomp.Arg(0, beyond, _LAST_FAMILY))
        rules.add_rule(refuse, "socket", seccomp.Arg(1, seccomp.MASKED_EQ, _SOCKET_TYPE_MASK, socket.SOCK_RAW))
        for command in range(_LAST_BPF_COMMAND + 1):
            if command not in _BPF_ON_MAPS:
                rules.add_rule(refuse, "bpf", seccomp.Arg(0, equal, command))
        rules.add_rule(refuse, "bpf", seccomp.Arg(0, beyond, _LAST_BPF_COMMAND))
        rules.load()
    except (OSError, ValueError, RuntimeError) as error:
        raise SeccompUnavailable(f"the kernel takes no seccomp filter: {error}") from error
