"""The maps of a gate: their layout, how they are made and pinned, and how pinned ones are opened again."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from . import abi, bpf
from .bpf import MapFlags, MapType
from .gate_state import GateState, owner_number

__all__ = [
    "MAX_EGRESS",
    "MAX_FAILSAFE",
    "USUAL_REJECTS",
    "GateMaps",
    "LayoutMismatch",
    "MapSizes",
    "MapSpec",
    "set_pages",
]


class LayoutMismatch(RuntimeError):
    """Pinned maps were made by another version of this software."""


@dataclass(frozen=True, slots=True)
class MapSizes:
    """How many entries the maps of a gate hold at most."""

    rules: int = 131_072
    """Of the loaded set and of the runtime layer together, one more than there may be. A rule of the set can have any
    number of sources."""
    bans: int = 1_048_576
    buckets: int = 65_536

    @property
    def rule_ids(self) -> int:
        """How many ids the tables of rules have: a set is replaced in its own size, so both must fit for a moment."""
        return self.rules + min(self.rules, _SPARE_RULES)


@dataclass(frozen=True, slots=True)
class MapSpec:
    """Layout of one map. ``inner`` is the layout of the maps in a map of maps."""

    kind: MapType
    key_size: int
    value_size: int
    max_entries: int
    flags: MapFlags = MapFlags.NONE
    inner: MapSpec | None = None

    def create(self, name: str) -> int:
        """Create the map and return its descriptor. A map of maps is filled with an empty map per index."""
        if self.inner is None:
            return bpf.map_create(
                self.kind, self.key_size, self.value_size, self.max_entries, flags=self.flags, name=name
            )
        inner_fd = self.inner.create(name)
        try:
            fd = bpf.map_create(self.kind, 4, 4, self.max_entries, inner_fd=inner_fd, name=name)
            for index in range(self.max_entries):
                bpf.map_update(fd, index.to_bytes(4, sys.byteorder), inner_fd.to_bytes(4, sys.byteorder))
        finally:
            os.close(inner_fd)
        return fd

    def check(self, name: str, fd: int) -> None:
        """Raise :class:`LayoutMismatch` if an open map is not laid out like this (its size may differ)."""
        info = bpf.map_info(fd)
        found = (info.kind, info.key_size, info.value_size, info.flags)
        wanted = (int(self.kind), self.key_size, self.value_size, int(self.flags))
        if found != wanted:
            raise LayoutMismatch(f"pinned map {name} has layout {found}, this version needs {wanted}")


_HASH: Final = (MapType.HASH, MapFlags.NO_PREALLOC)
MAX_FAILSAFE: Final = 1024
"""How many networks the failsafe has at most. Its map has room for two such lists: the new one is made before the old
one goes, so that nobody is locked out between them."""
MAX_EGRESS: Final = 65_536
"""How many networks and name servers the egress policy has at most."""
MAX_GRANTS: Final = 4096
"""Of all children that read feeds at once."""
_SPARE_RULES: Final = 8192
"""How many rules the tables hold beyond ``MapSizes.rules``, for the moment in which a set replaces another."""

_EMISSION: Final = 1_000_000_000 // abi.constants()["REJECTS_PER_SECOND"]
USUAL_REJECTS: Final = (_EMISSION, _EMISSION * (abi.constants()["REJECT_BURST"] - 1))
"""How many RST answer ``reject`` where nobody says otherwise: emission and tolerance in nanoseconds."""

_EVENT_BYTES: Final = 256 * 1024  # a power of two, and of whole pages of up to 64 KiB

_LPM: Final = (MapType.LPM_TRIE, MapFlags.NO_PREALLOC)


def set_pages(count: int) -> MapSpec:
    """Layout of a set: ``count`` pages that userspace fills through shared memory. Sets differ in size."""
    flags = MapFlags.MMAPABLE | MapFlags.INNER_MAP
    return MapSpec(MapType.ARRAY, 4, abi.constants()["PAGE_BYTES"], count, flags)


def _specs(sizes: MapSizes) -> dict[str, MapSpec]:
    constant = abi.constants()
    listeners = constant["MAX_LISTENERS"]
    stats = constant["HOOK_COUNT"] * constant["STAGE_COUNT"] * constant["ACTION_COUNT"]

    return {
        "gate": MapSpec(MapType.ARRAY, 4, abi.GATE.size, 1),
        "listeners": MapSpec(MapType.HASH, abi.LISTENER_KEY.size, abi.LISTENER.size, listeners),
        "bindings": MapSpec(_LPM[0], abi.BINDING_KEY.size, 4, constant["MAX_BOUND_PREFIXES"], _LPM[1]),
        "bound_ports": MapSpec(_LPM[0], abi.PORT_KEY.size, 4, constant["MAX_BOUND_PORTS"], _LPM[1]),
        "bound": MapSpec(MapType.ARRAY, 4, abi.LISTENER.size, listeners),
        "sockets": MapSpec(MapType.SOCKMAP, 4, 8, listeners * constant["SOCKETS_PER_LISTENER"]),
        "rules": MapSpec(MapType.ARRAY, 4, abi.RULE.size, sizes.rule_ids),
        "rule_hits": MapSpec(MapType.PERCPU_ARRAY, 4, abi.RULE_HITS.size, sizes.rule_ids),
        "rule_info": MapSpec(_HASH[0], 4, abi.RULE_INFO.size, sizes.rule_ids, _HASH[1]),
        "gate_stats": MapSpec(MapType.PERCPU_ARRAY, 4, 8, stats),
        "established": MapSpec(MapType.PERCPU_ARRAY, 4, 8, listeners),
        "accepted": MapSpec(MapType.ARRAY, 4, 8, listeners * constant["SOCKETS_PER_LISTENER"], MapFlags.MMAPABLE),
        "bans": MapSpec(_HASH[0], abi.BAN_KEY.size, abi.BAN.size, sizes.bans, _HASH[1]),
        "ban_account": MapSpec(MapType.ARRAY, 4, abi.BAN_ACCOUNT.size, 1),
        "failsafe": MapSpec(_LPM[0], abi.FAILSAFE_KEY.size, 4, 2 * MAX_FAILSAFE, _LPM[1]),
        "egress": MapSpec(_LPM[0], abi.FAILSAFE_KEY.size, 4, MAX_EGRESS, _LPM[1]),
        "server_cgroup": MapSpec(MapType.ARRAY, 4, 8, 1),
        "grants": MapSpec(_HASH[0], abi.GRANT_KEY.size, 4, MAX_GRANTS, _HASH[1]),
        "datagram_peers": MapSpec(MapType.LRU_HASH, abi.PEER_KEY.size, 4, constant["MAX_DATAGRAM_PEERS"]),
        "buckets": MapSpec(MapType.LRU_HASH, abi.BUCKET_KEY.size, 8, sizes.buckets),
        "event_rate": MapSpec(MapType.ARRAY, 4, abi.LIMIT.size, 1),
        "event_meter": MapSpec(MapType.PERCPU_ARRAY, 4, abi.EVENT_METER.size, 1),
        "events": MapSpec(MapType.RINGBUF, 0, 0, _EVENT_BYTES),
        "clients": MapSpec(MapType.LRU_HASH, abi.CLIENT_KEY.size, abi.CLIENT.size, constant["MAX_CLIENTS"]),
        "client_meter": MapSpec(MapType.PERCPU_ARRAY, 4, abi.EVENT_METER.size, 1),
        "interfaces": MapSpec(MapType.HASH, 4, abi.INTERFACE.size, constant["MAX_INTERFACES"]),
        "reject_meter": MapSpec(MapType.ARRAY, 4, abi.REJECT_METER.size, 1),
        "silent_rejects": MapSpec(MapType.PERCPU_ARRAY, 4, 8, 1),
        "scratch": MapSpec(MapType.PERCPU_ARRAY, 4, abi.SCRATCH.size, constant["SCRATCH_COUNT"]),
        "runtime": MapSpec(_HASH[0], abi.RUNTIME_KEY.size, 4, max(1, sizes.rules - 1), _HASH[1]),
        "slots": MapSpec(MapType.ARRAY, 4, abi.SLOT.size, 4 * constant["MAX_SLOTS"], MapFlags.MMAPABLE),
        "chains": MapSpec(MapType.ARRAY, 4, abi.CHAIN_ITEM.size, 2 * constant["MAX_CHAIN_ITEMS"], MapFlags.MMAPABLE),
        # One index more than there are sets: writing to it waits for all programs that are running (see KernelStore).
        "sets": MapSpec(MapType.ARRAY_OF_MAPS, 4, 4, 3, inner=set_pages(1)),
    }


def _pinned(path: Path) -> int:
    try:
        return bpf.obj_get(str(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, "there is no pin", str(path)) from error


class GateMaps(Mapping[str, int]):
    """The open maps of a gate: descriptors by map name. Close it, or use it as a context manager."""

    def __init__(self, fds: dict[str, int], specs: Mapping[str, MapSpec]) -> None:
        self._fds = fds
        self.specs = specs

    @classmethod
    def create(cls, directory: Path, sizes: MapSizes, owner: str = "") -> GateMaps:
        """Create all maps, with an empty policy that allows all, and pin them in ``directory`` (on a bpffs).

        ``owner`` is the instance that they are for; none is for any."""
        specs = _specs(sizes)
        maps = cls({}, specs)
        try:
            for name, spec in specs.items():
                maps._fds[name] = spec.create(name)
            bpf.map_update(maps["gate"], bytes(4), GateState(owner=owner_number(owner) if owner else 0).pack())
            bpf.map_update(maps["reject_meter"], bytes(4), abi.REJECT_METER.pack(*USUAL_REJECTS, 0))
            maps.pin(directory)
        except BaseException:
            maps.close()
            raise
        return maps

    @classmethod
    def open(cls, directory: Path, owner: str = "") -> GateMaps:
        """Open the maps pinned in ``directory``.

        Raises FileNotFoundError or :class:`LayoutMismatch`, also for maps that were made for another instance than
        ``owner``, if that is given."""
        specs = _specs(MapSizes())
        maps = cls({}, specs)
        try:
            for name, spec in specs.items():
                maps._fds[name] = fd = _pinned(directory / name)
                spec.check(name, fd)
            maps._check_owner(directory, owner)
        except BaseException:
            maps.close()
            raise
        return maps

    @classmethod
    def adopt(cls, fds: Mapping[str, int]) -> GateMaps:
        """Take over open maps, by name, of another process. Raises :class:`LayoutMismatch` if they are not those of
        this version; the descriptors stay the caller's then."""
        specs = _specs(MapSizes())
        if fds.keys() != specs.keys():
            other = ", ".join(sorted(fds.keys() ^ specs.keys()))
            raise LayoutMismatch(f"the maps are of another version: only one of the two has {other}")
        for name, spec in specs.items():
            spec.check(name, fds[name])
        return cls(dict(fds), specs)

    def _check_owner(self, directory: Path, owner: str) -> None:
        raw = bpf.map_lookup(self["gate"], bytes(4), abi.GATE.size)
        assert raw is not None  # an array has all its elements
        if owner and GateState.unpack(raw).owner not in (0, owner_number(owner)):
            raise LayoutMismatch(f"the maps pinned at {directory} belong to another instance")

    def pin(self, directory: Path) -> None:
        """Pin all maps in a directory on a bpffs. Raises OSError."""
        for name, fd in self.items():
            bpf.obj_pin(fd, str(directory / name))

    def are_pinned(self, directory: Path) -> bool:
        """Whether these very maps, all of them, are pinned there. Raises OSError if we are out of descriptors."""
        for name, fd in self.items():
            try:
                pinned = bpf.obj_get(str(directory / name))
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                    raise
                return False
            try:
                if bpf.map_info(pinned).id != bpf.map_info(fd).id:
                    return False
            except OSError:
                return False  # a program or a link
            finally:
                os.close(pinned)
        return True

    def capacity(self, name: str) -> int:
        """How many entries a map holds at most."""
        return bpf.map_info(self._fds[name]).max_entries

    @property
    def sizes(self) -> MapSizes:
        """The sizes that these maps were made with."""
        ids = self.capacity("rules")
        rules = ids // 2 if ids <= 2 * _SPARE_RULES else ids - _SPARE_RULES
        return MapSizes(rules, self.capacity("bans"), self.capacity("buckets"))

    def close(self) -> None:
        """Close the descriptors; pinned maps live on."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __getitem__(self, name: str) -> int:
        return self._fds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fds)

    def __len__(self) -> int:
        return len(self._fds)

    def __enter__(self) -> GateMaps:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
