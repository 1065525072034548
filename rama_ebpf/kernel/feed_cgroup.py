"""A cgroup for each child that reads a feed, below the workers': there it connects to what it is granted, and asks the
name servers. ``bpf/egress.c`` judges by it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from ..core.address import mapped
from . import abi, bpf, cgroup
from .denials import DenialCounts
from .gate_maps import GateMaps

__all__ = ["FeedCgroup", "GrantedChild", "confined_to_grants"]

IPAddress = IPv4Address | IPv6Address


class FeedCgroup:
    """The ways that are open to the processes of one cgroup."""

    def __init__(self, maps: GateMaps, directory: Path) -> None:
        """Make the cgroup ``directory``, from which no way is open. Raises OSError."""
        directory.mkdir()
        self._directory = directory
        self._maps = maps
        self._identity = directory.stat().st_ino
        self._keys: list[bytes] = []
        try:
            self._put(abi.GRANT_KEY.pack(self._identity, bytes(16), 0))  # it is one of those that have grants only
        except BaseException:
            cgroup.remove_if_empty(directory)
            raise

    def _put(self, key: bytes) -> None:
        bpf.map_update(self._maps["grants"], key, bytes(4))
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
            bpf.map_delete(self._maps["grants"], self._keys.pop())
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
    maps: GateMaps | None, workers: Path | None, pid: int, denials: DenialCounts
) -> Iterator[GrantedChild]:
    """Confine a child that has just been started, where ``workers`` is the workers' cgroup; where there is none its
    sandbox alone holds it. Raises OSError."""
    if maps is None or workers is None:
        yield GrantedChild(None, pid, denials)
        return
    room = FeedCgroup(maps, workers / f"feed-{os.getpid()}-{pid}")
    try:
        with contextlib.suppress(ProcessLookupError):  # it has ended already; its end is seen elsewhere
            room.move(pid)
        yield GrantedChild(room, pid, denials)
    finally:
        room.close()
