"""How many connections or requests are let in per second, altogether or per source."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from ..core.bucket import TokenBucket
from ..core.client import HasExtensions
from ..core.errors import LimitExceeded
from ..core.service import Service
from .source import Key

__all__ = ["RateExceeded", "RateLimitLayer"]


class RateExceeded(LimitExceeded):
    """More came than the rate allows. ``retry_after`` is when the next would be let in, in seconds."""

    kind = "rate_limit"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimitLayer:
    """Lets ``rate`` a second through for each ``key``, or altogether without one, and ``burst`` at once.

    What comes above that is delayed if its turn comes within ``wait`` seconds, else refused with
    :class:`RateExceeded`. At most ``max_keys`` keys are remembered; the one unused for longest is forgotten first.
    """

    def __init__(
        self,
        rate: float,
        *,
        burst: int = 1,
        key: Key | None = None,
        wait: float = 0.0,
        max_keys: int = 65536,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        TokenBucket(rate, burst)  # raises ValueError for bad numbers now and not when a client comes
        self._rate = rate
        self._burst = burst
        self._key = key
        self._wait = wait
        self._max_keys = max_keys
        self._clock = clock
        self._buckets: OrderedDict[Hashable, TokenBucket] = OrderedDict()

    def __call__(self, inner: Service[Any, Any]) -> Service[Any, Any]:
        async def serve(input: HasExtensions) -> Any:
            bucket = self._bucket(None if self._key is None else self._key(input))
            now = self._clock()
            wait = bucket.take(now)
            if wait > self._wait:
                raise RateExceeded(f"more than {self._rate:g} a second", wait)
            if wait > 0:
                await asyncio.sleep(bucket.force(now, 1))  # taken now, so that later ones queue up behind
            return await inner(input)

        return serve

    def _bucket(self, key: Hashable) -> TokenBucket:
        bucket = self._buckets.get(key)
        if bucket is None:
            if len(self._buckets) >= self._max_keys:
                self._buckets.popitem(last=False)
            bucket = self._buckets[key] = TokenBucket(self._rate, self._burst)
        else:
            self._buckets.move_to_end(key)
        return bucket
