"""The system calls that are left to what serves clients, and those that it is told it may not make.

Both are names as libseccomp has them, on any architecture. ``packaging/trace-system-calls`` runs tests under strace(1)
and says which calls workers make that are not here, and which of these none made.
"""

from __future__ import annotations

from typing import Final

__all__ = ["ALLOWED", "REFUSED"]

_FILES: Final = (
    *("open", "openat", "close", "close_range", "read", "write", "readv", "writev"),
    *("pread64", "pwrite64", "preadv", "preadv2", "pwritev", "pwritev2", "lseek", "_llseek"),
    *("fstat", "stat", "lstat", "newfstatat", "statx", "fstatfs", "statfs", "access", "faccessat", "faccessat2"),
    *("getdents64", "readlink", "readlinkat", "getcwd", "chdir", "fchdir", "umask", "fcntl", "flock"),
    *("fsync", "fdatasync", "ftruncate", "truncate", "fallocate", "fadvise64", "sync_file_range"),
    *("rename", "renameat", "renameat2", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir", "link", "linkat"),
    *("chmod", "fchmod", "fchmodat", "utimensat", "getxattr", "lgetxattr", "fgetxattr", "listxattr", "llistxattr"),
    *("flistxattr", "inotify_init1", "inotify_add_watch", "inotify_rm_watch", "memfd_create"),
)
"""Landlock says which."""
_DESCRIPTORS: Final = (
    *("dup", "dup2", "dup3", "pipe", "pipe2", "eventfd2", "timerfd_create", "timerfd_settime", "timerfd_gettime"),
    *("signalfd4", "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "epoll_pwait2", "poll", "ppoll"),
    *("select", "pselect6", "sendfile", "splice", "tee", "vmsplice", "copy_file_range"),
)
_SOCKETS: Final = (
    *("socketpair", "connect", "accept", "accept4", "bind", "listen", "getsockname", "getpeername", "getsockopt"),
    *("setsockopt", "shutdown", "sendto", "sendmsg", "sendmmsg", "recvfrom", "recvmsg", "recvmmsg"),
)
_MEMORY: Final = (
    *("mmap", "munmap", "mprotect", "mremap", "madvise", "brk", "msync", "mincore", "mlock", "munlock", "membarrier"),
)
_THREADS: Final = (
    *("futex", "set_robust_list", "get_robust_list", "rseq", "set_tid_address", "sched_yield", "sched_getaffinity"),
    *("sched_getparam", "sched_getscheduler", "sched_get_priority_max", "sched_get_priority_min", "getpriority"),
    *("setpriority", "exit", "exit_group", "gettid", "getcpu", "restart_syscall"),
)
_PROCESS: Final = (
    *("getpid", "getppid", "getpgrp", "getpgid", "getsid", "getuid", "getgid", "geteuid", "getegid", "getresuid"),
    *("getresgid", "getgroups", "getrlimit", "setrlimit", "getrusage", "times", "sysinfo", "uname", "getrandom"),
    *("wait4", "waitid", "capget"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigpending", "rt_sigtimedwait", "rt_sigsuspend"),
    *("sigaltstack", "pause", "alarm", "getitimer", "setitimer"),
)
_CLOCKS: Final = ("nanosleep", "clock_nanosleep", "clock_gettime", "clock_getres", "gettimeofday", "time")

ALLOWED: Final[frozenset[str]] = frozenset(
    (*_FILES, *_DESCRIPTORS, *_SOCKETS, *_MEMORY, *_THREADS, *_PROCESS, *_CLOCKS)
)
"""Calls that are made as they come. ``clone``, ``kill``, ``tgkill``, ``prlimit64``, ``ioctl``, ``prctl``, ``socket``
and ``bpf`` are judged by their arguments: :mod:`.seccomp`."""

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
    # other users, and what is left of privileges
    *("setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setgroups", "setfsuid", "setfsgid"),
    *("capset", "setsid", "setpgid", "chown", "fchown", "lchown", "fchownat"),
    # files by other ways than their path, devices, and what outlives the process
    *("open_by_handle_at", "name_to_handle_at", "mknod", "mknodat", "symlink", "symlinkat"),
    *("shmget", "shmat", "shmctl", "semget", "semop", "msgget", "msgsnd", "msgrcv", "mq_open", "mq_unlink"),
)
"""Calls that fail with EPERM: a service that makes one shall say so, and not look for another way."""
