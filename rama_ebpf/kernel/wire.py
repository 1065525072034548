"""The maps and programs of the wire relay: how they are made, attached and read. ``bpf/wire.h`` has the layouts.

One process with privileges makes them (:mod:`rama_ebpf.control.wire_child`), and it alone can write to them. Workers
may have the pairs to read (:meth:`WireMaps.readable_pairs`). Nothing stays pinned, and the programs are attached by
links that their descriptors hold: with the process all of it is gone.

Reference: ``include/uapi/linux/bpf.h``, BPF_TCX_INGRESS and BPF_TCX_EGRESS (Linux 6.6).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from . import bpf
from .abi import source_dir
from .bpf import AttachType, MapFlags, MapType
from .btf import member_offsets
from .bytecode import Program
from .compile import Unit, amalgamate
from .header import Header
from .programs import load_programs

__all__ = [
    "LOOPBACK",
    "NOTICE",
    "STATE",
    "Leg",
    "Pair",
    "PairMemory",
    "PairReader",
    "Snapshot",
    "WireKey",
    "WireMaps",
    "WireUnavailable",
]

_HEADER: Final = Header.read(source_dir() / "wire.h")
STATE: Final = _HEADER.constants
"""The constants of the header, by name."""

_KEY: Final = _HEADER.layout("wire_key", "source", "target", "sport", "dport")
_FLOW: Final = _HEADER.layout(
    "wire_flow",
    *("pair", "leg", "source", "target", "sport", "dport", "seq", "ack", "device"),
    *("expect_received", "expect_acked", "shift_left", "shift_right", "v6", "scale"),
)
_LEG: Final = _HEADER.layout("wire_leg", "packets", "bytes", "seen", "acked", "sent", "end", "window")
_PAIR: Final = _HEADER.layout(
    "wire_pair", "state", "taken_at", "spoiled_by", "pad", "stamps", "offsets", "recent", "legs"
)
_QUESTION: Final = _HEADER.layout("wire_question", "v6", "pad", "key")
_SNAPSHOT: Final = _HEADER.layout(
    "wire_snapshot",
    *("found", "state", "rcv_nxt", "copied_seq", "snd_una", "snd_nxt", "write_seq", "ts_recent", "tsoffset"),
    *("out_of_order", "backlog", "snd_wnd", "rcv_wnd", "rcv_wup", "device"),
)
_FLIP: Final = _HEADER.layout("wire_flip", "deadline", "unless", "bits", "pair", "pad")
NOTICE: Final = _HEADER.layout("wire_notice", "pair", "leg", "kind", "v6", "pad", "bytes")

LOOPBACK: Final = 1
"""The index of a namespace's loopback device."""
_SCHED_CLS: Final = 3  # enum bpf_prog_type
_NAMES: Final = ("wire_relay", "wire_snapshot", "wire_flip")
_FRAME: Final = bytes(12) + b"\x88\xb5"  # an Ethernet header of a local experiment
_RDONLY: Final = 1 << 3  # BPF_F_RDONLY
_OPTION_BYTES: Final = 256
_RING_BYTES: Final = 1 << 18
_MASK: Final = 0xFFFFFFFF
_OFFSETS: Final = {
    ("sock_common", "skc_state"): "STATE",
    ("tcp_sock", "rcv_nxt"): "RCV_NXT",
    ("tcp_sock", "copied_seq"): "COPIED_SEQ",
    ("tcp_sock", "snd_una"): "SND_UNA",
    ("tcp_sock", "snd_nxt"): "SND_NXT",
    ("tcp_sock", "write_seq"): "WRITE_SEQ",
    ("tcp_sock", "tsoffset"): "TSOFFSET",
    ("tcp_sock", "out_of_order_queue"): "OUT_OF_ORDER",
    ("tcp_sock", "snd_wnd"): "SND_WND",
    ("tcp_sock", "rcv_wnd"): "RCV_WND",
    ("tcp_sock", "rcv_wup"): "RCV_WUP",
    ("sock", "sk_dst_cache"): "ROUTE",
    ("net_device", "ifindex"): "IFINDEX",
}


