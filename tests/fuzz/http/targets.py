"""Fuzz targets for HTTP: each takes bytes and raises AssertionError if a guarantee does not hold.

The guarantee for messages: whatever is accepted is the same message to h11 (:mod:`.oracle`), and is written again so
that every careless reader (:mod:`.reference`) sees the same messages, as many as were accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import hpack
import hyperframe.frame

from rama_ebpf.services.http.h1.heads import RequestHead, ResponseHead
from rama_ebpf.services.http.h1.reader import (
    NEED_DATA,
    PAUSED,
    Closed,
    Content,
    End,
    Role,
    StrictConnection,
    WholeResponse,
)
from rama_ebpf.services.http.h1.writer import MessageWriter
from rama_ebpf.services.http.h2.engine import EngineConnection, StreamMalformed
from rama_ebpf.services.http.h2.fields import Fields, read_request, read_response, read_trailers
from rama_ebpf.services.http.h2.guard import FloodDetected, FrameGuard
from rama_ebpf.services.http.message.errors import MalformedMessage
from rama_ebpf.services.http.message.headers import Headers
from rama_ebpf.services.http.message.limits import HttpLimits
from rama_ebpf.services.proxy_protocol import Command, ProxyProtocolError, TlvType, encode_v1, encode_v2, parse

from .oracle import Taken, judge
from .reference import HABITS, Unreadable, read_all

__all__ = ["TARGETS", "h2_fields", "h2_requests", "h2_responses", "proxy_header", "requests", "responses"]

LIMITS = HttpLimits(target=200, head=2000, fields=20, chunk_line=40, trailers=200, interim=3, body=5000)
_METHODS = ("GET", "HEAD", "POST", "CONNECT", "OPTIONS")


# -- HTTP/1.1 --------------------------------------------------------------------------------------------------


def _pieces(data: bytes, how: int) -> int:
    """Return the size of the pieces that ``data`` is cut into: single bytes of a short input, else at most 16."""
    return 1 if how % 4 == 0 and len(data) < 100 else len(data) // (how % 16 + 1) + 1


def _events(connection: StrictConnection, role: Role, data: bytes, *, quick: bool) -> Iterator[object]:
    """Feed some bytes, and yield what comes of them; ``quick`` as callbacks do it, which have another way for messages
    that are here whole."""
    event: object
    if not (quick and data):
        connection.receive(data)
        event = connection.next_event()
    elif role is Role.SERVER:
        event = connection.receive_request(data)
        if isinstance(event, RequestHead) and event.length == 0:
            yield event
            yield End(None)
            event = connection.next_event()
    else:
        event = connection.receive_response(data)
        if isinstance(event, WholeResponse):
            yield event.head
            if event.content:
                yield Content(event.content)
            yield End(None)
            event = connection.next_event()
    while event is not NEED_DATA:
        yield event
        event = connection.next_event()


def _check_again(role: Role, data: bytes, method: str = "GET") -> None:
    """What has come once and is remembered must be read the same when it comes again on the same connection."""
    connection = StrictConnection(role, LIMITS)
    if not data or data.startswith(b"\r\n"):
        return  # an empty line is taken once before a message, and one may have come behind the last
    first: list[object] | None = None
    while True:
        if role is Role.CLIENT:
            _ask(connection, method)
        out: list[object] = []
        over = False
        try:
            for event in _events(connection, role, data, quick=True):
                if isinstance(event, Closed):
                    return
                if event is not PAUSED:
                    out.append(event)
                elif role is Role.SERVER:
                    if not _next(connection, role, out):
                        return
                    over = True
                elif connection.reusable:
                    connection.next_cycle()
                    over = True
                    break
                else:
                    return
        except MalformedMessage:
            assert first is None
            return
        if first is not None:
            assert out == first, "what was remembered is not what has come"
            return
        if not (over and connection.quiet):
            return
        first = out


def _read(role: Role, data: bytes, chunk: int, method: str = "GET") -> list[object]:
    """Feed bytes in pieces; return heads, whole bodies and ends, and last the error or None."""
    connection = StrictConnection(role, LIMITS)
    if role is Role.CLIENT:
        _ask(connection, method)
    out: list[object] = []
    start = 0
    head: RequestHead | ResponseHead | None = None
    body = b""
    try:
        for offset in range(0, len(data) + chunk, chunk):
            for event in _events(connection, role, data[offset : offset + chunk], quick=chunk >= len(data)):
                if isinstance(event, RequestHead | ResponseHead):
                    head, body = event, b""
                elif isinstance(event, Content):
                    body += event.data
                elif isinstance(event, End) and chunk >= len(data):
                    assert head is not None
                    left = len(connection.trailing)
                    ended = not data[offset : offset + chunk]
                    judge(Taken(head, body, event.trailers, data[start:], left, method, ended))
                    start = len(data) - left
                if isinstance(event, Closed):
                    return [*out, None]
                if event is PAUSED:
                    if not _next(connection, role, out):
                        return [*out, None]
                elif isinstance(event, Content) and out and isinstance(out[-1], bytes):
                    out[-1] += event.data
                else:
                    out.append(event.data if isinstance(event, Content) else event)
            if not data[offset : offset + chunk]:
                break
    except MalformedMessage as error:
        return [*out, _checked(error)]
    return [*out, None]


def _checked(error: MalformedMessage) -> MalformedMessage:
    assert 400 <= error.status <= 599
    assert error.close
    assert error.wire.startswith(b"HTTP/1.1 %d " % error.status)
    return error


def _ask(connection: StrictConnection, method: str) -> None:
    target = "a.test:1" if method == "CONNECT" else "/"
    connection.asked(method)
    connection.writer.request(method, target, "a.test", Headers(), [], 0)
    connection.writer.end(None)


def _next(connection: StrictConnection, role: Role, out: list[object]) -> bool:
    """Answer a request that is complete and begin the next; False if there is none (an upgrade, or one response)."""
    if role is Role.CLIENT:
        return False
    head = next(event for event in reversed(out) if isinstance(event, RequestHead))
    if head.method == "CONNECT" or head.upgrade is not None:
        return False
    connection.writer.response(200, "", Headers(), [], 0, bodiless=False, http_1_0=False, close=False)
    connection.writer.end(None)
    if not connection.reusable:
        return False
    connection.next_cycle()
    return True


def _same(whole: list[object], pieces: list[object]) -> bool:
    """The same events. What is wrong may be found sooner in pieces, so of a message that is refused the reason and
    how much of its body was passed on may differ."""
    if whole[-1] is None or pieces[-1] is None:
        return whole == pieces

    def heads(events: list[object]) -> list[object]:
        return [event for event in events[:-1] if not isinstance(event, bytes)]

    return heads(whole) == heads(pieces)


def requests(data: bytes) -> None:
    """A client's bytes; the first says how they are cut."""
    if not data:
        return
    sent = data[1:]
    events = _read(Role.SERVER, sent, len(sent) or 1)
    assert _same(events, _read(Role.SERVER, sent, _pieces(sent, data[0]))), "segments must not matter"
    _check_again(Role.SERVER, sent)
    written = b""
    expected: list[tuple[bytes, bytes]] = []
    head: RequestHead | None = None
    body = b""
    for event in events:
        if isinstance(event, RequestHead):
            head, body = event, b""
            _check_head(head)
        elif isinstance(event, bytes):
            body += event
        elif isinstance(event, End):
            assert head is not None
            line, message = _forwarded(head, body, event.trailers)
            expected.append((line, body))
            written += message
    _all_read_alike(written, expected)


