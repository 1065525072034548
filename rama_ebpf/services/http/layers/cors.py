"""Cross-origin resource sharing (the Fetch standard, section 3.2): which pages of other origins may read responses."""

from __future__ import annotations

from collections.abc import Callable, Collection

from ....core.service import Service
from ..message.headers import Headers
from ..message.model import Request, Response

__all__ = ["CorsLayer"]


class CorsLayer:
    """Answers preflight requests, and tells browsers which responses a page may read.

    ``origins`` are origins such as ``https://app.example``, or a function that decides, or ``"*"`` for any (not with
    ``credentials``: raises ValueError). ``methods`` and ``headers`` are what a page may send beyond the simple
    requests, ``expose`` which response fields it may read, ``max_age`` (seconds) how long browsers may remember it.
    """

    accepts = Request

    def __init__(
        self,
        origins: Collection[str] | Callable[[str], bool],
        *,
        methods: Collection[str] = ("GET", "HEAD", "POST"),
        headers: Collection[str] = (),
        expose: Collection[str] = (),
        credentials: bool = False,
        max_age: int | None = None,
    ) -> None:
        self._any = origins == "*"
        if self._any and credentials:
            raise ValueError("with credentials the origins must be named")
        self._allows = origins if callable(origins) else frozenset(origins).__contains__
        self._methods = ", ".join(methods)
        self._headers = ", ".join(headers)
        self._expose = ", ".join(expose)
        self._credentials = credentials
        self._max_age = max_age

    def __call__(self, inner: Service[Request, Response], /) -> Service[Request, Response]:
        async def serve(request: Request) -> Response:
            origin = request.headers.get("origin")
            if (
                request.method == "OPTIONS"
                and origin is not None
                and "access-control-request-method" in request.headers
            ):
                response = Response(204)
                if self._allow(response.headers, origin):
                    self._preflight(response.headers)
                return response
            response = await inner(request)
            response.headers.remove("access-control-allow-origin", "access-control-allow-credentials")
            if origin is not None and self._allow(response.headers, origin) and self._expose:
                response.headers.set("Access-Control-Expose-Headers", self._expose)
            if not self._any and "origin" not in response.headers.tokens("vary"):
                response.headers.add("Vary", "Origin")
            return response

        return serve

    def _allow(self, headers: Headers, origin: str) -> bool:
        if not self._any and not self._allows(origin):
            return False
        headers.set("Access-Control-Allow-Origin", "*" if self._any else origin)
        if self._credentials:
            headers.set("Access-Control-Allow-Credentials", "true")
        return True

    def _preflight(self, headers: Headers) -> None:
        headers.set("Access-Control-Allow-Methods", self._methods)
        if self._headers:
            headers.set("Access-Control-Allow-Headers", self._headers)
        if self._max_age is not None:
            headers.set("Access-Control-Max-Age", str(self._max_age))
        headers.add("Vary", "Origin")
