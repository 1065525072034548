"""Trying again what failed for a moment, with back-off and a budget that keeps retries from becoming the load."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

from ..core.bucket import TokenBucket
from ..core.errors import StackError
from ..core.service import Input, Output, Service, accepts_of, name_of
from ..core.stream import Stream

__all__ = ["RetryBudget", "RetryLayer"]


class RetryBudget:
    """Allows ``minimum`` retries a second, and ``ratio`` more for each first try (0.1: one retry in ten).

    One budget may be shared by several layers. When everything fails at once it is spent soon, and the rest fails
    fast instead of multiplying the load.
    """

    def __init__(
        self, *, ratio: float = 0.1, minimum: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if ratio < 0:
            raise ValueError(f"ratio must not be negative: {ratio}")
        self._floor = TokenBucket(minimum, max(minimum, 1.0))
        self._ratio = ratio
        self._earned = 0.0
        self._clock = clock

    def earn(self) -> None:
        """Count a first try."""
        self._earned = min(self._earned + self._ratio, 100.0)

    def spend(self) -> bool:
        """Take one retry from the budget; False if there is none left."""
        if self._earned >= 1:
            self._earned -= 1
            return True
        return self._floor.take(self._clock()) == 0.0


class RetryLayer:
    """Calls the service inside up to ``attempts`` times while it raises one of the errors ``on`` and ``retryable``
    agrees.

    Between two calls it sleeps a random time of up to ``backoff`` seconds, doubled each time, at most
    ``max_backoff`` (full jitter, as in the AWS Architecture Blog of 2015). The last error is raised. A stream cannot
    be served twice: around a service that takes one this is a :class:`StackError`.
    """

    def __init__(
        self,
        *on: type[Exception],
        attempts: int = 3,
        backoff: float = 0.05,
        max_backoff: float = 2.0,
        budget: RetryBudget | None = None,
        retryable: Callable[[Any, Exception], bool] = lambda input, error: True,
        rng: random.Random | None = None,
    ) -> None:
        if not on:
            raise ValueError("name the error types that are worth another try")
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, not {attempts}")
        self._on = on
        self._attempts = attempts
        self._backoff = backoff
        self._max_backoff = max_backoff
        self._budget = RetryBudget() if budget is None else budget
        self._retryable = retryable
        self._rng = random.Random() if rng is None else rng

    def __call__(self, inner: Service[Input, Output], /) -> Service[Input, Output]:
        takes = accepts_of(inner)
        if takes is not None and issubclass(takes, Stream):
            raise StackError(f"RetryLayer around {name_of(inner)}: a stream cannot be served a second time")

        async def serve(input: Input, /) -> Output:
            self._budget.earn()
            for attempt in range(1, self._attempts + 1):
                try:
                    return await inner(input)
                except self._on as error:
                    last = attempt == self._attempts
                    if last or not self._retryable(input, error) or not self._budget.spend():
                        raise
                longest = min(self._backoff * 2 ** (attempt - 1), self._max_backoff)
                await asyncio.sleep(self._rng.uniform(0, longest))
            raise AssertionError("unreachable: the last attempt returns or raises")

        return serve
