from __future__ import annotations

import asyncio

import pytest

from rama_ebpf.core import Stream, stack
from rama_ebpf.layers.concurrency import ConcurrencyExceeded, ConcurrencyLimitLayer
from rama_ebpf.layers.source import by_source
from rama_ebpf.relay import CloseReason

from .conftest import Serve, echo
from .tunnel import tunnel_to


async def test_what_is_above_the_limit_is_refused_at_once(serve: Serve) -> None:
    server = await serve(stack(ConcurrencyLimitLayer(2), echo))
    for _ in range(2):
        assert await (await server.open()).ask(b"in") == b"in"
    third = await server.open()
    assert isinstance(await server.outcome(), ConcurrencyExceeded)
    assert await third.ended() == "reset"


async def test_a_tunnel_holds_its_place_for_as_long_as_it_lives(serve: Serve, echo_target: int) -> None:
    layer = ConcurrencyLimitLayer(1)
    server = await serve(stack(layer, tunnel_to(echo_target)))
    first = await server.open()
    assert await first.ask(b"tunnel") == b"tunnel"
    await server.open()
    assert isinstance(await server.outcome(), ConcurrencyExceeded)
    first.writer.close()
    assert (await server.outcome()).reason is CloseReason.EOF
    assert layer.live == 0
    assert await (await server.open()).ask(b"now") == b"now"


async def test_each_source_has_its_own_limit(serve: Serve) -> None:
    server = await serve(stack(ConcurrencyLimitLayer(1, key=by_source()), echo))
    for source in ("127.0.1.1", "127.0.1.2"):
        assert await (await server.open(source)).ask(b"in") == b"in"
    await server.open("127.0.1.1")
    assert isinstance(await server.outcome(), ConcurrencyExceeded)


async def test_sources_of_one_prefix_share_a_limit(serve: Serve) -> None:
    server = await serve(stack(ConcurrencyLimitLayer(1, key=by_source(v4=24)), echo))
    assert await (await server.open("127.0.1.1")).ask(b"in") == b"in"
    await server.open("127.0.1.2")
    assert isinstance(await server.outcome(), ConcurrencyExceeded)
    assert await (await server.open("127.0.2.1")).ask(b"in") == b"in"


async def test_waiting_clients_are_served_first_come_first_served(serve: Serve) -> None:
    order: list[bytes] = []

    async def note(stream: Stream) -> None:
        order.append(await stream.read())
        await stream.read()

    server = await serve(stack(ConcurrencyLimitLayer(1, wait=30, queue=2), note))
    clients = []
    for name in (b"a", b"b", b"c"):
        clients.append(await server.open())
        clients[-1].writer.write(name)
        await server.accepted(len(clients))
    await server.open()
    assert isinstance(await server.outcome(), ConcurrencyExceeded)  # the queue is bounded too
    for client in clients:
        client.writer.close()
        await server.outcome()
    assert order == [b"a", b"b", b"c"]


async def test_waiting_ends_after_its_time(serve: Serve) -> None:
    layer = ConcurrencyLimitLayer(1, wait=0.05)
    server = await serve(stack(layer, echo))
    first = await server.open()
    assert await first.ask(b"in") == b"in"
    await server.open()
    assert isinstance(await server.outcome(), ConcurrencyExceeded)
    first.writer.close()
    assert await server.outcome() == "served"
    assert layer.live == 0


async def test_cancelled_while_waiting_leaks_no_place() -> None:
    gate = asyncio.Event()

    async def wait(input: Stream) -> None:
        await gate.wait()

    layer = ConcurrencyLimitLayer(1, wait=30, queue=10)
    service = layer(wait)
    tasks = [asyncio.create_task(service(None)) for _ in range(4)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.sleep(0)
    gate.set()
    await asyncio.sleep(0)
    tasks[2].cancel()  # its place may have been handed over in this very turn of the loop
    await asyncio.gather(*tasks, return_exceptions=True)
    assert layer.live == 0
    await service(None)


def test_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ConcurrencyLimitLayer(0)
