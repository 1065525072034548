"""Keys for :class:`~rama_ebpf.layers.rate.RateLimitLayer` that only HTTP has; what it refuses is 429."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from ....core.client import HasExtensions
from ..message.model import Request

__all__ = ["by_header"]


def by_header(name: str) -> Callable[[HasExtensions], Hashable]:
    """Count per value of a header field, such as an API key; requests without it share one key.

    Clients choose their headers: behind this belongs something that checks the value, or a limit per source too.
    """

    def key(input: HasExtensions) -> Hashable:
        assert isinstance(input, Request)
        return tuple(input.headers.get_all(name))

    return key
