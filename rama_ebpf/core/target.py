"""A target together with the client that asks for it, so that connectors can choose by either."""

from __future__ import annotations

from dataclasses import dataclass, field

from .address import Authority
from .extensions import Extensions

__all__ = ["Target"]


@dataclass(frozen=True, slots=True)
class Target(Authority):
    """An :class:`Authority` that carries the client's extensions.

    Protocol servers call their connector with one. A connector that does not care sees an authority; a
    :class:`~rama_ebpf.core.routing.Router` of connectors can choose the way out by the client's user, address or
    options as well as by the target. The extensions take no part in comparisons.
    """

    extensions: Extensions = field(default_factory=Extensions, compare=False, repr=False)
