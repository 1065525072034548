"""What goes into a service and what comes out, at DEBUG. Costs one boolean when off."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable

from ..core.service import Input, Output, Service, name_of

__all__ = ["TraceLayer"]


class TraceLayer:
    """Logs start, end, failure and duration of every call of the service inside, if ``logger`` is enabled for DEBUG.

    ``name`` defaults to the name of the wrapped part. Calls are numbered, so that interleaved lines can be told
    apart.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        logger: logging.Logger | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._logger = logging.getLogger("rama_ebpf.trace") if logger is None else logger
        self._clock = clock
        self._numbers = itertools.count(1)

    def __call__(self, inner: Service[Input, Output], /) -> Service[Input, Output]:
        name = self._name or name_of(inner)
        logger = self._logger

        async def serve(input: Input, /) -> Output:
            if not logger.isEnabledFor(logging.DEBUG):
                return await inner(input)
            return await self._traced(name, inner, input)

        return serve

    async def _traced(self, name: str, inner: Service[Input, Output], input: Input) -> Output:
        number = next(self._numbers)
        started = self._clock()
        self._logger.debug("%s #%d: called with %r", name, number, input)
        try:
            output = await inner(input)
        except BaseException as error:
            self._logger.debug("%s #%d: raised %r after %.6f s", name, number, error, self._clock() - started)
            raise
        self._logger.debug("%s #%d: returned %r after %.6f s", name, number, output, self._clock() - started)
        return output
