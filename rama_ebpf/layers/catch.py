"""Turning errors of the service inside into an answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ..core.errors import StackError
from ..core.service import Input, Output, Service

__all__ = ["CatchLayer"]


class CatchLayer:
    """Calls ``handler(input, error)`` for an error of one of the types ``on``; what it returns is the output.

    Other errors pass, and so does a cancellation always. A handler that cannot help raises.
    """

    def __init__(self, handler: Callable[[Any, Exception], Awaitable[Any]], *on: type[Exception]) -> None:
        if not on:
            raise ValueError("name the error types to catch")
        if not callable(handler):
            raise StackError(f"CatchLayer is given {handler!r} where it needs an async function of input and error")
        self._handler = handler
        self._on = on

    def __call__(self, inner: Service[Input, Output], /) -> Service[Input, Output]:
        async def serve(input: Input, /) -> Output:
            try:
                return await inner(input)
            except self._on as error:
                output: Output = await self._handler(input, error)
                return output

        return serve
