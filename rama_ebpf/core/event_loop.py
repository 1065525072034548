"""Running an event loop to its end, also where no thread can be started any more."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import uvloop

__all__ = ["run_loop"]

T = TypeVar("T")


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop, and wait for the threads that it has begun. asyncio's own way needs one more for that,
    and a process that is at its limit would not end."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        loop, executor = runner.get_loop(), ThreadPoolExecutor(thread_name_prefix="asyncio")
        loop.set_default_executor(executor)
        try:
            return runner.run(main)
        finally:
            executor.shutdown(cancel_futures=True)
            loop.set_default_executor(None)  # type: ignore[arg-type]
