"""New connections to upstreams, and short bodies, in callbacks: they end as they would in a coroutine."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from rama_ebpf.core import Authority, Stream, stack
from rama_ebpf.core.request_log import RequestRecord
from rama_ebpf.layers.access_log import AccessLogLayer
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.services.connect import Connector
from rama_ebpf.services.http import BackendPool, HttpProxy, HttpServer, HttpTimeouts, OriginOptions
from rama_ebpf.services.http.exchange.running import running

from .conftest import DATE, OK, Loopback, Origin, Run, abort, descriptors, eventually, read_until_reset
from .test_quick import HEAD, Client, Counted, Reply, chunked_body, counted, get, scenario, scripted

__all__ = ["counted"]


def dialler(timeout: float = 5.0) -> Connector:
    """A connector with nothing around it: callbacks may have it dial."""
    return Connector(Loopback(), EgressPolicy.of(["127.0.0.0/8"]), timeout=timeout)


@pytest.fixture
def silent() -> Iterator[Authority]:
    """A target that exists and answers no SYN: its queue is full."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for sock in (first, second):
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield Authority.of("127.0.0.1", listener.getsockname()[1])


@pytest.mark.parametrize("method", [b"GET", b"POST", b"PUT", b"PATCH", b"DELETE"])
async def test_a_request_over_a_new_connection_needs_no_coroutine(run: Run, counted: Counted, method: bytes) -> None:
    body = b"" if method in (b"GET", b"DELETE") else b"hello"
    origin = Origin(0, [OK], [body or b"\r\n\r\n"], False)
    origin.port = run(origin.serve).port
    records: list[RequestRecord] = []
    proxy = run(stack(AccessLogLayer(request_sink=records.append), HttpProxy(dialler())))
    client = Client(*await proxy.open())
    fields = [b"Content-Length: 5"] if body else []
    for _ in range(3):
        assert (await client.ask(get(origin, *fields, method=method) + body)).endswith(b"ok")
    assert counted.coroutines == 0
    for request in origin.requests:
        assert request.startswith(method + b" / HTTP/1.1\r\nHost: " + origin.host + b"\r\n")
        assert request.endswith(b"\r\n\r\n" + body)
        assert request.count(b"Content-Length") == len(fields)
    # What may not be repeated goes out on connections of its own.
    assert origin.connections == (1 if method == b"GET" else 3)
    assert len(running) == 0
    assert [record.upstream and record.upstream.kept for record in records] == [False] + [method == b"GET"] * 2
    client.writer.close()


