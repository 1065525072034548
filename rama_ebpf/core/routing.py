"""Choosing among services by matchers."""

from __future__ import annotations

from typing import Any

from .errors import RamaError, StackError
from .matchers import Matcher
from .service import Service, accepts_of, check_fit, name_of, needs_of_all

__all__ = ["Either", "NoRoute", "Router"]


class NoRoute(RamaError):
    """No route matches and there is no fall-back."""

    kind = "no_route"


class Router:
    """A service that gives its input to the first route whose matcher says yes, or else to ``fallback``::

        Router((TargetPort(25), reject), (Source("10.0.0.0/8"), internal), fallback=stack(...))

    Raises :class:`NoRoute` where there is neither. Services that declare different inputs cannot be routes of one
    router: that is a :class:`StackError` when it is made.
    """

    def __init__(self, *routes: tuple[Matcher, Service[Any, Any]], fallback: Service[Any, Any] | None = None) -> None:
        self._routes = routes
        self._fallback = fallback
        services = [service for _, service in routes] + ([] if fallback is None else [fallback])
        for matcher, _ in routes:
            if not callable(matcher):
                raise StackError(f"a route of {name_of(self)} has {matcher!r} where it needs a matcher")
        self.accepts = _common_input(services)
        for service in services:
            check_fit(self, self.accepts or object, service)
        self.needs = needs_of_all(services)

    async def __call__(self, input: Any, /) -> Any:
        for matcher, service in self._routes:
            if matcher(input):
                return await service(input)
        if self._fallback is None:
            raise NoRoute(f"none of {len(self._routes)} routes matches")
        return await self._fallback(input)


class Either(Router):
    """A service that gives its input to ``then`` if ``matcher`` says yes, else to ``otherwise``."""

    def __init__(self, matcher: Matcher, then: Service[Any, Any], otherwise: Service[Any, Any]) -> None:
        super().__init__((matcher, then), fallback=otherwise)


def _common_input(services: list[Service[Any, Any]]) -> type | None:
    common: type | None = None
    for service in services:
        kind = accepts_of(service)
        if kind is None or common is None or issubclass(kind, common):
            common = kind or common
        elif not issubclass(common, kind):
            raise StackError(
                f"routes of one router take {common.__name__}, but {name_of(service)} takes {kind.__name__}"
            )
    return common