def _check_head(head: RequestHead) -> None:
    assert head.version in ("1.0", "1.1")
    assert "#" not in head.target.path
    assert head.headers.get("content-length") is None
    assert head.headers.get("transfer-encoding") is None
    assert head.headers.get("host") is None
    assert head.headers.get("connection") is None
    if head.method == "CONNECT":
        assert head.length == 0
        assert ":" in head.authority


def _forwarded(head: RequestHead, body: bytes, trailers: Headers | None) -> tuple[bytes, bytes]:
    """Write a request as the client side does; return its request line and all of it."""
    out = MessageWriter()
    target = head.authority if head.method == "CONNECT" else head.target.path
    written = out.request(head.method, target, head.authority, head.headers, [], head.length)
    if body:
        written += out.content(body)
    written += out.end(trailers)
    return f"{head.method} {target} HTTP/1.1".encode(), written


def _all_read_alike(written: bytes, expected: list[tuple[bytes, bytes]]) -> None:
    for habit in HABITS:
        try:
            messages = read_all(written, habit)
        except Unreadable as error:
            raise AssertionError(f"{habit} cannot read {written!r}: {error}") from error
        assert [(message.start, message.body) for message in messages] == expected, (habit, written)
        assert all(len(message.hosts) == 1 for message in messages), (habit, written)


