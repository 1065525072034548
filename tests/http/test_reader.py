"""The reader and the writer of HTTP/1.1 messages, beside h11: whatever is taken is the same message to both."""

from __future__ import annotations

from collections.abc import Iterator

import h11
import pytest

from rama_ebpf.core import Authority
from rama_ebpf.services.http import (
    BackendPool,
    Headers,
    HttpLimits,
    HttpProxy,
    HttpServer,
    MalformedMessage,
    OriginOptions,
)
from rama_ebpf.services.http.h1 import heads
from rama_ebpf.services.http.h1.heads import RequestHead, ResponseHead
from rama_ebpf.services.http.h1.reader import NEED_DATA, PAUSED, Closed, Content, End, Role, StrictConnection
from rama_ebpf.services.http.h1.writer import MessageWriter, WrongLength

from ..fuzz.http.oracle import Taken, judge
from .conftest import DATE, OK, OK_VIA, Connect, Run, Server
from .corpus import BODIES, BROKEN, REQUESTS, RESPONSES
from .test_corpus import answering

CHUNKED = b"POST /a HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n"
TAKEN = {
    "GET": b"GET http://a.test/x?y HTTP/1.1\r\nHost: a.test\r\nAccept: */*\r\n\r\n",
    "an empty line in front": b"\r\nGET / HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "by length": b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 0005\r\n\r\nhello",
    "chunked": CHUNKED + b"5\r\nhello\r\n00A\r\n0123456789\r\n0\r\n\r\n",
    "extensions": CHUNKED + b'5;a=b;c="d;e"\r\nhello\r\n0;x\r\n\r\n',
    "trailers": CHUNKED + b"1\r\nx\r\n0\r\nX-Sum: 1\r\nX-Sum: 2\r\n\r\n",
    "no chunk": CHUNKED + b"0\r\n\r\n",
    "HTTP/1.0": b"GET / HTTP/1.0\r\nX:\r\n\r\n",
    "CONNECT": b"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test:443\r\n\r\n\x16\x03\x01",
}
ANSWERS = {
    "by length": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "GET"),
    "chunked": (b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX: 1\r\n\r\n", "GET"),
    "until the end": (b"HTTP/1.0 200 \r\n\r\nok", "GET"),
    "HEAD": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", "HEAD"),
    "304": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\n", "GET"),
    "204": (b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "GET"),
    "interim": (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "GET"),
    "999": (b"HTTP/1.1 999 Odd\r\nContent-Length: 2\r\n\r\nok", "GET"),
}


def read(role: Role, pieces: list[bytes], method: str = "GET", *, lenient: bool = False) -> tuple[list[object], int]:
    """Return the events up to the end of the first message, its content as one piece, and how many bytes are behind it.
    Raises :class:`MalformedMessage`."""
    connection = StrictConnection(role, HttpLimits(), lenient=lenient)
    connection.asked(method)
    events: list[object] = []
    rest = list(pieces)
    for piece in [*pieces, b""]:
        connection.receive(piece)
        rest = rest[1:]
        while (event := connection.next_event()) is not NEED_DATA:
            if event is PAUSED or isinstance(event, Closed):
                return events, len(connection.trailing) + sum(map(len, rest))
            if isinstance(event, Content) and events and isinstance(events[-1], bytes):
                events[-1] += event.data
            else:
                events.append(event.data if isinstance(event, Content) else event)
    raise AssertionError(f"not over: {events}")


def cut(data: bytes) -> Iterator[list[bytes]]:
    yield [data]
    yield [data[index : index + 1] for index in range(len(data))]
    for split in range(1, len(data)):
        yield [data[:split], data[split:]]


@pytest.mark.parametrize("name", TAKEN)
def test_a_request_is_the_same_to_h11_however_it_is_cut(name: str) -> None:
    data = TAKEN[name] + (b"" if name == "CONNECT" else b"GET /next")
    first, _ = read(Role.SERVER, [data])
    for pieces in cut(data):
        events, left = read(Role.SERVER, pieces)
        assert events == first
        head, end = events[0], events[-1]
        assert isinstance(head, RequestHead)
        assert isinstance(end, End)
        body = b"".join(event for event in events if isinstance(event, bytes))
        judge(Taken(head, body, end.trailers, data, left, head.method, False))


@pytest.mark.parametrize("name", ANSWERS)
def test_a_response_is_the_same_to_h11_however_it_is_cut(name: str) -> None:
    data, method = ANSWERS[name]
    first, _ = read(Role.CLIENT, [data], method)
    for pieces in cut(data):
        events, left = read(Role.CLIENT, pieces, method)
        assert events == first
        head = next(event for event in events if isinstance(event, ResponseHead) and event.status >= 200)
        end = events[-1]
        assert isinstance(end, End)
        body = b"".join(event for event in events if isinstance(event, bytes))
        judge(Taken(head, body, end.trailers, data, left, method, name == "until the end"))


@pytest.mark.parametrize("role", Role)
def test_what_is_refused_is_refused_wherever_it_is_cut(role: Role) -> None:
    if role is Role.SERVER:
        corpus = [(data, "GET") for data, _ in (REQUESTS | BODIES).values()]
    else:
        corpus = [(data, method.decode()) for data, method in RESPONSES.values()]
        corpus += [(data, "GET") for data in BROKEN.values()]
    for data, method in corpus:
        sent = data.replace(b"ORIGIN", b"a.test:8080")
        if len(sent) > 300 or not sent or b"101 Switching" in sent:
            continue
        for split in range(1, len(sent)):
            with pytest.raises(MalformedMessage):
                read(role, [sent[:split], sent[split:]], method)


def test_lines_that_are_remembered_are_bounded_and_hold_no_secrets() -> None:
    heads._lines.clear()
    for number in range(10_000):
        fields = b"X-%d: 1\r\nCookie: s%d\r\nAuthorization: Basic s%d\r\nX-Long: %b\r\n" % (
            *(number, number, number),
            b"a" * 200,
        )
        read(Role.SERVER, [b"GET / HTTP/1.1\r\nHost: a.test\r\n" + fields + b"\r\n"])
    assert 0 < len(heads._lines) <= 4096
    assert all(line.startswith((b"X-", b"Host")) and len(line) <= 128 for line in heads._lines)


