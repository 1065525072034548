"""How far a connection has come: accepted, established, a tunnel.

Only the protocol in the middle of a stack knows when a handshake is over, but layers outside it act on it: the
time-out changes, the metrics count. So the protocol says it once, ``Lifecycle.of(stream.extensions).reached(...)``,
and who wants to know watches. :func:`rama_ebpf.relay.relay` says it for every tunnel.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator

from .extensions import Extensions

__all__ = ["Lifecycle", "Stage"]


class Stage(enum.IntEnum):
    """Stages of a connection; it only moves forward and may leave out some."""

    ACCEPTED = 0
    ESTABLISHED = 1
    """The protocol's handshake is over: the connection is of use to its client."""
    TUNNEL = 2
    """A relay moves its bytes, and enforces the idle and total time-outs itself."""


class Lifecycle:
    """The stage of one connection, and the callbacks that are told when it moves."""

    __slots__ = ("_owed", "_owed_watchers", "_watchers", "due", "stage")

    def __init__(self) -> None:
        self.stage = Stage.ACCEPTED
        self.due: float | None = None
        """By when (the event loop's clock) a protocol had better end a handshake that takes too long, in its own words:
        a moment later it is cut. None: it may take any time."""
        self._watchers: list[Callable[[Stage], None]] = []
        self._owed = 0
        self._owed_watchers: list[Callable[[bool], None]] = []

    @classmethod
    def of(cls, extensions: Extensions) -> Lifecycle:
        """Return the lifecycle among ``extensions``; the first call adds it."""
        found = extensions.get(cls)
        if found is None:
            found = cls()
            extensions.add(found)
        return found

    def watch(self, callback: Callable[[Stage], None]) -> None:
        """Call ``callback`` with each stage that is reached from now on. It must not raise."""
        self._watchers.append(callback)

    def watch_owed(self, callback: Callable[[bool], None]) -> None:
        """Call ``callback`` with True when the client begins to wait for us and with False when it no longer does."""
        self._owed_watchers.append(callback)

    @contextlib.contextmanager
    def owed(self) -> Iterator[None]:
        """The client waits for something that we owe it, such as the check of its password: until this ends, no
        time-out of its handshake runs."""
        self._owed += 1
        if self._owed == 1:
            for watcher in self._owed_watchers:
                watcher(True)
        try:
            yield
        finally:
            self._owed -= 1
            if not self._owed:
                for watcher in self._owed_watchers:
                    watcher(False)

    def reached(self, stage: Stage) -> None:
        """Move to ``stage`` and tell the watchers; does nothing if the connection is already there or further."""
        if stage > self.stage:
            self.stage = stage
            for watcher in self._watchers:
                watcher(stage)
