from __future__ import annotations

import asyncio

import pytest

from rama_ebpf.core import stack
from rama_ebpf.layers.rate import RateExceeded, RateLimitLayer, _LocalBuckets
from rama_ebpf.layers.source import by_source

from .conftest import Serve, echo


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_burst_passes_then_the_rate_holds(serve: Serve) -> None:
    clock = Clock()
    server = await serve(stack(RateLimitLayer(2, burst=3, clock=clock), echo))

    async def accepted() -> bool:
        client = await server.open()
        client.writer.close()
        outcome = await server.outcome()
        assert outcome == "served" or isinstance(outcome, RateExceeded)
        return bool(outcome == "served")

    assert [await accepted() for _ in range(4)] == [True, True, True, False]
    clock.now = 0.5
    assert [await accepted() for _ in range(2)] == [True, False]
    clock.now = 100.0
    assert [await accepted() for _ in range(4)] == [True, True, True, False]


async def test_refusal_says_when_to_come_back(serve: Serve) -> None:
    server = await serve(stack(RateLimitLayer(0.5, clock=Clock()), echo))
    await server.open()
    await server.open()
    error = await server.outcome()
    assert isinstance(error, RateExceeded)
    assert error.retry_after == pytest.approx(2.0)


async def test_each_source_has_its_own_rate(serve: Serve) -> None:
    server = await serve(stack(RateLimitLayer(1, key=by_source(), clock=Clock()), echo))
    for source in ("127.0.1.1", "127.0.1.2"):
        assert await (await server.open(source)).ask(b"in") == b"in"
    await server.open("127.0.1.1")
    assert isinstance(await server.outcome(), RateExceeded)


async def test_what_can_wait_waits_and_passes() -> None:
    async def done(input: None) -> str:
        return "done"

    service = RateLimitLayer(100, wait=1.0)(done)
    assert await asyncio.gather(*(service(None) for _ in range(5))) == ["done"] * 5


async def test_remembered_sources_are_bounded(serve: Serve) -> None:
    layer = RateLimitLayer(1, key=by_source(), max_keys=2, clock=Clock())
    server = await serve(stack(layer, echo))
    for last in (1, 2, 3):
        await (await server.open(f"127.0.1.{last}")).ask(b"in")
    assert isinstance(layer._buckets, _LocalBuckets)
    assert len(layer._buckets) == 2


def test_bad_numbers_are_refused_when_the_layer_is_made() -> None:
    with pytest.raises(ValueError, match="rate must be above 0"):
        RateLimitLayer(0)
    with pytest.raises(ValueError, match="burst must be above 0"):
        RateLimitLayer(1, burst=0)
