"""A TCP client made by hand, for segments that no operating system sends on request.

The start-up self-test and the overlap fuzz send with it, from one end of a veth pair that has no address, to a real
TCP server on the other end: in order, out of order, and overlapping (a retransmission that begins before what was
acknowledged and reaches beyond it, as Linux sends when it collapses segments, RFC 9293 section 3.10.7.4 allows).
"""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import struct
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

__all__ = ["SegmentPlan", "SyntheticConnection", "Wire", "segment_plan"]

_FIN, _SYN, _RST, _ACK = 1, 2, 4, 16
_ETHERTYPE_IPV4: Final = 0x0800
_MSS_OPTION: Final = struct.pack("!BBH", 2, 4, 1400)
_IPV4: Final = struct.Struct("!BBHHHBBH4s4s")
_TCP: Final = struct.Struct("!HHIIBBHHH")
_PSEUDO: Final = struct.Struct("!4s4sxBH")
_PACKET_OUTGOING: Final = 4


@dataclass(frozen=True)
class SegmentPlan:
    """Which bytes of a stream go into which segment, in the order of sending; together they cover all of it."""

    size: int
    segments: tuple[tuple[int, int], ...]
    first: int
    """So many segments are sent and have to arrive before the others follow at once."""


def segment_plan(rng: random.Random, kind: str) -> SegmentPlan:
    """Draw a plan: ``clean`` (in order), ``overlapping`` (segments begin before the last one's end) or ``reordered``
    (both, and exchanged within a window)."""
    size = rng.randrange(2000, 20_000)
    segments: list[tuple[int, int]] = []
    end = 0
    while end < size:
        start = end
        if kind != "clean" and rng.random() < 0.5:
            start = max(0, end - rng.randrange(1, 1200))
        end = min(size, max(end + rng.randrange(1, 1200), start + 1), start + 1400)
        segments.append((start, end))
    first = rng.randrange(1, 3)
    if kind == "reordered":
        head, tail = segments[:first], segments[first:]
        window = rng.randrange(2, 8)
        mixed: list[tuple[int, int]] = []
        while tail:
            block, tail = tail[:window], tail[window:]
            rng.shuffle(block)
            mixed += block
        segments = head + mixed
    return SegmentPlan(size, tuple(segments), first)


class Wire:
    """The end of a veth pair from which segments are sent. It answers nothing by itself, not even ARP: the other end
    needs a permanent neighbour entry for ``source``."""

    def __init__(self, interface: str, other_mac: bytes, source: IPv4Address, target: IPv4Address) -> None:
        self.source, self.target = source.packed, target.packed
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETHERTYPE_IPV4))
        self._socket.bind((interface, _ETHERTYPE_IPV4))
        self._socket.setblocking(False)
        mac: bytes = self._socket.getsockname()[4]
        self._ethernet = other_mac + mac + struct.pack("!H", _ETHERTYPE_IPV4)
        self._connections: dict[int, SyntheticConnection] = {}
        self._ports = itertools.cycle(range(10_000, 60_000))
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._receive)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()

    def reserve(self) -> int:
        """Return a local port for :meth:`connect`."""
        return next(self._ports)

    async def connect(self, port: int, local: int, *, timeout: float = 5.0) -> SyntheticConnection:
        """Open a connection from port ``local``. Raises TimeoutError."""
        connection = self._connections[local] = SyntheticConnection(self, local, port)
        async with asyncio.timeout(timeout):
            await connection.open()
        return connection

    def forget(self, local: int) -> None:
        self._connections.pop(local, None)

    def send(self, local: int, port: int, sequence: int, acknowledgement: int, flags: int, payload: bytes) -> None:
        """Put one segment on the wire."""
        options = _MSS_OPTION if flags & _SYN else b""
        offset = (_TCP.size + len(options)) << 2
        fields = (local, port, sequence & 0xFFFFFFFF, acknowledgement & 0xFFFFFFFF, offset, flags, 65535)
        length = _TCP.size + len(options) + len(payload)
        body = options + payload
        pseudo = _PSEUDO.pack(self.source, self.target, socket.IPPROTO_TCP, length)
        checksum = _checksum(pseudo + _TCP.pack(*fields, 0, 0) + body)
        total = _IPV4.size + length
        header = (0x45, 0, total, 0, 0, 64, socket.IPPROTO_TCP)
        ip_checksum = _checksum(_IPV4.pack(*header, 0, self.source, self.target))
        ip = _IPV4.pack(*header, ip_checksum, self.source, self.target)
        self._socket.send(self._ethernet + ip + _TCP.pack(*fields, checksum, 0) + body)

    def _receive(self) -> None:
        while True:
            try:
                frame, address = self._socket.recvfrom(65536)
            except BlockingIOError:
                return
            if address[2] == _PACKET_OUTGOING or frame[23] != socket.IPPROTO_TCP:
                continue
            start = 14 + (frame[14] & 15) * 4
            end = 14 + int.from_bytes(frame[16:18], "big")
            _, local, sequence, acknowledgement, offset, flags, _, _, _ = _TCP.unpack_from(frame, start)
            connection = self._connections.get(local)
            if connection is not None:
                connection.received(sequence, acknowledgement, flags, end - start - (offset >> 4) * 4)


