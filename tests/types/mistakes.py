"""Mistakes that a type checker reports, each on the line that has one. It is checked by mypy --strict, and not run."""

from __future__ import annotations

from rama_ebpf.core import Authority, Service, Stream, stack
from rama_ebpf.core.auth import Credentials, User
from rama_ebpf.layers import RateLimitLayer, TimeoutLayer, TraceLayer
from rama_ebpf.services.http import HttpServer, Request, Response
from rama_ebpf.services.http.layers.auth import ProxyAuthLayer
from rama_ebpf.services.socks5 import Socks5Server


async def app(request: Request) -> Response:
    return Response.text(200, "ok")


async def count(stream: Stream) -> int:
    return 1


def sync_auth(credentials: Credentials) -> User:
    return User(credentials.username)


async def to_authority(target: Authority) -> Stream:
    raise NotImplementedError


a = stack(TimeoutLayer(), app)  # mistake: a layer of streams around an application
b = HttpServer(count)  # mistake: a service of streams as application
c = Socks5Server(to_authority, auth=sync_auth)  # mistake: not async
d = ProxyAuthLayer({"tom": "secret"})  # mistake: no authenticator
e = RateLimitLayer(1, key="source")  # mistake: no function
f: Service[Stream, str] = stack(TraceLayer(), count)  # mistake: it returns an int
g: Service[Request, int] = stack(TimeoutLayer(), TraceLayer(), count)  # mistake: it takes streams
h = Socks5Server(count)  # mistake: no connector
