"""Exchanges that are slow and healthy are not cut: events, pauses, long polls, and clients that have half-closed."""

from __future__ import annotations

import asyncio

import pytest

from rama_ebpf.core.address import Authority
from rama_ebpf.core.service import Service
from rama_ebpf.core.stream import Stream
from rama_ebpf.services.http import BackendPool, HttpProxy, HttpServer, HttpTimeouts

from .conftest import Connect, Run, Server, abort

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nDate: x\r\n\r\n"
QUICK = HttpTimeouts(watch=0.01, body_grace=0.01, body_rate=1e6)
"""A rate that nobody here keeps: it is for clients whose body is waited for."""


@pytest.fixture(params=["forward", "reverse", "reverse over h2"])
def through(request: pytest.FixtureRequest, run: Run, connector: Connect) -> object:
    """Return a proxy to a service, and what a request for it begins with."""

    def make(service: Service[Stream, object], timeouts: HttpTimeouts = QUICK) -> tuple[Server, bytes]:
        origin = run(service)
        if request.param == "forward":
            return run(HttpProxy(connector, timeouts=timeouts)), b"GET http://%b/ HTTP/1.1\r\nHost: a.test\r\n" % (
                origin.authority.encode()
            )
        pool = BackendPool([Authority.of("127.0.0.1", origin.port)], connector, timeouts=timeouts)
        if request.param == "reverse over h2":
            inner = run(HttpServer(pool, h2c=True, timeouts=timeouts))
            target = Authority.of("127.0.0.1", inner.port)
            pool = BackendPool([target], connector, h2_prior_knowledge=True, timeouts=timeouts)
        return run(HttpServer(pool, timeouts=timeouts)), b"GET / HTTP/1.1\r\nHost: a.test\r\n"

    return make


async def test_upstream_owes_no_rate(through) -> None:  # type: ignore[no-untyped-def]  # a fixture that makes
    async def trickles(stream: Stream) -> None:
        await stream.read()
        await stream.write(HEAD)
        for letter in b"hello":
            await asyncio.sleep(0.05)
            await stream.write(bytes([letter]))

    proxy, begin = through(trickles)
    assert (await proxy.exchange(begin + b"Connection: close\r\n\r\n")).endswith(b"hello")


async def test_client_that_half_closes_gets_its_late_answer(through) -> None:  # type: ignore[no-untyped-def]
    half_closed = asyncio.Event()

    async def late(stream: Stream) -> None:
        await stream.read()
        await half_closed.wait()
        await asyncio.sleep(0.2)  # far longer than the watch waits before it looks
        await stream.write(HEAD + b"hello")

    proxy, begin = through(late)
    reader, writer = await proxy.open()
    writer.write(begin + b"\r\n")
    writer.write_eof()
    half_closed.set()
    assert (await reader.read()).endswith(b"hello")
    writer.close()


async def test_half_closed_client_that_goes_altogether_ends_its_request(run: Run, connector: Connect) -> None:
    upstream_closed = asyncio.Event()

    async def silent(stream: Stream) -> None:
        try:
            while await stream.read():
                pass
        finally:
            upstream_closed.set()

    origin = run(silent)
    proxy = run(HttpProxy(connector, timeouts=QUICK))
    _, writer = await proxy.open()
    writer.write(b"GET http://%b/ HTTP/1.1\r\nHost: a.test\r\n\r\n" % origin.authority.encode())
    writer.write_eof()
    await asyncio.sleep(0.1)  # the watch has seen the FIN by now
    abort(writer)
    await upstream_closed.wait()
