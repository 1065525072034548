"""Changing what goes in and what comes out, and adding to the context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from ..core.at_once import NOTHING, Entered, Visit, entered_by
from ..core.client import Carrier
from ..core.extensions import Extensions
from ..core.first_bytes import FirstBytes
from ..core.service import Input, Output, Service

__all__ = ["AddExtensionLayer", "MapInputLayer", "MapOutputLayer"]

Before = TypeVar("Before")
After = TypeVar("After")


class MapInputLayer(Generic[Before, After]):
    """Gives ``function(input)`` to the service inside.

    ``accepts`` and ``provides`` (both or neither) declare to stack() what the function takes and returns.
    """

    def __init__(
        self, function: Callable[[Before], After], *, accepts: type | None = None, provides: type | None = None
    ) -> None:
        if (accepts is None) != (provides is None):
            raise ValueError("declare both accepts and provides, or neither")
        self._function = function
        self.accepts = accepts
        self.provides = provides

    def __call__(self, inner: Service[After, Output], /) -> Service[Before, Output]:
        function = self._function

        async def serve(input: Before, /) -> Output:
            return await inner(function(input))

        return serve


class MapOutputLayer(Generic[Before, After]):
    """Returns ``function(output)`` of the output of the service inside."""

    def __init__(self, function: Callable[[Before], After]) -> None:
        self._function = function

    def __call__(self, inner: Service[Input, Before], /) -> Service[Input, After]:
        function = self._function

        async def serve(input: Input, /) -> After:
            return function(await inner(input))

        return serve


class AddExtensionLayer:
    """Adds ``values`` to the extensions of every input; each is found under its own type."""

    def __init__(self, *values: object) -> None:
        self._values = values

    def first_bytes(self, inner: FirstBytes | None) -> FirstBytes | None:
        """First bytes are judged as inside: what is refused by them needs nothing of this layer."""
        return inner

    def __call__(self, inner: Service[Carrier, Output], /) -> Service[Carrier, Output]:
        async def serve(input: Carrier, /) -> Output:
            if entered_by(input, self) is None:
                self._add(input.extensions)
            return await inner(input)

        return serve

    def enter(self, visit: Visit) -> Entered:
        """In callbacks (:mod:`rama_ebpf.core.at_once`)."""
        self._add(visit.stream.extensions)
        return NOTHING

    def _add(self, extensions: Extensions) -> None:
        for value in self._values:
            extensions.add(value)
