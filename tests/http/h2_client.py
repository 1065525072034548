"""A client for tests: the h2 library over a socket, plus frames that h2 itself would never send."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import hyperframe.frame

__all__ = ["H2Client", "h2_client"]

GET = [(":method", "GET"), (":scheme", "http"), (":authority", "a.test"), (":path", "/")]


class H2Client:
    """One connection; ``events`` are all that came. ``auto`` acknowledges received data at once."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, auto: bool = True) -> None:
        self.reader, self.writer, self.auto = reader, writer, auto
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=True,
                header_encoding="latin-1",
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.events: list[Any] = []
        self.closed = False
        self.h2.initiate_connection()

    async def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    def request(self, fields: list[tuple[str, str]] = GET, *, end: bool = True) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream_id, fields, end_stream=end)
        return int(stream_id)

    def raw(self, *frames: hyperframe.frame.Frame) -> None:
        self.writer.write(self.h2.data_to_send() + b"".join(frame.serialize() for frame in frames))

    async def step(self) -> None:
        """Read once and take the events."""
        data = await self.reader.read(65536)
        if not data:
            self.closed = True
            return
        for event in self.h2.receive_data(data):
            self.events.append(event)
            if isinstance(event, h2.events.DataReceived) and self.auto:
                with contextlib.suppress(h2.exceptions.StreamClosedError):
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        await self.flush()

    def of(self, kind: type, stream_id: int | None = None) -> list[Any]:
        return [
            event
            for event in self.events
            if isinstance(event, kind) and (stream_id is None or event.stream_id == stream_id)
        ]

    async def until(self, kind: type, stream_id: int | None = None) -> Any:
        """Read until an event of this kind has come, and return it."""
        await self.flush()
        while not self.of(kind, stream_id):
            assert not self.closed, f"closed before {kind.__name__}: {self.events}"
            await self.step()
        return self.of(kind, stream_id)[0]

    async def response(self, stream_id: int) -> tuple[dict[str, str], bytes]:
        """Return the fields and the body of a response."""
        await self.until(h2.events.StreamEnded, stream_id)
        (head,) = self.of(h2.events.ResponseReceived, stream_id)
        return dict(head.headers), b"".join(event.data for event in self.of(h2.events.DataReceived, stream_id))


@contextlib.asynccontextmanager
async def h2_client(port: int, *, auto: bool = True, **tls: Any) -> AsyncIterator[H2Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **tls)
    try:
        yield H2Client(reader, writer, auto=auto)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
