"""A name for each request, the same in our log, the upstream's and the client's."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ....core.service import Service
from ..message.model import Request, Response

__all__ = ["RequestId", "RequestIdLayer"]

_PLAIN: Final = re.compile(r"[0-9A-Za-z._-]{1,128}")


@dataclass(frozen=True, slots=True)
class RequestId:
    """The id of a request; among its extensions."""

    text: str


class RequestIdLayer:
    """Sets ``header`` on the request and on its response, and adds a :class:`RequestId`.

    An id that the client sent is kept only with ``trust``, and only if it is plain (letters, digits, ``._-``, at
    most 128): it ends up in logs. ``new`` makes ids, by default random UUIDs.
    """

    accepts = Request

    def __init__(
        self, header: str = "X-Request-Id", *, trust: bool = False, new: Callable[[], str] = lambda: uuid.uuid4().hex
    ) -> None:
        self._header = header
        self._trust = trust
        self._new = new

    def __call__(self, inner: Service[Request, Response], /) -> Service[Request, Response]:
        async def serve(request: Request) -> Response:
            sent = request.headers.get(self._header) or ""
            text = sent if self._trust and _PLAIN.fullmatch(sent) else self._new()
            request.headers = request.headers.copy()
            request.headers.set(self._header, text)
            request.extensions.add(RequestId(text))
            response = await inner(request)
            response.headers.set(self._header, text)
            return response

        return serve
