"""Changing what goes in and what comes out, and adding to the context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.client import HasExtensions
from ..core.service import Service

__all__ = ["AddExtensionLayer", "MapInputLayer", "MapOutputLayer"]


class MapInputLayer:
    """Gives ``function(input)`` to the service inside.

    ``accepts`` and ``provides`` (both or neither) declare to stack() what the function takes and returns.
    """

    def __init__(
        self, function: Callable[[Any], Any], *, accepts: type | None = None, provides: type | None = None
    ) -> None:
        if (accepts is None) != (provides is None):
            raise ValueError("declare both accepts and provides, or neither")
        self._function = function
        self.accepts = accepts
        self.provides = provides

    def __call__(self, inner: Service[Any, Any]) -> Service[Any, Any]:
        function = self._function

        async def serve(input: Any) -> Any:
            return await inner(function(input))

        return serve


class MapOutputLayer:
    """Returns ``function(output)`` of the output of the service inside."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __call__(self, inner: Service[Any, Any]) -> Service[Any, Any]:
        function = self._function

        async def serve(input: Any) -> Any:
            return function(await inner(input))

        return serve


class AddExtensionLayer:
    """Adds ``values`` to the extensions of every input; each is found under its own type."""

    def __init__(self, *values: object) -> None:
        self._values = values

    def __call__(self, inner: Service[Any, Any]) -> Service[Any, Any]:
        async def serve(input: HasExtensions) -> Any:
            for value in self._values:
                input.extensions.add(value)
            return await inner(input)

        return serve
