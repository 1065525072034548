"""The process model: a supervisor that holds what must outlive a worker, and workers that serve.

``docs/process.md`` says why it is cut this way.
"""

from __future__ import annotations

from .context import Application, WorkerContext
from .nursery import Nursery
from .plan import Listener, Plan
from .supervisor import Revision, Supervisor
from .worker_process import WorkerObserver, WorkerProcess, WorkersFailed

__all__ = [
    "Application",
    "Listener",
    "Nursery",
    "Plan",
    "Revision",
    "Supervisor",
    "WorkerContext",
    "WorkerObserver",
    "WorkerProcess",
    "WorkersFailed",
]
