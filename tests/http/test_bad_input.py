"""Peers that are slow, endless, or gone: the right status or close, bounded memory, no descriptor left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import AsyncIterator

import pytest

from rama_ebpf.core import Stream
from rama_ebpf.services.http import (
    Body,
    Headers,
    HttpError,
    HttpLimits,
    HttpProxy,
    HttpServer,
    HttpTimeouts,
    Request,
    Response,
)

from .conftest import DATE, OK, Connect, Run, RunOrigin, abort, descriptors, eventually, read_until_reset

CHUNKED = b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n"


async def swallow(request: Request) -> Response:
    """Read the whole body and tell its size."""
    size = 0
    async for chunk in request.body:
        size += len(chunk)
    return Response.text(200, str(size))


def status_of(answer: bytes) -> bytes:
    return answer.split(b" ", 2)[1]


@pytest.mark.parametrize("sent", [b"G", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: a.test\r\nX: 1\r\n"])
async def test_slow_header_section_gets_408(run: Run, sent: bytes) -> None:
    server = run(HttpServer(swallow, timeouts=HttpTimeouts(head=0.1)))
    answer = await server.exchange(sent)
    assert status_of(answer) == b"408"
    assert b"\r\nConnection: close\r\n" in answer


async def test_header_section_that_trickles_gets_408_however_lively(run: Run) -> None:
    server = run(HttpServer(swallow, timeouts=HttpTimeouts(head=0.3)))
    reader, writer = await server.open()
    writer.write(b"GET / HTTP/1.1\r\n")

    async def trickle() -> None:
        for number in range(1000):
            writer.write(b"X-%d: 1\r\n" % number)
            await asyncio.sleep(0.02)

    trickling = asyncio.create_task(trickle())
    assert status_of(await reader.read()) == b"408"
    trickling.cancel()
    writer.close()


async def test_idle_connection_is_closed_without_a_word(run: Run) -> None:
    server = run(HttpServer(swallow, timeouts=HttpTimeouts(idle=0.1)))
    assert await server.exchange() == b""
    reader, writer = await server.open()
    writer.write(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
    assert (await reader.read()).endswith(b"\r\n\r\n0")
    writer.close()


async def test_body_that_stops_gets_408(run: Run) -> None:
    server = run(HttpServer(swallow, timeouts=HttpTimeouts(body=0.1)))
    assert status_of(await server.exchange(CHUNKED + b"5\r\nhel")) == b"408"
    by_length = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\n\r\nhel"
    assert status_of(await server.exchange(by_length)) == b"408"


async def test_body_that_trickles_below_the_rate_gets_408(run: Run) -> None:
    server = run(HttpServer(swallow, timeouts=HttpTimeouts(body=5.0, body_grace=0.2, body_rate=1000)))
    reader, writer = await server.open()
    writer.write(CHUNKED)

    async def trickle() -> None:
        while True:
            writer.write(b"1\r\nx\r\n")
            await asyncio.sleep(0.02)

    trickling = asyncio.create_task(trickle())
    assert status_of(await reader.read()) == b"408"
    trickling.cancel()
    writer.close()


async def test_slow_service_is_not_held_against_the_sender_of_a_body(run: Run) -> None:
    async def slow(request: Request) -> Response:
        await asyncio.sleep(0.5)
        return await swallow(request)

    server = run(HttpServer(slow, timeouts=HttpTimeouts(body=5.0, body_grace=0.2, body_rate=1e6)))
    answer = await server.exchange(CHUNKED + b"1\r\nx\r\n0\r\n\r\n", eof=True)
    assert answer.endswith(b"\r\n\r\n1")


def resident() -> int:
    """Bytes of memory that this process has in use."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("what", ["header section", "chunk extension", "trailer section"])
async def test_what_stalls_unfinished_holds_no_more_than_its_limit(run: Run, what: str) -> None:
    limits = HttpLimits(chunk_line=64 * 1024, trailers=64 * 1024)
    server = run(HttpServer(swallow, limits=limits))
    begun = {
        "header section": b"GET / HTTP/1.1\r\nHost: a.test\r\nX: ",
        "chunk extension": CHUNKED + b"5;a=",
        "trailer section": CHUNKED + b"0\r\nX: ",
    }[what]
    before = resident()
    clients = [await server.open() for _ in range(100)]
    for _, writer in clients:
        writer.write(begun + b"a" * 60_000)
        await writer.drain()
    await eventually(lambda: server.tcp.live == 100)
    await asyncio.sleep(0.2)  # the server has taken what it takes: no event tells of that
    assert resident() - before < 100 * 256 * 1024
    for reader, writer in clients:
        writer.write(b"a" * 10_000)
        assert status_of(await reader.read()) == (b"400" if what == "chunk extension" else b"431")
        writer.close()
    await server.idle()


