"""HTTP/1.1 without doubt: h11 behind a layer that lets through only what every parser reads alike. Sans-I/O.

h11 accepts, as the robustness principle once asked, what another parser may read differently: folded and bare-LF
lines, control characters, lengths beside codings, anything behind a chunk size. Between two parsers that is request
smuggling (RFC 9112 section 11.2), so:

1. Bytes are admitted to h11 only when their framing has been proved: whole header sections by :mod:`.heads`, chunked
   bodies by :mod:`.chunked`, other bodies by count. What follows a message stays outside until its turn.
2. What h11 then says must agree with what the strict reading said; h11's own errors count as well.
3. After an error nothing more is read: where a next message would begin is not known.

Both roles work the same way: ``receive`` bytes, ask for ``next_event`` until it says NEED_DATA or PAUSED, ``send``
h11 events and write what comes back.
"""

from __future__ import annotations

import enum
from collections.abc import Sized
from dataclasses import dataclass
from typing import Final

import h11

from .chunked import ChunkGuard
from .errors import AmbiguousMessage, MalformedMessage
from .headers import Headers
from .heads import RequestHead, ResponseHead, head_end, parse_request, parse_response
from .limits import HttpLimits

__all__ = ["NEED_DATA", "PAUSED", "Closed", "Content", "End", "Event", "Role", "StrictConnection"]


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


@dataclass(frozen=True, slots=True)
class Content:
    """Some bytes of a body."""

    data: bytes


@dataclass(frozen=True, slots=True)
class End:
    """A message is complete."""

    trailers: Headers


@dataclass(frozen=True, slots=True)
class Closed:
    """The peer closed the connection between two messages."""


Event = RequestHead | ResponseHead | Content | End | Closed | _Signal

_COALESCE: Final = 64 * 1024


class _Phase(enum.Enum):
    HEAD = "a header section is due"
    BODY = "content is due"
    END = "the end of the message is due"
    OVER = "the message is over"
    BROKEN = "an error has happened"


