"""A TCP end whose every segment is written by hand, against one of the kernel: what packetdrill does.

It plays the client of a connection, from an interface whose addresses the kernel does not have, and notes what comes
back: relative sequence numbers, flags, options. So the same script can be played to a target that is reached directly,
and to one behind a relay, and what was seen be compared.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from rama_ebpf.kernel.raw_packets import checksum

__all__ = ["ACK", "FIN", "PSH", "RST", "SYN", "URG", "Answer", "Script"]

FIN, SYN, RST, PSH, ACK, URG = (1 << bit for bit in range(6))
_TICK: Final = 1000
"""What our timestamps grow by for each segment: milliseconds."""
_MSS: Final = 1460


@dataclass(frozen=True)
class Answer:
    """A segment that came, relative to the beginning: ``seq`` is of the bytes that the other end has said, ``ack`` of
    ours. ``sack`` are blocks of ours, ``echo`` is how many of our ticks old the timestamp is that it echoes."""

    flags: str
    seq: int
    ack: int
    size: int
    sack: tuple[tuple[int, int], ...] = ()
    window_open: bool = True
    stamped: bool = False

    def __str__(self) -> str:
        sack = "".join(f" sack {left}-{right}" for left, right in self.sack)
        window = "" if self.window_open else " win 0"
        return f"{self.flags} {self.seq}:{self.seq + self.size}({self.size}) ack {self.ack}{sack}{window}"


class Script:
    """A connection from ``source`` to ``target``, addresses and ports, by frames on ``interface`` to ``gateway``'s MAC
    address. With ``stamps`` it has timestamps, with ``sack`` it permits SACK."""

    def __init__(
        self,
        interface: str,
        gateway: bytes,
        source: tuple[str, int],
        target: tuple[str, int],
        *,
        stamps: bool = True,
        sack: bool = True,
        first: int = 0xFFFFF000,
    ) -> None:
        self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
        self._sock.bind((interface, 0x0800))
        self._head = gateway + self._sock.getsockname()[4] + b"\x08\x00"
        self._source, self._target = source, target
        self._stamps = stamps
        self._sack = sack
        self._first = first  # what we say begins here, soon before the numbers wrap around
        self._base = 0  # what the other end says begins here
        self._clock = 10_000_000
        self._recent = 0
        self._said = 0
        self._heard = 0

    def close(self) -> None:
        """Forget it, without a word."""
        self._sock.close()

    def open(self) -> None:
        """Connect. Raises TimeoutError."""
        self.send(SYN, seq=-1, options=self._syn_options())
        answer = self._raw(lambda flags: flags & (SYN | ACK) == SYN | ACK)
        self._base = answer[0] + 1
        self.send(ACK)

    def _syn_options(self) -> bytes:
        sack = b"\4\2" if self._sack else b"\1\1"
        stamps = b"\x08\x0a" + struct.pack("!II", self._clock, 0) if self._stamps else b"\1" * 10
        return b"\2\4" + struct.pack("!H", _MSS) + sack + stamps + b"\1\3\3\7"

    def rebase(self) -> None:
        """Count from here on: what was said before was the way to the target."""
        self._first = (self._first + self._said) & 0xFFFFFFFF
        self._base = (self._base + self._heard) & 0xFFFFFFFF
        self._said = self._heard = 0

    def say(self, data: bytes) -> None:
        """Send the next bytes in order."""
        self.send(ACK | PSH, data=data)
        self._said += len(data)

    def hear(self, count: int) -> bytes:
        """Wait for so many bytes in order, and acknowledge them. Raises TimeoutError."""
        got = bytearray()
        while len(got) < count:
            seq, _, flags, _, _, data = self._raw(lambda flags: not flags & SYN)
            if flags & RST:
                raise ConnectionResetError("the other end resets")
            at = (seq - self._base) & 0xFFFFFFFF
            if at == self._heard and data:
                got += data
                self._heard += len(data)
                self.send(ACK)
        return bytes(got)

    def send(
        self,
        flags: int,
        *,
        seq: int | None = None,
        ack: int | None = None,
        data: bytes = b"",
        window: int = 512,
        options: bytes | None = None,
        stamp: int | None = None,
        urgent: int = 0,
        broken: bool = False,
    ) -> None:
        """Send a segment. ``seq`` and ``ack`` are relative, and follow what was said and heard if they are not given;
        so is ``stamp``, in ticks of the past. ``broken``: with a wrong checksum."""
        self._clock += _TICK
        number = (self._first + (self._said if seq is None else seq)) & 0xFFFFFFFF
        answer = (self._base + (self._heard if ack is None else ack)) & 0xFFFFFFFF if flags & ACK else 0
        if options is None:
            options = b""
            if self._stamps:
                value = self._clock - (stamp or 0) * _TICK
                options = b"\1\1\x08\x0a" + struct.pack("!II", value & 0xFFFFFFFF, self._recent)
        offset = (20 + len(options)) // 4 << 4
        ports = self._source[1], self._target[1]
        tcp = struct.pack("!HHIIBBHHH", *ports, number, answer, offset, flags, window, 0, urgent) + options + data
        addresses = socket.inet_aton(self._source[0]) + socket.inet_aton(self._target[0])
        found = checksum(addresses + struct.pack("!HH", 6, len(tcp)) + tcp) ^ (0x5555 if broken else 0)
        tcp = tcp[:16] + struct.pack("!H", found) + tcp[18:]
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0x4000, 64, 6, 0) + addresses
        self._sock.send(self._head + ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:] + tcp)

    def answers(self, seconds: float = 0.3) -> list[Answer]:
        """What comes until nothing has for so long."""
        found: list[Answer] = []
        while (answer := self.answer(seconds)) is not None:
            found.append(answer)
        return found

    def answer(self, seconds: float) -> Answer | None:
        """What comes next, within so many seconds."""
        packet = self._next(seconds)
        if packet is None:
            return None
        seq, ack, flags, window, options, data = packet
        letters = "".join(letter for bit, letter in enumerate("FSRPAU") if flags >> bit & 1)
        stamped, sack = False, []
        for kind, value in _options(options):
            if kind == 8:
                stamped = True
                self._recent = struct.unpack("!I", value[:4])[0]
            if kind == 5:
                edges = struct.unpack(f"!{len(value) // 4}I", value)
                pairs = zip(edges[::2], edges[1::2], strict=True)
                sack = [(self._ours(left), self._ours(right)) for left, right in pairs]
        at = (seq - self._base) & 0xFFFFFFFF
        return Answer(
            letters.replace("P", ""),
            at if at < 1 << 31 else at - (1 << 32),
            self._ours(ack) if flags & ACK else 0,
            len(data),
            tuple(sack),
            window > 0 or bool(flags & RST),
            stamped,
        )

    def _ours(self, number: int) -> int:
        at = (number - self._first) & 0xFFFFFFFF
        return at if at < 1 << 31 else at - (1 << 32)

    def _raw(self, wanted: object) -> tuple[int, int, int, int, bytes, bytes]:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            packet = self._next(1.0)
            if packet is not None and wanted(packet[2]):  # type: ignore[operator]
                for kind, value in _options(packet[4]):
                    if kind == 8:
                        self._recent = struct.unpack("!I", value[:4])[0]
                return packet
        raise TimeoutError("nothing comes")

    def _next(self, seconds: float) -> tuple[int, int, int, int, bytes, bytes] | None:
        """Sequence number, acknowledgement, flags, window, options and data of the next segment for us."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self._sock], [], [], left)[0]:
                return None
            frame, address = self._sock.recvfrom(1 << 17)
            if address[2] == 4 or frame[23] != 6 or frame[30:34] != socket.inet_aton(self._source[0]):
                continue
            ports = struct.unpack_from("!HH", frame, 34)
            if ports != (self._target[1], self._source[1]):
                continue
            _, _, seq, ack, offset, flags, window = struct.unpack_from("!HHIIBBH", frame, 34)
            head, end = 34 + (offset >> 4) * 4, 14 + int.from_bytes(frame[16:18], "big")
            return seq, ack, flags, window, frame[54:head], frame[head:end]
        return None


def _options(data: bytes) -> Iterable[tuple[int, bytes]]:
    at = 0
    while at < len(data) and data[at]:
        if data[at] == 1:
            at += 1
            continue
        if at + 1 >= len(data) or data[at + 1] < 2:
            return
        yield data[at], data[at + 2 : at + data[at + 1]]
        at += data[at + 1]