async def test_endless_chunks_get_413_at_the_limit(run: Run) -> None:
    server = run(HttpServer(swallow, limits=HttpLimits(body=1_000_000)))
    reader, writer = await server.open()
    writer.write(CHUNKED)
    sent = 0
    chunk = b"1000\r\n" + bytes(4096) + b"\r\n"
    reading = asyncio.create_task(reader.read())
    while not reading.done() and sent < 20_000_000:
        writer.write(chunk)
        sent += 4096
        await asyncio.wait({reading}, timeout=0)
        await writer.drain()
    assert status_of(await reading) == b"413"
    writer.close()


async def test_body_announced_above_the_limit_gets_413_at_once(run: Run) -> None:
    server = run(HttpServer(swallow, limits=HttpLimits(body=1000)))
    head = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1001\r\nExpect: 100-continue\r\n\r\n"
    answer = await server.exchange(head)
    assert status_of(answer) == b"413"
    assert b"100 Continue" not in answer


async def test_body_above_what_the_service_reads_gets_413(run: Run) -> None:
    async def small(request: Request) -> Response:
        return Response.text(200, str(len(await request.body.read(10))))

    server = run(HttpServer(small))
    assert status_of(await server.exchange(CHUNKED + b"b\r\nhello world\r\n0\r\n\r\n")) == b"413"


