"""What is asked of another proxy in absolute form, and not of the origin (RFC 9112 section 3.2.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["NeedsTunnel", "ToProxy"]


@dataclass(frozen=True, slots=True)
class ToProxy:
    """An extension of a stream to another proxy: requests on it are in absolute form, and carry ``authorization``, the
    value of Proxy-Authorization, where that is not None. ``refused`` is called for a 407."""

    authorization: str | None = field(repr=False)
    refused: Callable[[], object] = field(repr=False)


@dataclass(frozen=True, slots=True)
class NeedsTunnel:
    """An extension of a request that another protocol will follow: it goes through a tunnel, whoever is on the way."""
