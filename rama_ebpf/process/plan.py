"""What is to be served: listeners, the application, and the workers that run it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from ..core.errors import RamaError
from ..kernel.privileges import UserIds
from .sandbox import Sandbox

__all__ = ["Json", "Listener", "Plan", "PlanError", "nothing_held"]

Json = Mapping[str, object]


class PlanError(RamaError, ValueError):
    """A plan cannot be carried out; the text names the value and the remedy."""

    kind = "plan"


def nothing_held() -> AbstractContextManager[Collection[int]]:
    """No descriptors to hold."""
    return nullcontext(())


@dataclass(frozen=True, slots=True)
class Listener:
    """Listening sockets of one address, under a name that appears in metrics and logs.

    With one socket per worker (SO_REUSEPORT) each worker has an accept queue of its own; with a single socket all
    share it. Worker ``i`` of ``n`` gets the sockets ``i``, ``i + n``, … or, if there are fewer sockets than workers,
    socket ``i`` modulo their number: every socket always has a worker that accepts on it.
    """

    name: str
    sockets: tuple[socket.socket, ...]

    def for_worker(self, worker: int, workers: int) -> list[tuple[int, socket.socket]]:
        """Return the indexes and sockets on which ``worker`` (from 0) of ``workers`` accepts."""
        count = len(self.sockets)
        indexes = range(worker, count, workers) if worker < count else [worker % count]
        return [(index, self.sockets[index]) for index in indexes]


@dataclass(frozen=True, eq=False)
class Plan:
    """What a :class:`~.supervisor.Supervisor` is to run.

    ``target`` is ``module:attribute``, a service or a function of a :class:`~.context.WorkerContext` that makes one;
    ``directory`` is put in front of the module search path. ``params`` is JSON that the function finds in its
    context. ``user`` is who the workers become (None: they stay who they are), ``sandbox`` whether they must give up
    files and system calls, and ``read`` and ``write`` are paths that are left to them. ``fds`` are further descriptors
    by name that every worker gets. ``held`` says, whenever a worker starts, which descriptors it has to hold without
    knowing what they are for, and keeps them open meanwhile. ``drain`` is how many seconds live connections have after
    SIGTERM, ``linger`` for how many it goes on to accept before that, ``watchdog`` after how many seconds of silence a
    worker is taken for hung
    and replaced. ``environment`` is added to the workers'.
    """

    target: str
    listeners: tuple[Listener, ...]
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    user: UserIds | None = None
    sandbox: Sandbox = Sandbox.WANTED
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    params: Json = field(default_factory=dict)
    directory: str | None = None
    fds: Mapping[str, int] = field(default_factory=dict)
    held: Callable[[], AbstractContextManager[Collection[int]]] = nothing_held
    environment: Mapping[str, str] = field(default_factory=dict)
    drain: float = 300.0
    linger: float = 0.0
    watchdog: float = 60.0
    log_level: str = "info"
    log_format: str = "text"

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= 1024:
            raise PlanError(f"workers must be 1-1024, not {self.workers}")
        names = [listener.name for listener in self.listeners]
        if len(set(names)) != len(names):
            raise PlanError(f"two listeners have one name: {', '.join(sorted(names))}")
        module, colon, attribute = self.target.partition(":")
        if not (module and colon and attribute):
            raise PlanError(f"target {self.target!r}: write module:attribute")

    def shared_with(self, later: Plan) -> frozenset[str]:
        """The names, here, of the listeners whose sockets a later plan goes on to use."""
        used = {sock for listener in later.listeners for sock in listener.sockets}
        return frozenset(listener.name for listener in self.listeners if used.intersection(listener.sockets))
