"""What crosses an interface: the TCP segments, by an AF_PACKET socket (packet(7))."""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass

__all__ = ["Capture", "Segment"]


@dataclass(frozen=True)
class Segment:
    """A TCP segment on the wire."""

    source: str
    sport: int
    target: str
    dport: int
    flags: str
    """Letters of FSRPA that are set, in that order."""


class Capture:
    """What an AF_PACKET socket saw."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.segments: list[Segment] = []

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._sock.close()

    def read(self, seconds: float = 0.3) -> list[Segment]:
        """Collect for ``seconds`` and return everything seen since the start."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                frame = self._sock.recv(65535)
            except TimeoutError:
                continue
            segment = _segment(frame)
            if segment is not None:
                self.segments.append(segment)
        return self.segments


def _segment(frame: bytes) -> Segment | None:
    kind = struct.unpack_from("!H", frame, 12)[0]
    if kind == 0x0800 and frame[23] == 6:
        family, source, target, at = socket.AF_INET, frame[26:30], frame[30:34], 14 + (frame[14] & 15) * 4
    elif kind == 0x86DD and frame[20] == 6:
        family, source, target, at = socket.AF_INET6, frame[22:38], frame[38:54], 54
    else:
        return None
    sport, dport = struct.unpack_from("!HH", frame, at)
    bits = frame[at + 13]
    flags = "".join(letter for bit, letter in ((1, "F"), (2, "S"), (4, "R"), (8, "P"), (16, "A")) if bits & bit)
    return Segment(socket.inet_ntop(family, source), sport, socket.inet_ntop(family, target), dport, flags)
