"""Errors that cross a service boundary.

Every error has a ``kind``: a short stable word that serves as a metric label and in log lines. The text is for
people. Protocol packages subclass these and add the bytes that the peer is to be sent (``wire``). Who is to blame for a
kind, and so whether it is a strike, stands in :mod:`~rama_ebpf.core.blame`: a new kind needs a row there.
"""

from __future__ import annotations

__all__ = [
    "AuthFailed",
    "Busy",
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

    ``wire`` is the complete reply that the protocol prescribes for this error (may be empty). ``kind`` says more
    exactly what it was.
    """

    kind = "protocol"

    def __init__(self, message: str, wire: bytes = b"", *, kind: str | None = None) -> None:
        super().__init__(message)
        self.wire = wire
        if kind is not None:
            self.kind = kind


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
    """A client gave no valid credentials. The text never holds a password.

    ``kind`` is ``auth_absent`` where it offered none, or none of a form that is taken: nothing was guessed.
    """

    kind = "auth_failed"

    def __init__(self, message: str = "", *, kind: str | None = None) -> None:
        super().__init__(message)
        if kind is not None:
            self.kind = kind


class LimitExceeded(RamaError):
    """A configured bound (buffer, rate, concurrency) was reached."""

    kind = "limit"


class RateExceeded(LimitExceeded):
    """More came than the rate allows. ``retry_after`` is when the next would be let in, in seconds."""

    kind = "rate_limit"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Busy(LimitExceeded):
    """We have no time for it now; the client has done nothing wrong and may try again in ``retry_after`` seconds."""

    kind = "busy"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
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
