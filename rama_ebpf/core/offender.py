"""How a protocol reports a misbehaving client that it answers politely, instead of raising."""

from __future__ import annotations

from collections.abc import Callable

from .address import SocketAddress
from .client import ClientAddress
from .extensions import Extensions

__all__ = ["Offender", "strike"]


class Offender:
    """Added to the extensions by whoever counts strikes; ``report`` takes the reason, and who is to blame (None: the
    client of the connection)."""

    def __init__(self, report: Callable[[str, SocketAddress | None], object]) -> None:
        self.report = report


def strike(extensions: Extensions, reason: str) -> None:
    """Count one strike against the client that these extensions belong to: of a request that a trusted proxy has
    forwarded, whom that named. Does nothing where nobody counts them."""
    offender = extensions.get(Offender)
    if offender is not None:
        told = extensions.get(ClientAddress)
        offender.report(reason, None if told is None else told.address)
