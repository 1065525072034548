"""Every mistake in composing is told when the stack is composed, with the part and the remedy."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rama_ebpf.core import Authority, Service, StackError, Stream, stack
from rama_ebpf.core.auth import Credentials, User
from rama_ebpf.core.extensions import Extensions
from rama_ebpf.core.matchers import TargetPort
from rama_ebpf.core.routing import Router
from rama_ebpf.layers import (
    AuthLayer,
    CatchLayer,
    ConcurrencyLimitLayer,
    HijackLayer,
    RateLimitLayer,
    StaticUsers,
    TimeoutLayer,
    TraceLayer,
    UsernameOptionsLayer,
)
from rama_ebpf.services.connect import Connector
from rama_ebpf.services.forward import Forward
from rama_ebpf.services.http import HttpProxy, HttpServer, Request, Response
from rama_ebpf.services.http.layers.auth import ProxyAuthLayer
from rama_ebpf.services.router import PeekRouter, is_http
from rama_ebpf.services.socks5 import Socks5Client, Socks5Server
from rama_ebpf.services.tls.match import TlsMatch, TlsPolicyLayer, TlsRoute, TlsRouter
from rama_ebpf.services.tls.passthrough import TlsPassthrough
from rama_ebpf.services.tls.peek import TlsPeekLayer


async def on_stream(stream: Stream) -> str:
    return "stream"


async def app(request: Request) -> Response:
    return Response.text(200, "ok")


async def dial(target: Authority) -> Stream:
    raise AssertionError


def sync_dial(target: Authority) -> Stream:
    raise AssertionError


def sync_auth(credentials: Credentials) -> User:
    raise AssertionError


TLS_ROUTER = TlsRouter([TlsRoute(TlsMatch(), on_stream)])

WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "router without peek": (lambda: stack(TimeoutLayer(), TLS_ROUTER), "TlsRouter needs ClientHello and Ja4"),
    "policy without peek": (lambda: stack(TlsPolicyLayer([]), on_stream), "TlsPolicyLayer needs ClientHello and Ja4"),
    "pass-through without peek": (lambda: stack(TlsPassthrough(dial)), "TlsPassthrough needs ClientHello"),
    "peek inside what needs it": (
        lambda: stack(TlsPolicyLayer([]), TlsPeekLayer(), on_stream),
        "TlsPolicyLayer needs ClientHello",
    ),
    "behind a router of protocols": (
        lambda: stack(TimeoutLayer(), PeekRouter((is_http, TLS_ROUTER))),
        "PeekRouter needs ClientHello",
    ),
    "sync authenticator of SOCKS": (
        lambda: Socks5Server(dial, auth=sync_auth),  # type: ignore[arg-type]
        "sync_auth, which is not async",
    ),
    "sync authenticator of HTTP": (
        lambda: ProxyAuthLayer(sync_auth),  # type: ignore[arg-type]
        "sync_auth, which is not async",
    ),
    "sync authenticator of a layer": (lambda: AuthLayer(sync_auth), "sync_auth, which is not async"),  # type: ignore[arg-type]
    "options around a sync authenticator": (
        lambda: UsernameOptionsLayer(lambda name: (name, {}))(sync_auth),  # type: ignore[arg-type]
        "sync_auth, which is not async",
    ),
    "users as a dict": (lambda: Socks5Server(dial, auth={"tom": "secret"}), "needs a service"),  # type: ignore[arg-type]
    "class of an authenticator": (lambda: Socks5Server(dial, auth=StaticUsers), "class StaticUsers"),  # type: ignore[arg-type]
    "class of a connector": (lambda: Socks5Server(Connector), "class Connector"),  # type: ignore[arg-type]
    "sync connector": (lambda: HttpProxy(sync_dial), "sync_dial, which is not async"),  # type: ignore[arg-type]
    "no connector": (lambda: Forward(None, Authority.of("a", 1)), "needs a service"),  # type: ignore[arg-type]
    "layer for a connector": (lambda: Socks5Client(TraceLayer(), Authority.of("a", 1)), "TraceLayer, which is not"),  # type: ignore[arg-type]
    "key of a rate by name": (lambda: RateLimitLayer(1, key="source"), "'source'"),  # type: ignore[arg-type]
    "key of a bound by name": (lambda: ConcurrencyLimitLayer(1, key="source"), "'source'"),  # type: ignore[arg-type]
    "handler that is none": (lambda: CatchLayer("ignore", OSError), "'ignore'"),  # type: ignore[arg-type]
    "matcher that is none": (lambda: Router((25, on_stream)), "needs a matcher"),  # type: ignore[arg-type]
    "class of a layer": (lambda: stack(TimeoutLayer, on_stream), "TimeoutLayer is a class"),
    "class of a service": (lambda: stack(TimeoutLayer(), HttpServer), "HttpServer is a class"),
    "list of layers": (lambda: stack([TimeoutLayer()], on_stream), "is not a layer"),
    "two services": (lambda: stack(on_stream, on_stream), "is a service, but only the last part"),
    "layer last": (lambda: stack(TraceLayer(), TimeoutLayer()), "is not async"),
    "HTTP application on streams": (lambda: stack(TimeoutLayer(), app), "hands on Stream, but app takes Request"),
    "stream service as application": (lambda: HttpServer(on_stream), "takes Stream"),  # type: ignore[arg-type]
    "stream service as connector": (lambda: Socks5Server(on_stream), "takes Stream"),  # type: ignore[arg-type]
    "streams hijacked for an application": (
        lambda: stack(TimeoutLayer(), HijackLayer(TargetPort(25), app), on_stream),
        "routes of one router",
    ),
    "layer of requests on streams": (lambda: stack(ProxyAuthLayer(StaticUsers({})), on_stream), "takes Stream"),
    "nothing": (lambda: stack(), "at least a service"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_stack_fails_when_it_is_composed(mistake: str) -> None:
    compose, message = WRONG[mistake]
    with pytest.raises(StackError, match=message):
        compose()


def test_what_is_given_outside_of_a_part_of_a_stack_is_not_missed() -> None:
    from rama_ebpf.services.tls.client_hello import ClientHello
    from rama_ebpf.services.tls.fingerprint import Ja4

    inside = stack(TimeoutLayer(), TLS_ROUTER, given=(ClientHello, Ja4))
    assert stack(TlsPeekLayer(), inside) is not None
    assert stack(TlsPeekLayer(), TimeoutLayer(), TlsPolicyLayer([]), PeekRouter((is_http, TLS_ROUTER))) is not None


async def test_layer_of_ones_own_can_declare_what_it_adds() -> None:
    class Adds:
        adds = (int,)

        def __call__(self, inner: Service[Extensions, int], /) -> Service[Extensions, int]:
            async def serve(extensions: Extensions, /) -> int:
                extensions.add(3)
                return await inner(extensions)

            return serve

    class Needs:
        needs = (int,)

        async def __call__(self, extensions: Extensions, /) -> int:
            return extensions.require(int)

    assert await stack(Adds(), Needs())(Extensions()) == 3
    with pytest.raises(StackError, match="Needs needs int"):
        stack(TraceLayer(), Needs())
