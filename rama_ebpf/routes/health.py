"""How well a way does: falls after some failures, is held down, is tried by one connection at a time, and rises.

A way that was down is not trusted at once: the pause doubles while it flaps, and it is used freely only after ``rise``
successes. Pure functions over a small record; callers give the time and keep the record where all workers see it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

__all__ = ["QUARANTINE_SECONDS", "Health", "HealthLimits", "State"]

QUARANTINE_SECONDS: Final = 900.0
"""How long a way that refuses our log-in is left alone: asking again locks accounts."""
_STEADY: Final = 10
"""A way that has been up for so many pauses has stopped flapping."""


class State(enum.IntEnum):
    """Of a way."""

    UP = 0
    DOWN = 1
    """Not asked before the end of its pause."""
    TRIAL = 2
    """Asked by one connection at a time."""
    QUARANTINED = 3
    """It refuses our log-in: an operator has to look."""


@dataclass(frozen=True, slots=True)
class HealthLimits:
    """``fall`` failures in a row take a way down, ``rise`` successes bring it back; it rests for ``hold`` seconds,
    twice as long each time that it falls again, ``longest`` at most."""

    fall: int = 3
    rise: int = 2
    hold: float = 10.0
    longest: float = 300.0

    def __post_init__(self) -> None:
        if self.fall < 1 or self.rise < 1:
            raise ValueError("fall and rise are at least 1")
        if not 0 < self.hold <= self.longest:
            raise ValueError("hold is above 0 and not above the longest pause")


@dataclass(slots=True)
class Health:
    """What is known of one way. Times are seconds of one clock; ``answered`` is when it last proved to be alive."""

    state: State = State.UP
    drained: bool = False
    """An operator wants no new connections on it."""
    failures: int = 0
    successes: int = 0
    since: float = 0.0
    until: float = 0.0
    hold: float = 0.0
    answered: float = 0.0
    latency: float = 0.0
    trial_until: float = 0.0
    asked: float = 0.0
    """When it was asked last for want of a better one."""
    cause: str = ""

    def fail(self, now: float, limits: HealthLimits, cause: str, jitter: float = 0.5) -> bool:
        """Count a failure of the way itself; return whether it has just fallen. ``jitter`` (0 to 1) moves the end of
        the pause by up to a tenth, so that not all workers and servers come back at once."""
        self.failures += 1
        self.successes = 0
        self.trial_until = 0.0
        self.cause = cause
        if self.state is State.QUARANTINED:
            self.until = now + QUARANTINE_SECONDS
            return False
        if self.state is State.UP:
            if self.failures < limits.fall:
                return False
            flaps = self.hold > 0 and now - self.since < _STEADY * self.hold
            self._go_down(now, min(self.hold * 2, limits.longest) if flaps else limits.hold, jitter)
            self.since = now
            return True
        fell = self.state is State.TRIAL
        self._go_down(now, min(max(self.hold, limits.hold / 2) * 2, limits.longest), jitter)
        return fell

    def _go_down(self, now: float, hold: float, jitter: float) -> None:
        self.state = State.DOWN
        self.hold = hold
        self.until = now + hold * (0.9 + 0.2 * jitter)

    def quarantine(self, now: float, cause: str) -> bool:
        """It refuses our log-in; return whether that is news."""
        news = self.state is not State.QUARANTINED
        self.state, self.cause = State.QUARANTINED, cause
        self.failures += 1
        self.successes = 0
        self.trial_until = 0.0
        self.until = now + QUARANTINE_SECONDS
        if news:
            self.since = now
        return news

    def succeed(self, now: float, limits: HealthLimits, seconds: float) -> bool:
        """Count a connection through to a target, which took ``seconds``; return whether the way has just risen."""
        self.answered = now
        self.failures = 0
        self.latency = seconds if not self.latency else 0.8 * self.latency + 0.2 * seconds
        if self.state is State.UP:
            return False
        self.trial_until = 0.0
        self.successes += 1
        if self.successes >= limits.rise:
            self.state, self.since, self.cause = State.UP, now, ""
            return True
        if self.state is not State.TRIAL:
            self.state = State.TRIAL
        return False

    def answer(self, now: float) -> bool:
        """It has answered, though not as was hoped: about the target."""
        self.answered = now
        self.failures = 0
        self.trial_until = 0.0
        return True

    def usable(self) -> bool:
        """Whether it is used freely."""
        return self.state is State.UP and not self.drained

    def triable(self, now: float) -> bool:
        """Whether one connection may try it now."""
        if self.drained or self.state is State.UP or self.trial_until > now:
            return False
        return self.state is State.TRIAL or now >= self.until

    def claim(self, now: float, seconds: float) -> bool:
        """Begin a trial, which is over after ``seconds`` at the latest; False if somebody else has."""
        if not self.triable(now):
            return False
        self.trial_until = now + seconds
        return True

    def last_resort(self, now: float) -> bool:
        """Begin an attempt although it is down, for no other is up; False within a second of the one before."""
        if self.drained or self.state is State.QUARANTINED or now - self.asked < 1.0:
            return False
        self.asked = now
        return True

    def release(self) -> bool:
        """A trial has ended that says nothing."""
        self.trial_until = 0.0
        return True

    def enable(self, now: float) -> None:
        """An operator says that it is well again: the next connections try it."""
        self.drained = False
        if self.state is not State.UP:
            self.state, self.until, self.trial_until, self.since = State.TRIAL, now, 0.0, now
            self.failures = self.successes = 0
