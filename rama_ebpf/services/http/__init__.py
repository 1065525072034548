"""HTTP: servers, clients and proxies. Services are ``async def app(request: Request) -> Response``."""

from .exchange.tunnel import Tunnel
from .layers.forwarded import ForwardedField, ForwardedLayer, TrustedPeersLayer
from .message.errors import ConnectionDropped, HttpError, MalformedMessage
from .message.headers import Headers
from .message.limits import HttpLimits, HttpTimeouts, OriginOptions
from .message.model import Body, BodyTooLarge, Request, Response, Upgrade
from .proxy.backends import BackendPool
from .proxy.duties import DEFAULT_UPGRADES
from .proxy.forward import ForwardProxy, HttpProxy
from .proxy.health import HealthCheck, PassiveHealth
from .proxy.intercept import HttpInspector
from .proxy.pool import ConnectionPool, PoolLimits
from .proxy.routes import Route, Routes
from .server import HttpServer

__all__ = [
    "DEFAULT_UPGRADES",
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
