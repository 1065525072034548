"""HTTP/1.1 without doubt: one reader of messages, in which nothing can be read in two ways. Sans-I/O.

Parsers that follow the robustness principle take folded and bare-LF lines, control characters, lengths beside
codings, anything behind a chunk size, and each in its own way. Between two parsers that is request smuggling (RFC
9112 section 11.2). So each byte is looked at once, here: whole header sections by :mod:`.heads`, chunked bodies by
:mod:`.chunked`, other bodies by count. What follows a message waits until its turn, and after an error nothing more
is read: where a next message would begin is not known. The states are those of one pair of messages:

====  =====================================  =================================================
HEAD  a header section is due                → BODY, END, or OVER (101, a 2xx to CONNECT)
BODY  content is due                         → END; bytes may go past by :meth:`StrictConnection.skip`
END   the end of the message is due          → OVER
OVER  the message is over                    → HEAD by :meth:`StrictConnection.next_cycle`
====  =====================================  =================================================

Both roles work the same way: ``receive`` bytes, ask for ``next_event`` until it says NEED_DATA or PAUSED; what is
sent is written by :attr:`StrictConnection.writer`. The tests read every input with h11 as well: what is taken here
must be the same there."""

from __future__ import annotations

import enum
from typing import Final, NamedTuple

from ..message.errors import MalformedMessage
from ..message.headers import Headers
from ..message.limits import HttpLimits
from .chunked import ChunkDecoder
from .heads import RequestHead, RequestMemory, ResponseHead, head_end, parse_request, parse_response
from .writer import MessageWriter

__all__ = [
    "NEED_DATA",
    "PAUSED",
    "Closed",
    "Content",
    "End",
    "Event",
    "Role",
    "StrictConnection",
    "WholeResponse",
    "reader",
]


class Role(enum.Enum):
    """Which side of the connection we are."""

    SERVER = "server"
    CLIENT = "client"


class _Signal(enum.Enum):
    NEED_DATA = "need data"
    PAUSED = "paused"


NEED_DATA: Final = _Signal.NEED_DATA
"""Give more bytes to :meth:`StrictConnection.receive`."""
PAUSED: Final = _Signal.PAUSED
"""The message is over: call :meth:`StrictConnection.next_cycle`, or take the connection over after an upgrade."""


class Content(NamedTuple):
    """Some bytes of a body."""

    data: bytes


class End(NamedTuple):
    """A message is complete."""

    trailers: Headers | None


class Closed(NamedTuple):
    """The peer closed the connection between two messages."""


class WholeResponse(NamedTuple):
    """A final response that is over."""

    head: ResponseHead
    content: bytes


Event = RequestHead | ResponseHead | Content | End | Closed | _Signal

_COALESCE: Final = 64 * 1024
_SHORT: Final = 4096
_END: Final = End(None)


class _Phase(enum.Enum):
    HEAD = "a header section is due"
    BODY = "content is due"
    END = "the end of the message is due"
    OVER = "the message is over"
    BROKEN = "an error has happened"


_HEAD_DUE, _BODY_DUE, _END_DUE, _OVER, _BROKEN = _Phase


