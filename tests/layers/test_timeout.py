from __future__ import annotations

import asyncio

import pytest

from rama_ebpf.core import HandshakeTimeout, IdleTimeout, Lifecycle, Stage, Stream, TotalTimeout, stack
from rama_ebpf.layers.access_log import AccessLogLayer, AccessRecord
from rama_ebpf.layers.timeout import TimeoutLayer
from rama_ebpf.relay import CloseReason, TunnelLimits, TunnelReport

from .conftest import Serve, echo
from .tunnel import tunnel_to


async def establish_and_echo(stream: Stream) -> str:
    Lifecycle.of(stream.extensions).reached(Stage.ESTABLISHED)
    return await echo(stream)


async def test_handshake_that_does_not_finish_is_cut(serve: Serve) -> None:
    server = await serve(stack(TimeoutLayer(0.1), echo))
    client = await server.open()
    assert await client.ask(b"bytes alone do not finish a handshake") != b""
    assert isinstance(await server.outcome(), HandshakeTimeout)
    assert await client.ended() == "reset"


async def test_established_connection_outlives_the_handshake_timeout(serve: Serve) -> None:
    server = await serve(stack(TimeoutLayer(0.1, idle=60), establish_and_echo))
    client = await server.open()
    await asyncio.sleep(0.3)  # longer than the handshake may last
    assert await client.ask(b"still there") == b"still there"


async def test_idle_connection_is_cut_and_a_busy_one_is_not(serve: Serve) -> None:
    server = await serve(stack(TimeoutLayer(None, idle=0.4), echo))
    busy, silent = await server.open(), await server.open()

    async def talk() -> None:
        while True:
            await busy.ask(b"x")
            await asyncio.sleep(0.01)

    talking = asyncio.create_task(talk())
    assert isinstance(await server.outcome(), IdleTimeout)
    assert await silent.ended() == "reset"
    assert not talking.done()
    talking.cancel()


@pytest.mark.parametrize("service", [echo, establish_and_echo])
async def test_total_bounds_every_stage(serve: Serve, service: object) -> None:
    server = await serve(stack(TimeoutLayer(60, idle=None, total=0.1), service))
    client = await server.open()
    assert isinstance(await server.outcome(), TotalTimeout)
    assert await client.ended() == "reset"


async def test_tunnel_past_its_handshake_is_still_under_the_idle_timeout(serve: Serve, echo_target: int) -> None:
    records: list[AccessRecord] = []
    layers = AccessLogLayer(records.append), TimeoutLayer(5, idle=0.2)
    server = await serve(stack(*layers, tunnel_to(echo_target)))
    client = await server.open()
    assert await client.ask(b"hello") == b"hello"
    report = await server.outcome()
    assert isinstance(report, TunnelReport)
    assert report.reason is CloseReason.IDLE_TIMEOUT
    assert await client.ended() == "reset"
    (record,) = records
    assert (record.reason, record.received, record.sent) == ("idle_timeout", 5, 5)
    assert record.age >= 0.2


async def test_tunnel_past_its_handshake_is_still_under_what_is_left_of_the_total(
    serve: Serve, echo_target: int
) -> None:
    tunnel = tunnel_to(echo_target)

    async def slow_handshake(stream: Stream) -> TunnelReport:
        await asyncio.sleep(0.2)  # part of what the total allows
        return await tunnel(stream)

    server = await serve(stack(TimeoutLayer(5, idle=None, total=0.4), slow_handshake))
    client = await server.open()
    assert await client.ask(b"hello") == b"hello"
    report = await server.outcome()
    assert report.reason is CloseReason.TOTAL_TIMEOUT
    limits = server.streams[0].extensions.require(TunnelLimits)
    assert limits.total is not None
    assert limits.total <= 0.2


async def test_tighter_limits_from_inside_are_kept(serve: Serve, echo_target: int) -> None:
    tunnel = tunnel_to(echo_target)

    async def limited(stream: Stream) -> TunnelReport:
        stream.extensions.add(TunnelLimits(idle=0.1, total=60))
        return await tunnel(stream)

    server = await serve(stack(TimeoutLayer(5, idle=60, total=None), limited))
    await server.open()
    assert (await server.outcome()).reason is CloseReason.IDLE_TIMEOUT


async def test_a_timeout_of_the_service_itself_passes_unchanged(serve: Serve) -> None:
    async def gives_up(stream: Stream) -> None:
        raise TimeoutError("the upstream's own")

    server = await serve(stack(TimeoutLayer(5), gives_up))
    await server.open()
    error = await server.outcome()
    assert type(error) is TimeoutError


@pytest.mark.parametrize("bad", [0, -1, float("nan")])
def test_time_out_that_is_not_above_zero_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="handshake must be above 0"):
        TimeoutLayer(bad)