async def test_a_post_without_a_body_says_so(run: Run, counted: Counted) -> None:
    origin = scripted(run, OK)
    client = Client(*await run(HttpProxy(dialler())).open())
    assert (await client.ask(get(origin, b"Content-Length: 0", method=b"POST"))).endswith(b"ok")
    assert b"\r\nContent-Length: 0\r\n" in origin.requests[0]
    assert counted.coroutines == 0
    client.writer.close()


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ((b"Content-Length: 5",), (b"he", b"llo")),
        ((b"Content-Length: 5", b"Expect: 100-continue"), (b"", b"hello")),
        ((b"Transfer-Encoding: chunked",), (b"5\r\nhello\r\n", b"0\r\n\r\n")),
    ],
)
async def test_a_body_that_is_not_here_whole_is_the_coroutines(
    run: Run, counted: Counted, fields: tuple[bytes, ...], parts: tuple[bytes, bytes]
) -> None:
    end = b"0\r\n\r\n" if b"chunked" in fields[0] else b"hello"
    origin = Origin(0, [OK], [end], False)
    origin.port = run(origin.serve).port
    client = Client(*await run(HttpProxy(dialler(), timeouts=HttpTimeouts(expect_continue=0.05))).open())
    client.writer.write(get(origin, *fields, method=b"POST") + parts[0])
    await client.writer.drain()
    if len(fields) == 1:
        await eventually(lambda: counted.coroutines == 1)
    client.writer.write(parts[1])
    head = await client.reader.readuntil(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 100 "):
        head = await client.reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert await client.reader.readexactly(2) == b"ok"
    assert counted.coroutines == 1
    assert b"hello" in origin.requests[0]
    client.writer.close()


async def test_a_target_that_does_not_answer_is_504_and_one_that_refuses_502(run: Run, silent: Authority) -> None:
    proxy = run(HttpProxy(dialler(0.3)))
    before = descriptors()
    client = Client(*await proxy.open())
    for target, status, reason in (
        (silent, b"504", b"connection_timeout"),
        (Authority.of("127.0.0.1", 1), b"502", b"connection_refused"),
        (Authority.of("192.0.2.1", 1), b"403", b"destination_ip_prohibited"),
    ):
        client.writer.write(b"GET http://%b/ HTTP/1.1\r\nHost: x\r\n\r\n" % str(target).encode())
        answer = await client.response()
        assert answer.startswith(b"HTTP/1.1 " + status), answer
        assert reason in answer
    client.writer.close()
    await proxy.idle()
    await eventually(lambda: descriptors() <= before)
    assert len(running) == 0


async def test_a_client_that_leaves_ends_the_dialling(run: Run, silent: Authority) -> None:
    proxy = run(HttpProxy(dialler(60.0), timeouts=HttpTimeouts(watch=0.05)))
    before = descriptors()
    client = Client(*await proxy.open())
    client.writer.write(b"GET http://%b/ HTTP/1.1\r\nHost: x\r\n\r\n" % str(silent).encode())
    await eventually(lambda: len(running) == 1)
    abort(client.writer)
    await proxy.idle()
    await eventually(lambda: descriptors() <= before)
    assert len(running) == 0


async def test_a_dial_that_succeeds_late_serves_its_request(run: Run, counted: Counted) -> None:
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for sock in (first, second):
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        client = Client(*await run(HttpProxy(dialler(30.0))).open())
        target = b"%b" % str(Authority.of(*listener.getsockname())).encode()
        client.writer.write(b"GET http://%b/late HTTP/1.1\r\nHost: x\r\n\r\n" % target)
        await eventually(lambda: len(running) == 1)
        assert counted.coroutines == 0
        listener.listen(8)  # there is room now, and the next SYN is answered
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(listener)
            sock.setblocking(False)
            if sock.getpeername() not in (first.getsockname(), second.getsockname()):
                break
            sock.close()
        assert (await loop.sock_recv(sock, 4096)).startswith(b"GET /late HTTP/1.1\r\n")
        await loop.sock_sendall(sock, OK)
        assert (await client.response()).endswith(b"ok")
        assert counted.coroutines == 0
        sock.close()
        client.writer.close()


async def test_who_refuses_a_body_early_is_heard(run: Run) -> None:
    async def origin(stream: Stream) -> None:
        await stream.read(1)
        await stream.write(b"HTTP/1.1 413 Too Large\r\n" + DATE + b"Connection: close\r\nContent-Length: 2\r\n\r\nno")

    script = Origin(run(origin).port, [], [], False)
    client = Client(*await run(HttpProxy(dialler())).open())
    request = get(script, b"Content-Length: 9000", method=b"POST") + bytes(9000)
    assert (await client.ask(request)).startswith(b"HTTP/1.1 413 ")
    client.writer.close()


async def test_an_upstream_whose_connections_are_not_kept_is_told_so(run: Run, counted: Counted) -> None:
    origin = scripted(run, OK)
    client = Client(*await run(HttpProxy(dialler(), origins=lambda _target: OriginOptions(keep=False))).open())
    for _ in range(2):
        assert (await client.ask(get(origin))).endswith(b"ok")
    assert counted.coroutines == 0
    assert origin.connections == 2
    assert all(b"\r\nConnection: close\r\n" in request for request in origin.requests)
    client.writer.close()


async def test_a_backend_that_refuses_has_its_request_moved_on(run: Run) -> None:
    origin = scripted(run, OK)
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        backends = [Authority.of("127.0.0.1", dead.getsockname()[1]), Authority.of("127.0.0.1", origin.port)]
        pool = BackendPool(backends, dialler())
        client = Client(*await run(HttpServer(pool)).open())
        for _ in range(8):
            answer = await client.ask(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n\r\n\r\n")
            assert answer.endswith(b"ok")
        client.writer.close()
        await pool.stop()


@pytest.mark.parametrize("seed", range(25))
async def test_whatever_upstreams_do_new_connections_answer_alike(
    run: Run, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    replies, _ = scenario(chance)
    methods = [chance.choice([b"GET", b"POST", b"HEAD", b"DELETE", b"PUT"]) for _ in range(6)]
    answers = []
    for quick in (True, False):
        script = iter([Reply(OK, b"", (), False), *replies])

        async def origin(stream: Stream, script: Any = script) -> None:
            asked = b""
            while data := await stream.read():
                asked += data
                if b"\r\n\r\n" not in asked or (b"Content-Length: 5" in asked and not asked.endswith(b"hello")):
                    continue
                reply = next(script, Reply(HEAD + b"Content-Length: 2\r\n\r\n", b"ok", (), False))
                for segment in reply.segments(asked):
                    await stream.write(segment)
                    await asyncio.sleep(0)
                asked = b""
                if reply.closes:
                    return

        if not quick:
            monkeypatch.setattr("rama_ebpf.services.http.h1.server.quick_of", lambda _service: None)
        proxy = run(HttpProxy(dialler()))
        target = Origin(run(origin).port, [], [], False)
        client = Client(*await proxy.open())
        got: list[tuple[object, bytes]] = []
        for method in [b"GET", *methods]:
            body = b"hello" if method in (b"POST", b"PUT") else b""
            client.writer.write(get(target, *([b"Content-Length: 5"] if body else []), method=method) + body)
            try:
                head = await client.reader.readuntil(b"\r\n\r\n")
                while head.startswith(b"HTTP/1.1 103 "):
                    head = await client.reader.readuntil(b"\r\n\r\n")
                content = b""
                if method != b"HEAD" and head[9:12] not in (b"204", b"304"):
                    if b"Content-Length: " in head:
                        size = int(head.partition(b"Content-Length: ")[2].split(b"\r\n")[0])
                        content = await client.reader.readexactly(size)
                    else:
                        content = await chunked_body(client.reader)
            except (ConnectionResetError, asyncio.IncompleteReadError) as error:
                got.append((type(error), b""))
                break
            got.append((b"\r\n".join(line for line in head.split(b"\r\n") if not line.startswith(b"Date")), content))
        client.writer.close()
        answers.append(got)
        await proxy.idle()
        assert len(running) == 0
    assert answers[0] == answers[1]


async def test_an_upstream_that_breaks_off_resets_the_client(run: Run) -> None:
    async def origin(stream: Stream) -> None:
        await stream.read()
        await stream.write(HEAD + b"Content-Length: 10\r\n\r\nabc")

    script = Origin(run(origin).port, [], [], False)
    client = Client(*await run(HttpProxy(dialler())).open())
    client.writer.write(get(script, b"Content-Length: 1", method=b"POST") + b"x")
    assert (await read_until_reset(client.reader)).endswith(b"abc")
    client.writer.close()


class Pieces:
    """An origin that sends a response piece by piece, when it is told to."""

    def __init__(self, *pieces: bytes, reset: bool = False, close: bool = False) -> None:
        self.pieces, self.reset, self.close = pieces, reset, close
        self.go = asyncio.Semaphore(0)
        self.ended = asyncio.Event()
        self.port = 0

    async def serve(self, stream: Stream) -> None:
        try:
            while await stream.read():
                for piece in self.pieces:
                    await self.go.acquire()
                    await stream.write(piece)
                if self.reset:
                    await self.go.acquire()
                    stream.abort()
                if self.reset or self.close:
                    return
        finally:
            self.ended.set()

    @property
    def origin(self) -> Origin:
        return Origin(self.port, [], [], False)


def pieces(run: Run, *parts: bytes, **options: bool) -> Pieces:
    made = Pieces(*parts, **options)
    made.port = run(made.serve).port
    return made


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("parts", "ended", "body"),
    [
        ((HEAD + b"Content-Length: 6\r\n\r\nab", b"cd", b"ef"), False, b"abcdef"),
        ((HEAD + b"Content-Length: 4\r\n\r\n", b"abcd"), False, b"abcd"),
        ((CHUNKED + b"2\r\nab\r\n", b"3\r\ncd", b"e\r\n0\r\n", b"\r\n"), False, b"abcde"),
        ((CHUNKED, b"1\r\na\r\n0\r\nX-T: 1\r\n\r\n"), False, b"aX-T: 1\r\n"),
        ((HEAD + b"\r\nab", b"cd"), True, b"abcd"),
    ],
)
async def test_a_response_in_pieces_passes_as_it_comes(
    run: Run, counted: Counted, parts: tuple[bytes, ...], ended: bool, body: bytes
) -> None:
    upstream = pieces(run, *parts, close=ended)
    client = Client(*await run(HttpProxy(dialler())).open())
    for _ in range(2):
        client.writer.write(get(upstream.origin, b"TE: trailers", b"Connection: TE"))
        upstream.go.release()
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        for _ in parts[1:]:
            upstream.go.release()
        whole = b"Content-Length" in head
        assert (await (client.reader.readexactly(len(body)) if whole else chunked_body(client.reader))) == body
    assert counted.coroutines == 0
    assert len(running) == 0
    client.writer.close()


async def test_a_client_that_does_not_read_holds_the_upstream_back(run: Run) -> None:
    size = 32 * 1024 * 1024
    sent = 0

    async def origin(stream: Stream) -> None:
        nonlocal sent
        await stream.read()
        await stream.write(CHUNKED)
        while sent < size:
            await stream.write(b"10000\r\n" + bytes(65536) + b"\r\n")
            sent += 65536
        await stream.write(b"0\r\n\r\n")

    script = Origin(run(origin).port, [], [], False)
    client = Client(*await run(HttpProxy(dialler())).open())
    client.writer.write(get(script))
    await client.reader.readuntil(b"\r\n\r\n")
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    before = -1
    while before != sent:
        before = sent
        for _ in range(100):
            await asyncio.sleep(0)
        await asyncio.sleep(0.1)  # what has been taken by then stays the same: there is nobody to wait for
    assert sent < size
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    content = await chunked_body(client.reader)
    assert content == bytes(size)
    client.writer.close()


@pytest.mark.parametrize("head", [HEAD + b"Content-Length: 9\r\n\r\n", CHUNKED + b"1\r\na\r\n", HEAD + b"\r\n"])
async def test_an_upstream_that_resets_within_a_response_never_looks_whole(run: Run, head: bytes) -> None:
    upstream = pieces(run, head + b"", b"1\r\na\r\n", reset=True)
    proxy = run(HttpProxy(dialler()))
    client = Client(*await proxy.open())
    client.writer.write(get(upstream.origin))
    upstream.go.release()
    await client.reader.readuntil(b"\r\n\r\n")
    upstream.go.release()
    upstream.go.release()
    assert not (await read_until_reset(client.reader)).endswith(b"0\r\n\r\n")
    await proxy.idle()
    assert len(running) == 0
    client.writer.close()


async def test_a_body_that_stops_coming_ends_in_a_reset(run: Run) -> None:
    upstream = pieces(run, HEAD + b"Content-Length: 9\r\n\r\nabc", b"never")
    records: list[RequestRecord] = []
    service = HttpProxy(dialler(), timeouts=HttpTimeouts(body=0.2))
    proxy = run(stack(AccessLogLayer(request_sink=records.append), service))
    client = Client(*await proxy.open())
    client.writer.write(get(upstream.origin))
    upstream.go.release()
    assert (await read_until_reset(client.reader)).endswith(b"abc")
    await proxy.idle()
    assert [record.status for record in records] == [200]
    assert "broke off" in records[0].error
    upstream.go.release()
    await upstream.ended.wait()
    client.writer.close()


@pytest.mark.parametrize("leaves", [True, False])
async def test_a_client_that_leaves_or_half_closes_within_a_response(run: Run, leaves: bool) -> None:
    upstream = pieces(run, HEAD + b"Content-Length: 6\r\n\r\nabc", b"def")
    proxy = run(HttpProxy(dialler(), timeouts=HttpTimeouts(watch=0.02)))
    client = Client(*await proxy.open())
    client.writer.write(get(upstream.origin))
    upstream.go.release()
    await client.reader.readuntil(b"abc")
    if leaves:
        abort(client.writer)
    else:
        client.writer.write_eof()
        upstream.go.release()
        assert await client.reader.readexactly(3) == b"def"
    await proxy.idle()
    assert len(running) == 0
    client.writer.close()
    upstream.go.release()


async def test_a_drain_lets_a_response_in_pieces_end(run: Run) -> None:
    upstream = pieces(run, HEAD + b"Content-Length: 6\r\n\r\nabc", b"def")
    service = HttpProxy(dialler())
    client = Client(*await run(service).open())
    client.writer.write(get(upstream.origin))
    upstream.go.release()
    await client.reader.readuntil(b"abc")
    service.drain()
    upstream.go.release()
    assert await client.reader.read() == b"def"
    client.writer.close()