class SyntheticConnection:
    """The client's side of one connection: it sends what it is told, and acknowledges what comes in order."""

    def __init__(self, wire: Wire, local: int, port: int) -> None:
        self._wire, self._local, self._port = wire, local, port
        self._first = (local * 2654435761) & 0xFFFFFFFF  # some initial sequence number, near the wrap for some
        self._next = 0
        self.acknowledged = -1
        """How many bytes the server has acknowledged; -1 before the handshake."""
        self.ended = False
        """Whether the server has sent FIN or RST."""
        self._changed = asyncio.Event()

    async def open(self) -> None:
        self._wire.send(self._local, self._port, self._first, 0, _SYN, b"")
        await self._until(lambda: self.acknowledged >= 0)
        self._acknowledge()

    def send(self, start: int, data: bytes, *, fin: bool = False) -> None:
        """Send one segment whose first byte is number ``start`` of the stream."""
        self._wire.send(self._local, self._port, self._first + 1 + start, self._next, _ACK | (_FIN if fin else 0), data)

    async def play(self, plan: SegmentPlan, stream: bytes, arrived: asyncio.Event, *, timeout: float = 20.0) -> None:
        """Send ``stream`` as ``plan`` says, and FIN when all is acknowledged. Raises TimeoutError.

        After the first segments it waits for ``arrived``: their bytes are where they were to go, so that whoever
        relays them may have handed over to the kernel.
        """
        async with asyncio.timeout(timeout):
            early, late = plan.segments[: plan.first], plan.segments[plan.first :]
            for start, end in early:
                self.send(start, stream[start:end])
            await arrived.wait()
            for start, end in late:
                self.send(start, stream[start:end])
            await self._until(lambda: self.acknowledged >= plan.size or self.ended)
            self.send(plan.size, b"", fin=True)
            await self._until(lambda: self.ended)

    def close(self) -> None:
        """Forget the connection, with RST."""
        self._wire.send(
            self._local, self._port, self._first + 2 + max(self.acknowledged, 0), self._next, _RST | _ACK, b""
        )
        self._wire.forget(self._local)

    def received(self, sequence: int, acknowledgement: int, flags: int, length: int) -> None:
        """Take note of a segment from the server."""
        if flags & _SYN:
            self._next = (sequence + 1) & 0xFFFFFFFF
        elif sequence == self._next:
            self._next = (self._next + length + (flags & _FIN)) & 0xFFFFFFFF
        if flags & _ACK:
            self.acknowledged = max(self.acknowledged, (acknowledgement - self._first - 1) & 0xFFFFFFFF)
        if flags & (_FIN | _RST):
            self.ended = True
        if length or flags & _FIN:
            self._acknowledge()
        self._changed.set()

    def _acknowledge(self) -> None:
        self._wire.send(self._local, self._port, self._first + 1 + self.acknowledged, self._next, _ACK, b"")

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()


def _checksum(data: bytes) -> int:
    """The Internet checksum, RFC 1071."""
    words = array("H", data if len(data) % 2 == 0 else data + b"\0")
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return socket.htons(~total & 0xFFFF)
