"""Sending a request's body while its response is awaited: the part that is the same for every version of HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from ..message.limits import HttpTimeouts
from ..message.model import Body

__all__ = ["BodyFailed", "Upload"]

log = logging.getLogger(__name__)

T = TypeVar("T")


class BodyFailed(Exception):
    """Reading the request's body failed with ``error``: the client's failure, not the upstream's."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Upload:
    """Moves ``body`` into an upstream: ``send`` takes its bytes and, at the end, b"". ``move``
    (see :mod:`..h1.bulk`), given the size of the piece before, may move some of them itself and tell how many.

    ``give_up`` is called when the body fails, so that the upstream never takes what it got for a whole one. A failure
    of the upstream ends the upload quietly: a response may have come before it, and reading tells what became of it.
    """

    def __init__(
        self,
        body: Body,
        send: Callable[[bytes], Awaitable[None]],
        give_up: Callable[[], None],
        timeouts: HttpTimeouts,
        *,
        move: Callable[[int], Awaitable[int]] | None = None,
    ) -> None:
        self._body = body
        self._send = send
        self._give_up = give_up
        self._timeouts = timeouts
        self._move = move
        self._continue = asyncio.Event()
        self._waits = False
        self._whole = body.length == 0
        self._progress = 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def complete(self) -> bool:
        """The whole body has been taken by the upstream, or there was none."""
        return self._whole

    def proceed(self) -> None:
        """The upstream said 100 (Continue)."""
        self._continue.set()

    async def stop(self) -> None:
        """End the upload, wherever it is. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            # What it raised has been seen, or belongs to a client that is being refused for it.
            await asyncio.gather(self._task, return_exceptions=True)

    async def respond(self, reading: Coroutine[Any, Any, T]) -> T:
        """Upload, and return what ``reading``, the coroutine that waits for the response, returns.

        The upload goes on behind that, unless the body was never asked for. Raises what ``reading`` raises,
        :class:`BodyFailed`, or TimeoutError if neither moves.
        """
        if self._body.length == 0:
            async with asyncio.timeout(self._timeouts.response):
                return await reading
        loop = asyncio.get_running_loop()
        self._progress = loop.time()
        self._task = loop.create_task(self._run())
        head = loop.create_task(reading)
        waiting: set[asyncio.Task[Any]] = {head, self._task}
        try:
            while not head.done():
                left = self._progress + self._timeouts.response - loop.time()
                if left <= 0:
                    raise TimeoutError("neither request nor response moves")
                await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if self._task.done():
                    self._task.result()
                    waiting.discard(self._task)
            result = head.result()
        finally:
            head.cancel()
            await asyncio.gather(head, return_exceptions=True)
        if self._waits:
            await self.stop()  # the final response came instead of 100 (Continue)
        return result

    async def _run(self) -> None:
        if self._body.expects_continue:
            self._waits = True
            # RFC 9110 section 10.1.1: 100 (Continue) is not to be waited for indefinitely.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timeouts.expect_continue):
                    await self._continue.wait()
            self._waits = False
        try:
            await self._send_all()
        except OSError as error:
            log.debug("an upstream takes no more of a request: %s", error)

    async def _send_all(self) -> None:
        size = 0
        while True:
            if self._move is None or not (size := await self._move(size)):
                try:
                    chunk = await self._body.next()
                except Exception as error:
                    self._give_up()
                    raise BodyFailed(error) from error
                await self._send(chunk)
                size = len(chunk)
            self._progress = asyncio.get_running_loop().time()
            if not size:
                self._whole = True
                return
