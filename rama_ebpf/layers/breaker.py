"""Circuit breaker: what has failed again and again is not tried for a while."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from ..core.errors import RamaError
from ..core.service import Input, Output, Service, check_key

__all__ = ["CircuitBreakerLayer", "CircuitOpen"]


class CircuitOpen(RamaError):
    """The target failed too often of late and is not tried now. ``retry_after`` is in seconds."""

    kind = "circuit_open"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class _Circuit:
    __slots__ = ("failures", "open_until", "probing")

    def __init__(self) -> None:
        self.failures = 0
        self.open_until = float("-inf")
        self.probing = False


class CircuitBreakerLayer:
    """After ``failures`` errors of the types ``on`` in a row, refuses the same ``key`` for ``pause`` seconds.

    Then one call is let through as a probe: its success closes the circuit, its failure opens it for another pause.
    ``key`` defaults to the input itself, so each :class:`~rama_ebpf.core.address.Authority` has a circuit of its
    own. At most ``max_keys`` circuits with failures are remembered. Raises :class:`CircuitOpen`.
    """

    def __init__(
        self,
        *on: type[Exception],
        failures: int = 5,
        pause: float = 10.0,
        key: Callable[[Any], Hashable] = lambda input: input,
        max_keys: int = 65536,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not on:
            raise ValueError("name the error types that count as failures")
        if failures < 1:
            raise ValueError(f"failures must be at least 1, not {failures}")
        self._on = on
        self._failures = failures
        self._pause = pause
        check_key(self, key)
        self._key = key
        self._max_keys = max_keys
        self._clock = clock
        self._circuits: OrderedDict[Hashable, _Circuit] = OrderedDict()

    def __call__(self, inner: Service[Input, Output], /) -> Service[Input, Output]:
        async def serve(input: Input, /) -> Output:
            key = self._key(input)
            circuit = self._circuits.get(key)
            probing = circuit is not None and self._admit(key, circuit)
            try:
                output = await inner(input)
            except self._on:
                self._failed(key)
                raise
            finally:
                if probing and circuit is not None:
                    circuit.probing = False
            self._circuits.pop(key, None)
            return output

        return serve

    def _admit(self, key: Hashable, circuit: _Circuit) -> bool:
        """Return whether this call is the probe of an open circuit; raise if it may not pass."""
        if circuit.failures < self._failures:
            return False
        left = circuit.open_until - self._clock()
        if left > 0 or circuit.probing:
            raise CircuitOpen(f"{key} failed {circuit.failures} times in a row: not tried now", max(left, 0.0))
        circuit.probing = True
        return True

    def _failed(self, key: Hashable) -> None:
        circuit = self._circuits.get(key)
        if circuit is None:
            if len(self._circuits) >= self._max_keys:
                self._circuits.popitem(last=False)
            circuit = self._circuits[key] = _Circuit()
        circuit.failures += 1
        if circuit.failures >= self._failures:
            circuit.open_until = self._clock() + self._pause
