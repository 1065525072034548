"""Rewriting JSON in bodies: user code gets values, and nothing of framing, codings and lengths."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final

from ....core.service import Service
from ..message.errors import HttpError
from ..message.headers import Headers
from ..message.model import Body, BodyTooLarge, Request, Response

__all__ = ["Json", "JsonLayer"]

Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None
"""What JSON can say (RFC 8259)."""

_OF_THE_BYTES: Final = ("content-length", "content-md5", "content-digest", "digest", "etag", "last-modified")


class JsonLayer:
    """Calls ``response`` with each response's JSON, and ``request`` with each request's; what they return is sent on.

    A body counts as JSON by its Content-Type (``application/json``, ``…+json``, RFC 6839). Put a
    :class:`~.decode.DecodeLayer` inside, or one with a Content-Encoding stays as it is. It is read as a whole: above
    ``max_body`` bytes the message is refused (413, a response 502). What does not parse goes on unchanged, byte for
    byte, and so do ranges and ``Cache-Control: no-transform``.
    """

    accepts = Request

    def __init__(
        self,
        *,
        response: Callable[[Request, Json], Json] | None = None,
        request: Callable[[Request, Json], Json] | None = None,
        max_body: int = 4 * 1024 * 1024,
    ) -> None:
        if response is None and request is None:
            raise ValueError("nothing to rewrite: give response=, request=, or both a function")
        if max_body < 1:
            raise ValueError(f"max_body must be at least 1, not {max_body}")
        self._response = response
        self._request = request
        self._max_body = max_body

    def __call__(self, inner: Service[Request, Response], /) -> Service[Request, Response]:
        async def serve(request: Request) -> Response:
            rewrite = self._request
            if rewrite is not None and _is_json(request.headers):
                too_large = HttpError(413, "the body is too large", close=True)
                request.headers = request.headers.copy()
                request.body = await self._rewritten(
                    request.body, request.headers, lambda value: rewrite(request, value), too_large
                )
            response = await inner(request)
            answer = self._response
            bodiless = request.method == "HEAD" or response.status in (204, 206, 304) or response.upgrade is not None
            if answer is not None and not bodiless and _is_json(response.headers):
                too_large = HttpError(502, "the upstream's response is too large", close=True)
                response.headers = response.headers.copy()
                response.body = await self._rewritten(
                    response.body, response.headers, lambda value: answer(request, value), too_large
                )
            return response

        return serve

    async def _rewritten(
        self, body: Body, headers: Headers, rewrite: Callable[[Json], Json], too_large: HttpError
    ) -> Body:
        try:
            data = await body.read(self._max_body)
        except BodyTooLarge as error:
            await body.close()
            raise too_large from error
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return Body.of(data)
        changed = json.dumps(rewrite(value), ensure_ascii=False, separators=(",", ":")).encode()
        headers.remove(*_OF_THE_BYTES)
        return Body.of(changed)


def _is_json(headers: Headers) -> bool:
    kind = (headers.get("content-type") or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        return False
    if "content-range" in headers or "no-transform" in headers.tokens("cache-control"):
        return False
    return all(coding == "identity" for coding in headers.tokens("content-encoding"))
