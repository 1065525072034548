"""Keys by which limits are counted."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from ..core.client import HasExtensions, client_address, source_prefix

__all__ = ["Key", "by_client", "by_source", "source_prefix"]

Key = Callable[[HasExtensions], Hashable]
"""Says under which key an input counts; inputs with equal keys share one limit."""


def by_client(input: HasExtensions) -> Hashable:
    """Count per client; clients of a Unix socket, which have no address, each by themselves."""
    address = client_address(input)
    return id(input) if address is None else source_prefix(address.ip)


def by_source(v4: int = 32, v6: int = 64) -> Key:
    """Count per client prefix of ``v4`` (0-32) or ``v6`` (0-128) bits; clients of a Unix socket share one key.

    Raises ValueError for a length out of range.
    """
    if not 0 <= v4 <= 32 or not 0 <= v6 <= 128:
        raise ValueError(f"prefix lengths must be 0-32 and 0-128, not {v4} and {v6}")

    def key(input: HasExtensions) -> Hashable:
        address = client_address(input)
        return None if address is None else source_prefix(address.ip, v4, v6)

    return key