class StrictConnection:
    """One HTTP/1.1 connection as bytes and events. Reading raises :class:`MalformedMessage`."""

    def __init__(self, role: Role, limits: HttpLimits) -> None:
        self._role = role
        self._limits = limits
        self._pending = bytearray()
        self._eof = False
        self._h11 = self._fresh()
        self._begin()

    def _fresh(self) -> h11.Connection:
        # Sizes are bounded here, before h11 holds anything.
        return h11.Connection(h11.SERVER if self._role is Role.SERVER else h11.CLIENT, max_incomplete_event_size=2**31)

    def _begin(self) -> None:
        self._phase = _Phase.HEAD
        self._method = ""
        self._searched = 0
        self._skipped_line = False
        self._interims = 0
        self._remaining = 0
        self._content = 0
        self._chunks: ChunkGuard | None = None
        self._until_close = False
        self._last = False
        self._bypassed = False

    # -- input -------------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer; b"" says that it closed its side."""
        if data:
            self._pending += data
        else:
            self._eof = True

    @property
    def trailing(self) -> bytes:
        """What was received beyond the messages read so far: after an upgrade the first bytes of the new protocol."""
        return bytes(self._pending)

    @property
    def quiet(self) -> bool:
        """No byte of a next message has come."""
        return self._phase is _Phase.HEAD and not self._pending

    @property
    def receiving(self) -> bool:
        """A message has begun and its end was not read yet."""
        return self._phase in (_Phase.BODY, _Phase.END)

    @property
    def reusable(self) -> bool:
        """Both messages are complete and both sides let the connection live."""
        return self._h11.our_state is h11.DONE and self._phase is _Phase.OVER and not self._eof and not self._last

    @property
    def movable(self) -> int:
        """How many bytes of the current body, whose length is known, are still to come from the peer.

        They may be moved by other means than :meth:`receive`; tell with :meth:`moved`. 0 while received bytes wait,
        and for bodies that are chunked or end with the connection.
        """
        return 0 if self._pending or self._phase is not _Phase.BODY else self._remaining

    def send_beside(self, count: Sized) -> None:
        """As many bytes of the body that we send go past this object. Raises :class:`h11.LocalProtocolError` if they
        are more than was declared."""
        self._h11.send_with_data_passthrough(h11.Data(data=count))  # type: ignore[arg-type]  # only its length counts

    def moved(self, count: int) -> None:
        """``count`` bytes of the body, at most :attr:`movable`, went past this object."""
        self._remaining -= count
        self._bypassed = True
        if self._remaining == 0:
            self._phase = _Phase.END

    def next_event(self) -> Event:
        """Return the next event, or :data:`NEED_DATA`, or :data:`PAUSED`."""
        try:
            match self._phase:
                case _Phase.HEAD:
                    return self._next_head()
                case _Phase.BODY:
                    return self._next_content()
                case _Phase.END:
                    return self._end()
                case _Phase.OVER:
                    return Closed() if self._eof and not self._pending else PAUSED
                case _Phase.BROKEN:
                    raise MalformedMessage("an earlier message broke the connection")
        except MalformedMessage:
            self._phase = _Phase.BROKEN
            raise
        except h11.RemoteProtocolError as error:
            self._phase = _Phase.BROKEN
            raise MalformedMessage("not a message of HTTP/1.1", error.error_status_hint) from error

    def _next_head(self) -> Event:
        if self._role is Role.SERVER and not self._skipped_line and self._pending[:2] == b"\r\n":
            # RFC 9112 section 2.2: an empty line before the request line is ignored. One.
            del self._pending[:2]
            self._skipped_line = True
        end = head_end(self._pending, self._searched, self._limits, request=self._role is Role.SERVER)
        if end == 0:
            self._searched = len(self._pending)
            if not self._eof:
                return NEED_DATA
            if self._pending:
                raise MalformedMessage("the connection ended within a header section")
            return Closed()
        data = bytes(self._pending[:end])
        del self._pending[:end]
        self._searched = 0
        return self._admit_request(data) if self._role is Role.SERVER else self._admit_response(data)

    def _admit_request(self, data: bytes) -> RequestHead:
        head = parse_request(data, self._limits)
        self._h11.receive_data(data)
        event = self._h11.next_event()
        if type(event) is not h11.Request or event.method != head.method.encode():
            raise AmbiguousMessage("the request can be read in two ways")
        self._method = head.method
        self._expect_body(head.length, until_close=False)
        return head

    def _admit_response(self, data: bytes) -> ResponseHead:
        head = parse_response(data, self._limits, method=self._method)
        self._h11.receive_data(data)
        event = self._h11.next_event()
        if not isinstance(event, h11.Response | h11.InformationalResponse) or head.status not in (
            event.status_code,
            502,
        ):
            raise MalformedMessage("the response can be read in two ways")
        if head.status < 200:
            self._interims += 1
            if self._interims > self._limits.interim:
                raise MalformedMessage("too many interim responses")
            if head.status == 101:
                self._phase = _Phase.OVER
        elif self._h11.their_state is h11.SWITCHED_PROTOCOL:
            self._phase = _Phase.OVER
        else:
            self._last = not head.persistent
            self._expect_body(head.length, until_close=head.until_close)
        return head

    def _expect_body(self, length: int | None, *, until_close: bool) -> None:
        if self._limits.body is not None and (length or 0) > self._limits.body:
            raise MalformedMessage("the body is too large", 413)
        self._phase = _Phase.BODY
        self._until_close = until_close
        if length is not None:
            self._remaining = length
            if length == 0:
                self._phase = _Phase.END
        elif not until_close:
            self._chunks = ChunkGuard(self._limits)

    def _next_content(self) -> Event:
        """Admit what is beyond doubt and return it as one piece: many small chunks are not worth many writes."""
        if self._bypassed:
            return self._content_beside_h11()
        parts: list[bytes] = []
        size = 0
        while size < _COALESCE:
            event = self._h11.next_event()
            if type(event) is h11.Data:
                parts.append(bytes(event.data))
                size += len(event.data)
            elif type(event) is h11.EndOfMessage:
                self._phase = _Phase.OVER
                if not parts:
                    return End(self._trailers())
                self._phase = _Phase.END
                break
            elif event is not h11.NEED_DATA:
                raise AmbiguousMessage("the body can be read in two ways")
            elif not self._admit_content():
                break
        self._content += size
        if self._limits.body is not None and self._content > self._limits.body:
            raise MalformedMessage("the body is too large", 413)
        return Content(b"".join(parts)) if parts else NEED_DATA

    def _admit_content(self) -> bool:
        """Let more of what was received into h11; return whether there was any."""
        if self._chunks is not None:
            count = self._chunks.admit(self._pending)
        elif self._until_close:
            count = len(self._pending)
        else:
            count = min(self._remaining, len(self._pending))
            self._remaining -= count
        if count:
            self._h11.receive_data(bytes(self._pending[:count]))
            del self._pending[:count]
            return True
        if not self._eof:
            return False
        if not self._until_close:
            raise MalformedMessage("the connection ended within a body")
        self._h11.receive_data(b"")
        return True

    def _content_beside_h11(self) -> Event:
        # Part of this body went past h11, so h11 cannot count the rest; see next_cycle().
        data = bytes(self._pending[: self._remaining])
        if not data:
            if self._eof:
                raise MalformedMessage("the connection ended within a body")
            return NEED_DATA
        del self._pending[: len(data)]
        self.moved(len(data))
        return Content(data)

    def _end(self) -> End:
        if (
            not self._bypassed
            and self._h11.their_state is h11.SEND_BODY
            and type(self._h11.next_event()) is not h11.EndOfMessage
        ):
            raise AmbiguousMessage("the end of the body can be read in two ways")
        self._phase = _Phase.OVER
        return End(self._trailers())

    def _trailers(self) -> Headers:
        return Headers() if self._chunks is None else self._chunks.trailers

    # -- output ------------------------------------------------------------------------------------------------

    def send(self, event: h11.Event) -> list[bytes]:
        """Return the bytes of an h11 event. Raises :class:`h11.LocalProtocolError` if it is not its turn."""
        if type(event) is h11.Request:
            self._method = event.method.decode("ascii")
        return self._h11.send_with_data_passthrough(event) or []

    @property
    def may_respond(self) -> bool:
        """Server: no final response has begun."""
        return self._h11.our_state in (h11.IDLE, h11.SEND_RESPONSE)

    def next_cycle(self) -> None:
        """Begin the next pair of messages on a :attr:`reusable` connection."""
        if self._bypassed:
            # h11 still waits for a body that it will not see: its part ends here, in a state that was reusable.
            self._h11 = self._fresh()
        else:
            self._h11.start_next_cycle()
        self._begin()