def responses(data: bytes) -> None:
    """A server's bytes; the first two say how they are cut, and what they answer."""
    if len(data) < 2:
        return
    method = _METHODS[data[1] % len(_METHODS)]
    sent = data[2:]
    events = _read(Role.CLIENT, sent, len(sent) or 1, method)
    assert _same(events, _read(Role.CLIENT, sent, _pieces(sent, data[0]), method)), "segments must not matter"
    _check_again(Role.CLIENT, sent, method)
    head: ResponseHead | None = None
    body = b""
    for event in events:
        if isinstance(event, ResponseHead):
            head = event
            assert 100 <= head.status <= 599
        elif isinstance(event, bytes):
            body += event
        elif isinstance(event, End):
            assert head is not None
            _check_response(head, body, event.trailers, method)


def _check_response(head: ResponseHead, body: bytes, trailers: Headers | None, method: str) -> None:
    out = MessageWriter()
    bodiless = method == "HEAD" or head.status in (204, 304)
    length = head.declared if bodiless else head.length
    written = out.response(
        head.status, head.reason, head.headers, [], length, bodiless=bodiless, http_1_0=False, close=False
    )
    if body:
        assert not bodiless
        written += out.content(body)
    written += out.end(trailers)
    for habit in HABITS:
        try:
            (message,) = read_all(written, habit, bodiless=bodiless)
        except (Unreadable, ValueError) as error:
            raise AssertionError(f"{habit} cannot read {written!r}: {error}") from error
        assert message.start.split(b" ")[1] == str(head.status).encode()
        assert message.body == body, (habit, written)


# -- HTTP/2 ----------------------------------------------------------------------------------------------------


_REQUEST: Fields = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"a.test"), (b":path", b"/")]


def _fields(block: bytes) -> Fields:
    """Fields are separated by 0xfe, names from values by 0xff: so the fuzzer need not learn HPACK."""
    pairs = [pair.partition(b"\xff") for pair in block.split(b"\xfe")]
    return [(name, value) for name, _, value in pairs]


def _h2_input(data: bytes, *, client: bool) -> bytes:
    """Make a connection's bytes: by the first byte, frames as they are, or header blocks of the fields in the rest,
    separated by 0xfd."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if client else b""
    opening = preface + hyperframe.frame.SettingsFrame(0).serialize()
    if data[0] & 1:
        return opening + data[1:]
    encoder = hpack.Encoder()
    frames: list[bytes] = []
    stream_id = 1
    for number, block in enumerate(data[1:].split(b"\xfd")[:6]):
        fields = _fields(block)
        if data[0] & 2:
            fields = [*(_REQUEST if client else [(b":status", b"200")]), *fields]
        flags = ["END_HEADERS", *(["END_STREAM"] if data[0] & 4 or number % 2 else [])]
        frames.append(hyperframe.frame.HeadersFrame(stream_id, encoder.encode(fields), flags=flags).serialize())
        if data[0] & 8:
            frames.append(hyperframe.frame.DataFrame(stream_id, b"hello", flags=["END_STREAM"]).serialize())
        if client and not data[0] & 16:
            stream_id += 2
    return opening + b"".join(frames)


def _h2_connection(*, client_side: bool) -> h2.connection.H2Connection:
    connection = EngineConnection(
        h2.config.H2Configuration(client_side=client_side, header_encoding=None, validate_outbound_headers=False)
    )
    connection.initiate_connection()
    connection.decoder.max_header_list_size = 4 * LIMITS.head
    return connection


def _h2_events(data: bytes, chunk: int, *, client: bool) -> list[h2.events.Event]:
    """What h2 makes of the bytes behind the guard, as :class:`H2Connection` gives them to it."""
    connection = _h2_connection(client_side=not client)
    if not client:
        connection.send_headers(
            1, [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/")]
        )
    guard = FrameGuard(server=client, header_bytes=2 * LIMITS.head, clock=lambda: 0.0)
    events: list[h2.events.Event] = []
    try:
        for offset in range(0, len(data), chunk):
            events += connection.receive_data(guard.receive(data[offset : offset + chunk]))
    except (h2.exceptions.ProtocolError, FloodDetected):
        pass
    return events


def h2_requests(data: bytes) -> None:
    """A client's frames or fields."""
    if not data:
        return
    sent = _h2_input(data, client=True)
    for event in _h2_events(sent, 7 if data[0] & 32 else len(sent), client=True):
        if isinstance(event, h2.events.RequestReceived) and not isinstance(event, StreamMalformed):
            _check_h2_request(list(event.headers or []))
        elif isinstance(event, h2.events.TrailersReceived):
            _check_trailers(list(event.headers or []))


