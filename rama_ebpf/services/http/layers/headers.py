"""Setting, adding and removing header fields."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ....core.service import Service
from ..message.headers import Headers
from ..message.model import Request, Response

__all__ = ["RequestHeadersLayer", "ResponseHeadersLayer"]


class _Edit:
    def __init__(self, set: Mapping[str, str], add: Mapping[str, str], remove: Collection[str]) -> None:
        Headers([*set.items(), *add.items()])  # raises ValueError for a bad field now and not at a request
        self._set = dict(set)
        self._add = dict(add)
        self._remove = tuple(remove)

    def apply(self, headers: Headers) -> Headers:
        edited = headers.copy()
        edited.remove(*self._remove)
        for name, value in self._set.items():
            edited.set(name, value)
        for name, value in self._add.items():
            edited.add(name, value)
        return edited


class RequestHeadersLayer:
    """Changes the fields of requests: first ``remove``, then ``set`` (the only field of its name), then ``add``.

    Raises ValueError for a field that cannot be one.
    """

    accepts = Request

    def __init__(
        self,
        *,
        set: Mapping[str, str] | None = None,
        add: Mapping[str, str] | None = None,
        remove: Collection[str] = (),
    ) -> None:
        self._edit = _Edit(set or {}, add or {}, remove)

    def __call__(self, inner: Service[Request, Response], /) -> Service[Request, Response]:
        async def serve(request: Request) -> Response:
            request.headers = self._edit.apply(request.headers)
            return await inner(request)

        return serve


class ResponseHeadersLayer:
    """Changes the fields of responses, as :class:`RequestHeadersLayer` does those of requests."""

    accepts = Request

    def __init__(
        self,
        *,
        set: Mapping[str, str] | None = None,
        add: Mapping[str, str] | None = None,
        remove: Collection[str] = (),
    ) -> None:
        self._edit = _Edit(set or {}, add or {}, remove)

    def __call__(self, inner: Service[Request, Response], /) -> Service[Request, Response]:
        async def serve(request: Request) -> Response:
            response = await inner(request)
            response.headers = self._edit.apply(response.headers)
            return response

        return serve
