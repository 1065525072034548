"""Calling the service: whatever it does, there is a response that fits the request."""

from __future__ import annotations

import logging

from ....core.address import SocketAddress
from ....core.notes import Note
from ....core.request_log import REFUSAL_FIELD, Refusal, RequestLog, explained
from ....core.service import Service
from ..message.errors import ConnectionDropped, HttpError
from ..message.model import Request, Response
from .gateway import error_response, to_http_error
from .running import note_refusal

__all__ = ["checked_response"]

log = logging.getLogger(__name__)


async def checked_response(
    service: Service[Request, Response],
    request: Request,
    name: str,
    peer: SocketAddress | None,
    *,
    forward: bool = False,
) -> Response:
    """Return the service's response to ``request``, or the error response for what it raised.

    Unless ``forward``, the target's scheme must be that of the connection (RFC 9110 section 7.4): else 421.

    A response that does not fit, such as 101 to a request that asked for no upgrade, is a bug of the service: 500.
    ``name`` stands in Proxy-Status, ``peer`` in the log. Raises :class:`ConnectionDropped` if the service did.
    """
    try:
        if not forward and request.scheme != request.arrived_by:
            raise HttpError(421, f"this connection is not for {request.scheme} targets")
        response = await service(request)
        if not _fits(request, response):
            raise await _misfit(request, response)
        return response if response.status < 400 else _named(request, response)
    except ConnectionDropped:
        raise
    except Exception as error:
        refusal = to_http_error(error)
        note_refusal(request, error)
        if refusal.status == 500:
            log.exception("%s: service failed on %s", peer, request.method)
        elif RequestLog not in request.extensions:
            log.info("%s: %s %s: %s: %s", peer, request.method, request.authority, refusal.status, explained(error))
        return _named(request, error_response(refusal, name))


def _named(request: Request, response: Response) -> Response:
    """Give a response that refuses an id, where refusals have one."""
    log = request.extensions.get(RequestLog)
    if log is not None and log.new_id is not None and Refusal in request.extensions:
        refusal = log.new_id()
        request.extensions.add(Note("refusal", refusal))
        response.headers.add(REFUSAL_FIELD, refusal)
    return response


def _fits(request: Request, response: Response) -> bool:
    status = response.status
    switches = response.upgrade is not None
    if request.method == "CONNECT":
        fits = switches == (200 <= status < 300)
    else:
        fits = switches == (status == 101) and not (switches and request.upgrade is None)
    return fits and (200 <= status <= 599 or switches)


async def _misfit(request: Request, response: Response) -> ValueError:
    switches = response.upgrade is not None
    await response.body.close()
    if response.upgrade is not None:
        response.upgrade.abandon()
    return ValueError(f"a {response.status} response {'with' if switches else 'without'} upgrade to {request.method}")
