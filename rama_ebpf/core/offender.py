"""How a protocol reports a misbehaving client that it answers politely, instead of raising."""

from __future__ import annotations

from collections.abc import Callable

from .extensions import Extensions

__all__ = ["Offender", "strike"]


class Offender:
    """Added to the extensions by whoever counts strikes; ``report`` takes the reason."""

    def __init__(self, report: Callable[[str], object]) -> None:
        self.report = report


def strike(extensions: Extensions, reason: str) -> None:
    """Count one strike against the client that these extensions belong to; does nothing where nobody counts them."""
    offender = extensions.get(Offender)
    if offender is not None:
        offender.report(reason)
