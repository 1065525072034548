"""A live gate, twelve sources around it, and its policy as it can be put back in milliseconds."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import select
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from rama_ebpf.cli.lifecycle import status
from rama_ebpf.control.api import ControlApi
from rama_ebpf.kernel import bpf
from rama_ebpf.kernel.bpf import MapFlags, MapType
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.kernel_store import KernelStore
from rama_ebpf.policy.rule import Action

from ..lab import PATIENCE, Host, wait_for
from ..proxy import ProxyProcess

__all__ = ["PORT", "SOURCES", "Policy", "Scene", "Verdicts"]

PORT = 1080
SOURCES = {
    "blocked": "198.18.1.1",
    "target": "198.18.1.2",
    "neighbour": "198.18.1.3",
    "in a blocked net": "198.18.2.9",
    "its exception": "198.18.2.10",
    "banned": "198.18.3.1",
    "failsafe": "198.18.4.1",
    "in the set": "198.18.5.1",
    "beside the set": "198.18.5.129",
    "blocked IPv6": "2001:db8:1::1",
    "target IPv6": "2001:db8:1::2",
    "in the set IPv6": "2001:db8:2::1",
}
SERVER = {4: "198.18.0.80", 6: "2001:db8::80"}

Verdicts = Mapping[str, str]
"""What each of :data:`SOURCES` met: ``in``, ``rst`` or ``silence``."""

_NOT_POLICY = {
    *(
        "listeners",
        "sockets",
        "interfaces",
        "accepted",
        "established",
        "server_cgroup",
        "grants",
        "datagram_peers",
        "buckets",
    ),
    *("events", "event_rate", "event_meter", "reject_meter", "silent_rejects", "scratch", "egress", "gate_stats"),
    *("rule_hits",),
}
_HASHES = {MapType.HASH, MapType.LPM_TRIE}


@dataclass(frozen=True)
class Policy:
    """All of a policy, on bpffs and on disk, as it was at one moment."""

    hashes: Mapping[str, Mapping[bytes, bytes]]
    arrays: Mapping[str, bytes]
    sets: Mapping[str, tuple[int, ...]]
    """descriptors of the inner maps"""
    files: Mapping[str, bytes]


class Scene:
    """A server in a namespace, with :data:`SOURCES` as addresses of the same namespace."""

    def __init__(self, host: Host, instance: str) -> None:
        self.host = host
        self.instance = Instance(instance)
        for address in (*SERVER.values(), *SOURCES.values()):
            host.add_address(f"{address}/{ip_address(address).max_prefixlen}", "lo")
        self.arguments = ["--workers", "1", "--max-rules", "64", "--max-bans", "64", "--drain", "1"]
        for server in SERVER.values():
            self.arguments += ["--listen", f"[{server}]:{PORT}" if ":" in server else f"{server}:{PORT}"]
        self.proxy = ProxyProcess(host, instance, *self.arguments)

    @property
    def roots(self) -> tuple[str, ...]:
        """What the paths of all its files have in them: pins, state, /run, cgroup, and what was compiled."""
        return (self.instance.name, "/.programs/")

    def crash(self) -> None:
        """Kill the server, and wait until nothing of it holds the instance."""
        self.proxy.signal(signal.SIGKILL)
        self.proxy.end()
        wait_for(lambda: self.instance.serving_pid() is None, timeout=30, what="the end of the server's children")

    def restart(self) -> None:
        """Crash, and start anew."""
        self.crash()
        self.proxy.start()

    # -- asking --------------------------------------------------------------------------------------------------

    def connect_all(self, sources: Mapping[str, str] = SOURCES) -> Verdicts:
        """Connect from each source at once. Where the gate says that it has dropped all that got no answer, nobody
        waits for it."""
        before = self._drops()
        sockets = self.host.call(lambda: {name: _connecting(address) for name, address in sources.items()})
        found: dict[str, str] = {}
        deadline = time.monotonic() + 1.5 * PATIENCE
        try:
            while len(found) < len(sources):
                for name, sock in sockets.items():
                    if name not in found and (verdict := _verdict(sock)):
                        found[name] = verdict
                silent = len(sources) - len(found)
                if silent and (self._drops() - before >= silent or time.monotonic() > deadline):
                    # What was dropped meanwhile may have been somebody's: look once more.
                    found |= {name: _verdict(sock) or "silence" for name, sock in sockets.items() if name not in found}
        finally:
            for sock in sockets.values():
                sock.close()
        return {name: found[name] for name in sources}

    def _drops(self) -> int:
        try:
            with self.store() as store:
                return sum(count for (_, _, action), count in store.counters.totals().items() if action == "drop")
        except FileNotFoundError:
            return 0

    def store(self) -> KernelStore:
        """The store as commands open it."""
        return KernelStore(self.instance)

    def told(self) -> Verdicts:
        """What ``test`` says of each source."""
        with self.store() as store:
            verdicts = {name: store.verdict(ip_address(address), PORT) for name, address in SOURCES.items()}
        words = {Action.ALLOW: "in", Action.DROP: "silence", Action.REJECT: "rst"}
        return {name: words[verdict.action] for name, verdict in verdicts.items()}

    def listed(self) -> frozenset[str]:
        """What ``list`` says is in force, without times and counts."""
        with self.store() as store:
            answer = ControlApi(store).list({})
        rows = [f"default {answer['default']}", f"trial {answer['confirm_within'] is not None}"]
        rows += [f"failsafe {network}" for network in answer["failsafe"]]  # type: ignore[attr-defined]
        for rule in answer["rules"]:  # type: ignore[attr-defined]
            told = (rule["sources"], rule["action"], rule["port"], rule["dry_run"], rule["expires_in"] is None)
            rows.append(f"rule {rule['name']} {told}")
        for ban in answer["bans"]:  # type: ignore[attr-defined]
            rows.append(f"ban {ban['address']} {ban['action']} {ban['expires_in'] is None}")
        return frozenset(rows)

    def status(self) -> Mapping[str, object]:
        return status(self.instance)

    # -- the policy as a whole -----------------------------------------------------------------------------------

    def unfinished_files(self) -> list[Path]:
        """Those that a writer has not renamed yet, or has left behind."""
        return list(self.instance.state_dir.glob(".*"))

    def save(self) -> Policy:
        """Read all of the policy."""
        hashes: dict[str, dict[bytes, bytes]] = {}
        arrays: dict[str, bytes] = {}
        sets: dict[str, tuple[int, ...]] = {}
        with self._pins() as pins:
            for name, (fd, info) in pins.items():
                if info.kind == MapType.ARRAY_OF_MAPS:
                    identities = [bpf.map_lookup(fd, _number(n), 4) for n in range(info.max_entries)]
                    found = [bpf.map_by_id(int.from_bytes(raw or b"", sys.byteorder)) for raw in identities]
                    sets[name] = tuple(found)
                elif info.kind in _HASHES:
                    hashes[name] = dict(bpf.map_lookup_batch(fd, info.key_size, info.value_size))
                elif info.kind == MapType.ARRAY:
                    arrays[name] = _read_array(fd, info)
        files = {}
        for path in self.instance.state_dir.rglob("*"):
            if path.is_file():
                files[str(path.relative_to(self.instance.state_dir))] = path.read_bytes()
        return Policy(hashes, arrays, sets, files)

    def put_back(self, policy: Policy) -> None:
        """Make it what it was."""
        with self.instance.policy_lock(), self._pins() as pins:
            for name, wanted in policy.hashes.items():
                fd, info = pins[name]
                for key, value in bpf.map_lookup_batch(fd, info.key_size, info.value_size):
                    if wanted.get(key) != value:
                        bpf.map_delete(fd, key)
                for key, value in wanted.items():
                    bpf.map_update(fd, key, value)
            for name, inner in policy.sets.items():
                for index, fd in enumerate(inner):
                    present = bpf.map_lookup(pins[name][0], _number(index), 4)
                    if present != _number(bpf.map_info(fd).id):
                        bpf.map_update(pins[name][0], _number(index), _number(fd))
            for name, data in policy.arrays.items():
                _write_array(*pins[name], data)
            for path in list(self.instance.state_dir.rglob("*")):
                if path.is_file() and str(path.relative_to(self.instance.state_dir)) not in policy.files:
                    path.unlink()
            for relative, data in policy.files.items():
                path = self.instance.state_dir / relative
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                if not path.is_file() or path.read_bytes() != data:
                    path.write_bytes(data)

    @contextlib.contextmanager
    def _pins(self) -> Iterator[dict[str, tuple[int, bpf.MapInfo]]]:
        opened: dict[str, tuple[int, bpf.MapInfo]] = {}
        try:
            for path in self.instance.pin_dir.iterdir():
                if path.name not in _NOT_POLICY:
                    fd = bpf.obj_get(str(path))
                    opened[path.name] = fd, bpf.map_info(fd)
            yield opened
        finally:
            for fd, _ in opened.values():
                bpf.close(fd)

    def digest(self) -> str:
        """Name the state: equal for states which differ in times, counts, revisions and ids only."""
        policy = self.save()
        for fds in policy.sets.values():
            for fd in fds:
                bpf.close(fd)
        with self.store() as store:
            gate = store.tables.gate()
        shape = (
            sorted(self.listed()),
            {name: len(rows) for name, rows in policy.hashes.items()},
            (gate.active, gate.fallback, bool(gate.deadline), gate.flags, gate.runtime, gate.failsafe_ports),
            [(head.default, head.document_size) for head in gate.sets],
            {name: [_shape(line) for line in data.splitlines()] for name, data in policy.files.items()},
        )
        return hashlib.sha256(repr(shape).encode()).hexdigest()


def _shape(line: bytes) -> object:
    try:
        row = json.loads(line)
        return (row.get("address"), row.get("lifted"), row.get("what"), row.get("until") is None)
    except (ValueError, AttributeError):
        return len(line)


def _number(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)


def _read_array(fd: int, info: bpf.MapInfo) -> bytes:
    if info.flags & MapFlags.MMAPABLE:
        with mmap.mmap(fd, info.max_entries * info.value_size, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
            return memory[:]
    return b"".join(bpf.map_lookup(fd, _number(n), info.value_size) or b"" for n in range(info.max_entries))


def _write_array(fd: int, info: bpf.MapInfo, data: bytes) -> None:
    if info.flags & MapFlags.MMAPABLE:
        with mmap.mmap(fd, info.max_entries * info.value_size) as memory:
            if memory[:] != data:
                memory[:] = data
        return
    for index in range(info.max_entries):
        value = data[index * info.value_size : (index + 1) * info.value_size]
        if bpf.map_lookup(fd, _number(index), info.value_size) != value:
            bpf.map_update(fd, _number(index), value)


def _connecting(source: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    sock = socket.socket(family)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.bind((source, 0))
    sock.connect_ex((SERVER[6 if family == socket.AF_INET6 else 4], PORT))
    return sock


def _verdict(sock: socket.socket) -> str:
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    if not poller.poll(0):
        return ""
    error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error == 0:
        with contextlib.suppress(OSError):
            sock.getpeername()
            return "in"
        return "rst"
    return "rst" if error in (errno.ECONNREFUSED, errno.ECONNRESET) else errno.errorcode[error]


def remove(path: Path) -> None:
    """Remove a directory if it is there."""
    if path.is_dir():
        shutil.rmtree(path)


def descriptors() -> int:
    """How many this process has."""
    return len(os.listdir("/proc/self/fd"))
