from __future__ import annotations

import asyncio

import pytest

from rama_ebpf.core import Stream, stack
from rama_ebpf.layers.throttle import Bandwidth, ThrottleLayer

from .conftest import Client, Serve, echo
from .tunnel import tunnel_to

KB = 1024


async def send_and_receive(client: Client, data: bytes) -> float:
    """Send ``data``, receive as much, and return how long that took."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    client.writer.write(data)
    assert await client.reader.readexactly(len(data)) == data
    return loop.time() - started


async def test_a_live_tunnel_is_held_to_its_rate_byte_for_byte(serve: Serve, echo_target: int) -> None:
    # 64 KiB pass at once, the other 128 KiB at 256 KiB/s: no load can make this faster than half a second.
    layer = ThrottleLayer(up=Bandwidth(256 * KB, 64 * KB))
    server = await serve(stack(layer, tunnel_to(echo_target)))
    data = bytes(range(256)) * (192 * KB // 256)
    assert await send_and_receive(await server.open(), data) >= 0.45


async def test_what_is_written_to_the_client_is_held_to_its_rate(serve: Serve, echo_target: int) -> None:
    layer = ThrottleLayer(down=Bandwidth(256 * KB, 64 * KB))
    server = await serve(stack(layer, tunnel_to(echo_target)))
    assert await send_and_receive(await server.open(), bytes(192 * KB)) >= 0.45


async def test_a_shared_budget_bounds_the_sum(serve: Serve) -> None:
    server = await serve(stack(ThrottleLayer(up=Bandwidth(256 * KB, 64 * KB)), echo))
    clients = [await server.open() for _ in range(4)]
    loop = asyncio.get_running_loop()
    started = loop.time()
    await asyncio.gather(*(send_and_receive(client, bytes(48 * KB)) for client in clients))
    assert loop.time() - started >= 0.45


async def test_a_plain_number_is_a_budget_for_each_connection(serve: Serve) -> None:
    # 64 KiB is the burst of each connection: four of them pass it at once at a rate that would need an hour.
    server = await serve(stack(ThrottleLayer(up=18, down=None), echo))
    clients = [await server.open() for _ in range(4)]
    await asyncio.gather(*(send_and_receive(client, bytes(15 * KB)) for client in clients))


async def test_what_was_read_ahead_outside_passes_through(serve: Serve) -> None:
    async def peek_first(stream: Stream) -> str:
        assert (await stream.peek(5))[:5] == b"hello"
        return str(await stack(ThrottleLayer(up=1e6), echo)(stream))

    server = await serve(peek_first)
    assert await (await server.open()).ask(b"hello world") == b"hello world"
    assert server.streams[0].bytes_received == 11


def test_bad_rate_is_refused_when_the_layer_is_made() -> None:
    with pytest.raises(ValueError, match="rate must be above 0"):
        ThrottleLayer(up=-1)
