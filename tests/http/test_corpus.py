"""The corpus: nothing that two parsers could read differently reaches the other side."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

import pytest

from rama_ebpf.core import Stream
from rama_ebpf.services.http import HttpLimits, HttpProxy, HttpTimeouts, MalformedMessage
from rama_ebpf.services.http.h1.reader import NEED_DATA, PAUSED, Closed, End, Role, StrictConnection

from .conftest import OK, Connect, Run, read_until_reset
from .corpus import BODIES, BROKEN, REQUESTS, RESPONSES


def segmented(data: bytes) -> Iterator[list[bytes]]:
    """The whole in one piece, and (where that is quick) in pieces of one byte."""
    yield [data]
    if len(data) < 2000:
        yield [data[index : index + 1] for index in range(len(data))]


def refusal(pieces: list[bytes]) -> tuple[int, list[object]]:
    """Return the status with which the strict server side refuses, and the events before."""
    connection = StrictConnection(Role.SERVER, HttpLimits())
    events: list[object] = []
    try:
        for piece in [*pieces, b""]:
            connection.receive(piece)
            while (event := connection.next_event()) not in (NEED_DATA, PAUSED) and not isinstance(event, Closed):
                events.append(event)
    except MalformedMessage as error:
        return error.status, events
    raise AssertionError(f"not refused: {events}")


@pytest.mark.parametrize("name", REQUESTS)
def test_request_is_refused_before_anything_is_known_of_it(name: str) -> None:
    data, status = REQUESTS[name]
    for pieces in segmented(data.replace(b"ORIGIN", b"a.test:8080")):
        assert refusal(pieces) == (status, [])


def read_whole(connection: StrictConnection, data: bytes) -> None:
    """Read as callbacks do, which have another way for heads that are here whole."""
    if connection.receive_head(data) is NEED_DATA:
        connection.receive(b"")
        connection.next_event()


@pytest.mark.parametrize("name", REQUESTS)
def test_callbacks_refuse_a_request_as_others_do(name: str) -> None:
    data, status = REQUESTS[name]
    connection = StrictConnection(Role.SERVER, HttpLimits())
    with pytest.raises(MalformedMessage) as refused:
        read_whole(connection, data.replace(b"ORIGIN", b"a.test:8080"))
    assert refused.value.status == status
    with pytest.raises(MalformedMessage):
        connection.next_event()  # nothing more is read


@pytest.mark.parametrize("name", BODIES)
def test_body_is_refused_before_its_end(name: str) -> None:
    data, status = BODIES[name]
    for pieces in segmented(data.replace(b"ORIGIN", b"a.test:8080")):
        refused, events = refusal(pieces)
        assert refused == status
        assert not any(isinstance(event, End) for event in events)


def test_the_corpus_has_no_message_twice() -> None:
    requests = [data for data, _ in (REQUESTS | BODIES).values()]
    responses = [*(data for data, _ in RESPONSES.values()), *BROKEN.values()]
    assert len(set(requests)) == len(requests)
    assert len(set(responses)) == len(responses)
    assert len(requests) + len(responses) >= 400


class Recorder:
    """An origin that only records, per connection, whatever reaches it."""

    def __init__(self) -> None:
        self.received: list[bytearray] = []

    async def serve(self, stream: Stream) -> None:
        got = bytearray()
        self.received.append(got)
        while data := await stream.read():
            got += data


async def test_no_byte_of_a_refused_request_reaches_an_origin(run: Run, connector: Connect) -> None:
    recorder = Recorder()
    origin = run(recorder.serve).authority.encode()
    proxy = run(HttpProxy(connector))
    for name, (data, status) in REQUESTS.items():
        answer = await proxy.exchange(data.replace(b"ORIGIN", origin), eof=True)
        assert answer.startswith(b"HTTP/1.1 %d " % status), name
        assert answer.count(b"HTTP/1.1 ") == 1, name
        assert b"\r\nConnection: close\r\n" in answer, name
    assert recorder.received == []


async def test_no_refused_body_makes_a_complete_request(run: Run, connector: Connect) -> None:
    recorder = Recorder()
    server = run(recorder.serve)
    origin = server.authority.encode()
    proxy = run(HttpProxy(connector))
    for name, (data, status) in BODIES.items():
        recorder.received.clear()
        answer = await proxy.exchange(data.replace(b"ORIGIN", origin), eof=True)
        assert answer.startswith(b"HTTP/1.1 %d " % status), name
        assert answer.count(b"HTTP/1.1 ") == 1, name
        await server.idle()
        (received,) = recorder.received
        head, _, body = bytes(received).partition(b"\r\n\r\n")
        assert head.startswith(b"POST / HTTP/1.1\r\n"), name
        assert b"0\r\n" not in body, name
        assert len(body) < 5 or b"Transfer-Encoding: chunked" in head, name


async def test_no_byte_of_it_reaches_a_kept_origin_by_callbacks(run: Run, connector: Connect) -> None:
    received = bytearray()
    connections = 0

    async def kept(stream: Stream) -> None:
        nonlocal connections
        connections += 1
        while data := await stream.read():
            received.extend(data)
            await stream.write(OK)

    origin = run(kept).authority.encode()
    proxy = run(HttpProxy(connector))
    plain = b"GET http://" + origin + b"/warm HTTP/1.1\r\nHost: " + origin + b"\r\n\r\n"
    for name, (data, status) in REQUESTS.items():
        reader, writer = await proxy.open()
        for _ in range(2):  # the second one is served in callbacks, and so is what follows
            writer.write(plain)
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 ")
        before = len(received)
        writer.write(data.replace(b"ORIGIN", origin))
        writer.write_eof()
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 %d " % status), name
        assert answer.count(b"HTTP/1.1 ") == 1, name
        assert len(received) == before, name
        writer.close()
    assert connections == 1


def answering(data: bytes) -> Callable[[Stream], Awaitable[None]]:
    async def serve(stream: Stream) -> None:
        await stream.read()
        await stream.write(data)

    return serve


async def test_no_malformed_response_reaches_the_client(run: Run, connector: Connect) -> None:
    proxy = run(HttpProxy(connector, timeouts=HttpTimeouts(response=2.0)))
    for name, (data, method) in RESPONSES.items():
        origin = run(answering(data)).authority.encode()
        answer = await proxy.exchange(
            method + b" http://" + origin + b"/ HTTP/1.1\r\nHost: " + origin + b"\r\nConnection: close\r\n\r\n"
        )
        final = answer[answer.index(b"HTTP/1.1 502 ") :] if name == "endless interim responses" else answer
        assert final.startswith(b"HTTP/1.1 502 Bad Gateway\r\n"), name
        assert b"\r\n\r\nok" not in answer, name


async def test_no_broken_response_body_looks_complete(run: Run, connector: Connect) -> None:
    proxy = run(HttpProxy(connector))
    for name, data in BROKEN.items():
        origin = run(answering(data)).authority.encode()
        reader, writer = await proxy.open()
        writer.write(b"GET http://" + origin + b"/ HTTP/1.1\r\nHost: " + origin + b"\r\n\r\n")
        answer = await read_until_reset(reader)
        assert b"\r\n0\r\n" not in answer, name
        writer.close()
