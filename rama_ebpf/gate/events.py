"""Verdicts as they take effect, read from a server's control socket.

The reader keeps up with the server by itself, and keeps the latest few thousand for a caller who does not; what goes
beyond is counted, and each event says how many were lost before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Final

from ..kernel.instance import Instance
from ..kernel.suspended import is_stopped, stopped_hint
from .answers import GateEvent, event_of
from .errors import GateError, GateRefused, GateUnavailable

__all__ = ["BACKLOG", "Events", "SyncEvents"]

BACKLOG: Final = 4096
"""How many events wait for their reader."""
_MAX_LINE: Final = 1 << 16
_CONNECT_SECONDS: Final = 10.0


class _Waiting:
    """What waits for the reader: bounded, the oldest first."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._events: deque[GateEvent] = deque()
        self._gap = 0
        self.lost = 0
        self.ended: GateError | None = None

    def take(self, line: bytes) -> None:
        """Take a line of the server's."""
        answer = json.loads(line)
        if "error" in answer:
            self.ended = GateRefused(str(answer["error"]))
            return
        result = answer["result"]
        if "lost" in result:
            self._lose(int(result["lost"]))
        elif "event" in result:
            if len(self._events) >= BACKLOG:
                self._lose(1)
            else:
                self._events.append(event_of(result["event"], self._gap))
                self._gap = 0

    def _lose(self, count: int) -> None:
        self._gap += count
        self.lost += count

    def end(self) -> None:
        """The server has closed its end."""
        if self.ended is None:
            self.ended = GateUnavailable(
                f"the server of instance {self._instance.name!r} has ended: start it with rama-ebpf run, and ask for "
                "its events again"
            )

    def next(self) -> GateEvent | None:
        """Return the next; None if none is there. Raises when there will be none any more."""
        if self._events:
            return self._events.popleft()
        if self.ended is not None:
            raise self.ended
        return None


def _connected(instance: Instance) -> socket.socket:
    path = instance.control_socket
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(_CONNECT_SECONDS)
        sock.connect(str(path))
        pid = instance.serving_pid()
        if pid and is_stopped(pid):
            raise OSError(errno.ETIMEDOUT, f"process {pid} listens there{stopped_hint(pid)}")
    except OSError as error:
        sock.close()
        raise GateUnavailable(
            f"events come from a running server, and none answers at {path} ({error.strerror or error}): start it with "
            "rama-ebpf run"
        ) from error
    return sock


def _request(rule: object) -> bytes:
    if rule is not None and not isinstance(rule, str):
        raise TypeError(f"a rule is named by text, not by {type(rule).__name__}")
    return json.dumps({"method": "events", "params": {} if rule is None else {"rule": rule}}).encode() + b"\n"


class SyncEvents(Iterator[GateEvent]):
    """Events for a program without a loop; a thread reads them. An iterator and a context manager: iterating waits for
    the next one, and raises :class:`~.errors.GateUnavailable` when the server has ended."""

    def __init__(self, instance: Instance, rule: str | None) -> None:
        request = _request(rule)
        self._sock = _connected(instance)
        self._sock.settimeout(None)
        self._waiting = _Waiting(instance)
        self._more = threading.Condition()
        self._closed = False
        self._lines = self._sock.makefile("rb")
        self._sock.sendall(request)
        self._take(self._lines.readline(_MAX_LINE))  # that it is watched, or why not
        if self._waiting.ended is not None:
            self.close()
            raise self._waiting.ended
        self._thread = threading.Thread(target=self._read, name="gate-events", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """How many were lost so far."""
        return self._waiting.lost

    def _take(self, line: bytes) -> None:
        if line:
            self._waiting.take(line)
        else:
            self._waiting.end()

    def _read(self) -> None:
        while self._waiting.ended is None:
            try:
                line = self._lines.readline(_MAX_LINE)
            except (OSError, ValueError):  # closed meanwhile
                line = b""
            with self._more:
                self._take(line)
                self._more.notify_all()

    def __next__(self) -> GateEvent:
        with self._more:
            while True:
                if self._closed:
                    raise StopIteration
                event = self._waiting.next()
                if event is not None:
                    return event
                self._more.wait()

    def close(self) -> None:
        """Watch no longer; whoever waits for the next event gets none."""
        with self._more:
            self._closed = True
            self._more.notify_all()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        thread = getattr(self, "_thread", None)
        if thread is not None:
            thread.join()
        self._lines.close()
        self._sock.close()

    def __enter__(self) -> SyncEvents:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class Events(AsyncIterator[GateEvent]):
    """Events for a program on asyncio. An asynchronous iterator and context manager; it begins with the first use.
    Raises :class:`~.errors.GateUnavailable` when the server has ended."""

    def __init__(self, instance: Instance, rule: str | None) -> None:
        self._instance = instance
        self._request = _request(rule)
        self._waiting = _Waiting(instance)
        self._more = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._closed = False

    @property
    def lost(self) -> int:
        """How many were lost so far."""
        return self._waiting.lost

    async def start(self) -> None:
        """Watch from now on. Raises :class:`~.errors.GateUnavailable`, or GateRefused if too many watch."""
        if self._reading is not None or self._closed:
            return
        sock = await asyncio.to_thread(_connected, self._instance)
        sock.setblocking(False)
        reader, self._writer = await asyncio.open_unix_connection(sock=sock, limit=_MAX_LINE)
        self._writer.write(self._request)
        self._take(await reader.readline())
        self._reading = asyncio.create_task(self._read(reader))
        if self._waiting.ended is not None:
            await self.aclose()
            raise self._waiting.ended

    def _take(self, line: bytes) -> None:
        if line:
            self._waiting.take(line)
        else:
            self._waiting.end()
        self._more.set()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while self._waiting.ended is None:
            try:
                line = await reader.readline()
            except (OSError, ValueError):
                line = b""
            self._take(line)

    async def __anext__(self) -> GateEvent:
        await self.start()
        while True:
            if self._closed:
                raise StopAsyncIteration
            self._more.clear()
            event = self._waiting.next()
            if event is not None:
                return event
            await self._more.wait()

    async def aclose(self) -> None:
        """Watch no longer."""
        self._closed = True
        self._more.set()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    async def __aenter__(self) -> Events:
        await self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()