class WireUnavailable(RuntimeError):
    """This host cannot have the wire relay; the text says why."""


@dataclass(frozen=True, slots=True)
class WireKey:
    """The addresses of packets as they arrive: 16 bytes each, IPv4 in the last four, and ports in network order."""

    source: bytes
    target: bytes
    sport: bytes
    dport: bytes
    v6: bool

    @property
    def packed(self) -> bytes:
        return self.source + self.target + self.sport + self.dport

    @property
    def reverse(self) -> WireKey:
        """Those of what is sent that way."""
        return WireKey(self.target, self.source, self.dport, self.sport, self.v6)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A TCP socket at one moment, as ``struct tcp_sock`` has it. ``device`` is the index of the interface by which it
    sends, 0 where it has no route yet."""

    found: int
    state: int
    rcv_nxt: int
    copied_seq: int
    snd_una: int
    snd_nxt: int
    write_seq: int
    ts_recent: int
    tsoffset: int
    out_of_order: int
    backlog: int
    snd_wnd: int
    rcv_wnd: int
    rcv_wup: int
    device: int

    @property
    def promised(self) -> int:
        """Bytes that the peer was told it may still send."""
        return max(0, self.rcv_wnd - ((self.rcv_nxt - self.rcv_wup) & _MASK))


@dataclass(frozen=True, slots=True)
class Leg:
    """What has become of one end. ``packets`` came from it; of its bytes ``bytes`` were acknowledged by the other end,
    the end of its stream among them; ``seen`` is when the last packet came, in ns of CLOCK_MONOTONIC."""

    packets: int
    bytes: int
    seen: int
    acked: int
    sent: int
    end: int
    window: int


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair at one moment. ``state`` is of ``enum wire_state``."""

    state: int
    spoiled_by: int
    client: Leg
    target: Leg

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes that the target, and the client, have acknowledged."""
        ends = bool(self.state & STATE["WIRE_FINACK1"]), bool(self.state & STATE["WIRE_FINACK0"])
        return self.client.bytes - ends[0], self.target.bytes - ends[1]


class PairMemory:
    """The pairs as shared memory, of which every read is of the kernel's current value. ``fd`` stays the caller's."""

    def __init__(self, fd: int) -> None:
        self.count = bpf.map_info(fd).max_entries
        size = -(-self.count * _PAIR.size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(fd, size)
        self._words = memoryview(self._memory).cast("Q")

    def state(self, number: int) -> int:
        """Read a pair's state alone."""
        return int(self._words[number * _PAIR.size // 8])

    def __getitem__(self, number: int) -> Pair:
        at = number * _PAIR.size
        return _pair(self._memory[at : at + _PAIR.size])

    def begin(self, number: int, client: Snapshot, target: Snapshot, acked: tuple[int, int]) -> None:
        """Write a new pair, that is watched from now on; ``acked`` are the acknowledgements that the ends owe."""
        now = time.monotonic_ns()
        legs = [
            _LEG.pack(0, 0, now, owed, snapshot.rcv_nxt, 0, snapshot.snd_wnd)
            for snapshot, owed in zip((client, target), acked, strict=True)
        ]
        clocks = client.tsoffset, target.tsoffset, client.ts_recent, target.ts_recent
        at = number * _PAIR.size
        _PAIR.pack_into(self._memory, at, STATE["WIRE_TRACK"], 0, 0, 0, 0, 0, *clocks, *legs)

    def clear(self, number: int) -> None:
        """Forget a pair whose flows are gone."""
        self._memory[number * _PAIR.size : (number + 1) * _PAIR.size] = bytes(_PAIR.size)

    def close(self) -> None:
        """Unmap the memory."""
        self._words.release()
        self._memory.close()


class PairReader:
    """The pairs, for who may only read them: the kernel maps such a descriptor into no memory. ``fd`` is closed with
    this."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._read = bpf.MapReader(fd, 4, _PAIR.size)

    def __getitem__(self, number: int) -> Pair:
        found = self._read(number.to_bytes(4, sys.byteorder))
        if found is None:
            raise IndexError(f"there is no pair {number}")
        return _pair(found)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


def _pair(raw: bytes) -> Pair:
    state, _, spoiled, *_, client, target = _PAIR.unpack(raw)
    return Pair(state, spoiled, Leg(*_LEG.unpack(client)), Leg(*_LEG.unpack(target)))


class WireMaps:
    """The maps and programs, by name, for ``count`` tunnels at once."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.maps: dict[str, int] = {}
        self.programs: dict[str, int] = {}
        self._links: dict[int, int] = {}

    @classmethod
    def load(cls, count: int, *, kernel_headers: Path | None = None, sources: Path | None = None) -> WireMaps:
        """Make the maps and load the programs from the directory ``sources``. Nothing is attached yet.

        Raises OSError, :class:`~.compile.CompileError`, or :class:`~.btf.BtfUnavailable`.
        """
        wire = cls(count)
        try:
            wire._create()
            wire._load(kernel_headers, sources or source_dir())
        except BaseException:
            wire.close()
            raise
        return wire

    def _create(self) -> None:
        maps = self.maps
        maps["flows"] = bpf.map_create(
            MapType.HASH, _KEY.size, _FLOW.size, 2 * self.count, flags=MapFlags.NO_PREALLOC, name="wire_flows"
        )
        maps["pairs"] = bpf.map_create(
            MapType.ARRAY, 4, _PAIR.size, self.count, flags=MapFlags.MMAPABLE, name="wire_pairs"
        )
        maps["alive_until"] = bpf.map_create(MapType.ARRAY, 4, 8, 1, name="wire_alive")
        maps["options"] = bpf.map_create(MapType.PERCPU_ARRAY, 4, _OPTION_BYTES, 1, name="wire_options")
        for name in ("changes", "notices"):
            maps[name] = bpf.map_create(MapType.RINGBUF, 0, 0, _RING_BYTES, name=f"wire_{name}")

    def _load(self, kernel_headers: Path | None, sources: Path) -> None:
        offsets = member_offsets([*_OFFSETS, ("tcp_sock", "rx_opt"), ("tcp_options_received", "ts_recent")])
        backlog = member_offsets([("sock", "sk_backlog")])["sock", "sk_backlog"]
        flags = [f"-DOFFSET_{name}={offsets[member]}" for member, name in _OFFSETS.items()]
        recent = offsets["tcp_sock", "rx_opt"] + offsets["tcp_options_received", "ts_recent"]
        # sk_backlog is a structure without a name: atomic_t rmem_alloc, then int len. The device of a struct dst_entry
        # is its first member, since 6.18 in a union without a name.
        flags += [f"-DOFFSET_TS_RECENT={recent}", f"-DOFFSET_BACKLOG={backlog + 4}", "-DOFFSET_ROUTE_DEVICE=0"]
        unit = Unit(
            amalgamate(sources / "wire.c"),
            tuple(Program(name, _SCHED_CLS) for name in _NAMES),
            tuple(flags),
            kernel_headers,
        )
        self.programs = load_programs(unit, self.maps)

    # -- where it runs -----------------------------------------------------------------------------------------------

    @property
    def devices(self) -> frozenset[int]:
        """The indexes of the interfaces that carry the program."""
        return frozenset(self._links)

    def attach(self, devices: Iterable[int]) -> dict[int, str]:
        """Attach the program to these interfaces, and to no others any more; return why it is not on some of them.

        Raises :class:`WireUnavailable` where the kernel knows no such links.
        """
        wanted, refused = set(devices), {}
        for device in self._links.keys() - wanted:
            os.close(self._links.pop(device))
        for device in sorted(wanted - self._links.keys()):
            where = AttachType.TCX_EGRESS if device == LOOPBACK else AttachType.TCX_INGRESS
            try:
                self._links[device] = bpf.link_create(self.programs["wire_relay"], device, where)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    raise WireUnavailable("the kernel has no links for traffic control (Linux 6.6)") from error
                refused[device] = error.strerror or str(error)
        return refused

    def mend(self) -> None:
        """Forget the links whose interface is gone, though another one may have its index by now."""
        for device, link in list(self._links.items()):
            if bpf.link_info(link).ifindex != device:
                os.close(self._links.pop(device))

    def stay_alive(self, seconds: float) -> None:
        """Let the programs translate for so long from now; afterwards packets go to the stack, until the next call."""
        until = time.monotonic_ns() + int(seconds * 1e9)
        bpf.map_update(self.maps["alive_until"], bytes(4), until.to_bytes(8, sys.byteorder))

    # -- pairs and flows ---------------------------------------------------------------------------------------------

    def snapshot(self, key: WireKey) -> Snapshot:
        """Look at the socket to which packets with ``key`` belong. Raises OSError."""
        question = _QUESTION.pack(key.v6, 0, key.packed)
        size = max(_QUESTION.size, _SNAPSHOT.size)
        _, _, out, _ = bpf.prog_test_run(
            self.programs["wire_snapshot"],
            (_FRAME + question).ljust(len(_FRAME) + size, b"\0"),
            output=len(_FRAME) + size,
        )
        return Snapshot(*_SNAPSHOT.unpack_from(out, len(_FRAME)))

    def flip(self, pair: int, bits: int, *, unless: int, deadline: int = 0) -> bool:
        """Set bits of a pair's state at once, unless one of ``unless`` is set or ``deadline`` (CLOCK_MONOTONIC ns) has
        passed; return whether they were. Raises OSError."""
        question = _FLIP.pack(deadline, unless, bits, pair, 0)
        answer, _, _, _ = bpf.prog_test_run(self.programs["wire_flip"], _FRAME + question)
        if answer > 1:
            raise OSError(errno.EIO, f"wire_flip of pair {pair} returned {answer}")
        return answer == 0

    def put_flow(
        self,
        key: WireKey,
        pair: int,
        leg: int,
        becomes: WireKey,
        *,
        seq: int,
        ack: int,
        device: int,
        expect_received: int,
        expect_acked: int,
        scales: tuple[int, int],
        replace: bool = False,
    ) -> None:
        """Say what packets with ``key`` become. ``scales`` are those of the windows that this end advertises, and that
        the other end reads. Raises FileExistsError if there is such a flow already, unless ``replace``."""
        own, read = scales
        shift = own - read
        value = _FLOW.pack(
            pair,
            leg,
            *struct.unpack("=4I", becomes.source),
            *struct.unpack("=4I", becomes.target),
            *struct.unpack("=HH", becomes.sport + becomes.dport),
            seq & _MASK,
            ack & _MASK,
            device,
            expect_received & _MASK,
            expect_acked & _MASK,
            max(shift, 0),
            max(-shift, 0),
            key.v6,
            own,
        )
        bpf.map_update(self.maps["flows"], key.packed, value, bpf.BPF_EXIST if replace else bpf.BPF_NOEXIST)

    def remove_flow(self, key: WireKey) -> None:
        """Let packets with ``key`` go to the stack."""
        bpf.map_delete(self.maps["flows"], key.packed)

    def flow_count(self) -> int:
        """How many flows there are."""
        return len(bpf.map_lookup_batch(self.maps["flows"], _KEY.size, _FLOW.size))

    def readable_pairs(self) -> int:
        """Return a new descriptor of the pairs that can only be read."""
        return bpf.map_by_id(bpf.map_info(self.maps["pairs"]).id, flags=_RDONLY)

    def close(self) -> None:
        """Detach the programs and give everything up."""
        for fds in (self._links, self.programs, self.maps):
            for fd in fds.values():
                with contextlib.suppress(OSError):
                    os.close(fd)
            fds.clear()
