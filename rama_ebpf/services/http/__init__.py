"""HTTP: servers, clients and proxies. Services are ``async def app(request: Request) -> Response``."""

from .backends import BackendPool
from .errors import ConnectionDropped, HttpError, MalformedMessage
from .forwarded import ForwardedField, ForwardedLayer, TrustedPeersLayer
from .headers import Headers
from .health import HealthCheck, PassiveHealth
from .intercept import HttpInspector
from .limits import HttpLimits, HttpTimeouts, OriginOptions
from .model import Body, BodyTooLarge, Request, Response, Upgrade
from .pool import ConnectionPool, PoolLimits
from .proxy import ForwardProxy, HttpProxy
from .routes import Route, Routes
from .server import HttpServer
from .tunnel import Tunnel

__all__ = [
    "BackendPool",
    "Body",
    "BodyTooLarge",
    "ConnectionDropped",
    "ConnectionPool",
    "ForwardProxy",
    "ForwardedField",
    "ForwardedLayer",
    "Headers",
    "HealthCheck",
    "HttpError",
    "HttpInspector",
    "HttpLimits",
    "HttpProxy",
    "HttpServer",
    "HttpTimeouts",
    "MalformedMessage",
    "OriginOptions",
    "PassiveHealth",
    "PoolLimits",
    "Request",
    "Response",
    "Route",
    "Routes",
    "TrustedPeersLayer",
    "Tunnel",
    "Upgrade",
]
