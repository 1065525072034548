"""How many handshakes may be under way at once."""

from __future__ import annotations

from ...core.errors import LimitExceeded

__all__ = ["HandshakeLimit"]


class HandshakeLimit:
    """A context manager that at most ``most`` connections can be inside of; the next one raises
    :class:`LimitExceeded` at once, for to wait in line would only hold more sockets."""

    def __init__(self, most: int) -> None:
        if most < 1:
            raise ValueError(f"the number of handshakes must be at least 1, not {most}")
        self._most = most
        self.live = 0

    def __enter__(self) -> None:
        if self.live >= self._most:
            raise LimitExceeded(f"{self.live} TLS handshakes are under way")
        self.live += 1

    def __exit__(self, *_exception: object) -> None:
        self.live -= 1
