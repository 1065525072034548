"""The channel between the supervisor and a worker: JSON lines over a socket pair, with requests and answers.

A worker parses bytes from the network, so it may have been taken over: the other end believes nothing. Every message
has a schema with sizes, depths and ranges, and whoever breaks it has lost its channel, which ends that worker and
harms nobody else. What a channel may cost the other end, in memory and time, is bounded.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import socket
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, TypeVar, cast

import msgspec
from msgspec import Meta

from ..core.bucket import TokenBucket
from ..core.errors import PeerClosed, RamaError
from .plan import Json

__all__ = ["Channel", "Facts", "Reply", "RequestFailed", "Text", "receive_line", "send_line"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_LINE: Final = 16 * 1024 * 1024
"""An answer may list some ten thousand tunnels."""
_MAX_UNSENT: Final = 4 * 1024 * 1024
"""What waits for an end that does not read."""
_MAX_WAITING: Final = 4096
"""Requests that one end has not answered yet."""
_RATE: Final = 10_000.0
_BURST: Final = 1000
"""Messages a second that are read of one channel; more wait in its socket. A part of them only before the event loop
turns to others."""

Text = Annotated[str, Meta(max_length=4096)]
Number = Annotated[int, Meta(ge=-(2**53), le=2**53)]
_Scalar = bool | Number | float | Text | None
_Flat = _Scalar | list[_Scalar] | dict[Text, _Scalar]
_Deep = _Scalar | list[_Flat] | dict[Text, _Flat]
Facts = dict[Text, _Scalar | list[_Deep] | dict[Text, _Deep]]
"""What a body is where nothing narrower is said: finite, and four levels deep."""

Reply = Json | asyncio.Future[Json] | None
"""What a handler returns: an answer, or where it will be."""


class RequestFailed(RamaError):
    """The other side could not do what was asked; the text is its own."""

    kind = "request_failed"


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    """A message that may want an answer (``topic``), or an answer (``answer`` or ``error``) to request ``id``."""

    topic: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    body: msgspec.Raw = msgspec.Raw(b"{}")
    id: Annotated[int, Meta(ge=1, le=2**53)] | None = None
    answer: msgspec.Raw = msgspec.Raw(b"")
    error: Text | None = None


_decode = msgspec.json.Decoder(_Message).decode


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

    A handler runs in the event loop; what it returns is the answer to a request, and a :class:`RamaError`, OSError or
    ValueError that it raises fails the request on the other side with its text. ``run`` ends when the other side
    closes, breaks the schema, or does not read what it is sent.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, tuple[Callable[[Any], Reply], msgspec.json.Decoder[Any]]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.StreamReader | None = None
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[bytes]] = {}
        self._owed = 0
        self._bucket = TokenBucket(_RATE, _BURST)

    def on(self, topic: str, handler: Callable[[T], Reply], kind: type[T] | None = None) -> None:
        """Call ``handler`` with the body of each message on ``topic``, which has to be of ``kind`` (by default
        :data:`Facts`). One handler a topic."""
        self._handlers[topic] = handler, msgspec.json.Decoder(Facts if kind is None else kind)

    async def open(self, sock: socket.socket) -> None:
        """Take over one end of a socket pair."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=sock, limit=_MAX_LINE)

    def notify(self, topic: str, body: Json | None = None) -> None:
        """Send a message that needs no answer. Does nothing once the other side has gone."""
        self._send({"topic": topic, "body": body or {}})

    def send_first(self, message: Json) -> None:
        """Send what :func:`receive_line` expects at the other end."""
        self._send(message)

    async def request(self, topic: str, body: Json | None = None) -> Json:
        """Send a message and return its answer. Raises :class:`RequestFailed`, also where too many wait for an answer
        already, or :class:`PeerClosed`."""
        if len(self._answers) >= _MAX_WAITING:
            raise RequestFailed(f"{_MAX_WAITING} requests are not answered yet")
        number = next(self._numbers)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            self._send({"topic": topic, "body": body or {}, "id": number})
            raw = await answer
        finally:
            del self._answers[number]
        return cast("Json", msgspec.json.decode(raw))  # its depth and numbers were checked when it came

    async def run(self) -> None:
        """Handle messages until the other side closes."""
        assert self._reader is not None
        handled = 0
        try:
            while line := await self._reader.readline():
                self._handle(line)
                handled += 1
                if wait := self._bucket.take(time.monotonic()):
                    await asyncio.sleep(wait)
                elif handled % 64 == 0:
                    await asyncio.sleep(0)  # what is buffered is read without a turn of the loop
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            # Nothing sensible can follow what makes no sense; whoever runs us ends the other side.
            log.error("channel: %s: %s", type(error).__name__, str(error)[:200])
        except ConnectionError as error:
            log.debug("channel: %s", error)  # the other process has gone: whoever runs us sees its end
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
        if self._writer.transport.get_write_buffer_size() > _MAX_UNSENT:
            log.error("channel: the other process does not read: %d bytes wait", _MAX_UNSENT)
            self._writer.transport.abort()
            return
        self._writer.write(json.dumps(message).encode() + b"\n")

    def _handle(self, line: bytes) -> None:
        """Raises what :meth:`run` catches for what breaks the schema."""
        message = _decode(line)
        if message.topic is None:
            self._settle(message)
            return
        if bytes(message.answer) or message.error is not None:
            raise msgspec.ValidationError("a message is a question or an answer, not both")
        found = self._handlers.get(message.topic)
        if found is None:
            self._answer(message, error=f"nobody handles {message.topic!r} here")
            return
        handler, decoder = found
        body = decoder.decode(message.body)
        if message.id is not None and self._owed >= _MAX_WAITING:
            raise msgspec.ValidationError(f"more than {_MAX_WAITING} requests at once")
        try:
            answer = handler(body)
        except (RamaError, OSError, ValueError, LookupError) as error:
            self._answer(message, error=str(error))
            return
        if isinstance(answer, asyncio.Future):
            self._owed += 1
            answer.add_done_callback(lambda future: self._answer_later(message, future))
        else:
            self._answer(message, answer=answer or {})

    def _answer_later(self, message: _Message, future: asyncio.Future[Json]) -> None:
        self._owed -= 1
        if future.cancelled():
            self._answer(message, error="the server stops")
        elif (error := future.exception()) is None:
            self._answer(message, answer=future.result() or {})
        else:
            if not isinstance(error, RamaError | OSError | ValueError):
                log.error("%s failed", message.topic, exc_info=error)
            self._answer(message, error=str(error))

    def _answer(self, message: _Message, *, answer: Json | None = None, error: str | None = None) -> None:
        if message.id is not None:
            self._send({"id": message.id, **({"answer": answer} if error is None else {"error": error[:4096]})})
        elif error is not None:
            log.error("%s: %s", message.topic, error)

    def _settle(self, message: _Message) -> None:
        raw = bytes(message.answer)
        if message.id is None or bool(raw) == (message.error is not None):
            raise msgspec.ValidationError("neither a question nor an answer")
        if raw:
            msgspec.json.decode(raw, type=Facts)
        answer = self._answers.get(message.id)
        if answer is None or answer.done():
            return  # whoever asked has stopped waiting
        if raw:
            answer.set_result(raw)
        else:
            answer.set_exception(RequestFailed(str(message.error)))
