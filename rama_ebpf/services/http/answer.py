"""Calling the service: whatever it does, there is a response that fits the request."""

from __future__ import annotations

import logging

from ...core.address import SocketAddress
from ...core.service import Service
from .errors import ConnectionDropped
from .gateway import error_response, to_http_error
from .model import Request, Response

__all__ = ["checked_response"]

log = logging.getLogger(__name__)


async def checked_response(
    service: Service[Request, Response], request: Request, name: str, peer: SocketAddress | None
) -> Response:
    """Return the service's response to ``request``, or the error response for what it raised.

    A response that does not fit, such as 101 to a request that asked for no upgrade, is a bug of the service: 500.
    ``name`` stands in Proxy-Status, ``peer`` in the log. Raises :class:`ConnectionDropped` if the service did.
    """
    try:
        response = await service(request)
        await _check(request, response)
        return response
    except ConnectionDropped:
        raise
    except Exception as error:
        refusal = to_http_error(error)
        if refusal.status == 500:
            log.exception("%s: service failed on %s", peer, request.method)
        else:
            log.info("%s: %s %s: %s", peer, request.method, refusal.status, error)
        return error_response(refusal, name)


async def _check(request: Request, response: Response) -> None:
    switches = response.upgrade is not None
    if request.method == "CONNECT":
        fits = switches == (200 <= response.status < 300)
    else:
        fits = switches == (response.status == 101) and not (switches and request.upgrade is None)
    if fits and (200 <= response.status <= 599 or switches):
        return
    await response.body.close()
    if response.upgrade is not None:
        response.upgrade.abandon()
    raise ValueError(f"a {response.status} response {'with' if switches else 'without'} upgrade to {request.method}")