async def test_service_that_fails_is_500_and_the_connection_lives_on(run: Run) -> None:
    async def fails(request: Request) -> Response:
        if request.path == "/bug":
            raise KeyError("a bug")
        raise HttpError(429, "slow down", headers=[("Retry-After", "7")])

    server = run(HttpServer(fails))
    answer = await server.exchange(
        b"GET /bug HTTP/1.1\r\nHost: a.test\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
    assert b"KeyError" not in answer
    assert b"HTTP/1.1 429 Too Many Requests\r\nContent-Type: text/plain; charset=utf-8\r\nRetry-After: 7\r\n" in answer


async def test_response_above_its_declared_length_is_cut_and_reset(run: Run) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"hello"
        yield b" world"

    async def lies(request: Request) -> Response:
        return Response(200, Headers(), Body.stream(chunks(), length=5))

    server = run(HttpServer(lies))
    reader, writer = await server.open()
    writer.write(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
    assert (await read_until_reset(reader)).endswith(b"hello")
    writer.close()


async def test_unread_body_is_dropped_if_short_and_ends_the_connection_if_long(run: Run) -> None:
    async def ignores(request: Request) -> Response:
        return Response.text(200, "ok")

    server = run(HttpServer(ignores))
    short = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\n\r\nhello"
    long = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 500000\r\n\r\n" + bytes(500_000)
    answer = await server.exchange(short + short + long + short)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.count(b"Connection: close") == 1


async def test_client_that_pipelines_does_not_keep_others_waiting(run: Run) -> None:
    order: list[str] = []

    async def app(request: Request) -> Response:
        order.append(request.path)
        return Response.text(200, "ok")

    server = run(HttpServer(app))
    with (
        socket.create_connection(("127.0.0.1", server.port)) as greedy,
        socket.create_connection(("127.0.0.1", server.port)) as modest,
    ):
        greedy.sendall(b"GET /greedy HTTP/1.1\r\nHost: a.test\r\n\r\n" * 200)
        modest.sendall(b"GET /modest HTTP/1.1\r\nHost: a.test\r\n\r\n")
        await eventually(lambda: "/modest" in order)
    assert order.index("/modest") < 100


async def test_fast_sender_is_held_back_by_a_stalled_upstream(run: Run, connector: Connect) -> None:
    stalled = asyncio.Event()

    async def never_reads(stream: Stream) -> None:
        await stalled.wait()

    proxy = run(HttpProxy(connector))
    origin = run(never_reads)
    reader, writer = await proxy.open()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    writer.write(
        b"POST http://%s/ HTTP/1.1\r\nHost: a\r\nContent-Length: 4000000000\r\n\r\n" % origin.authority.encode()
    )
    chunk = bytes(1024 * 1024)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while True:
            writer.write(chunk)
            async with asyncio.timeout(1.0):
                await writer.drain()
            sent += len(chunk)
    # The kernel's socket buffers on both sides, and no more than a few reads of ours.
    assert sent < 64 * 1024 * 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    stalled.set()
    writer.transport.abort()
    del reader


async def test_fast_origin_is_held_back_by_a_stalled_client(run: Run, connector: Connect) -> None:
    sent = 0

    async def floods(stream: Stream) -> None:
        nonlocal sent
        await stream.read()
        await stream.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4000000000\r\n\r\n")
        while True:
            await stream.write(bytes(8192))
            sent += 8192

    proxy = run(HttpProxy(connector))
    origin = run(floods).authority.encode()
    _, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1024)
    writer.write(b"GET http://" + origin + b"/ HTTP/1.1\r\nHost: " + origin + b"\r\n\r\n")
    before = -1
    while sent != before or sent == 0:
        before = sent
        await asyncio.sleep(0.5)  # until nothing moves any more
    assert sent < 64 * 1024 * 1024
    writer.transport.abort()
    await eventually(lambda: proxy.tcp.live == 0)


STAGES = {
    "before a byte": b"",
    "in the request line": b"GET http://ORI",
    "in the header section": b"GET http://ORIGIN/ HTTP/1.1\r\nHost: OR",
    "behind the header section": b"GET http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\n\r\n",
    "before the body": b"POST http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nContent-Length: 5\r\n\r\n",
    "in the body": b"POST http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nContent-Length: 5\r\n\r\nhel",
    "in a chunk": b"POST http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
    "while 100 is awaited": (
        b"POST http://ORIGIN/ HTTP/1.1\r\nHost: ORIGIN\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    ),
    "behind CONNECT": b"CONNECT ORIGIN HTTP/1.1\r\nHost: ORIGIN\r\n\r\n",
    "in the tunnel": b"CONNECT ORIGIN HTTP/1.1\r\nHost: ORIGIN\r\n\r\nhello",
}

ORIGINS = {
    "never answers": b"",
    "stops in the header section": b"HTTP/1.1 200 OK\r\nConte",
    "stops in the body": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhel",
    "streams": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + (b"1000\r\n" + bytes(4096) + b"\r\n") * 500,
}


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
@pytest.mark.parametrize("reply", ORIGINS)
@pytest.mark.parametrize("stage", STAGES)
async def test_client_that_leaves_at_any_stage_leaves_nothing_behind(
    run: Run, connector: Connect, stage: str, reply: str, reset: bool
) -> None:
    served = asyncio.Event()

    async def origin(stream: Stream) -> None:
        if await stream.read():
            await stream.write(ORIGINS[reply])
            served.set()
        while await stream.read():
            pass

    upstream = run(origin)
    # Who has closed in order may be one that still waits for a response: for it the origin's silence is what ends.
    ends = 60.0 if reset else 0.3
    timeouts = HttpTimeouts(linger=0.1, expect_continue=0.1, watch=0.05, response=ends, body=ends)
    proxy = run(HttpProxy(connector, timeouts=timeouts))
    before = descriptors()
    _, writer = await proxy.open()
    writer.write(STAGES[stage].replace(b"ORIGIN", upstream.authority.encode()))
    await writer.drain()
    await eventually(lambda: proxy.tcp.accepted == 1)
    await asyncio.sleep(0.05)  # so that the server has taken what was sent: no event tells of that
    if reset:
        abort(writer)
    else:
        writer.close()
    await eventually(lambda: proxy.tcp.live == 0 and upstream.tcp.live == 0)
    await eventually(lambda: descriptors() <= before)


async def test_origin_that_leaves_at_any_point_leaves_nothing_behind(run: Run, connector: Connect) -> None:
    whole = b"HTTP/1.1 200 OK\r\n" + DATE + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    proxy = run(HttpProxy(connector))
    for cut in range(len(whole)):

        async def leaves(stream: Stream, cut: int = cut) -> None:
            await stream.read()
            await stream.write(whole[:cut])

        origin = run(leaves).authority.encode()
        before = descriptors()
        reader, writer = await proxy.open()
        writer.write(b"GET http://" + origin + b"/ HTTP/1.1\r\nHost: " + origin + b"\r\nConnection: close\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            await reader.read()
        writer.close()
        await eventually(lambda before=before: descriptors() <= before)


async def test_many_broken_clients_at_once_leave_the_proxy_as_it_was(
    run: Run, connector: Connect, run_origin: RunOrigin
) -> None:
    service = HttpProxy(connector, timeouts=HttpTimeouts(linger=0.2, watch=0.1))
    proxy = run(service)
    origin = run_origin(OK)
    before = descriptors()

    async def one(number: int) -> None:
        _, writer = await proxy.open()
        stage = list(STAGES.values())[number % len(STAGES)]
        writer.write(stage.replace(b"ORIGIN", origin.host) + os.urandom(number))
        await asyncio.sleep(0)
        if number % 2:
            writer.transport.abort()
        else:
            writer.close()

    for _ in range(5):
        await asyncio.gather(*(one(number) for number in range(60)))
    await eventually(lambda: proxy.tcp.live == 0)
    good = b"GET http://" + origin.host + b"/ HTTP/1.1\r\nHost: " + origin.host + b"\r\nConnection: close\r\n\r\n"
    assert (await proxy.exchange(good)).endswith(b"ok")
    service.drain()
    await eventually(lambda: descriptors() <= before)
