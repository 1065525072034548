"""Taking some inputs away from the service inside."""

from __future__ import annotations

from typing import Any

from ..core.errors import PolicyDenied
from ..core.matchers import Matcher
from ..core.routing import Either
from ..core.service import Input, Output, Service

__all__ = ["FilterLayer", "HijackLayer"]


class HijackLayer:
    """Gives what ``matcher`` matches to ``service``, the rest to the service inside."""

    def __init__(self, matcher: Matcher, service: Service[Any, Any]) -> None:
        self._matcher = matcher
        self._service = service

    def __call__(self, inner: Service[Input, Output], /) -> Service[Input, Output]:
        return Either(self._matcher, self._service, inner)


class FilterLayer:
    """Lets pass what ``matcher`` matches; for the rest raises :class:`PolicyDenied` in the name of ``rule``."""

    def __init__(self, matcher: Matcher, rule: str = "filter") -> None:
        self._matcher = matcher
        self._rule = rule

    def __call__(self, inner: Service[Input, Output], /) -> Service[Input, Output]:
        async def serve(input: Input, /) -> Output:
            if not self._matcher(input):
                raise PolicyDenied(f"refused by the filter {self._rule}", rule=self._rule)
            return await inner(input)

        return serve
