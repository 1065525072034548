"""The h2 library's connection, with two rules that it does not keep.

- A malformed message is an error of its stream, not of the connection (RFC 9113 section 8.1.1): behind a front end
  that multiplexes the other streams are other people's.
- Streams above our limit are the receiver's to refuse (section 5.1.2), so that they can be tried again: a client may
  have opened many before it knew the limit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import h2.stream
import hyperframe.frame

if TYPE_CHECKING:
    from hpack.struct import Header

__all__ = ["EngineConnection", "StreamMalformed"]

_PROTOCOL_ERROR: Final = 1
_Codes = h2.settings.SettingCodes
_STREAMS: Final = _Codes.MAX_CONCURRENT_STREAMS
_OF_THE_CONNECTION: Final = (
    h2.exceptions.StreamClosedError,
    h2.exceptions.NoSuchStreamError,
    h2.exceptions.FlowControlError,
)
_Events = tuple[list[hyperframe.frame.Frame], list[h2.events.Event]]


class StreamMalformed(h2.events.RequestReceived):
    """What came on a stream is no message; the stream has been reset. It stands where h2 would tell of headers or
    data. ``flow`` is how many bytes of windows it took."""

    why: str
    flow: int

    @classmethod
    def because(cls, stream_id: int, error: Exception, flow: int = 0) -> StreamMalformed:
        """Make one."""
        event = cls(stream_id=stream_id, headers=[])
        event.why = str(error)
        event.flow = flow
        return event


class EngineConnection(h2.connection.H2Connection):
    """See the module. ``StreamMalformed`` events come beside those of h2."""

    def accept_any_number_of_streams(self) -> None:
        """Leave the limit on streams that we have announced (call this after that) to be kept by the caller."""
        values = {_Codes(code): value for code, value in self.local_settings.items() if code != _STREAMS}
        self.local_settings = h2.settings.Settings(client=self.config.client_side, initial_values=values)

    def _begin_new_stream(self, stream_id: int, allowed_ids: h2.connection.AllowedStreamIDs) -> h2.stream.H2Stream:
        stream = super()._begin_new_stream(stream_id, allowed_ids)
        stream.__class__ = _Stream
        return stream


class _Stream(h2.stream.H2Stream):
    def receive_headers(
        self, headers: Iterable[Header], end_stream: bool, header_encoding: bool | str | None
    ) -> _Events:
        try:
            return super().receive_headers(headers, end_stream, header_encoding)
        except _OF_THE_CONNECTION:
            raise
        except h2.exceptions.ProtocolError as error:
            return self._malformed(error)

    def receive_data(self, data: bytes, end_stream: bool, flow_control_len: int) -> _Events:
        try:
            return super().receive_data(data, end_stream, flow_control_len)
        except _OF_THE_CONNECTION:
            raise
        except h2.exceptions.ProtocolError as error:
            return self._malformed(error, flow_control_len)

    def _malformed(self, error: Exception, flow: int = 0) -> _Events:
        machine = self.state_machine
        machine.state = h2.stream.StreamState.CLOSED
        machine.stream_closed_by = h2.stream.StreamClosedBy.SEND_RST_STREAM
        reset = hyperframe.frame.RstStreamFrame(self.stream_id, error_code=_PROTOCOL_ERROR)
        return [reset], [StreamMalformed.because(self.stream_id, error, flow)]
