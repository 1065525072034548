from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rama_ebpf.core import TokenBucket


def test_starts_full_and_refills_at_its_rate() -> None:
    bucket = TokenBucket(10, 5)
    assert [bucket.take(0.0) for _ in range(5)] == [0.0] * 5
    assert bucket.take(0.0) == pytest.approx(0.1)
    assert bucket.take(0.1) == 0.0
    assert bucket.available(100.0) == 5


def test_more_than_the_burst_can_never_be_taken() -> None:
    assert TokenBucket(1, 5).take(1000.0, 6) == float("inf")


def test_debt_delays_what_comes_after() -> None:
    bucket = TokenBucket(10, 5)
    assert bucket.force(0.0, 15) == 1.0
    assert bucket.available(0.0) == -10
    assert bucket.take(1.0) > 0
    assert bucket.take(1.1) == 0.0


@given(
    st.floats(0.001, 1e9),
    st.floats(0.001, 1e9),
    st.floats(0, 1e6),
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1)), max_size=50),
)
def test_waiting_as_long_as_told_is_always_enough(
    rate: float, burst: float, start: float, steps: list[tuple[float, float]]
) -> None:
    bucket, now = TokenBucket(rate, burst), start
    for passed, share in steps:
        now += passed
        wait = bucket.take(now, share * burst)
        if wait:
            now += wait
            assert bucket.take(now, share * burst) <= 1e-9 * max(now, 1)


@given(st.floats(0.1, 1e6), st.floats(1, 1e6), st.lists(st.floats(0, 5), min_size=1, max_size=100))
def test_never_more_than_burst_and_rate_over_any_time(rate: float, burst: float, gaps: list[float]) -> None:
    bucket, now, taken = TokenBucket(rate, burst), 0.0, 0
    for gap in gaps:
        now += gap
        if bucket.take(now) == 0.0:
            taken += 1
    assert taken <= burst + rate * now + 1e-6 * (1 + rate * now)
