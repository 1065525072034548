"""Listeners of other programs under a policy: one program on the root cgroup (``bpf/gate_guard.c``).

The link and the map of what is guarded are held by descriptors of this process alone: when it ends, by whatever signal,
the kernel detaches the program, and the listeners are as they were.

Rejected: a pinned link (it would outlive the guard), sk_lookup (it answers RST, and knows no silence), a netfilter
program (three times the cost for the rest of the host, measured; Linux 6.4), XDP (it costs bulk traffic most).
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ..core.address import SocketAddress, mapped
from . import abi, bpf, bpffs, cgroup
from .attachments import HOOKS
from .bpf import AttachType, MapFlags, MapType
from .btf import member_offsets
from .bytecode import Program
from .compile import Unit, amalgamate
from .gate_maps import GateMaps
from .programs import load_programs

__all__ = ["GUARD_PROGRAM", "MAX_GUARDED", "HostGuard", "namespace_cookie"]

_SO_NETNS_COOKIE: Final = 71
GUARD_PROGRAM: Final = Program("gate_guard", HOOKS[0].prog_type, AttachType.CGROUP_INET_INGRESS)
MAX_GUARDED: Final = 1024
"""How many (address, port) a guard has at most."""


def namespace_cookie() -> int:
    """Return what tells this thread's network namespace from all others while the machine is up (Linux 5.14)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), sys.byteorder)


class HostGuard:
    """The program over the maps of a policy. Close it when done; one thread at a time uses it.

    ``maps`` stay the caller's. Raises OSError, :class:`~.compile.CompileError` or :class:`~.btf.BtfUnavailable`.
    """

    def __init__(self, maps: GateMaps, *, kernel_headers: Path | None = None) -> None:
        self._kernel_headers = kernel_headers
        self._link: int | None = None
        self._guarded = bpf.map_create(
            MapType.HASH, abi.GUARDED_KEY.size, 4, MAX_GUARDED, flags=MapFlags.NO_PREALLOC, name="guarded"
        )
        try:
            self._program = self._load(maps)
        except BaseException:
            os.close(self._guarded)
            raise

    def _load(self, maps: GateMaps) -> int:
        offsets = member_offsets([("sock_common", "skc_net"), ("net", "net_cookie")])
        cflags = tuple(f"-DOFFSET_{name.upper()}={offset}" for (_, name), offset in offsets.items())
        unit = Unit(amalgamate(abi.source_dir() / "gate_guard.c"), (GUARD_PROGRAM,), cflags, self._kernel_headers)
        bpffs.ensure_mounted()
        return load_programs(unit, {**maps, "guarded": self._guarded})[GUARD_PROGRAM.name]

    def use(self, maps: GateMaps) -> None:
        """Judge by the policy in other maps from now on; no packet is judged by neither. Raises as the constructor
        does; nothing is changed then."""
        program = self._load(maps)
        try:
            if self._link is not None:
                bpf.link_update(self._link, program)
        except BaseException:
            os.close(program)
            raise
        os.close(self._program)
        self._program = program

    def attach(self) -> None:
        """Attach it to the root cgroup. Raises OSError; the text names who has it to himself, if that is why."""
        root = os.open(cgroup.cgroup2_mount(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._link = bpf.link_create(self._program, root, AttachType.CGROUP_INET_INGRESS)
        except OSError as error:
            if error.errno != errno.EPERM:
                raise
            names = ", ".join(_programs_of(root)) or "another program"
            text = f"{names} is attached to the root cgroup exclusively, so no other can be (bpftool cgroup show)"
            raise OSError(error.errno, text) from error
        finally:
            os.close(root)

    def guard(self, namespace: int, addresses: Iterable[SocketAddress]) -> None:
        """Put these addresses of a network namespace under the policy. Raises ValueError for too many."""
        for address in addresses:
            try:
                bpf.map_update(self._guarded, _key(namespace, address), bytes(4))
            except OSError as error:
                if error.errno != errno.E2BIG:
                    raise
                raise ValueError(f"a guard has at most {MAX_GUARDED} addresses") from error

    @property
    def verified_insns(self) -> int:
        """How many instructions the kernel's verifier walked."""
        return bpf.prog_info(self._program).verified_insns

    def close(self) -> None:
        """Detach it: the listeners are as they were."""
        if self._link is not None:
            os.close(self._link)
            self._link = None
        if self._guarded >= 0:
            os.close(self._program)
            os.close(self._guarded)
            self._guarded = -1


def _key(namespace: int, address: SocketAddress) -> bytes:
    return abi.GUARDED_KEY.pack(namespace, mapped(address.ip), address.port)


def _programs_of(root: int) -> list[str]:
    names = []
    for identity in sorted(bpf.effective_programs(root, AttachType.CGROUP_INET_INGRESS)):
        program = bpf.prog_by_id(identity)
        try:
            names.append(bpf.prog_info(program).name or f"program {identity}")
        finally:
            os.close(program)
    return names
