"""How ways fail: an error that says whose fault it was."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final

from ...core.errors import AuthFailed, PolicyDenied, RamaError
from ...core.stream import Stream
from ...routes.blame import Fault, socks5_fault
from ..connect import ConnectError, upstream_failure
from ..socks5.client import ERRNO
from ..socks5.client_machine import Refused

__all__ = ["Budget", "Start", "WayFailed", "failure_of", "race"]

Start = Callable[[], Coroutine[Any, Any, Stream]]
_NOT_COUNTED: Final = "no way is left to try"


class WayFailed(ConnectError):
    """A way did not get there; ``fault`` says who is to blame, ``errno`` what the client is told."""

    def __init__(self, number: int, message: str, fault: Fault) -> None:
        super().__init__(number, message)
        self.fault = fault


class Budget:
    """How many attempts there may be for one connection, over all ways and addresses."""

    def __init__(self, tries: int) -> None:
        self.left = tries

    def take(self) -> bool:
        """Take one; False if there is none left."""
        self.left -= 1
        return self.left >= 0


def failure_of(error: BaseException, doing: str, fault: Fault) -> WayFailed | None:
    """Return what stands for ``error``, met while ``doing``; ``fault`` is whose it is where the error itself does not
    say. None for what is none of this kind."""
    if isinstance(error, WayFailed):
        return error
    if isinstance(error, Refused):
        return WayFailed(ERRNO[error.reply], f"{doing}: {error}", socks5_fault(error.reply))
    if isinstance(error, AuthFailed):
        return WayFailed(errno.EKEYREJECTED, f"{doing}: {error}", Fault.LOGIN)
    found = upstream_failure(error, doing)
    return None if found is None else WayFailed(found.errno or errno.EIO, found.strerror or str(found), fault)


async def race(starts: Iterator[Start], late: float, final: Callable[[BaseException], bool]) -> Stream:
    """Run attempts until one succeeds. The next begins when one has failed, or beside those that run when none has
    ended for ``late`` seconds. An error that is ``final`` ends it; else the last one is raised, or LookupError if there
    was no attempt at all. Losers are cancelled, and closed if they have won by then."""
    loop = asyncio.get_running_loop()
    running: set[asyncio.Task[Stream]] = set()
    failure: BaseException | None = None
    more = True
    try:
        while True:
            if more:
                start = next(starts, None)
                if start is None:
                    more = False
                else:
                    running.add(loop.create_task(start()))
            if not running:
                raise failure or LookupError(_NOT_COUNTED)
            done, _ = await asyncio.wait(running, timeout=late if more else None, return_when=asyncio.FIRST_COMPLETED)
            winner: asyncio.Task[Stream] | None = None
            for task in done:
                if (error := task.exception()) is None:
                    winner = winner or task
                    continue
                running.discard(task)
                if not isinstance(error, RamaError | OSError) or final(error):
                    raise error
                if failure is None or not isinstance(error, PolicyDenied):
                    failure = error
            if winner is not None:
                running.discard(winner)
                return winner.result()
    finally:
        for task in running:
            task.add_done_callback(_abort_loser)
            task.cancel()


def _abort_loser(task: asyncio.Task[Stream]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().abort()
