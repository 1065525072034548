"""Relay by copying through userspace: works for every kind of stream.

Back-pressure is the stream's own: nothing is read from one side until the other has taken what was read before, so
a tunnel holds at most one chunk per direction. EOF on one side half-closes the other and the rest still flows.
"""

from __future__ import annotations

import asyncio
import time

from ..core.stream import Stream
from .tunnel import CloseReason, TunnelLimits, TunnelReport

__all__ = ["copy"]

_CHUNK = 128 * 1024


class _Direction:
    def __init__(self) -> None:
        self.delivered = 0
        self.last = time.monotonic()
        self.error: OSError | None = None
        self.error_on_read = False

    async def pump(self, source: Stream, sink: Stream) -> None:
        reading = True
        try:
            while True:
                reading = True
                data = await source.read(_CHUNK)
                reading = False
                self.last = time.monotonic()
                if not data:
                    await sink.write_eof()
                    return
                await sink.write(data)
                self.delivered += len(data)
                self.last = time.monotonic()
        except OSError as error:
            self.error, self.error_on_read = error, reading
            raise


async def copy(client: Stream, upstream: Stream, limits: TunnelLimits, *, why: str = "") -> TunnelReport:
    """Relay until both directions have ended, a side resets, or a time-out of ``limits`` passes.

    Both streams are closed on return: in order after :attr:`CloseReason.EOF`, else aborted (TCP: RST), so that a
    truncated stream never looks complete. If the caller is cancelled both are aborted and the cancellation goes on.
    """
    started = time.monotonic()
    up, down = _Direction(), _Direction()
    tasks = {
        asyncio.create_task(up.pump(client, upstream)),
        asyncio.create_task(down.pump(upstream, client)),
    }
    reason = CloseReason.CUT
    try:
        reason = await _supervise(tasks, up, down, started, limits)
    finally:
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
            if reason is CloseReason.EOF:
                await client.close()
                await upstream.close()
        finally:
            # A cancellation may arrive during the clean-up itself, and must not leave a stream open. After close()
            # this does nothing.
            client.abort()
            upstream.abort()
            report = TunnelReport(reason, up.delivered, down.delivered, time.monotonic() - started, "copy", why)
            client.extensions.add(report)
    return report


async def _supervise(
    tasks: set[asyncio.Task[None]], up: _Direction, down: _Direction, started: float, limits: TunnelLimits
) -> CloseReason:
    pending = tasks
    while pending:
        deadlines = []
        if limits.idle is not None:
            deadlines.append((max(up.last, down.last) + limits.idle, CloseReason.IDLE_TIMEOUT))
        if limits.total is not None:
            deadlines.append((started + limits.total, CloseReason.TOTAL_TIMEOUT))
        first = min(deadlines, default=None, key=lambda deadline: deadline[0])
        if first is not None and first[0] <= time.monotonic():
            return first[1]
        timeout = None if first is None else first[0] - time.monotonic()
        done, pending = await asyncio.wait(pending, timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
        if any(task.exception() is not None for task in done):
            return _blame(up, down, done)
    return CloseReason.EOF


def _blame(up: _Direction, down: _Direction, done: set[asyncio.Task[None]]) -> CloseReason:
    for task in done:
        error = task.exception()
        if error is not None and not isinstance(error, OSError):
            raise error
    # A read error is the reading side's reset, a write error the other side's.
    client_failed = (up.error is not None and up.error_on_read) or (down.error is not None and not down.error_on_read)
    return CloseReason.CLIENT_RESET if client_failed else CloseReason.UPSTREAM_RESET
