"""Settings that every service of HTTP has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ..services.http import HttpLimits, HttpTimeouts
from .decode import setting
from .kinds import DURATION, Kind, choice, integer

__all__ = ["ENGINE", "HttpLimitSettings", "HttpTimeoutSettings", "check_upgrades"]

ENGINE: Final[Kind[str]] = choice("strict", "h11")
"""Who reads HTTP/1.1 (:class:`~rama_ebpf.services.http.HttpLimits`)."""

_DEFAULTS = HttpTimeouts()
_LIMITS = HttpLimits()
_PROTOCOL: Final = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+(/[a-z0-9!#$%&'*+.^_`|~-]+)?")


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
    expect_continue: float = setting(
        DURATION,
        "for an upstream's 100 (Continue), before a body is sent without it",
        default=_DEFAULTS.expect_continue,
    )
    watch: float = setting(
        DURATION, "of serving a request, before it is looked whether its client has gone", default=_DEFAULTS.watch
    )
    linger: float = setting(
        DURATION, "for a refused client to read why; what it still sends is dropped", default=_DEFAULTS.linger
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
            expect_continue=self.expect_continue,
            watch=self.watch,
            linger=self.linger,
        )


@dataclass(frozen=True)
class HttpLimitSettings:
    """How large the parts of a message may be, from clients and from upstreams (502)."""

    target: int = setting(integer(256, 1_048_576), "bytes of a request target (414)", default=_LIMITS.target)
    head: int = setting(integer(1024, 16_777_216), "bytes of a header section (431)", default=_LIMITS.head)
    fields: int = setting(integer(1, 10_000), "header fields (431)", default=_LIMITS.fields)
    chunk_line: int = setting(
        integer(16, 65_536), "bytes of a chunk's size line with its extensions (400)", default=_LIMITS.chunk_line
    )
    trailers: int = setting(integer(0, 1_048_576), "bytes of a trailer section (431)", default=_LIMITS.trailers)
    interim: int = setting(integer(0, 1000), "interim (1xx) responses before a final one", default=_LIMITS.interim)

    def limits(self, engine: str, *, body: int | None = None) -> HttpLimits:
        """Return them as services take them, with this engine."""
        return HttpLimits(
            target=self.target,
            head=self.head,
            fields=self.fields,
            body=body,
            chunk_line=self.chunk_line,
            trailers=self.trailers,
            interim=self.interim,
            engine="h11" if engine == "h11" else "strict",
        )


def check_upgrades(upgrades: tuple[str, ...]) -> None:
    """Raise ValueError unless these are protocols that may be switched to."""
    for name in upgrades:
        if _PROTOCOL.fullmatch(name) is None:
            raise ValueError(f'upgrades: "{name}": a protocol is written in lower case, as in "websocket"')
        if name == "h2c":
            raise ValueError('upgrades: "h2c" would take the requests that follow out of our sight')
