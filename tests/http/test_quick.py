"""The callback path: plain requests need no coroutine, and whatever is not plain ends as it would without it."""

from __future__ import annotations

import asyncio
import base64
import functools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rama_ebpf.core import AuthFailed, Authority, Credentials, Service, Stream, User, client_address, stack
from rama_ebpf.core.request_log import RequestRecord
from rama_ebpf.layers import PasswordFile, StaticUsers
from rama_ebpf.layers.access_log import AccessLogLayer
from rama_ebpf.layers.hashes import hash_password
from rama_ebpf.services.http import (
    BackendPool,
    ForwardedLayer,
    ForwardProxy,
    HttpProxy,
    HttpServer,
    HttpTimeouts,
    PassiveHealth,
    Request,
    Response,
    Route,
    Routes,
)
from rama_ebpf.services.http.exchange.quick import decides
from rama_ebpf.services.http.exchange.running import running
from rama_ebpf.services.http.h1.server import H1ServerConnection
from rama_ebpf.services.http.layers import ProxyAuthLayer

from .conftest import DATE, OK, Connect, Origin, Run, Server, abort, descriptors, eventually, read_until_reset

HEAD = b"HTTP/1.1 200 OK\r\n" + DATE


@dataclass
class Counted:
    """How many requests coroutines have served."""

    coroutines: int = 0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    found = Counted()
    original = H1ServerConnection._serve_head

    async def serve_head(self: H1ServerConnection, *arguments: Any) -> bool:
        found.coroutines += 1
        return await original(self, *arguments)

    monkeypatch.setattr(H1ServerConnection, "_serve_head", serve_head)
    return found


def get(origin: Origin, *fields: bytes, method: bytes = b"GET", path: bytes = b"/") -> bytes:
    return b"\r\n".join([method + b" http://" + origin.host + path + b" HTTP/1.1", b"Host: a.test", *fields, b"", b""])


