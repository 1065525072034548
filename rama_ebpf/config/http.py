"""Settings that every service of HTTP has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..services.http import HttpLimits, HttpTimeouts
from .decode import setting
from .kinds import DURATION, Kind, choice, integer

__all__ = ["ENGINE", "HttpTimeoutSettings", "limits_of"]

ENGINE: Final[Kind[str]] = choice("strict", "h11")
"""Who reads HTTP/1.1 (:class:`~rama_ebpf.services.http.HttpLimits`)."""

_DEFAULTS = HttpTimeouts()


@dataclass(frozen=True)
class HttpTimeoutSettings:
    """How long HTTP waits, for clients and for upstreams."""

    head: float | None = setting(
        DURATION, "for a request's header section (10s; in mixed what its handshake says)", default=None
    )
    keep: float = setting(DURATION, "for the next request of a connection", default=_DEFAULTS.idle)
    first_byte: float = setting(DURATION, "for an upstream's response to begin (504)", default=_DEFAULTS.response)
    idle: float = setting(
        DURATION, "without a byte of a body, from the client (408) or from the upstream", default=_DEFAULTS.body
    )
    write: float = setting(DURATION, "for a peer to take what it is sent", default=_DEFAULTS.write)
    client_rate: int = setting(
        integer(0, 1_000_000_000),
        "bytes a second that a client must average while its body is waited for; 0 for no minimum",
        default=0,
    )
    client_grace: float = setting(DURATION, "before client_rate counts", default=_DEFAULTS.body_grace)

    def timeouts(self, head: float = _DEFAULTS.head) -> HttpTimeouts:
        """Return them as services take them; ``head`` counts where none is set."""
        return HttpTimeouts(
            head=head if self.head is None else self.head,
            idle=self.keep,
            body=self.idle,
            body_grace=self.client_grace,
            body_rate=self.client_rate,
            write=self.write,
            response=self.first_byte,
        )


def limits_of(engine: str, *, body: int | None = None) -> HttpLimits:
    """Return the limits of a service with this engine."""
    return HttpLimits(body=body, engine="h11" if engine == "h11" else "strict")
