"""A cgroup for each child that reads a feed, below the workers': there it connects to what it is granted, and asks the
name servers. ``bpf/egress.c`` judges by it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from ..core.address import mapped, unmap
from . import abi, bpf, cgroup
from .denials import DenialCounts
from .gate_maps import GateMaps

__all__ = ["FeedCgroup", "GrantedChild", "Grants", "confined_to_grants"]

IPAddress = IPv4Address | IPv6Address


class Grants:
    """The map ``grants`` of a gate, and what this process has put there; from any thread.

    ``workers`` names the workers' cgroups: below them children of other servers may be, after an upgrade, whose grants
    are those servers' affair."""

    def __init__(self, maps: GateMaps, workers: Callable[[], Iterable[Path]] = tuple) -> None:
        self._fd = maps["grants"]
        self._workers = workers
        self._ours: set[bytes] = set()
        self._lock = threading.Lock()

    def put(self, key: bytes) -> None:
        """Make a grant. Raises OSError."""
        with self._lock:
            bpf.map_update(self._fd, key, bytes(4))
            self._ours.add(key)

    def drop(self, key: bytes) -> None:
        """Take a grant back. Raises OSError."""
        with self._lock:
            bpf.map_delete(self._fd, key)
            self._ours.discard(key)

    def differing(self) -> dict[bytes, str]:
        """Return the grants that this process has not made, and those of its own that are gone, each with what it is.
        Raises OSError."""
        with self._lock:
            return self._differing()

    def restore(self) -> None:
        """Have there be what :meth:`differing` says there must be. Raises OSError."""
        with self._lock:
            for key in self._differing():
                if key in self._ours:
                    bpf.map_update(self._fd, key, bytes(4))
                else:
                    bpf.map_delete(self._fd, key)

    def _differing(self) -> dict[bytes, str]:
        present = {key for key, _ in bpf.map_lookup_batch(self._fd, abi.GRANT_KEY.size, 4)}
        if present == self._ours:
            return {}
        others = self._cgroups_of_other_servers()
        found = {key: f"{_grant(key)} is gone" for key in self._ours - present}
        for key in present - self._ours:
            if abi.GRANT_KEY.unpack(key)[0] not in others:
                found[key] = f"{_grant(key)} is nobody's"
        return found

    def _cgroups_of_other_servers(self) -> set[int]:
        found = set()
        for directory in self._workers():
            for child in directory.glob("feed-*-*"):
                server = child.name.split("-")[1]
                if server.isdecimal() and int(server) != os.getpid() and Path("/proc", server).exists():
                    with contextlib.suppress(OSError):  # it has ended
                        found.add(child.stat().st_ino)
        return found


def _grant(key: bytes) -> str:
    identity, packed, port = abi.GRANT_KEY.unpack(key)
    return f"cgroup {identity} to {unmap(IPv6Address(packed))} port {port}" if port else f"cgroup {identity}"


class FeedCgroup:
    """The ways that are open to the processes of one cgroup."""

    def __init__(self, grants: Grants, directory: Path) -> None:
        """Make the cgroup ``directory``, from which no way is open. Raises OSError."""
        directory.mkdir()
        self._directory = directory
        self._grants = grants
        self._identity = directory.stat().st_ino
        self._keys: list[bytes] = []
        try:
            self._put(abi.GRANT_KEY.pack(self._identity, bytes(16), 0))  # it is one of those that have grants only
        except BaseException:
            cgroup.remove_if_empty(directory)
            raise

    def _put(self, key: bytes) -> None:
        self._grants.put(key)
        self._keys.append(key)

    def move(self, pid: int) -> None:
        """Put a process in. Raises OSError."""
        cgroup.move(pid, self._directory)

    def allow(self, addresses: Iterable[IPAddress], port: int) -> None:
        """Open the ways to a port of these. Raises OSError."""
        for address in addresses:
            self._put(abi.GRANT_KEY.pack(self._identity, mapped(address), port))

    def close(self) -> None:
        """Close all ways, and remove the cgroup, which no process is in any more. The entry that confines goes last."""
        while self._keys:
            self._grants.drop(self._keys.pop())
        cgroup.remove_if_empty(self._directory)


class GrantedChild:
    """One child in its cgroup; a process may have it followed once."""

    def __init__(self, room: FeedCgroup | None, pid: int, denials: DenialCounts) -> None:
        self._room = room
        self._pid = pid
        self._denials = denials

    def allow(self, addresses: Iterable[IPAddress], port: int) -> None:
        """Let it connect there, too. Raises OSError."""
        if self._room is not None:
            self._room.allow(addresses, port)

    def follow(self, listener: int) -> None:
        """Count what its sandbox refuses. Raises OSError."""
        self._denials.follow("feed", self._pid, listener)


@contextlib.contextmanager
def confined_to_grants(
    grants: Grants | None, workers: Path | None, pid: int, denials: DenialCounts
) -> Iterator[GrantedChild]:
    """Confine a child that has just been started, where ``workers`` is the workers' cgroup; where there is none its
    sandbox alone holds it. Raises OSError."""
    if grants is None or workers is None:
        yield GrantedChild(None, pid, denials)
        return
    room = FeedCgroup(grants, workers / f"feed-{os.getpid()}-{pid}")
    try:
        with contextlib.suppress(ProcessLookupError):  # it has ended already; its end is seen elsewhere
            room.move(pid)
        yield GrantedChild(room, pid, denials)
    finally:
        room.close()
