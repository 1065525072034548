"""Behind a time-out for handshakes: who is too slow is told in its protocol's words, and reserve connections live."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rama_ebpf.core import Lifecycle, RamaError, Stage, Stream, stack
from rama_ebpf.core.blame import judge
from rama_ebpf.layers import TimeoutLayer, timeout
from rama_ebpf.services.http import ForwardProxy, HttpServer, Request, Response

from .conftest import Run, eventually
from .h2_client import h2_client


async def app(_request: Request) -> Response:
    return Response.text(200, "ok")


async def connect(_target: object) -> Stream:
    raise AssertionError


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> TimeoutLayer:
    """A minute for the handshake, which a protocol had better end after 0.2 s."""
    monkeypatch.setattr(timeout, "_SAY_SECONDS", 59.8)
    monkeypatch.setattr(timeout, "_SAY_PART", 1.0)
    return TimeoutLayer(handshake=60)


class Ends:
    """A layer that notes the errors that pass."""

    def __init__(self) -> None:
        self.errors: list[RamaError] = []

    def __call__(self, inner: Any) -> Any:
        async def serve(stream: Stream) -> None:
            try:
                await inner(stream)
            except RamaError as error:
                self.errors.append(error)
                raise

        return serve


@pytest.mark.parametrize("service", [app, ForwardProxy(connect)], ids=["in a coroutine", "in callbacks"])
async def test_slow_head_is_answered_and_silence_ends_in_order_before_the_connection_is_cut(
    run: Run, soon: TimeoutLayer, service: Any
) -> None:
    ends = Ends()
    server = run(stack(soon, ends, HttpServer(service)))
    answer = await server.exchange(b"GET http://a.test/ HTTP/1.1\r\nHo")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert await server.exchange() == b""  # a reset would raise
    await eventually(lambda: len(ends.errors) == 2)
    assert [error.kind for error in ends.errors] == ["http_refused", "handshake_timeout"]
    assert not any(row.strikes for error in ends.errors if (row := judge(error)) is not None)


async def test_http2_connection_in_reserve_is_established_before_any_request(run: Run) -> None:
    established = asyncio.Event()

    def note(stage: Stage) -> None:
        if stage is Stage.ESTABLISHED:
            established.set()

    def watching(inner: Any) -> Any:
        async def serve(stream: Stream) -> None:
            Lifecycle.of(stream.extensions).watch(note)
            await inner(stream)

        return serve

    server = run(stack(TimeoutLayer(handshake=60), watching, HttpServer(app, h2c=True)))
    async with h2_client(server.port) as client:
        await client.flush()
        await established.wait()  # no time-out of the handshake runs any more
        assert (await client.response(client.request()))[0][":status"] == "200"


async def test_http2_client_that_does_not_finish_its_handshake_is_told_and_ended_in_order(
    run: Run, soon: TimeoutLayer
) -> None:
    server = run(stack(soon, HttpServer(app, h2c=True)))
    answer = await server.exchange(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert b"\x00\x00\x08\x07\x00" in answer  # GOAWAY
