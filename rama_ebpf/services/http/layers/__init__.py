"""Layers for HTTP services, one small file each."""

from .auth import BasicAuthLayer, ProxyAuthLayer
from .cors import CorsLayer
from .decode import DecodeLayer
from .har import HarLayer, HarRecorder
from .headers import RequestHeadersLayer, ResponseHeadersLayer
from .hooks import HookLayer, MappedBody
from .json_body import Json, JsonLayer
from .rate import by_header
from .redirect import RedirectLayer, RewriteLayer, to_https
from .request_id import RequestId, RequestIdLayer

__all__ = [
    "BasicAuthLayer",
    "CorsLayer",
    "DecodeLayer",
    "HarLayer",
    "HarRecorder",
    "HookLayer",
    "Json",
    "JsonLayer",
    "MappedBody",
    "ProxyAuthLayer",
    "RedirectLayer",
    "RequestHeadersLayer",
    "RequestId",
    "RequestIdLayer",
    "ResponseHeadersLayer",
    "RewriteLayer",
    "by_header",
    "to_https",
]
