"""Basic authentication (RFC 7617), towards a proxy (407) or an origin (401)."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable
from dataclasses import replace

from ....core.auth import Authenticator, Credentials, known_at_once
from ....core.blame import judge
from ....core.client import client_address
from ....core.errors import AuthFailed
from ....core.offender import strike
from ....core.request_log import Refusal
from ....core.service import Service, check_fit
from ..exchange.quick import Dial, Exchange, decide_aside, decides, dial_aside, dial_of, dials, quick_of
from ..message.headers import Headers
from ..message.model import Body, Request, Response

__all__ = ["BasicAuthLayer", "ProxyAuthLayer"]


class _Basic:
    def __init__(self, authenticate: Authenticator, realm: str, *, proxy: bool) -> None:
        if '"' in realm or "\\" in realm or not realm.isascii() or not realm.isprintable():
            raise ValueError(f"the realm must be plain text, not {realm!r}")
        check_fit(self, Credentials, authenticate)
        self._authenticate = authenticate
        self._known = known_at_once(authenticate)
        self._status = 407 if proxy else 401
        self._field = "Proxy-Authorization" if proxy else "Authorization"
        self._challenge = (
            "Proxy-Authenticate" if proxy else "WWW-Authenticate",
            f'Basic realm="{realm}", charset="UTF-8"',
        )

    async def refusal(self, request: Request) -> Response | None:
        """Authenticate ``request`` and add its user to the extensions, or return the response that asks for it."""
        fields = request.headers.get_all(self._field)
        kind = "auth_absent"
        if fields:
            try:
                request.extensions.add(await self._authenticate(_credentials(request, fields)))
            except AuthFailed as error:
                kind = error.kind
                judgement = judge(error)
                if judgement is not None and judgement.strikes:
                    strike(request.extensions, error.kind)
            else:
                return None
        request.extensions.add(Refusal(kind))
        headers = Headers([("Content-Type", "text/plain; charset=utf-8"), self._challenge])
        return Response(self._status, headers, Body.of(b"authentication required\n"))

    def quick(
        self,
        inner: Service[Request, Response],
        serve: Callable[[Request], Awaitable[Response]],
        passed_on: Callable[[Request], None] = lambda _request: None,
    ) -> None:
        """Let ``serve`` decide at once where ``inner`` does, for users who are known without waiting; ``passed_on`` is
        called with the request that goes on."""
        decide, dial, known = quick_of(inner), dial_of(inner), self._known
        if known is None:
            return

        def let_through(request: Request) -> Request | None:
            """Return the request that goes on, None if the coroutine is to decide."""
            fields = request.headers.get_all(self._field)
            try:
                user = known(_credentials(request, fields)) if fields else None
            except AuthFailed:
                return None  # the coroutine meets it as well, and answers
            if user is None:
                return None
            told = replace(request, extensions=request.extensions.fork())  # for nothing may have happened
            told.extensions.add(user)
            passed_on(told)
            return told

        if decide is not None:

            def quick_exchange(request: Request) -> Exchange | None:
                told = let_through(request)
                return None if told is None else decide_aside(decide, request, told)

            decides(serve, quick_exchange)
        if dial is not None:

            def quick_connect(request: Request) -> Dial | None:
                told = let_through(request)
                return None if told is None else dial_aside(dial, request, told)

            dials(serve, quick_connect)


class ProxyAuthLayer:
    """Lets requests through whose Proxy-Authorization ``authenticate`` accepts; the others get 407, and the
    connection stays open for the next attempt.

    The :class:`~rama_ebpf.core.auth.User` is added to the request's extensions. Wrong credentials count as a strike;
    none do not, for most clients begin without.
    """

    accepts = Request

    def __init__(self, authenticate: Authenticator, *, realm: str = "proxy") -> None:
        self._basic = _Basic(authenticate, realm, proxy=True)

    def __call__(self, inner: Service[Request, Response], /) -> Service[Request, Response]:
        async def serve(request: Request) -> Response:
            return await self._basic.refusal(request) or await inner(request)

        self._basic.quick(inner, serve)
        return serve


class BasicAuthLayer:
    """As :class:`ProxyAuthLayer`, with Authorization and 401. The field is removed before the request goes on,
    unless ``forward``."""

    accepts = Request

    def __init__(self, authenticate: Authenticator, *, realm: str = "restricted", forward: bool = False) -> None:
        self._basic = _Basic(authenticate, realm, proxy=False)
        self._forward = forward

    def __call__(self, inner: Service[Request, Response], /) -> Service[Request, Response]:
        async def serve(request: Request) -> Response:
            refusal = await self._basic.refusal(request)
            if refusal is not None:
                return refusal
            self._strip(request)
            return await inner(request)

        self._basic.quick(inner, serve, self._strip)
        return serve

    def _strip(self, request: Request) -> None:
        if not self._forward:
            request.headers = request.headers.copy()
            request.headers.remove("Authorization")


def _credentials(request: Request, fields: list[str]) -> Credentials:
    scheme, _, token = fields[0].partition(" ")
    if len(fields) > 1 or scheme.lower() != "basic":
        raise AuthFailed("credentials of a scheme other than Basic, or twice", kind="auth_absent")
    try:
        username, colon, password = base64.b64decode(token.strip(), validate=True).decode("utf-8").partition(":")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise AuthFailed("malformed Basic credentials", kind="auth_absent") from error
    if not colon:
        raise AuthFailed("malformed Basic credentials", kind="auth_absent")
    client = client_address(request)
    return Credentials(username, password, None if client is None else client.ip)
