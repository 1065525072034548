"""A service of one's own: a line protocol that tells the time, with a proper handshake and proper errors::

rama-ebpf run own_service:server --listen 127.0.0.1:1313
printf 'TIME UTC\n' | nc 127.0.0.1 1313
"""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from rama_ebpf.core import Lifecycle, ProtocolError, Service, Stage, Stream, stack
from rama_ebpf.layers import StrikeLayer, TimeoutLayer
from rama_ebpf.process import WorkerContext


class TimeServer:
    """Answers ``TIME <zone>`` with the time there, as often as it is asked."""

    accepts = Stream  # so that stack() can tell if it is put where something else goes in

    async def __call__(self, stream: Stream, /) -> None:
        while (line := await self._line(stream)) is not None:
            await stream.write(self._answer(line))
            # From here on the idle time-out counts, no longer the one for the handshake.
            Lifecycle.of(stream.extensions).reached(Stage.ESTABLISHED)

    async def _line(self, stream: Stream) -> bytes | None:
        while b"\n" not in stream.buffered:
            if not await stream.fill(256):  # raises LimitExceeded for a line that does not end
                return None
        line, _, _ = stream.buffered.partition(b"\n")
        stream.consume(len(line) + 1)
        return line

    def _answer(self, line: bytes) -> bytes:
        word, _, zone = line.decode("ascii", "replace").strip().partition(" ")
        if word != "TIME":
            raise ProtocolError(f"expected TIME, got {word!r}")  # counts as a strike; the connection is reset
        try:
            now = datetime.now(ZoneInfo(zone) if zone else UTC)
        except (ZoneInfoNotFoundError, ValueError):
            return b"there is no such zone\n"
        return f"{now:%H:%M}\n".encode()


def server(context: WorkerContext) -> Service[Stream, None]:
    """Three lines of nonsense within a minute, and the client's next SYN gets no answer."""
    return stack(StrikeLayer(context.policy, strikes=3), TimeoutLayer(handshake=5, idle=60), TimeServer())