def test_bytes_that_are_skipped_are_counted_and_the_rest_is_read() -> None:
    connection = StrictConnection(Role.CLIENT, HttpLimits())
    connection.asked("GET")
    connection.receive(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nab")
    assert isinstance(connection.next_event(), ResponseHead)
    assert connection.movable == 0  # what was received comes first
    assert connection.next_event() == Content(b"ab")
    assert connection.movable == 98
    connection.skip(90)
    assert connection.movable == 8
    connection.receive(b"01234567HTTP/1.1 ")
    assert connection.next_event() == Content(b"01234567")
    assert isinstance(connection.next_event(), End)
    assert connection.trailing == b"HTTP/1.1 "


def test_many_small_chunks_are_one_piece_of_content_and_bounded() -> None:
    connection = StrictConnection(Role.SERVER, HttpLimits())
    connection.receive(CHUNKED + b"1\r\nx\r\n" * 100_000)
    assert isinstance(connection.next_event(), RequestHead)
    content = connection.next_event()
    assert isinstance(content, Content)
    assert content.data == b"x" * 64 * 1024


OLD = {
    "padded sizes": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2   \r\nok\r\n0  \r\n\r\n",
    "blanks in front of sizes": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n  2\r\nok\r\n 0\r\n\r\n",
    "blanks in front of extensions": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2 ;a\r\nok\r\n0\r\n\r\n",
    "blank before a colon": b"HTTP/1.1 200 OK\r\nX-Old : 1\r\nContent-Length : 2\r\n\r\nok",
    "folded field": b"HTTP/1.1 200 OK\r\nX-Old: 1\r\n  2\r\nContent-Length: 2\r\n\r\nok",
    "one length twice": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
    "a list of one length": b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok",
}
NEVER = {
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
    "length beside chunked": b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\nTransfer-Encoding : chunked\r\n\r\n2\r\nok\r\n",
    "bare LF": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
    "blank in a name": b"HTTP/1.1 200 OK\r\nX Old: 1\r\nContent-Length: 2\r\n\r\nok",
    "no size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n  \r\nok\r\n0\r\n\r\n",
    "blank within a size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2 2\r\nok\r\n0\r\n\r\n",
    "NUL": b"HTTP/1.1 200 OK\r\nX: \0\r\nContent-Length: 2\r\n\r\nok",
    "fold of the status line": b"HTTP/1.1 200 OK\r\n  more\r\nContent-Length: 2\r\n\r\nok",
}


async def answer_of(server: Server, request: bytes) -> bytes:
    """What comes back; b"" if it ends with a reset, as a body that breaks off does."""
    try:
        return await server.exchange(request)
    except ConnectionResetError:
        return b""


async def test_a_lenient_upstream_is_taken_and_its_response_is_written_anew(run: Run, connector: Connect) -> None:
    ask = b"GET http://%b/ HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n"
    strict = run(HttpProxy(connector))
    forward = run(HttpProxy(connector, origins=lambda _: OriginOptions(lenient=True)))
    for name, data in OLD.items():
        origin = run(answering(data.replace(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n" + DATE)))
        refused = await answer_of(strict, ask % origin.authority.encode())
        assert not refused.endswith(b"ok"), name
        pool = BackendPool([Authority.of("127.0.0.1", origin.port)], connector, origin=OriginOptions(lenient=True))
        for answer in (
            await forward.exchange(ask % origin.authority.encode()),
            await run(HttpServer(pool)).exchange(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n"),
        ):
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n"), name
            head, _, body = answer.partition(b"\r\n\r\n")
            assert body == (b"2\r\nok\r\n0\r\n\r\n" if b"chunked" in data else b"ok"), name
            assert b" :" not in head, name
            assert b"\r\n " not in head, name
            assert head.count(b"Content-Length") == (0 if b"chunked" in data else 1), name
        await pool.stop()


async def test_what_can_be_read_in_two_ways_is_refused_from_a_lenient_upstream_too(
    run: Run, connector: Connect
) -> None:
    proxy = run(HttpProxy(connector, origins=lambda _: OriginOptions(lenient=True)))
    for name, data in NEVER.items():
        origin = run(answering(data))
        answer = await answer_of(
            proxy, b"GET http://%b/ HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n" % origin.authority.encode()
        )
        assert not answer.endswith(b"ok"), name
        assert b"\r\n0\r\n" not in answer, name


def test_a_lenient_204_with_a_length_has_no_body_and_is_the_last() -> None:
    data = b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nok"
    with pytest.raises(MalformedMessage):
        read(Role.CLIENT, [data])
    events, _ = read(Role.CLIENT, [data], lenient=True)
    assert isinstance(events[0], ResponseHead)
    assert not events[0].persistent
    assert len(events) == 2


def test_requests_are_never_read_leniently() -> None:
    with pytest.raises(MalformedMessage):
        read(Role.SERVER, [b"GET / HTTP/1.1\r\nHost : a.test\r\n\r\n"], lenient=True)


# -- the writer ------------------------------------------------------------------------------------------------


def h11_reads(data: bytes, *, asked: str = "GET") -> list[object]:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method=asked, target="/", headers=[("Host", "a")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    events = []
    while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
        events.append(event)
    return events


@pytest.mark.parametrize("length", [5, None])
def test_a_written_response_is_what_h11_reads(length: int | None) -> None:
    writer = MessageWriter()
    data = writer.response(200, "", Headers([("X", "1")]), [], length, bodiless=False, http_1_0=False, close=True)
    data += writer.content(b"hel") + writer.content(b"lo")
    data += writer.end(Headers([("X-Sum", "1")]))
    head, *content, end = h11_reads(data)
    assert isinstance(head, h11.Response)
    assert (b"x", b"1") in head.headers
    assert (b"connection", b"close") in head.headers
    assert b"".join(bytes(event.data) for event in content if isinstance(event, h11.Data)) == b"hello"
    assert isinstance(end, h11.EndOfMessage)
    assert list(end.headers) == ([] if length else [(b"x-sum", b"1")])


def test_a_body_that_is_not_as_long_as_it_was_said_is_no_message() -> None:
    for wrong in (b"hell", b"hello!"):
        writer = MessageWriter()
        writer.response(200, "", Headers(), [], 5, bodiless=False, http_1_0=False, close=False)
        with pytest.raises(WrongLength):
            _ = writer.content(wrong) + writer.end(None)
    writer = MessageWriter()
    writer.response(200, "", Headers(), [], 5, bodiless=False, http_1_0=False, close=False)
    writer.skip(4)
    with pytest.raises(WrongLength):
        writer.skip(2)


@pytest.mark.parametrize(
    ("method", "target", "host", "reason"),
    [
        ("GET /x", "/", "a", ""),
        ("GET", "/ HTTP/1.1\r\nX: 1", "a", ""),
        ("GET", "/a b", "a", ""),
        ("GET", "", "a", ""),
        ("GET", "/", "a\r\nX: 1", ""),
        ("GET", "/", "a", "OK\r\nX: 1"),
    ],
)
def test_nothing_that_is_written_splits_a_message(method: str, target: str, host: str, reason: str) -> None:
    asked, answered = MessageWriter(), MessageWriter()
    with pytest.raises(ValueError):
        _ = asked.request(method, target, host, Headers(), [], 0) + answered.response(
            200, reason, Headers(), [], 0, bodiless=False, http_1_0=False, close=False
        )


def test_fields_of_the_connection_that_a_service_adds_are_not_written() -> None:
    own = Headers([("Content-Length", "9"), ("Transfer-Encoding", "chunked"), ("Connection", "x"), ("Upgrade", "y")])
    data = MessageWriter().response(200, "", own, [], 0, bodiless=False, http_1_0=False, close=False)
    assert data == b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    own.add("Host", "b")
    data = MessageWriter().request("GET", "/", "a", own, [], 0)
    assert data == b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


async def test_a_kept_connection_serves_the_next_request(run: Run, connector: Connect) -> None:
    origin = run(answering(OK))
    proxy = run(HttpProxy(connector))
    answer = await proxy.exchange(
        b"GET http://%b/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % origin.authority.encode()
    )
    assert answer == OK_VIA.replace(b"Length: 2\r\n", b"Length: 2\r\nConnection: close\r\n")
