"""Redirects, and rewriting of paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final

from ....core.service import Service
from ..message.errors import HttpError
from ..message.headers import Headers
from ..message.model import Request, Response
from ..message.uri import parse_target

__all__ = ["RedirectLayer", "RewriteLayer", "to_https"]

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})


def to_https(request: Request) -> str | None:
    """A rule for :class:`RedirectLayer`: every ``http`` URL is its ``https`` one, on the default port."""
    if request.arrived_by == "https" or not request.authority:
        return None
    host = re.sub(r":[0-9]+$", "", request.authority)
    return f"https://{host}{request.path}"


class RedirectLayer:
    """Redirects the requests for which ``rule`` returns a URL (a relative one too), with ``status`` 301, 302, 303,
    307 or 308; the others go on."""

    accepts = Request

    def __init__(self, rule: Callable[[Request], str | None], *, status: int = 308) -> None:
        if status not in _REDIRECTS:
            raise ValueError(f"{status} is not a redirect")
        self._rule = rule
        self._status = status

    def __call__(self, inner: Service[Request, Response], /) -> Service[Request, Response]:
        async def serve(request: Request) -> Response:
            location = self._rule(request)
            if location is None:
                return await inner(request)
            return Response(self._status, Headers([("Location", location)]))

        return serve


class RewriteLayer:
    """Rewrites the path (with its query) of requests: the first pattern that matches at its beginning is replaced,
    as by :func:`re.sub` with count 1. A result that is no path is 500: a mistake in the rules."""

    accepts = Request

    def __init__(self, rules: Iterable[tuple[str, str]]) -> None:
        self._rules = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def __call__(self, inner: Service[Request, Response], /) -> Service[Request, Response]:
        async def serve(request: Request) -> Response:
            for pattern, replacement in self._rules:
                match = pattern.match(request.path)
                if match is not None:
                    request.path = _checked(match.expand(replacement) + request.path[match.end() :])
                    break
            return await inner(request)

        return serve


def _checked(path: str) -> str:
    try:
        return parse_target("GET", path if path.startswith("/") else f"bad {path}").path
    except ValueError as error:
        raise HttpError(500, "a rewrite rule made a bad path") from error
