"""Which backends may be used: what probes say (active) and what requests have met (passive)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

__all__ = ["BackendHealth", "HealthCheck", "PassiveHealth"]

_SUCCESS: Final = range(200, 400)


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """Active checks: GET ``path`` every ``interval`` seconds, answered within ``timeout`` by one of ``statuses``.

    ``fall`` failures in a row take a backend out, ``rise`` successes bring it back. ``host`` is sent as Host, by
    default the backend's own authority.
    """

    path: str = "/"
    host: str = ""
    interval: float = 5.0
    timeout: float = 2.0
    rise: int = 2
    fall: int = 3
    statuses: Collection[int] = _SUCCESS


@dataclass(frozen=True, slots=True)
class PassiveHealth:
    """``failures`` (no connection, no or no valid response) within ``window`` seconds take a backend out for
    ``eject`` seconds. After that one more failure suffices until it has had a success."""

    failures: int = 3
    window: float = 10.0
    eject: float = 10.0


class BackendHealth:
    """The health of one backend. ``clock`` is monotonic seconds."""

    def __init__(self, check: HealthCheck | None, passive: PassiveHealth, clock: Callable[[], float]) -> None:
        self._check = check
        self._passive = passive
        self._clock = clock
        self._streak = 0
        self._failed_at: list[float] = []
        self._ejected_until = float("-inf")
        self.passing = True
        """What active checks say; True until they have said otherwise."""

    @property
    def ejected(self) -> bool:
        """Taken out by failing requests."""
        return self._clock() < self._ejected_until

    def probed(self, success: bool) -> None:
        """Count the result of an active check."""
        assert self._check is not None
        if success == self.passing:
            self._streak = 0
            return
        self._streak += 1
        if self._streak >= (self._check.rise if success else self._check.fall):
            self.passing = success
            self._streak = 0

    def succeeded(self) -> None:
        """A request got its response."""
        self._failed_at.clear()

    def failed(self) -> None:
        """A request got no connection, or no valid response."""
        now = self._clock()
        self._failed_at = [at for at in self._failed_at if at > now - self._passive.window] + [now]
        if len(self._failed_at) >= self._passive.failures:
            self._ejected_until = now + self._passive.eject
            # On probation when it comes back: stamped so that they still count then.
            self._failed_at = [self._ejected_until] * (self._passive.failures - 1)
