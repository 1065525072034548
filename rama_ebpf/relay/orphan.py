"""A tunnel of the wire relay that has outlived its worker, as long as nobody adopts it."""

from __future__ import annotations

import logging
import time

from .report import CloseReason
from .wire_story import Story

__all__ = ["Orphan"]

log = logging.getLogger(__name__)


class Orphan:
    """Keeps the time-outs of a tunnel, and writes the line that its worker would have written at its end. ``moved`` are
    the bytes that it has moved up and down."""

    __slots__ = ("_active_at", "_seen", "_story")

    def __init__(self, story: bytes, moved: tuple[int, int]) -> None:
        self._story = Story.unpack(story)
        self._seen = moved
        self._active_at = time.monotonic()

    def expired(self, moved: tuple[int, int], now: float) -> CloseReason | None:
        """Say which time-out has passed, None if none has. ``now`` is by CLOCK_MONOTONIC."""
        limits = self._story.limits
        if limits.total is not None and now >= self._story.began + limits.total:
            return CloseReason.TOTAL_TIMEOUT
        if moved != self._seen:
            self._seen, self._active_at = moved, now
        elif limits.idle is not None and now >= self._active_at + limits.idle:
            return CloseReason.IDLE_TIMEOUT
        return None

    def ended(self, reason: CloseReason, moved: tuple[int, int]) -> None:
        """Write its line."""
        log.info("ended without a server: %s", self._story.line(reason, moved, time.monotonic()))
