"""Confining a Python process that others' bytes go through: its files by Landlock, its system calls by seccomp."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from . import landlock
from .landlock import NOTHING, Network
from .seccomp import SeccompUnavailable, keep_system_calls, load_library

__all__ = ["NO_NETWORK", "Confinement", "Network", "confine"]

NO_NETWORK: Final = Network.BIND | Network.CONNECT

_PACKAGE: Final = Path(__file__).resolve().parent.parent
_READ: Final = (
    *("/usr", "/lib", "/lib32", "/lib64", "/etc"),
    *("/dev/urandom", "/dev/random", "/dev/zero"),
    *("/proc/self", "/proc/sys/net", "/proc/sys/kernel/random", "/proc/meminfo", "/proc/cpuinfo", "/proc/loadavg"),
    *("/sys/devices/system/cpu",),
)
_FOLLOWED: Final = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/localtime")
"""Often links to what a daemon writes anew beside where they lead."""
_WRITE: Final = (Path("/dev/null"),)
_CERTIFICATES: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_ROOT: Final = Path("/")


@dataclass(frozen=True, slots=True)
class Confinement:
    """What is in force: whether system calls are filtered, and by which ABI of Landlock files are (0: they are not).
    ``missing`` says why, for each that is not. ``listener`` is a descriptor for :class:`.denials.DenialCounts`, to be
    closed when that was told of it."""

    seccomp: bool
    landlock: int
    missing: tuple[str, ...] = ()
    listener: int | None = None


def confine(
    read: Iterable[Path] = (),
    write: Iterable[Path] = (),
    *,
    closed: Network = NOTHING,
    listener: bool = False,
    bpf_commands: Iterable[int] = (),
    ioctls: Iterable[int] = (),
) -> Confinement:
    """Leave this process for good only what serving takes, as far as the host can do that.

    Files may be opened where this Python, libc and OpenSSL have theirs, and beneath ``read``; changed beneath
    ``write``. ``closed`` is for who needs no network, or no listening sockets: with all of it closed there are no
    sockets but Unix ones, besides those that are open. ``listener`` asks for one. ``bpf_commands`` of bpf(2) may be
    used besides those on maps, and ``ioctls`` besides those of sockets and terminals. Needs no_new_privs, and that no
    other thread has been started.
    """
    missing: list[str] = []
    version, filtered, told = 0, False, None
    with contextlib.suppress(SeccompUnavailable):  # asked for again below, where it is said
        load_library()
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        missing.append(f"files are not restricted: {threads - 1} other threads were started before")
    else:
        try:
            version = landlock.restrict(
                [*_python(), *map(_reachable, read)], [*_WRITE, *map(_reachable, write)], closed
            )
        except (landlock.LandlockUnavailable, OSError) as error:
            missing.append(str(error))
    try:
        told = keep_system_calls(
            network=closed != NO_NETWORK, listener=listener, bpf_commands=bpf_commands, ioctls=ioctls
        )
        filtered = True
    except SeccompUnavailable as error:
        missing.append(str(error))
    return Confinement(filtered, version, tuple(missing), told)


def _reachable(path: Path) -> Path:
    return path.absolute()


def _python() -> list[Path]:
    """What the interpreter and its libraries read as they run."""
    found = [*map(Path, _READ), _PACKAGE, Path(sys.prefix), Path(sys.base_prefix), Path(sys.exec_prefix)]
    found += [Path(os.path.realpath(path)).parent for path in _FOLLOWED]
    found += [Path(os.environ[name]) for name in _CERTIFICATES if os.environ.get(name)]
    here = Path.cwd()
    # The current directory is on the path of each process that is started with -m, whatever is there.
    found += [path for path in map(Path, sys.path) if path.is_absolute() and path != here]
    return [path for path in found if path.absolute() != _ROOT]
