"""The process model: a supervisor that holds what must outlive a worker, and workers that serve.

``docs/process.md`` says why it is cut this way.
"""

from __future__ import annotations

from .context import Application, WorkerContext
from .plan import Listener, Plan
from .supervisor import Supervisor, WorkersFailed

__all__ = ["Application", "Listener", "Plan", "Supervisor", "WorkerContext", "WorkersFailed"]
