"""What a server serves, and how: the same for each of its connections, whatever version of HTTP they speak."""

from __future__ import annotations

from dataclasses import dataclass

from ....core.address import SocketAddress
from ....core.service import Service
from ..message.limits import HttpLimits, HttpTimeouts
from ..message.model import Request, Response
from .answer import checked_response

__all__ = ["Served"]


@dataclass(frozen=True, slots=True)
class Served:
    """``service`` answers requests. ``scheme`` is the connection's, and that of its targets unless the service is a
    ``forward`` proxy; ``name`` stands in Proxy-Status."""

    service: Service[Request, Response]
    scheme: str
    name: str
    forward: bool
    limits: HttpLimits
    timeouts: HttpTimeouts

    async def answer(
        self, request: Request, peer: SocketAddress | None, service: Service[Request, Response] | None = None
    ) -> Response:
        """Return the response to ``request`` (:func:`~.answer.checked_response`), of ``service`` if one is given."""
        return await checked_response(service or self.service, request, self.name, peer, forward=self.forward)

    def is_for(self, request: Request) -> bool:
        """Whether the target's scheme is the connection's, where it must be (RFC 9110 section 7.4)."""
        return self.forward or request.scheme == request.arrived_by
