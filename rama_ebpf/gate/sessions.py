"""The sessions that this process is run from: what a guard must not shut out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from ..core.address import IPAddress, unmap
from ..kernel import sock_diag

__all__ = ["own_sessions"]


def own_sessions(port: int) -> list[IPAddress]:
    """Return from where this process is operated by connections to ``port`` of this network namespace: those that a
    process above it holds (sshd), and what ``SSH_CONNECTION`` says in the environment of one. Raises OSError."""
    found: dict[IPAddress, None] = {}
    held = set()
    for pid in _ancestors():
        held |= _sockets(pid)
        if (client := _ssh_client(pid, port)) is not None:
            found[client] = None
    for connection in sock_diag.connections(port):
        if connection.inode in held:
            found[unmap(connection.peer)] = None
    return list(found)


def _ancestors() -> Iterator[int]:
    """This process, its parent, and so on."""
    pid = os.getpid()
    while pid > 0:
        yield pid
        try:
            status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return
        pid = int(status.rpartition(")")[2].split()[1])


def _sockets(pid: int) -> set[int]:
    directory, inodes = f"/proc/{pid}/fd", set()
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            with contextlib.suppress(OSError):
                target = os.readlink(f"{directory}/{name}")
                if target.startswith("socket:["):
                    inodes.add(int(target[8:-1]))
    return inodes


def _ssh_client(pid: int, port: int) -> IPv4Address | IPv6Address | None:
    """The client of ``SSH_CONNECTION`` ("client port server port"), if that is to this port."""
    with contextlib.suppress(OSError, ValueError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"SSH_CONNECTION="):
                client, _, _, to = entry.partition(b"=")[2].decode().split()
                if int(to) == port:
                    return unmap(ip_address(client.partition("%")[0]))
    return None
