"""Large bodies go from socket to socket within the kernel, and nothing about them changes for that."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from rama_ebpf.core import Stream
from rama_ebpf.services.http import HttpProxy, HttpServer, Request, Response
from rama_ebpf.services.http.h1 import bulk
from rama_ebpf.services.http.layers import HookLayer

from .conftest import OK, Connect, Origin, Run, RunOrigin, Server, descriptors, eventually, read_until_reset

BIG = os.urandom(1 << 16) * 64
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BIG)


@dataclass
class Spliced:
    """How many bytes this process has moved by splice(2) into pipes, and out of them."""

    count: int = 0


@pytest.fixture
def spliced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spliced]:
    seen = Spliced()
    real = os.splice

    def counting(*args: int, **options: int) -> int:
        moved = real(*args, **options)
        seen.count += moved
        return moved

    monkeypatch.setattr(os, "splice", counting)
    monkeypatch.setattr(bulk, "_FAST", 1)  # however small the pieces are that this kernel's buffers let through
    monkeypatch.setattr(bulk, "_WORTH", 1)  # up to the last byte
    return seen


def get(origin: Origin | Server, *fields: bytes) -> bytes:
    authority = origin.authority.encode()
    return b"\r\n".join([b"GET http://" + authority + b"/ HTTP/1.1", b"Host: " + authority, *fields, b"", b""])


async def test_download_is_moved_and_the_connections_go_on(
    run: Run, connector: Connect, run_origin: RunOrigin, spliced: Spliced
) -> None:
    origin = run_origin(HEAD + BIG, OK)
    proxy = run(HttpProxy(connector))
    before = descriptors()
    reader, writer = await proxy.open()
    writer.write(get(origin))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
    assert await reader.readexactly(len(BIG)) == BIG
    assert spliced.count
    writer.write(get(origin))
    assert (await reader.readuntil(b"\r\n\r\nok")).startswith(b"HTTP/1.1 200 OK\r\n")
    assert (proxy.tcp.accepted, origin.connections) == (1, 1)
    writer.close()
    await proxy.idle()
    assert descriptors() <= before + 2 + 2  # the kept connection of both its ends, one pipe


async def test_upload_is_moved_and_the_connections_go_on(run: Run, connector: Connect, spliced: Spliced) -> None:
    received: list[bytes] = []
    connections = 0

    async def origin(stream: Stream) -> None:
        nonlocal connections
        connections += 1
        while head := await stream.read():
            while b"\r\n\r\n" not in head:
                head += await stream.read()
            head, _, body = head.partition(b"\r\n\r\n")
            got = bytearray(body)
            while b"Content-Length" in head and len(got) < len(BIG):
                got += await stream.read()
            received.append(bytes(got))
            await stream.write(OK)

    server = run(origin)
    proxy = run(HttpProxy(connector))
    reader, writer = await proxy.open()
    authority = server.authority.encode()
    writer.write(
        b"POST http://%s/ HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n" % (authority, authority, len(BIG))
    )
    writer.write(BIG)
    await reader.readuntil(b"\r\n\r\nok")
    assert received == [BIG]
    assert spliced.count
    writer.write(get(server))
    await reader.readuntil(b"\r\n\r\nok")
    assert received == [BIG, b""]
    assert (proxy.tcp.accepted, connections) == (1, 1)
    writer.close()


async def test_bytes_behind_a_moved_body_are_no_response(
    run: Run, connector: Connect, run_origin: RunOrigin, spliced: Spliced
) -> None:
    origin = run_origin(HEAD + BIG + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", OK)
    proxy = run(HttpProxy(connector))
    reader, writer = await proxy.open()
    writer.write(get(origin))
    await reader.readuntil(b"\r\n\r\n")
    assert await reader.readexactly(len(BIG)) == BIG
    assert spliced.count
    writer.write(get(origin, b"Connection: close"))
    assert (await reader.read()).endswith(b"\r\n\r\nok")
    assert origin.connections == 2
    writer.close()


async def test_requests_behind_a_moved_body_are_served(run: Run, connector: Connect, spliced: Spliced) -> None:
    async def size(request: Request) -> Response:
        return Response.text(200, str(len(await request.body.read(len(BIG)))))

    server = run(HttpServer(size))
    proxy = run(HttpProxy(connector))
    authority = server.authority.encode()
    post = b"POST http://%s/ HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n" % (authority, authority, len(BIG))
    answer = await proxy.exchange(post + BIG + post + BIG + get(server, b"Connection: close"))
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.count(b"\r\n\r\n%d" % len(BIG)) == 2
    assert spliced.count


async def test_moved_body_that_breaks_off_is_reset(
    run: Run, connector: Connect, run_origin: RunOrigin, spliced: Spliced
) -> None:
    origin = run_origin(HEAD + BIG[:-1000], close=True)
    proxy = run(HttpProxy(connector))
    reader, writer = await proxy.open()
    writer.write(get(origin))
    answer = await read_until_reset(reader)
    assert len(answer.partition(b"\r\n\r\n")[2]) < len(BIG)
    assert spliced.count
    writer.close()


async def test_upload_that_breaks_off_never_looks_complete(run: Run, connector: Connect, spliced: Spliced) -> None:
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def origin(stream: Stream) -> None:
        try:
            while await stream.read():
                pass
            ended.set_result("in order")
        except ConnectionResetError:
            ended.set_result("reset")

    server = run(origin)
    proxy = run(HttpProxy(connector))
    _, writer = await proxy.open()
    authority = server.authority.encode()
    writer.write(
        b"POST http://%s/ HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n" % (authority, authority, len(BIG))
    )
    writer.write(BIG[:-1000])
    writer.close()
    assert await ended == "reset"
    assert spliced.count


async def test_client_that_leaves_a_moved_body_leaves_nothing_behind(
    run: Run, connector: Connect, run_origin: RunOrigin, spliced: Spliced
) -> None:
    origin = run_origin(HEAD.replace(b"%d" % len(BIG), b"%d" % (1 << 40)) + BIG)
    proxy = run(HttpProxy(connector))
    before = descriptors()
    for _ in range(3):
        reader, writer = await proxy.open()
        writer.write(get(origin))
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(len(BIG) // 2)
        writer.transport.abort()
        await proxy.idle()
    assert spliced.count
    await eventually(lambda: descriptors() <= before + 2)  # a pipe is kept


async def test_stalled_client_holds_a_moved_body_back(run: Run, connector: Connect, spliced: Spliced) -> None:
    sent = 0

    async def endless(stream: Stream) -> None:
        nonlocal sent
        await stream.read()
        await stream.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4000000000\r\n\r\n")
        while True:
            await stream.write(BIG[:8192])
            sent += 8192

    proxy = run(HttpProxy(connector))
    origin = run(endless)
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1024)
    writer.write(get(origin))
    before = -1
    while sent != before or not spliced.count:
        before = sent
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                if not spliced.count:
                    await reader.read(1 << 20)
                await asyncio.sleep(0.4)  # until nothing moves any more
    assert sent < 64 * 1024 * 1024
    writer.transport.abort()
    await proxy.idle()


async def test_a_layer_that_looks_at_bodies_sees_every_byte(
    run: Run, connector: Connect, run_origin: RunOrigin, spliced: Spliced
) -> None:
    seen = bytearray()

    def look(chunk: bytes) -> bytes:
        seen.extend(chunk)
        return chunk

    origin = run_origin(HEAD + BIG)
    proxy = run(HttpProxy(connector, layers=[HookLayer(response_body=lambda request, response: look)]))
    answer = await proxy.exchange(get(origin, b"Connection: close"))
    assert BIG[-1000:] in answer
    assert bytes(seen) == BIG
    assert spliced.count == 0


async def test_chunked_bodies_are_not_moved(
    run: Run, connector: Connect, run_origin: RunOrigin, spliced: Spliced
) -> None:
    origin = run_origin(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(BIG) + BIG + b"\r\n0\r\n\r\n"
    )
    proxy = run(HttpProxy(connector))
    answer = await proxy.exchange(get(origin, b"Connection: close"))
    assert answer.endswith(b"\r\n0\r\n\r\n")
    assert len(answer) > len(BIG)
    assert spliced.count == 0
