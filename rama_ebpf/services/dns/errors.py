"""Why a name has no address."""

from __future__ import annotations

from ...core.errors import RamaError

__all__ = ["ResolveError", "ResolveTimeout"]


class ResolveError(RamaError):
    """A name has no usable address. ``temporary`` is true if a retry may succeed (SERVFAIL, no answer in time)."""

    kind = "resolve"

    def __init__(self, message: str, *, temporary: bool = False) -> None:
        super().__init__(message)
        self.temporary = temporary


class ResolveTimeout(ResolveError):
    """No name server has answered in time."""

    kind = "resolve_timeout"

    def __init__(self, message: str) -> None:
        super().__init__(message, temporary=True)