class StrictConnection:
    """One HTTP/1.1 connection as bytes and events. Reading raises :class:`MalformedMessage`. ``lenient``: see
    :func:`~.heads.parse_response` and :mod:`.chunked`; for a client only."""

    __slots__ = (
        "_chunks",
        "_content",
        "_eof",
        "_interims",
        "_known",
        "_known_head",
        "_known_method",
        "_last",
        "_lenient",
        "_limits",
        "_memory",
        "_method",
        "_pending",
        "_phase",
        "_remaining",
        "_searched",
        "_server",
        "_short",
        "_skipped_line",
        "_until_close",
        "writer",
    )

    def __init__(self, role: Role, limits: HttpLimits, *, lenient: bool = False) -> None:
        self._server = role is Role.SERVER
        self._limits = limits
        self._lenient = lenient and not self._server
        self._pending = bytearray()
        self._eof = False
        self._last = False
        self.writer = MessageWriter()
        self._memory = RequestMemory()
        # The header section that was read last, and what was found in it: often the next is the same, byte by byte.
        # Of this connection only, as RequestMemory.
        self._known = b""
        self._known_head: RequestHead | ResponseHead | None = None
        self._known_method = ""
        # A section of no more bytes passes all bounds of head_end().
        self._short = min(_SHORT, limits.head, limits.target)
        self._begin()

    def _begin(self) -> None:
        self._phase = _HEAD_DUE
        self._method = ""
        self._searched = 0
        self._skipped_line = False
        self._interims = 0
        self._remaining = 0
        self._content = 0
        self._chunks: ChunkDecoder | None = None
        self._until_close = False

    # -- input -------------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer; b"" says that it closed its side."""
        if data:
            self._pending += data
        else:
            self._eof = True

    def receive_head(self, data: bytes) -> Event:
        """:meth:`receive`, and the next event: for bytes that often are a whole header section, and little else."""
        if self._phase is not _HEAD_DUE or self._pending or self._eof:
            self.receive(data)
            return self.next_event()
        end = data.find(b"\r\n\r\n") + 4
        # What head_end() looks for besides cannot be wrong with so short a section, or is for the parser to see.
        if not 4 < end <= self._short or (self._server and (data[0] <= 32 or data.find(b" ", 0, 64) < 0)):
            self.receive(data)
            return self.next_event()
        if end < len(data):
            self._pending += data[end:]
            data = data[:end]
        try:
            return self._request(data) if self._server else self._response(data)
        except MalformedMessage:
            self._phase = _BROKEN
            raise

    def receive_request(self, data: bytes) -> Event:
        """Server: as :meth:`receive_head`; a request that has no body is over with it."""
        fresh = self._phase is _HEAD_DUE and not self._pending and not self._eof
        if fresh and data and data == self._known:
            head = self._known_head
            assert type(head) is RequestHead
            self._phase = _OVER
            self._method = head.method
            self._last = not head.persistent
            return head
        event = self.receive_head(data)
        if self._phase is _END_DUE and self._chunks is None:
            self._phase = _OVER
            # An empty line before it counts once a message, and is no part of what is known.
            if fresh and not self._pending and type(event) is RequestHead and len(data) <= self._short and data[0] > 32:
                self._known, self._known_head = data, event
        return event

    def receive_response(self, data: bytes) -> WholeResponse | Event:
        """Client: as :meth:`receive_head`; a final response all of which is here is returned with its content, and
        over with it."""
        fresh = self._phase is _HEAD_DUE and not self._pending and not self._eof
        known = self._known
        if fresh and known and data.startswith(known) and self._known_method == self._method:
            head = self._known_head
            assert type(head) is ResponseHead
            if len(data) - len(known) == head.length:
                self._phase = _OVER
                return WholeResponse(head, data[len(known) :])
        event = self.receive_head(data)
        if type(event) is not ResponseHead or event.status < 200 or (content := self.take_body()) is None:
            return event
        end = len(data) - len(content)
        if fresh and event.persistent and not self._pending and end <= self._short:
            self._known, self._known_head, self._known_method = data[:end], event, self._method
        return WholeResponse(event, content)

    def take_body(self) -> bytes | None:
        """Return the whole body of the message whose head was read, if its length is known and all of it is here;
        the message is over then. Else None, and nothing is taken."""
        if self._phase is _END_DUE:
            if self._chunks is not None:
                return None
            self._phase = _OVER
            return b""
        left, pending = self._remaining, self._pending
        if self._phase is not _BODY_DUE or not left or len(pending) < left:
            return None
        self._phase = _OVER
        self._remaining = 0
        if len(pending) == left:
            data = bytes(pending)
            pending.clear()
        else:
            data = bytes(pending[:left])
            del pending[:left]
        return data

    @property
    def trailing(self) -> bytes:
        """What was received beyond the messages read so far: after an upgrade the first bytes of the new protocol."""
        return bytes(self._pending)

    @property
    def quiet(self) -> bool:
        """No byte of a next message has come."""
        return self._phase is _HEAD_DUE and not self._pending

    @property
    def complete(self) -> bool:
        """Nothing of the message is missing, though its end may not have been asked for yet."""
        return self._phase is _END_DUE or self._phase is _OVER

    @property
    def last(self) -> bool:
        """One of the two messages says that the connection ends behind them."""
        return self._last or self.writer.last

    @property
    def reusable(self) -> bool:
        """Both messages are complete and both sides let the connection live."""
        writer = self.writer
        return writer.over and self._phase is _OVER and not (self._eof or self._last or writer.last)

    @property
    def movable(self) -> int:
        """How many bytes of the current body, whose length is known, are still to come from the peer.

        They may be moved by other means than :meth:`receive`; tell with :meth:`skip`. 0 while received bytes wait,
        and for bodies that are chunked or end with the connection.
        """
        return 0 if self._pending or self._phase is not _BODY_DUE else self._remaining

    def skip(self, count: int) -> None:
        """``count`` bytes of the body, at most :attr:`movable`, went past this object."""
        self._remaining -= count
        if self._remaining == 0:
            self._phase = _END_DUE

    def asked(self, method: str) -> None:
        """Client: the response that is due is to a request with ``method``."""
        self._method = method

    def next_event(self) -> Event:
        """Return the next event, or :data:`NEED_DATA`, or :data:`PAUSED`."""
        phase = self._phase
        try:
            if phase is _HEAD_DUE:
                return self._next_head()
            if phase is _BODY_DUE:
                return self._next_content()
            if phase is _END_DUE:
                self._phase = _OVER
                return _END if self._chunks is None else End(self._chunks.trailers)
            if phase is _OVER:
                return Closed() if self._eof and not self._pending else PAUSED
            raise MalformedMessage("an earlier message broke the connection")
        except MalformedMessage:
            self._phase = _BROKEN
            raise

    def _next_head(self) -> Event:
        pending = self._pending
        if self._server and not self._skipped_line and pending.startswith(b"\r\n"):
            # RFC 9112 section 2.2: an empty line before the request line is ignored. One.
            del pending[:2]
            self._skipped_line = True
        end = head_end(pending, self._searched, self._limits, request=self._server)
        if end == 0:
            self._searched = len(pending)
            if not self._eof:
                return NEED_DATA
            if pending:
                raise MalformedMessage("the connection ended within a header section")
            return Closed()
        data = bytes(pending[:end])
        del pending[:end]
        self._searched = 0
        return self._request(data) if self._server else self._response(data)

    def _request(self, data: bytes) -> RequestHead:
        head = parse_request(data, self._limits, self._memory)
        self._method = head.method
        self._last = not head.persistent
        self._expect_body(head.length, until_close=False)
        return head

    def _response(self, data: bytes) -> ResponseHead:
        head = parse_response(data, self._limits, method=self._method, lenient=self._lenient)
        if head.status < 200:
            self._interims += 1
            if self._interims > self._limits.interim:
                raise MalformedMessage("too many interim responses")
            if head.status == 101:
                self._phase = _OVER
        elif head.status < 300 and self._method == "CONNECT":
            self._phase = _OVER
        else:
            self._last = not head.persistent
            self._expect_body(head.length, until_close=head.until_close)
        return head

    def _expect_body(self, length: int | None, *, until_close: bool) -> None:
        if self._limits.body is not None and (length or 0) > self._limits.body:
            raise MalformedMessage("the body is too large", 413)
        self._phase = _BODY_DUE
        self._until_close = until_close
        if length is not None:
            self._remaining = length
            if length == 0:
                self._phase = _END_DUE
        elif not until_close:
            self._chunks = ChunkDecoder(self._limits, lenient=self._lenient)

    def _next_content(self) -> Event:
        pending = self._pending
        if self._chunks is not None:
            data = self._chunks.decode(pending, _COALESCE)
            if self._chunks.done:
                self._phase = _END_DUE
                if not data:
                    return self.next_event()
        elif self._until_close:
            data = bytes(pending)
            pending.clear()
        else:
            data = bytes(pending[: self._remaining])
            del pending[: len(data)]
            self._remaining -= len(data)
            if not self._remaining:
                self._phase = _END_DUE
        if data:
            self._content += len(data)
            if self._limits.body is not None and self._content > self._limits.body:
                raise MalformedMessage("the body is too large", 413)
            return Content(data)
        if not self._eof:
            return NEED_DATA
        if not self._until_close:
            raise MalformedMessage("the connection ended within a body")
        self._phase = _OVER
        return _END

    def broke(self) -> None:
        """Read nothing more."""
        self._phase = _BROKEN

    # -- output ------------------------------------------------------------------------------------------------

    @property
    def may_respond(self) -> bool:
        """Server: no final response has begun."""
        return not self.writer.begun

    def next_cycle(self) -> None:
        """Begin the next pair of messages on a :attr:`reusable` connection."""
        writer = self.writer
        writer.begun = writer.over = False
        self._begin()


def reader(role: Role, limits: HttpLimits, *, lenient: bool = False) -> StrictConnection:
    """Return a reader as ``limits.engine`` says. What only lenient reading takes, h11 is not asked about."""
    if limits.engine == "h11" and not lenient:
        from .second_reader import SecondReader  # h11 takes its time to import

        return SecondReader(role, limits)
    return StrictConnection(role, limits, lenient=lenient)
