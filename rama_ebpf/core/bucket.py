"""A token bucket without a clock: the caller says what time it is."""

from __future__ import annotations

__all__ = ["TokenBucket"]


class TokenBucket:
    """Refills at ``rate`` units a second up to ``burst`` units, and starts full.

    ``now`` is monotonic seconds from any epoch; a ``now`` before an earlier one counts as no time passed. Raises
    ValueError unless both numbers are above 0.
    """

    __slots__ = ("_full_at", "burst", "rate")

    # The only state is the instant at which the bucket is full again (the virtual scheduling form of the generic
    # cell rate algorithm, ITU-T I.371): a refill is then no work at all, and rounding cannot add up.

    def __init__(self, rate: float, burst: float) -> None:
        if not rate > 0:
            raise ValueError(f"rate must be above 0 per second, not {rate}")
        if not burst > 0:
            raise ValueError(f"burst must be above 0, not {burst}")
        self.rate = rate
        self.burst = burst
        self._full_at = float("-inf")

    def available(self, now: float) -> float:
        """Return how many units could be taken at ``now``; negative after :meth:`force`."""
        missing = (self._full_at - now) * self.rate
        return self.burst - max(missing, 0.0)

    def take(self, now: float, units: float = 1.0) -> float:
        """Take ``units`` and return 0.0, or take nothing and return how many seconds later there will be enough.

        More than ``burst`` units can never be taken: the answer is then infinity.
        """
        if units > self.burst:
            return float("inf")
        full_at = max(self._full_at, now) + units / self.rate
        wait = full_at - now - self.burst / self.rate
        if wait > 1e-9:  # what is due within a nanosecond is due now: the caller's clock has no more digits
            return wait
        self._full_at = full_at
        return 0.0

    def force(self, now: float, units: float) -> float:
        """Take ``units`` now in any case, going into debt; return the seconds until the debt is paid (0.0: none).

        For what is known only after it happened, as a read that returned so and so many bytes.
        """
        self._full_at = max(self._full_at, now) + units / self.rate
        return max(self._full_at - now - self.burst / self.rate, 0.0)
