"""Which name server is asked first, and what is remembered of those that do not answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from ...core.address import IPAddress
from .errors import ResolveError, ResolveTimeout
from .exchange import Answer, BadAnswer, Family, ask

__all__ = ["NameServers"]

log = logging.getLogger(__name__)

_UNANSWERED: Final = 8
"""After how many questions in a row that nobody answered a line is logged: names may be dead, or the servers."""
_SUSPECT_SECONDS: Final = 30.0
_LONGEST_TURN: Final = 2.0


class NameServers:
    """Asks ``servers`` in turn, ``attempts`` times each, until one answers or ``timeout`` seconds have passed.

    A server that is silent has its turn, then the next is asked as well, and the first answer counts. One that was
    silent where another then answered is asked last for 30 seconds, and after that beside the first one, so that a dead
    server delays one question and no other. Names that no server answers say nothing about the servers.
    """

    def __init__(
        self,
        servers: Sequence[IPAddress],
        *,
        timeout: float,
        attempts: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.servers = tuple(servers)
        self._timeout = timeout
        self._attempts = attempts
        self._turn = min(_LONGEST_TURN, timeout / (len(self.servers) * attempts))
        self._clock = clock
        self._suspected: dict[IPAddress, float] = {}
        self._unanswered = 0

    def _order(self) -> tuple[list[IPAddress], int]:
        """Return the servers in order, and how many of them are asked at once."""
        now = self._clock()
        good = [server for server in self.servers if server not in self._suspected]
        suspects = [server for server in self.servers if server in self._suspected]
        due = [server for server in suspects if self._suspected[server] <= now]
        for server in due:  # one question a period tries it
            self._suspected[server] = now + _SUSPECT_SECONDS
        rest = [server for server in suspects if server not in due]
        return [*good[:1], *due, *good[1:], *rest], max(1, min(1, len(good)) + len(due))

    async def ask(self, name: str, family: Family) -> Answer:
        """Raises :class:`ResolveTimeout` or :class:`ResolveError`."""
        order, at_once = self._order()
        left = [*order] * self._attempts
        asked: dict[asyncio.Task[Answer], IPAddress] = {}
        silent: set[IPAddress] = set()
        failure: Exception | None = None
        try:
            async with asyncio.timeout(self._timeout):
                while left or asked:
                    for _ in range(min(at_once, len(left))):
                        server = left.pop(0)
                        asked[asyncio.create_task(ask(server, name, family))] = server
                    at_once = 1
                    done, _ = await asyncio.wait(
                        asked, timeout=self._turn if left else None, return_when=asyncio.FIRST_COMPLETED
                    )
                    if not done:
                        silent.update(asked.values())
                    for task in done:
                        server = asked.pop(task)
                        error = task.exception()
                        if error is None:
                            self._answered(server, silent)
                            return task.result()
                        if not isinstance(error, (BadAnswer, OSError)):
                            raise error
                        if isinstance(error, OSError):
                            silent.add(server)  # nobody is there
                        failure = error
        except TimeoutError as error:
            self._nobody_answered()
            raise ResolveTimeout(f"no answer for {name!r} within {self._timeout:g} s") from error
        finally:
            for task in asked:
                task.add_done_callback(_look_away)
                task.cancel()
        if isinstance(failure, OSError):
            self._nobody_answered()
        raise ResolveError(f"cannot resolve {name!r}: {failure}", temporary=True)

    def _nobody_answered(self) -> None:
        self._unanswered += 1
        if self._unanswered == _UNANSWERED:
            names = ", ".join(map(str, self.servers))
            log.warning("no answer to the last %d questions from any name server (%s)", _UNANSWERED, names)

    def _answered(self, server: IPAddress, silent: set[IPAddress]) -> None:
        if self._unanswered >= _UNANSWERED:
            log.info("name servers answer again")
        self._unanswered = 0
        if self._suspected.pop(server, None) is not None:
            log.info("name server %s answers again", server)
        for other in silent - {server} - self._suspected.keys():
            self._suspected[other] = self._clock() + _SUSPECT_SECONDS
            log.warning("name server %s does not answer: %s does, and is asked first", other, server)


def _look_away(task: asyncio.Task[Answer]) -> None:
    if not task.cancelled():
        task.exception()  # another server has answered already
