"""Routing of requests by host, path and method to other HTTP services."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from ....core.request_log import RouteName
from ....core.service import Service
from ..exchange.quick import Exchange, quick_of
from ..message.errors import HttpError
from ..message.model import Request, Response

__all__ = ["Route", "Routes"]

# Dot segments, empty segments, and separators in disguise: a router and the server behind it read them differently.
_AMBIGUOUS: Final = re.compile(r"//|/(?:\.|%2e){1,2}(?:/|$)|%2f|%5c|%00|;", re.IGNORECASE)
_ESCAPE: Final = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


@dataclass(frozen=True, slots=True)
class Route:
    """Where requests go that match all that is given.

    ``host`` is a name without a port, or ``*.example.org`` for all names below one; ``path`` is a prefix that ends
    at a ``/`` or at the path's end; ``methods`` are in upper case.
    """

    service: Service[Request, Response]
    host: str | None = None
    path: str = "/"
    methods: Collection[str] | None = None
    name: str = ""
    """What metrics call it; its host and path by default."""
    _prefix: str = field(init=False, repr=False, default="")
    _named: RouteName = field(init=False, repr=False, default=RouteName(""))

    def __post_init__(self) -> None:
        if not self.path.startswith("/"):
            raise ValueError(f"the path of a route begins with /, not {self.path!r}")
        object.__setattr__(self, "_prefix", self.path.rstrip("/") + "/")
        object.__setattr__(self, "_named", RouteName(self.name or f"{self.host or ''}{self.path}"))

    def takes_host(self, host: str) -> bool:
        """Whether this route is for ``host``, which is in lower case."""
        if self.host is None:
            return True
        wanted = self.host.lower()
        return host.endswith(wanted[1:]) if wanted.startswith("*.") else host == wanted

    def takes_path(self, path: str) -> bool:
        """Whether this route is for ``path``, which is without a query."""
        return path.startswith(self._prefix) or path == self.path.rstrip("/") or self._prefix == "/"

    @property
    def rank(self) -> tuple[bool, bool, int, bool]:
        """Exact hosts come first, then wildcards, then longer paths, then routes with methods."""
        exact = self.host is not None and not self.host.startswith("*.")
        return exact, self.host is not None, len(self._prefix), self.methods is not None


class Routes:
    """An HTTP service that hands each request to the most specific :class:`Route` that matches.

    No route for the host: 421; for the path: 404; for the method: 405. A path that the server behind might read
    differently (``/a/../b``, ``//``, ``%2f``, ``;``) is refused with 400 unless ``ambiguous_paths`` lets it pass: a
    rule on ``/admin`` would not see ``/x/%2e%2e/admin``. ``/%61dmin`` is ``/admin`` here as it is there (RFC 3986
    section 6.2.2.2); what is forwarded stays as it was sent. ``OPTIONS *`` goes where ``OPTIONS /`` would.
    """

    accepts = Request

    def __init__(self, routes: Iterable[Route], *, ambiguous_paths: bool = False) -> None:
        self._routes = sorted(routes, key=lambda route: route.rank, reverse=True)
        self._ambiguous_paths = ambiguous_paths

    async def __call__(self, request: Request, /) -> Response:
        route = self.find(request)
        request.extensions.add(route._named)
        return await route.service(request)

    def quick_exchange(self, request: Request, /) -> Exchange | None:
        """See :mod:`..exchange.quick`."""
        route = self.find(request)
        quick = quick_of(route.service)
        exchange = None if quick is None else quick(request)
        if exchange is not None:
            request.extensions.add(route._named)
        return exchange

    def find(self, request: Request) -> Route:
        """Return the route of ``request``. Raises :class:`HttpError` if there is none."""
        path = _ESCAPE.sub(_unescaped, request.path.partition("?")[0])
        if not self._ambiguous_paths and _AMBIGUOUS.search(path) is not None:
            raise HttpError(400, "the path can be read in two ways")
        host = _host(request)
        hosted = [route for route in self._routes if route.takes_host(host)]
        if not hosted:
            raise HttpError(421, "this server does not answer for the host")
        # OPTIONS * is about the server as a whole (RFC 9110 section 9.3.7): it goes where all paths do.
        found = [route for route in hosted if route.takes_path("/" if path == "*" else path)]
        if not found:
            raise HttpError(404, "there is nothing at this path")
        for route in found:
            if route.methods is None or request.method in route.methods:
                return route
        allowed = sorted({method for route in found for method in route.methods or ()})
        raise HttpError(405, "the method is not allowed here", headers=[("Allow", ", ".join(allowed))])


def _unescaped(escape: re.Match[str]) -> str:
    character = chr(int(escape[1], 16))
    return character if character in _UNRESERVED else escape[0]


def _host(request: Request) -> str:
    if not request.authority:
        return ""  # HTTP/1.0 without Host: routes with a host do not match
    target: Any = request.target.host
    return str(target).lower().removesuffix(".")
