"""``engine = "h11"``: each message is read by h11 as well, and refused where the two do not read the same. Sans-I/O.

Our reader takes nothing that h11 reads in another way: the tests hold that for their inputs, and this for those of a
running server. It costs about what h11 costs, and bodies go through memory instead of splice(2).
"""

from __future__ import annotations

from typing import Final

import h11

from ..message.errors import MalformedMessage
from ..message.headers import Headers
from .heads import RequestHead, ResponseHead
from .reader import Content, End, Event, StrictConnection

__all__ = ["SecondReader"]

_Head = h11.Request | h11.Response | h11.InformationalResponse
_SERVER_FAILURE: Final = 502
"""What a status above 599 is read as (RFC 9110 section 15)."""


class SecondReader(StrictConnection):
    """A :class:`~.reader.StrictConnection` whose messages h11 reads, too. Reading raises :class:`MalformedMessage` also
    where h11 refuses a message or reads another one."""

    __slots__ = ("_ended", "_second", "_within")

    def _begin(self) -> None:
        super()._begin()
        self._second: h11.Connection | None = None
        self._within = False
        self._ended: h11.EndOfMessage | None = None

    @property
    def movable(self) -> int:
        """0: h11 has to see each byte."""
        return 0

    def next_event(self) -> Event:
        event = super().next_event()
        if type(event) is End and self._second is not None and not self._within:
            self._same_end(event)
        return event

    def receive_head(self, data: bytes) -> Event:
        self.receive(data)
        return self.next_event()

    def receive_request(self, data: bytes) -> Event:
        event = self.receive_head(data)
        if isinstance(event, RequestHead) and event.length == 0:
            self.next_event()  # its end
        return event

    def receive_response(self, data: bytes) -> Event:
        return self.receive_head(data)

    def take_body(self) -> None:
        """None: h11 has to see each byte."""

    def _request(self, data: bytes) -> RequestHead:
        head = super()._request(data)
        self._second = h11.Connection(h11.SERVER, max_incomplete_event_size=2**31)
        event = self._ask(data)
        if not isinstance(event, h11.Request) or event.method != head.method.encode():
            raise _another(event)
        self._same_head(head, event)
        return head

    def _response(self, data: bytes) -> ResponseHead:
        method = self._method
        head = super()._response(data)
        tunnels = head.status == 101 or (method == "CONNECT" and 200 <= head.status < 300)
        if tunnels:
            self._second = None  # what follows is none of HTTP
            return head
        if self._second is None:
            self._second = h11.Connection(h11.CLIENT, max_incomplete_event_size=2**31)
            target = "a.invalid:1" if method == "CONNECT" else "/"
            self._second.send(h11.Request(method=method or "GET", target=target, headers=[("Host", "a.invalid")]))
            self._second.send(h11.EndOfMessage())
        event = self._ask(data)
        if not isinstance(event, h11.Response | h11.InformationalResponse):
            raise _another(event)
        if head.status != (event.status_code if event.status_code < 600 else _SERVER_FAILURE):
            raise _another(event)
        self._same_head(head, event)
        return head

    def _next_content(self) -> Event:
        before = bytes(self._pending)
        self._within = True  # it may ask for the end that follows, of which h11 has not heard yet
        try:
            event = super()._next_content()
        finally:
            self._within = False
        if self._second is None:
            return event
        taken = before[: len(before) - len(self._pending)]
        theirs = self._content_of(taken, ended=self._eof and not self._pending)
        ours = event.data if isinstance(event, Content) else b""
        if theirs != ours:
            raise MalformedMessage("h11 reads other content")
        return event

    def _content_of(self, taken: bytes, *, ended: bool) -> bytes:
        assert self._second is not None
        content = bytearray()
        try:
            if taken:
                self._second.receive_data(taken)
            if ended and self._until_close:
                self._second.receive_data(b"")
            while isinstance(event := self._second.next_event(), h11.Data):
                content += event.data
        except h11.RemoteProtocolError as error:
            raise MalformedMessage(f"h11 refuses it: {error}") from error
        if isinstance(event, h11.EndOfMessage):
            self._ended = event
        return bytes(content)

    def _ask(self, data: bytes) -> object:
        assert self._second is not None
        try:
            self._second.receive_data(data)
            return self._second.next_event()
        except h11.RemoteProtocolError as error:
            raise MalformedMessage(f"h11 refuses it: {error}") from error

    def _same_head(self, ours: RequestHead | ResponseHead, theirs: _Head) -> None:
        told = [(name, bytes(value)) for name, value in theirs.headers]
        if ours.version.encode() != theirs.http_version or any(
            (name.lower(), value) not in told for name, value in ours.headers.raw
        ):
            raise _another(theirs)

    def _same_end(self, end: End) -> None:
        if self._ended is None:
            self._content_of(b"", ended=self._eof)
        trailers = Headers() if end.trailers is None else end.trailers
        if self._ended is None or [(name.lower(), value) for name, value in trailers.raw] != [
            (name, bytes(value)) for name, value in self._ended.headers
        ]:
            self.broke()
            raise MalformedMessage("h11 sees the end of the message elsewhere")
        self._second = None


def _another(event: object) -> MalformedMessage:
    return MalformedMessage(f"h11 reads another message: {type(event).__name__}")
