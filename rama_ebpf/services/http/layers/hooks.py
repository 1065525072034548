"""Hooks for user code: on requests, on responses, and on the bytes of their bodies as they stream by."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ....core.service import Service
from ..message.model import Body, Request, Response

__all__ = ["HookLayer", "MappedBody"]


class MappedBody(Body):
    """A body each chunk of which passes through ``change``, and at its end b"" does, to flush what it held back.

    The length becomes unknown. Chunks are cut where the network cut them.
    """

    def __init__(self, inner: Body, change: Callable[[bytes], bytes]) -> None:
        self._inner = inner
        self._change = change
        self._ended = False
        self.expects_continue = inner.expects_continue
        self.length = 0 if inner.length == 0 else None

    async def next(self) -> bytes:
        while not self._ended:
            chunk = await self._inner.next()
            self._ended = not chunk
            changed = self._change(chunk)
            if changed:
                return changed
        self.trailers = self._inner.trailers
        return b""

    async def close(self) -> None:
        await self._inner.close()


class HookLayer:
    """Calls user code around the service inside.

    ``on_request`` may change the request, or return a response and so answer it. ``on_response`` gets both and may
    change the response. ``request_body`` and ``response_body`` are asked for each message whether its bytes are to
    be changed: they return a function from bytes to bytes (see :class:`MappedBody`), or None. Bodies come as they
    were sent: of a message with a Content-Encoding, compressed, unless a :class:`~.decode.DecodeLayer` is inside.
    """

    accepts = Request

    def __init__(
        self,
        *,
        on_request: Callable[[Request], Awaitable[Response | None]] | None = None,
        on_response: Callable[[Request, Response], Awaitable[None]] | None = None,
        request_body: Callable[[Request], Callable[[bytes], bytes] | None] | None = None,
        response_body: Callable[[Request, Response], Callable[[bytes], bytes] | None] | None = None,
    ) -> None:
        self._on_request = on_request
        self._on_response = on_response
        self._request_body = request_body
        self._response_body = response_body

    def __call__(self, inner: Service[Request, Response], /) -> Service[Request, Response]:
        async def serve(request: Request) -> Response:
            response = None if self._on_request is None else await self._on_request(request)
            if response is None:
                change = None if self._request_body is None else self._request_body(request)
                if change is not None:
                    request.body = MappedBody(request.body, change)
                response = await inner(request)
            try:
                if self._on_response is not None:
                    await self._on_response(request, response)
                change = None if self._response_body is None else self._response_body(request, response)
            except BaseException:
                await response.body.close()
                if response.upgrade is not None:
                    response.upgrade.abandon()
                raise
            if change is not None:
                response.body = MappedBody(response.body, change)
            return response

        return serve
