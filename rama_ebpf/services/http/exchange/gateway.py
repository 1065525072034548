"""Which status a failure behind a proxy gets (RFC 9110 section 15.6), and its Proxy-Status (RFC 9209).

502: the upstream was not reached or did not speak HTTP. 503: we, or all upstreams, have no capacity. 504: it did not
answer in time. 403: policy forbids the target.
"""

from __future__ import annotations

import errno
import math
from typing import Final

from ....core.errors import AuthFailed, Busy, LimitExceeded, PolicyDenied, RamaError, RateExceeded
from ...connect import ConnectError, ResolveError
from ..message.errors import ClientDenied, HttpError
from ..message.headers import Headers
from ..message.model import Body, BodyTooLarge, Response

__all__ = ["error_response", "to_http_error"]

_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
_UNREACHABLE: Final = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETDOWN})


def to_http_error(error: Exception) -> HttpError:
    """Return the HTTP error for what a service raised; 500 for what is a bug."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, ClientDenied):
        return HttpError(403, "the client is not allowed", proxy_error="http_request_denied")
    if isinstance(error, PolicyDenied):
        return HttpError(403, "the target is not allowed", proxy_error="destination_ip_prohibited")
    if isinstance(error, BodyTooLarge):
        return HttpError(413, "the body is too large", close=True)
    if isinstance(error, RateExceeded):
        return HttpError(
            429, "too many requests", headers=[("Retry-After", str(math.ceil(min(error.retry_after, 86400))))]
        )
    if isinstance(error, AuthFailed):
        return HttpError(403, "authentication failed")
    if isinstance(error, Busy):
        seconds = str(math.ceil(min(max(error.retry_after, 1), 86400)))
        return HttpError(503, "too busy now", headers=[("Retry-After", seconds)])
    if isinstance(error, LimitExceeded):
        return HttpError(503, "a limit is reached", proxy_error="proxy_internal_error")
    if isinstance(error, ResolveError):
        if error.temporary:
            return HttpError(504, "the target's name could not be resolved in time", proxy_error="dns_timeout")
        return HttpError(502, "the target's name has no address", proxy_error="dns_error")
    if isinstance(error, TimeoutError):
        return HttpError(504, "the upstream did not answer in time", proxy_error="connection_read_timeout")
    if isinstance(error, OSError):
        return _from_os_error(error)
    if isinstance(error, RamaError):
        return HttpError(502, "the upstream failed", proxy_error="connection_terminated")
    return HttpError(500, "the service failed")


def _from_os_error(error: OSError) -> HttpError:
    if error.errno in _RESOURCES:
        return HttpError(503, "the proxy is out of resources", proxy_error="proxy_internal_error")
    if error.errno == errno.ETIMEDOUT:
        return HttpError(504, "the target did not accept a connection in time", proxy_error="connection_timeout")
    if error.errno == errno.ECONNREFUSED:
        return HttpError(502, "the target refused the connection", proxy_error="connection_refused")
    if error.errno in _UNREACHABLE:
        return HttpError(502, "the target cannot be reached", proxy_error="destination_ip_unroutable")
    if isinstance(error, ConnectError):
        return HttpError(502, "the target could not be connected to", proxy_error="destination_unavailable")
    return HttpError(502, "the upstream closed the connection", proxy_error="connection_terminated")


def error_response(error: HttpError, name: str) -> Response:
    """Return the response for an error; ``name`` is how this proxy calls itself in Proxy-Status."""
    headers = Headers([("Content-Type", "text/plain; charset=utf-8"), *error.headers])
    if error.proxy_error:
        headers.add("Proxy-Status", f"{name}; error={error.proxy_error}")
    return Response(error.status, headers, Body.of(error.body), close=error.close)
