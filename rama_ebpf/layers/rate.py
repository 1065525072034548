"""How many connections or requests are let in per second, altogether or per source."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Protocol

from ..core.bucket import TokenBucket
from ..core.client import Carrier
from ..core.errors import RateExceeded
from ..core.first_bytes import FirstBytes
from ..core.service import Output, Service, check_key
from .source import Key

__all__ = ["Buckets", "RateExceeded", "RateLimitLayer", "SharesBuckets"]


class Buckets(Protocol):
    """A token bucket for each key."""

    def take(self, key: Hashable, longest: float, /) -> float:
        """Take one token if that means to wait at most ``longest`` seconds; return the wait, taken or not."""


class SharesBuckets(Protocol):
    """Who can count for several processes; in a worker of ``rama-ebpf run`` that is ``context.shared``."""

    def buckets(self, rate: float, burst: float, /) -> Buckets: ...


class _LocalBuckets:
    def __init__(self, rate: float, burst: float, max_keys: int, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._burst = burst
        self._max_keys = max_keys
        self._clock = clock
        self._buckets: OrderedDict[Hashable, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: Hashable, longest: float, /) -> float:
        bucket = self._bucket(key)
        now = self._clock()
        wait = bucket.take(now)
        if 0 < wait <= longest:
            bucket.force(now, 1)  # taken now, so that later ones queue up behind
        return wait

    def _bucket(self, key: Hashable) -> TokenBucket:
        bucket = self._buckets.get(key)
        if bucket is None:
            if len(self._buckets) >= self._max_keys:
                self._buckets.popitem(last=False)
            bucket = self._buckets[key] = TokenBucket(self._rate, self._burst)
        else:
            self._buckets.move_to_end(key)
        return bucket


class RateLimitLayer:
    """Lets ``rate`` a second through for each ``key``, or altogether without one, and ``burst`` at once.

    What comes above that is delayed if its turn comes within ``wait`` seconds, else refused with
    :class:`RateExceeded`. With ``shared`` the rate is one for all processes that share it. Without it each process
    counts for itself: then at most ``max_keys`` keys are remembered, the one unused for longest is forgotten first,
    and ``clock`` tells the time.
    """

    def __init__(
        self,
        rate: float,
        *,
        burst: int = 1,
        key: Key | None = None,
        wait: float = 0.0,
        shared: SharesBuckets | None = None,
        max_keys: int = 65536,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        TokenBucket(rate, burst)  # raises ValueError for bad numbers now and not when a client comes
        self._rate = rate
        check_key(self, key)
        self._key = key
        self._wait = wait
        self._buckets: Buckets = (
            _LocalBuckets(rate, burst, max_keys, clock) if shared is None else shared.buckets(rate, burst)
        )

    def first_bytes(self, inner: FirstBytes | None) -> FirstBytes | None:
        """First bytes are judged as inside: what is refused by them needs nothing of this layer."""
        return inner

    def __call__(self, inner: Service[Carrier, Output], /) -> Service[Carrier, Output]:
        async def serve(input: Carrier, /) -> Output:
            wait = self._buckets.take(None if self._key is None else self._key(input), self._wait)
            if wait > self._wait:
                raise RateExceeded(f"more than {self._rate:g} a second", wait)
            if wait > 0:
                await asyncio.sleep(wait)
            return await inner(input)

        return serve