class Client:
    """A client of a proxy whose connection, and one to the origin, are kept: its next request is for callbacks."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def warm(cls, proxy: Server, origin: Origin) -> Client:
        client = cls(*await proxy.open())
        assert (await client.ask(get(origin))).endswith(b"ok")
        return client

    async def ask(self, request: bytes) -> bytes:
        self.writer.write(request)
        return await self.response()

    async def response(self) -> bytes:
        head = await self.reader.readuntil(b"\r\n\r\n")
        if b"Content-Length: " in head:
            return head + await self.reader.readexactly(int(head.partition(b"Content-Length: ")[2].split(b"\r\n")[0]))
        return head + await self.reader.readuntil(b"0\r\n\r\n") if b"chunked" in head else head


def scripted(run: Run, *replies: bytes, close: bool = False) -> Origin:
    """An origin whose first reply is for the warming up."""
    origin = Origin(0, [OK, *replies], [b"\r\n\r\n"], close)
    origin.port = run(origin.serve).port
    return origin


@pytest.fixture
async def proxy(run: Run, connector: Connect) -> Server:
    return run(HttpProxy(connector))


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
async def test_plain_requests_on_kept_connections_need_no_coroutine(
    run: Run, proxy: Server, counted: Counted, method: bytes
) -> None:
    origin = scripted(run, OK if method == b"GET" else HEAD + b"Content-Length: 2\r\n\r\n")
    client = await Client.warm(proxy, origin)
    assert counted.coroutines == 1
    for _ in range(20):
        client.writer.write(get(origin, method=method))
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\nVia: 1.1 rama-ebpf\r\n" in head
        if method == b"GET":
            assert await client.reader.readexactly(2) == b"ok"
    assert counted.coroutines == 1
    assert (origin.connections, len(origin.requests)) == (1, 21)
    client.writer.close()


async def test_the_default_stack_of_a_reverse_proxy_decides_at_once(
    run: Run, connector: Connect, counted: Counted
) -> None:
    origin = scripted(run)
    pool = BackendPool([Authority.of("127.0.0.1", origin.port)], connector)
    server = run(HttpServer(stack(ForwardedLayer(), Routes([Route(pool)]))))
    client = Client(*await server.open())
    for _ in range(5):
        assert (await client.ask(b"GET /x HTTP/1.1\r\nHost: a.test\r\n\r\n")).endswith(b"ok")
    assert counted.coroutines == 1
    for request in origin.requests:
        assert request.count(b"X-Forwarded-For: 127.0.0.1\r\n") == 1
        assert request.count(b"Via: ") == 1
    client.writer.close()
    await pool.stop()


async def test_what_looks_like_a_service_that_decides_is_never_passed_by(run: Run, connector: Connect) -> None:
    seen: list[str] = []

    class Watched(ForwardProxy):
        async def __call__(self, request: Request, /) -> Response:
            seen.append("inherits")
            return await super().__call__(request)

    def layer(inner: Service[Request, Response]) -> Service[Request, Response]:
        @functools.wraps(inner)
        async def serve(request: Request) -> Response:
            seen.append("wraps")
            return await inner(request)

        return serve

    origin = scripted(run)
    for service in (Watched(connector), stack(layer, ForwardedLayer(), ForwardProxy(connector))):
        client = await Client.warm(run(HttpServer(service)), origin)
        for _ in range(2):
            await client.ask(get(origin))
        client.writer.close()
    assert seen == ["inherits"] * 3 + ["wraps"] * 3


async def test_who_is_asked_and_cannot_decide_leaves_nothing(run: Run, connector: Connect) -> None:
    seen: list[bytes] = []

    async def app(request: Request) -> Response:
        client = client_address(request)
        seen.append(str(client.ip if client else None).encode())
        return Response.text(200, "ok")

    def undecided(request: Request) -> None:
        return None

    decides(app, undecided)
    server = run(HttpServer(stack(ForwardedLayer(trusted=["127.0.0.0/8"]), app)))
    client = Client(*await server.open())
    for _ in range(2):
        await client.ask(b"GET / HTTP/1.1\r\nHost: a.test\r\nX-Forwarded-For: 192.0.2.7\r\n\r\n")
    assert seen == [b"192.0.2.7"] * 2
    client.writer.close()


async def test_a_layer_that_is_asynchronous_is_never_passed_by(run: Run, connector: Connect) -> None:
    seen = 0

    def layer(inner: Service[Request, Response]) -> Service[Request, Response]:
        async def serve(request: Request) -> Response:
            nonlocal seen
            seen += 1
            return await inner(request)

        return serve

    origin = scripted(run)
    client = await Client.warm(run(HttpProxy(connector, layers=[layer])), origin)
    for _ in range(3):
        await client.ask(get(origin))
    assert seen == 4
    client.writer.close()


async def test_each_request_in_callbacks_has_its_line_and_nothing_keeps_running(run: Run, connector: Connect) -> None:
    records: list[RequestRecord] = []
    origin = scripted(run)
    proxy = run(stack(AccessLogLayer(request_sink=records.append), HttpProxy(connector)))
    client = await Client.warm(proxy, origin)
    for _ in range(3):
        await client.ask(get(origin, path=b"/path?token=s3cret"))
    assert len(running) == 0
    assert [(record.status, record.reason) for record in records] == [(200, "done")] * 4
    for record in records[1:]:
        assert record.upstream is not None
        assert record.upstream.kept
        assert record.received > 50
        assert record.sent > 50
        assert record.first_byte is not None
        assert record.target.endswith("/path")
    client.writer.close()


async def test_pipelined_requests_are_answered_in_order_and_let_others_go_first(
    run: Run, proxy: Server, counted: Counted
) -> None:
    origin = scripted(run, *(HEAD + b"Content-Length: 4\r\n\r\n%04d" % number for number in range(200)))
    client = await Client.warm(proxy, origin)
    client.writer.write(get(origin) * 200)
    for number in range(200):
        assert (await client.response()).endswith(b"%04d" % number)
    assert counted.coroutines == 1
    client.writer.close()


@pytest.mark.parametrize(
    "reply",
    [
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n",
        HEAD + b"Content-Length: 0\r\n\r\n",
        HEAD.replace(b"200 OK", b"204 No Content") + b"\r\n",
        HEAD.replace(b"200 OK", b"304 Not Modified") + b"Content-Length: 7\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + HEAD + b"Content-Length: 2\r\n\r\nok",
        HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\nok",
        HEAD.replace(b"200 OK", b"999 Odd") + b"Content-Length: 2\r\n\r\nok",
    ],
)
async def test_a_response_is_the_same_in_callbacks_and_in_a_coroutine(run: Run, proxy: Server, reply: bytes) -> None:
    fresh, kept = Origin(0, [reply], [b"\r\n\r\n"], False), scripted(run, reply)
    fresh.port = run(fresh.serve).port
    slow = await proxy.exchange(get(fresh, b"Connection: close", b"TE: trailers"))
    client = await Client.warm(proxy, kept)
    client.writer.write(get(kept, b"Connection: close", b"TE: trailers"))
    assert await client.reader.read() == slow
    client.writer.close()


async def test_a_response_that_comes_byte_by_byte_and_one_that_is_large_arrive_whole(run: Run, proxy: Server) -> None:
    big = bytes(range(256)) * 8192

    async def origin(stream: Stream) -> None:
        asked = 0
        while await stream.read():
            asked += 1
            if asked == 1:
                await stream.write(OK)
            elif asked == 2:
                for byte in OK:
                    await stream.write(bytes([byte]))
                    await asyncio.sleep(0)
            else:
                await stream.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(big), big)

    script = Origin(run(origin).port, [], [], False)
    client = await Client.warm(proxy, script)
    assert (await client.ask(get(script))).endswith(b"\r\n\r\nok")
    assert (await client.ask(get(script))).endswith(big)
    assert (await client.ask(get(script))).endswith(big)
    client.writer.close()


async def test_a_kept_upstream_that_closes_instead_of_answering_costs_nothing(run: Run, proxy: Server) -> None:
    async def origin(stream: Stream) -> None:
        while await stream.read():
            await stream.write(OK)
            if not await stream.read():  # a second request is met by the end
                return
            return

    script = Origin(run(origin).port, [], [], False)
    client = await Client.warm(proxy, script)
    for _ in range(5):
        assert (await client.ask(get(script))).endswith(b"ok")
    client.writer.close()


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (b"220 smtp.test ESMTP\r\n\r\n", b"502"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok", b"502"),
        (b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", b"502"),
    ],
)
async def test_a_response_that_is_none_is_502_and_its_connection_is_gone(
    run: Run, proxy: Server, reply: bytes, status: bytes
) -> None:
    origin = scripted(run, reply, OK)
    client = await Client.warm(proxy, origin)
    assert (await client.ask(get(origin))).startswith(b"HTTP/1.1 " + status)
    assert (await client.ask(get(origin))).endswith(b"ok")
    assert origin.connections == 2
    client.writer.close()


async def test_a_body_that_breaks_off_ends_in_a_reset(run: Run, proxy: Server) -> None:
    for reply in (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nnonsense\r\n",
        HEAD + b"Content-Length: 10\r\n\r\nabc",
    ):

        async def origin(stream: Stream, reply: bytes = reply) -> None:
            for answer in (OK, reply):
                await stream.read()
                await stream.write(answer)

        script = Origin(run(origin).port, [], [], False)
        client = await Client.warm(proxy, script)
        client.writer.write(get(script))
        assert not (await read_until_reset(client.reader)).endswith(b"0\r\n\r\n")
        client.writer.close()


async def test_a_silent_upstream_is_504_and_a_slow_head_408(run: Run, connector: Connect) -> None:
    proxy = run(HttpProxy(connector, timeouts=HttpTimeouts(response=0.3, head=0.3)))
    origin = scripted(run, b"")
    client = await Client.warm(proxy, origin)
    assert (await client.ask(get(origin))).startswith(b"HTTP/1.1 504 ")
    client.writer.write(b"GET / HT")
    assert (await client.reader.read()).startswith(b"HTTP/1.1 408 ")
    client.writer.close()


async def test_a_head_that_trickles_gets_408_however_lively(run: Run, connector: Connect) -> None:
    proxy = run(HttpProxy(connector, timeouts=HttpTimeouts(head=0.3)))
    client = await Client.warm(proxy, scripted(run))

    async def trickle() -> None:
        client.writer.write(b"GET / HTTP/1.1\r\n")
        for number in range(1000):
            client.writer.write(b"X-%d: 1\r\n" % number)
            await asyncio.sleep(0.02)

    trickling = asyncio.create_task(trickle())
    assert (await client.reader.read()).startswith(b"HTTP/1.1 408 ")
    trickling.cancel()
    client.writer.close()


async def test_an_idle_connection_is_closed_without_a_word_and_a_drain_closes_it_at_once(
    run: Run, connector: Connect
) -> None:
    client = await Client.warm(run(HttpProxy(connector, timeouts=HttpTimeouts(idle=0.2))), scripted(run))
    assert await client.reader.read() == b""
    client.writer.close()
    service = HttpProxy(connector)
    client = await Client.warm(run(service), scripted(run))
    service.drain()
    assert await client.reader.read() == b""
    client.writer.close()


async def test_a_drain_lets_a_request_in_callbacks_finish(run: Run, connector: Connect) -> None:
    arrived, released = asyncio.Event(), asyncio.Event()

    async def origin(stream: Stream) -> None:
        await stream.read()
        await stream.write(OK)
        await stream.read()
        arrived.set()
        await released.wait()
        await stream.write(OK)

    service = HttpProxy(connector)
    script = Origin(run(origin).port, [], [], False)
    client = await Client.warm(run(service), script)
    client.writer.write(get(script))
    await arrived.wait()
    service.drain()
    released.set()
    assert (await client.reader.read()).endswith(b"Connection: close\r\n\r\nok")
    client.writer.close()


async def test_a_client_that_resets_ends_the_request_upstream_and_leaves_nothing(run: Run, proxy: Server) -> None:
    origin = scripted(run, b"")
    before = descriptors()
    client = await Client.warm(proxy, origin)
    client.writer.write(get(origin))
    await eventually(lambda: len(origin.requests) == 2)
    abort(client.writer)
    await eventually(lambda: proxy.tcp.live == 0)
    await eventually(lambda: descriptors() <= before)
    assert len(running) == 0


async def test_a_client_that_half_closes_gets_its_answer_however_late(run: Run, proxy: Server) -> None:
    released = asyncio.Event()

    async def origin(stream: Stream) -> None:
        await stream.read()
        await stream.write(OK)
        await stream.read()
        await released.wait()
        await stream.write(OK)

    script = Origin(run(origin).port, [], [], False)
    client = await Client.warm(proxy, script)
    client.writer.write(get(script))
    client.writer.write_eof()
    await asyncio.sleep(0.2)  # longer than a half-closed client is watched before it is looked at
    released.set()
    assert (await client.reader.read()).endswith(b"ok")
    client.writer.close()


async def test_a_client_that_reads_nothing_is_waited_for_and_gets_every_byte(
    run: Run, proxy: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted()
    original = H1ServerConnection._write_rest

    async def write_rest(self: H1ServerConnection, *arguments: Any) -> bool:
        counted.coroutines += 1
        return await original(self, *arguments)

    monkeypatch.setattr(H1ServerConnection, "_write_rest", write_rest)
    body = bytes(60_000)
    origin = scripted(run, HEAD + b"Content-Length: 60000\r\n\r\n" + body)
    client = await Client.warm(proxy, origin)
    client.reader._transport.pause_reading()  # type: ignore[attr-defined]  # nothing is read for a while
    client.writer.write(get(origin) * 400)
    await eventually(lambda: counted.coroutines > 0)  # the send queue is full: a task waits for room
    client.reader._transport.resume_reading()  # type: ignore[attr-defined]
    for _ in range(400):
        assert (await client.response()).endswith(b"\r\n\r\n" + body)
    client.writer.close()


async def test_cutting_a_connection_in_callbacks_leaves_nothing(run: Run, connector: Connect) -> None:
    origin = scripted(run, b"")
    service = HttpProxy(connector)
    proxy = run(service)
    client = await Client.warm(proxy, origin)
    client.writer.write(get(origin))
    await eventually(lambda: len(origin.requests) == 2)
    assert await proxy.tcp.drain(0) == 1
    assert len(running) == 0
    assert service.proxy.pool.busy(Authority.of("127.0.0.1", origin.port)) == 0
    client.writer.close()


@pytest.mark.parametrize(
    "refused",
    [b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", b"GET http://a.test/ HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(200)],
)
async def test_what_is_refused_is_refused_in_callbacks_too(run: Run, proxy: Server, refused: bytes) -> None:
    client = await Client.warm(proxy, scripted(run))
    client.writer.write(refused)
    answer = await client.reader.read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"\r\nConnection: close\r\n" in answer
    client.writer.close()


async def test_a_request_that_cannot_be_sent_is_500_and_holds_no_connection(run: Run, connector: Connect) -> None:
    origin = scripted(run)
    proxy = ForwardProxy(connector)

    async def spoils(request: Request) -> Response:
        if request.path == "/spoilt":
            request.path = "/a b"
        return await proxy(request)

    server = run(HttpServer(spoils, forward=True))
    client = await Client.warm(server, origin)
    for _ in range(3):
        assert (await client.ask(get(origin, path=b"/spoilt"))).startswith(b"HTTP/1.1 500 ")
        assert proxy.pool.busy(Authority.of("127.0.0.1", origin.port)) == 0
        assert (await client.ask(get(origin))).endswith(b"ok")
    client.writer.close()
    proxy.pool.close()
    await proxy.pool.wait_closed()


async def test_a_failing_backend_is_left_for_another_one(run: Run, connector: Connect) -> None:
    rude = scripted(run, b"nonsense\r\n\r\n")
    good = Origin(0, [OK], [b"\r\n\r\n"], False)
    good.port = run(good.serve).port
    backends = [Authority.of("127.0.0.1", origin.port) for origin in (rude, good)]
    pool = BackendPool(backends, connector, passive=PassiveHealth(failures=99))
    server = run(HttpServer(pool))
    client = Client(*await server.open())
    for _ in range(20):
        assert (await client.ask(b"GET /x HTTP/1.1\r\nHost: a.test\r\n\r\n")).endswith(b"ok")
    client.writer.close()
    await pool.stop()


@dataclass(frozen=True)
class Reply:
    """What an origin answers, in segments; HEAD gets no body. It ``closes`` behind it, or instead."""

    head: bytes
    body: bytes
    cuts: tuple[float, ...]
    closes: bool

    def segments(self, request: bytes) -> list[bytes]:
        data = self.head if request.startswith(b"HEAD") else self.head + self.body
        at = [int(cut * len(data)) for cut in self.cuts]
        return [data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True) if start < end]


def scenario(chance: random.Random) -> tuple[list[Reply], list[bytes]]:
    """Return what an origin answers one after the other, and the methods that are asked."""
    replies: list[Reply] = []
    for _ in range(8):
        body = bytes(chance.randrange(256) for _ in range(chance.choice([0, 1, 5, 300, 5000])))
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:3], body[3:]) if part)
        head, content = chance.choice(
            [
                (HEAD + b"Content-Length: %d\r\n\r\n" % len(body), body),
                (HEAD + b"Content-Length: %d\r\n\r\n" % len(body), body),
                (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunks + b"0\r\n\r\n"),
                (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunks + b"0\r\nX-T: 1\r\n\r\n"),
                (HEAD.replace(b"200 OK", b"304 Not Modified") + b"ETag: x\r\n\r\n", b""),
                (HEAD.replace(b"200 OK", b"204 No Content") + b"\r\n", b""),
                (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + HEAD + b"Content-Length: 0\r\n\r\n", b""),
                (HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\n", b"ok"),
                (b"nonsense\r\n\r\n", b""),
                (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n", b"ok"),
                (b"", b""),
            ]
        )
        cuts = tuple(sorted(chance.random() for _ in range(chance.choice([0, 0, 1, 3]))))
        # Who closes behind an answer races with the next request: that is for other tests.
        replies.append(Reply(head, content, cuts, not head))
    return replies, [chance.choice([b"GET", b"GET", b"GET", b"HEAD"]) for _ in range(5)]


@pytest.mark.parametrize("seed", range(60))
async def test_whatever_upstreams_do_callbacks_and_coroutines_answer_alike(
    run: Run, connector: Connect, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    replies, methods = scenario(random.Random(seed))
    answers = []
    for quick in (True, False):
        script = iter([Reply(OK, b"", (), False), *replies])

        async def origin(stream: Stream, script: Any = script) -> None:
            while data := await stream.read():
                reply = next(script, Reply(HEAD + b"Content-Length: 2\r\n\r\n", b"ok", (), False))
                for segment in reply.segments(data):
                    await stream.write(segment)
                    await asyncio.sleep(0)
                if reply.closes:
                    return

        if not quick:
            monkeypatch.setattr("rama_ebpf.services.http.h1.server.quick_of", lambda _service: None)
        proxy = run(HttpProxy(connector, timeouts=HttpTimeouts(response=20.0)))
        target = Origin(run(origin).port, [], [], False)
        client = await Client.warm(proxy, target)
        got = []
        for method in methods:
            client.writer.write(get(target, method=method))
            try:
                head = await client.reader.readuntil(b"\r\n\r\n")
                while head.startswith(b"HTTP/1.1 103 "):
                    head = await client.reader.readuntil(b"\r\n\r\n")
                body = b""
                if method != b"HEAD" and head[9:12] not in (b"204", b"304"):
                    if b"Content-Length: " in head:
                        size = int(head.partition(b"Content-Length: ")[2].split(b"\r\n")[0])
                        body = await client.reader.readexactly(size)
                    else:
                        body = await chunked_body(client.reader)
            except (ConnectionResetError, asyncio.IncompleteReadError) as error:
                got.append((type(error), b""))
                break
            got.append((b"\r\n".join(line for line in head.split(b"\r\n") if not line.startswith(b"Date")), body))
        client.writer.close()
        answers.append(got)
        await proxy.idle()
        assert len(running) == 0
    assert answers[0] == answers[1]


async def chunked_body(reader: asyncio.StreamReader) -> bytes:
    """Return the content and the trailers."""
    content = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        content += (await reader.readexactly(size + 2))[:-2]
    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
        content += line
    return content


TOM = b"Proxy-Authorization: Basic " + base64.b64encode(b"tom:right")
WRONG = b"Proxy-Authorization: Basic " + base64.b64encode(b"tom:wrong")


async def test_a_user_who_was_proven_needs_no_coroutine_and_no_other_gets_past_it(
    run: Run, connector: Connect, counted: Counted, tmp_path: Path
) -> None:
    users = tmp_path / "users"
    users.write_text(f"tom:{hash_password('right', (14, 1))}\n")
    records: list[RequestRecord] = []
    proxy = HttpProxy(connector, layers=[ProxyAuthLayer(PasswordFile(users))])
    server = run(stack(AccessLogLayer(request_sink=records.append), proxy))
    origin = scripted(run)
    client = Client(*await server.open())
    for _ in range(4):
        assert (await client.ask(get(origin, TOM))).endswith(b"ok")
    assert counted.coroutines == 1
    assert b"Proxy-Authorization" not in origin.requests[-1]
    for refused in (
        get(origin, WRONG),
        get(origin),
        get(origin, TOM, TOM),
        get(origin, b"Proxy-Authorization: Basic !"),
    ):
        assert (await client.ask(refused)).startswith(b"HTTP/1.1 407 ")
    assert counted.coroutines == 5
    assert (await client.ask(get(origin, TOM))).endswith(b"ok")
    assert counted.coroutines == 5
    users.write_text(f"tom:{hash_password('another', (14, 1))}\n")
    assert (await client.ask(get(origin, TOM))).startswith(b"HTTP/1.1 407 ")
    await eventually(lambda: len(records) == 10)
    assert [(record.user, record.status) for record in records] == [
        *[("tom", 200)] * 4,
        *[("", 407)] * 4,
        ("tom", 200),
        ("", 407),
    ]
    client.writer.close()


async def test_what_stands_around_an_authenticator_is_never_passed_by(
    run: Run, connector: Connect, counted: Counted
) -> None:
    users = StaticUsers({"tom": "right"})

    class NotOnMondays(StaticUsers):
        async def __call__(self, credentials: Credentials, /) -> User:
            raise AuthFailed("not on Mondays")

    @functools.wraps(users)
    async def never(credentials: Credentials, /) -> User:
        raise AuthFailed("never")

    proxy = ForwardProxy(connector)
    origin = scripted(run)
    client = Client(*await run(HttpServer(stack(ProxyAuthLayer(users), proxy))).open())
    for _ in range(3):
        assert (await client.ask(get(origin, TOM))).endswith(b"ok")
    assert counted.coroutines == 1
    client.writer.close()
    for authenticate in (NotOnMondays({"tom": "right"}), never):
        client = Client(*await run(HttpServer(stack(ProxyAuthLayer(authenticate), proxy))).open())
        for _ in range(3):
            assert (await client.ask(get(origin, TOM))).startswith(b"HTTP/1.1 407 ")
        client.writer.close()
    assert len(origin.requests) == 3