def _check_h2_request(received: Fields) -> None:
    try:
        head = read_request(received, LIMITS)
    except MalformedMessage:
        return
    target = head.authority if head.method == "CONNECT" and head.protocol is None else head.path
    out = MessageWriter()
    method = "GET" if head.protocol else head.method
    written = out.request(method, target, head.authority, head.headers, [], 0) + out.end(None)
    _all_read_alike(written, [(written.partition(b"\r\n")[0], b"")])
    # What was read from HTTP/2 must be what HTTP/1.1 would have let in.
    again = _read(Role.SERVER, written, len(written))
    assert again[-1] is None, (again[-1], written)


def h2_responses(data: bytes) -> None:
    """A server's frames or fields."""
    if not data:
        return
    sent = _h2_input(data, client=False)
    for event in _h2_events(sent, 7 if data[0] & 32 else len(sent), client=False):
        if isinstance(event, h2.events.ResponseReceived | h2.events.InformationalResponseReceived):
            _check_h2_response(list(event.headers or []))
        elif isinstance(event, h2.events.TrailersReceived):
            _check_trailers(list(event.headers or []))


def _check_h2_response(received: Fields) -> None:
    try:
        head = read_response(received, LIMITS)
    except MalformedMessage:
        return
    response = ResponseHead(head.status, "", "1.1", head.headers, 0, False, None, None, True)
    if head.status >= 200:
        _check_response(response, b"", Headers(), "GET")


def h2_fields(data: bytes) -> None:
    """Header blocks as our translation gets them, and without what h2 would have refused."""
    if not data:
        return
    received = _fields(data[1:])
    match data[0] % 4:
        case 0:
            _check_h2_request(received)
        case 1:
            _check_h2_request([*_REQUEST, *received])
        case 2:
            _check_h2_response([(b":status", b"200"), *received])
        case _:
            _check_trailers(received)


def _check_trailers(fields: Fields) -> None:
    try:
        trailers = read_trailers(fields, LIMITS)
    except MalformedMessage:
        return
    for name, value in trailers:
        assert "\r" not in name + value
        assert "\n" not in name + value
        assert not name.startswith(":")


# -- PROXY protocol --------------------------------------------------------------------------------------------


def proxy_header(data: bytes) -> None:
    """What comes before a connection's own bytes."""
    try:
        found = parse(data)
    except ProxyProtocolError:
        return
    if found is None:
        assert len(data) < 16 + 65536
        return
    header, length = found
    assert 0 < length <= len(data)
    for cut in {0, 1, 5, 11, 12, 15, 16, length // 2, length - 1}:
        if cut < length:
            assert parse(data[:cut]) is None, "a header must not end before its end"
    assert parse(data[:length]) == found, "what follows must not matter"
    assert (header.source is None) == (header.destination is None)
    if header.command is Command.LOCAL:
        assert header.source is None
        assert header.tlvs == ()
    if header.source is not None and header.destination is not None:
        _check_rewritten(header.version, data[:length])


def _check_rewritten(version: int, data: bytes) -> None:
    found = parse(data)
    assert found is not None
    header, _ = found
    if version == 1:
        assert data.count(b" ") == 5
        again = parse(encode_v1(header.source, header.destination))
    else:
        tlvs = tuple(tlv for tlv in header.tlvs if tlv.type != TlvType.CRC32C)
        again = parse(encode_v2(header.source, header.destination, tlvs=tlvs, checksum=True))
        assert again is not None
        assert tuple(tlv for tlv in again[0].tlvs if tlv.type != TlvType.CRC32C) == tlvs
    assert again is not None
    assert (again[0].source, again[0].destination) == (header.source, header.destination)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (requests, responses, h2_requests, h2_responses, h2_fields, proxy_header)
}
