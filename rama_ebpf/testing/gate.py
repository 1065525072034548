"""A real gate in the kernel in front of a real listener, in network namespaces of the test's own."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from .. import loader
from ..gate import Guard, SyncGate
from .network import Host, Lab

__all__ = ["GateLab", "gate_lab"]

_numbers: Final = itertools.count()


@dataclass(frozen=True)
class GateLab:
    """Two hosts, and a gate in front of a listener of the one. Made by :func:`gate_lab`."""

    lab: Lab
    """Where more hosts can be added."""
    server: Host
    client: Host
    listener: socket.socket
    """Listens on all IPv4 addresses of the server's, non-blocking. Any server can have it: sockets know their
    namespace."""
    gate: SyncGate
    """The policy: what is blocked here gets no answer to its SYN."""
    guard: Guard

    @property
    def port(self) -> int:
        """The port of the listener."""
        return int(self.listener.getsockname()[1])

    def admits(self, client: Host | None = None, *, timeout: float = 1.0) -> bool:
        """Whether a host (by default ``client``) can connect; ``timeout`` seconds without an answer are a no."""
        try:
            (client or self.client).connect(self.server.ipv4, self.port, timeout=timeout).close()
        except TimeoutError:
            return False
        return True


@contextlib.contextmanager
def gate_lab() -> Iterator[GateLab]:
    """Make a :class:`GateLab`. When the block ends nothing is left of it. Not for an event loop, like
    :class:`~rama_ebpf.gate.SyncGate`. Raises PermissionError unless root."""
    if os.geteuid() != 0:
        raise PermissionError(errno.EPERM, "a gate in a namespace needs root: run this test with sudo, or deselect it")
    with contextlib.ExitStack() as undo:
        lab = undo.enter_context(Lab())
        server, client = lab.host("server"), lab.host("client")
        listener = undo.enter_context(server.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        listener.setblocking(False)
        gate = SyncGate(f"test-{os.getpid()}-lab{next(_numbers)}")
        undo.callback(_forget, gate)
        guard = undo.enter_context(gate.guard(listener))
        yield GateLab(lab, server, client, listener, gate, guard)


def _forget(gate: SyncGate) -> None:
    loader.unload(gate.instance)
    if gate.instance.state_dir.is_dir():
        shutil.rmtree(gate.instance.state_dir)
