"""The channel between the supervisor and a worker: JSON lines over a socket pair, with requests and answers."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, cast

from ..core.errors import PeerClosed, RamaError
from .plan import Json

__all__ = ["Channel", "RequestFailed", "receive_line", "send_line"]

log = logging.getLogger(__name__)

_MAX_LINE: Final = 16 * 1024 * 1024

Handler = Callable[[Json], Json | None] | Callable[[Json], Awaitable[Json]]
_MOST_PENDING: Final = 4096
"""How many requests of the other side may wait for a handler that takes its time."""
_ERRORS: Final = (RamaError, OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError)
"""Also what a handler raises that makes no sense of a body: the other side may have been taken over by its peers."""


class RequestFailed(RamaError):
    """The other side could not do what was asked; the text is its own."""

    kind = "request_failed"


def send_line(sock: socket.socket, message: Json) -> None:
    """Send one message, blocking: for the moments before there is an event loop."""
    sock.sendall(json.dumps(message).encode() + b"\n")


def receive_line(sock: socket.socket) -> Json:
    """Receive one message, blocking. Raises :class:`PeerClosed`."""
    data = bytearray()
    while not data.endswith(b"\n"):
        byte = sock.recv(1)  # byte by byte: what follows the line belongs to the event loop
        if not byte:
            raise PeerClosed("the supervisor has closed the channel")
        data += byte
    return cast("Json", json.loads(data))


class Channel:
    """One end. Each message has a ``topic``; ``on(topic, handler)`` says what to do with it.

    A handler runs in the event loop; what it returns is the answer to a request, and a :class:`RamaError` or OSError
    that it raises (or what says that the body makes no sense to it) fails the request on the other side with its text.
    It may be a coroutine function; messages that come meanwhile are handled meanwhile.
    ``run`` ends when the other side closes, or sends what is no message.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.StreamReader | None = None
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Json]] = {}
        self._pending: set[asyncio.Task[None]] = set()

    def on(self, topic: str, handler: Handler) -> None:
        """Call ``handler`` with the body of each message on ``topic``. One handler a topic."""
        self._handlers[topic] = handler

    async def open(self, sock: socket.socket) -> None:
        """Take over one end of a socket pair."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=sock, limit=_MAX_LINE)

    def notify(self, topic: str, body: Json | None = None) -> None:
        """Send a message that needs no answer. Does nothing once the other side has gone."""
        self._send({"topic": topic, "body": body or {}})

    async def request(self, topic: str, body: Json | None = None) -> Json:
        """Send a message and return its answer. Raises :class:`RequestFailed`, or :class:`PeerClosed`."""
        number = next(self._numbers)
        answer: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            self._send({"topic": topic, "body": body or {}, "id": number})
            return await answer
        finally:
            del self._answers[number]

    async def run(self) -> None:
        """Handle messages until the other side closes."""
        assert self._reader is not None
        try:
            while line := await self._reader.readline():
                self._handle(json.loads(line))
        except (ConnectionError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
            # Nothing sensible can follow what makes no sense; whoever runs us ends the other side.
            log.error("channel: %s: %s", type(error).__name__, error)
        finally:
            self._lost()

    async def close(self) -> None:
        """Close this end."""
        if self._writer is not None:
            self._writer.close()
            self._lost()

    def _lost(self) -> None:
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(PeerClosed("the other process has gone"))

    def _send(self, message: Mapping[str, object]) -> None:
        if self._writer is None or self._writer.is_closing():
            return
        self._writer.write(json.dumps(message).encode() + b"\n")

    def _handle(self, message: Mapping[str, object]) -> None:
        if "answer" in message or "error" in message:
            self._settle(message)
            return
        topic = str(message["topic"])
        handler = self._handlers.get(topic)
        reply: dict[str, object] = {"id": message.get("id")}
        try:
            if handler is None:
                raise RequestFailed(f"nobody handles {topic!r} here")
            answer = handler(cast("Json", message["body"]))
            if inspect.isawaitable(answer):
                self._await(topic, answer, reply)
                return
            reply["answer"] = answer or {}
        except _ERRORS as error:
            reply["error"] = str(error)
        self._reply(topic, reply)

    def _await(self, topic: str, answer: Awaitable[Json], reply: dict[str, object]) -> None:
        async def wait() -> None:
            try:
                reply["answer"] = await answer or {}
            except _ERRORS as error:
                reply["error"] = str(error)
            self._reply(topic, reply)

        if len(self._pending) >= _MOST_PENDING:
            raise ConnectionError(f"{len(self._pending)} requests wait already")
        task = asyncio.get_running_loop().create_task(wait())
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    def _reply(self, topic: str, reply: dict[str, object]) -> None:
        if reply["id"] is not None:
            self._send(reply)
        elif "error" in reply:
            log.error("%s: %s", topic, reply["error"])

    def _settle(self, message: Mapping[str, object]) -> None:
        answer = self._answers.get(cast("int", message["id"]))
        if answer is None or answer.done():
            return  # whoever asked has stopped waiting
        if "error" in message:
            answer.set_exception(RequestFailed(str(message["error"])))
        else:
            answer.set_result(cast("Json", message["answer"]))
