from __future__ import annotations

import random

import pytest

from rama_ebpf.core import Authority, ProtocolError, StackError, Stream, stack
from rama_ebpf.layers.retry import RetryBudget, RetryLayer
from rama_ebpf.services.connect import ConnectError

TARGET = Authority.of("198.18.0.1", 80)


class Flaky:
    """A service for authorities that fails the first ``failures`` times."""

    accepts = Authority

    def __init__(self, failures: int, error: Exception | None = None) -> None:
        self.failures = failures
        self.calls = 0
        self.error = error or ConnectError(111, "refused")

    async def __call__(self, target: Authority, /) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return "connected"


async def test_what_fails_for_a_moment_is_tried_again() -> None:
    service = Flaky(2)
    assert await stack(RetryLayer(ConnectError, attempts=3, backoff=0.001), service)(TARGET) == "connected"


async def test_the_last_error_is_raised_after_so_many_attempts() -> None:
    service = Flaky(9)
    with pytest.raises(ConnectError):
        await stack(RetryLayer(ConnectError, attempts=3, backoff=0.001), service)(TARGET)
    assert service.calls == 3


async def test_other_errors_are_not_tried_again() -> None:
    service = Flaky(9, ProtocolError("nonsense"))
    with pytest.raises(ProtocolError):
        await stack(RetryLayer(ConnectError), service)(TARGET)
    assert service.calls == 1


async def test_what_is_not_retryable_is_not_tried_again() -> None:
    service = Flaky(9)
    layer = RetryLayer(ConnectError, retryable=lambda target, error: target.port != 80)
    with pytest.raises(ConnectError):
        await stack(layer, service)(TARGET)
    assert service.calls == 1


async def test_the_budget_keeps_retries_from_becoming_the_load() -> None:
    now = 0.0
    budget = RetryBudget(ratio=0.1, minimum=5, clock=lambda: now)
    service = Flaky(10**9)
    layered = stack(RetryLayer(ConnectError, attempts=10, backoff=1e-9, budget=budget), service)
    for _ in range(1000):
        with pytest.raises(ConnectError):
            await layered(TARGET)
    assert 1000 + 100 <= service.calls <= 1000 + 100 + 6


async def test_pauses_double_and_are_random_but_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def note(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("rama_ebpf.layers.retry.asyncio.sleep", note)

    class Longest(random.Random):
        def uniform(self, a: float, b: float) -> float:
            return b

    layer = RetryLayer(ConnectError, attempts=6, backoff=0.1, max_backoff=0.5, rng=Longest())
    await stack(layer, Flaky(5))(TARGET)
    assert slept == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5])


def test_a_stream_cannot_be_served_twice() -> None:
    async def on_stream(stream: Stream) -> None: ...

    with pytest.raises(StackError, match=r"RetryLayer around .*on_stream"):
        stack(RetryLayer(ConnectError), on_stream)
