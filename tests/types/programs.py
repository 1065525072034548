"""Programs as users write them. mypy --strict checks it as if it stood in a project of its own; it is not run."""

from __future__ import annotations

from rama_ebpf.core import Authority, Service, Stream, stack
from rama_ebpf.core.auth import Credentials, User
from rama_ebpf.core.target import Target
from rama_ebpf.layers import RateLimitLayer, StaticUsers, TimeoutLayer, TraceLayer
from rama_ebpf.services.http import Request, Response
from rama_ebpf.services.http.layers.auth import ProxyAuthLayer
from rama_ebpf.services.socks5 import Socks5Server
from rama_ebpf.services.tls.peek import TlsPeekLayer


async def app(request: Request) -> Response:
    return Response.text(200, "ok")


async def count(stream: Stream) -> int:
    return 1


async def check(credentials: Credentials) -> User:
    return User(credentials.username)


async def to_target(target: Target) -> Stream:
    raise NotImplementedError


async def to_authority(target: Authority) -> Stream:
    raise NotImplementedError


by_target: Service[Stream, object] = Socks5Server(to_target, auth=check)
by_authority: Service[Stream, object] = Socks5Server(to_authority, auth=StaticUsers({"tom": "secret"}))

counted: Service[Stream, int] = stack(TraceLayer(), TimeoutLayer(), RateLimitLayer(5), count)
peeked: Service[Stream, int] = stack(TimeoutLayer(), TlsPeekLayer(), count)
answered: Service[Request, Response] = stack(TraceLayer(), ProxyAuthLayer(check), app)
