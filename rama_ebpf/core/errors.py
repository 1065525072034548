"""Errors that cross a service boundary.

Every error has a ``kind``: a short stable word that serves as a metric label and in log lines. The text is for
people. Protocol packages subclass these and add the bytes that the peer is to be sent (``wire``).
"""

from __future__ import annotations

__all__ = [
    "AuthFailed",
    "HandshakeTimeout",
    "IdleTimeout",
    "LimitExceeded",
    "PeerClosed",
    "PolicyDenied",
    "PolicyStrike",
    "ProtocolError",
    "RamaError",
    "RateExceeded",
    "StackError",
    "TotalTimeout",
    "TunnelTimeout",
]


class RamaError(Exception):
    """Base of all errors that this package raises on purpose."""

    kind: str = "error"


class StackError(RamaError, TypeError):
    """A stack was composed of parts that do not fit; raised when it is composed, not when it runs."""

    kind = "stack"


class PeerClosed(RamaError, ConnectionError):
    """The peer ended its stream where more bytes were due."""

    kind = "peer_closed"


class ProtocolError(RamaError):
    """The peer sent what its protocol does not allow.

    ``wire`` is the complete reply that the protocol prescribes for this error (may be empty).
    """

    kind = "protocol"

    def __init__(self, message: str, wire: bytes = b"") -> None:
        super().__init__(message)
        self.wire = wire


class PolicyDenied(RamaError):
    """Policy refuses the source or the target. ``rule`` names the rule that decided."""

    kind = "policy_denied"

    def __init__(self, message: str, rule: str = "") -> None:
        super().__init__(message)
        self.rule = rule


class PolicyStrike(PolicyDenied):
    """Policy refuses the client and holds it against its address: a strike."""

    kind = "policy_strike"


class AuthFailed(RamaError):
    """A client gave no valid credentials. The text never holds a password."""

    kind = "auth_failed"


class LimitExceeded(RamaError):
    """A configured bound (buffer, rate, concurrency) was reached."""

    kind = "limit"


class RateExceeded(LimitExceeded):
    """More came than the rate allows. ``retry_after`` is when the next would be let in, in seconds."""

    kind = "rate_limit"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class HandshakeTimeout(RamaError, TimeoutError):
    """A peer did not finish its handshake in time."""

    kind = "handshake_timeout"


class TunnelTimeout(RamaError, TimeoutError):
    """An established tunnel passed its idle or total time-out."""

    kind = "tunnel_timeout"


class IdleTimeout(TunnelTimeout):
    """No byte moved in either direction for too long."""

    kind = "idle_timeout"


class TotalTimeout(TunnelTimeout):
    """A connection has lived for as long as it may."""

    kind = "total_timeout"
