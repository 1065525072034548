"""The thread in which services' bans are put into force: the event loop never waits for the policy's lock or the
disk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

__all__ = ["PolicyThread"]

log = logging.getLogger("rama_ebpf")

_MOST_WAITING: Final = 1024


class PolicyThread:
    """Carries out changes one after the other, in the order of :meth:`submit`; a context manager.

    At its end those that have not begun are dropped.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._waiting = 0
        self._dropped = 0

    def __enter__(self) -> PolicyThread:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def submit(self, change: Callable[[], None]) -> asyncio.Future[None] | None:
        """Have a change carried out; return its outcome, to be awaited or not. None if too many wait already.

        Call it on the event loop.
        """
        if self._waiting >= _MOST_WAITING:
            self._dropped += 1
            if self._dropped & (self._dropped - 1) == 0:  # the first, second, fourth, eighth …
                log.error(
                    "%d changes of the policy by services are lost: %d wait already", self._dropped, self._waiting
                )
            return None
        self._waiting += 1
        outcome = asyncio.get_running_loop().run_in_executor(self._executor, change)
        outcome.add_done_callback(self._done)
        return outcome

    def _done(self, outcome: asyncio.Future[None]) -> None:
        self._waiting -= 1
        if not outcome.cancelled() and (error := outcome.exception()) is not None:
            log.error("a ban by a service is not in force: %s", error)
