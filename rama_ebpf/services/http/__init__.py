"""HTTP: servers, clients and proxies. Services are ``async def app(request: Request) -> Response``."""

from .errors import HttpError, MalformedMessage
from .headers import Headers
from .limits import HttpLimits, HttpTimeouts
from .model import Body, BodyTooLarge, Request, Response, Upgrade
from .pool import ConnectionPool, PoolLimits
from .proxy import ForwardProxy, HttpProxy
from .server import HttpServer
from .tunnel import Tunnel

__all__ = [
    "Body",
    "BodyTooLarge",
    "ConnectionPool",
    "ForwardProxy",
    "Headers",
    "HttpError",
    "HttpLimits",
    "HttpProxy",
    "HttpServer",
    "HttpTimeouts",
    "MalformedMessage",
    "PoolLimits",
    "Request",
    "Response",
    "Tunnel",
    "Upgrade",
]
