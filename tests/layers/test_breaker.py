from __future__ import annotations

import asyncio

import pytest

from rama_ebpf.core import Authority, stack
from rama_ebpf.layers.breaker import CircuitBreakerLayer, CircuitOpen
from rama_ebpf.services.connect import ConnectError

BAD, GOOD = Authority.of("198.18.0.1", 80), Authority.of("198.18.0.2", 80)


class Network:
    """A connector to which some targets are down."""

    accepts = Authority

    def __init__(self) -> None:
        self.down = {BAD}
        self.calls = 0

    async def __call__(self, target: Authority, /) -> str:
        self.calls += 1
        await asyncio.sleep(0)
        if target in self.down:
            raise ConnectError(110, "timed out")
        return "connected"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def fail(service: object, times: int) -> None:
    for _ in range(times):
        with pytest.raises(ConnectError):
            await service(BAD)  # type: ignore[operator]


async def test_a_target_that_keeps_failing_is_left_alone_and_only_that_one() -> None:
    network, clock = Network(), Clock()
    service = stack(CircuitBreakerLayer(ConnectError, failures=3, pause=10, clock=clock), network)
    await fail(service, 3)
    with pytest.raises(CircuitOpen) as refused:
        await service(BAD)
    assert refused.value.retry_after == 10
    assert network.calls == 3
    assert await service(GOOD) == "connected"


async def test_after_the_pause_one_probe_decides() -> None:
    network, clock = Network(), Clock()
    service = stack(CircuitBreakerLayer(ConnectError, failures=2, pause=10, clock=clock), network)
    await fail(service, 2)
    clock.now = 10.0
    outcomes = await asyncio.gather(*(service(BAD) for _ in range(5)), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["CircuitOpen"] * 4 + ["ConnectError"]
    assert network.calls == 3
    clock.now = 19.9
    with pytest.raises(CircuitOpen):
        await service(BAD)
    clock.now = 20.0
    network.down.clear()
    assert await service(BAD) == "connected"
    assert await service(BAD) == "connected"


async def test_a_success_in_between_starts_the_count_anew() -> None:
    network = Network()
    service = stack(CircuitBreakerLayer(ConnectError, failures=2), network)
    for _ in range(5):
        await fail(service, 1)
        network.down.clear()
        assert await service(BAD) == "connected"
        network.down.add(BAD)


async def test_a_cancelled_probe_gives_the_next_one_its_chance() -> None:
    network, clock = Network(), Clock()
    service = stack(CircuitBreakerLayer(ConnectError, failures=1, pause=1, clock=clock), network)
    await fail(service, 1)
    clock.now = 1.0
    probe = asyncio.create_task(service(BAD))
    await asyncio.sleep(0)
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)
    network.down.clear()
    assert await service(BAD) == "connected"


async def test_remembered_circuits_are_bounded() -> None:
    network = Network()
    network.down = {Authority.of("198.18.0.1", port) for port in range(100)}
    layer = CircuitBreakerLayer(ConnectError, max_keys=10)
    service = stack(layer, network)
    for target in network.down:
        with pytest.raises(ConnectError):
            await service(target)
    assert len(layer._circuits) == 10
