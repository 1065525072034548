"""Bounds of HTTP connections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["HttpLimits", "HttpTimeouts", "OriginOptions"]


@dataclass(frozen=True, slots=True)
class OriginOptions:
    """How one upstream is treated.

    With ``keep`` off each request has a connection of its own: a server that sends a second response where none is
    due then answers nobody else with it. ``lenient`` takes what old servers send and what can be read in one way
    only: blanks around chunk sizes and before colons, folded fields, one length told twice, a 204 with a length. What
    is sent on is written anew, and strict."""

    keep: bool = True
    lenient: bool = False


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Sizes in bytes unless said otherwise. A peer that exceeds one gets the status in brackets, or 502 is sent on
    where an upstream does."""

    target: int = 16 * 1024
    """The request target (414)."""
    head: int = 64 * 1024
    """Request or status line and all header fields (431)."""
    fields: int = 128
    """Number of header fields (431)."""
    body: int | None = None
    """The content of a message (413), None for no bound: bodies stream and are never held."""
    chunk_line: int = 512
    """A chunk-size line with its extensions (400)."""
    trailers: int = 8 * 1024
    """The trailer section (431)."""
    interim: int = 16
    """Number of interim (1xx) responses before a final one."""
    engine: Literal["strict", "h11"] = "strict"
    """Who reads HTTP/1.1: our reader; or ours and h11, and what these two do not read the same is refused (400)."""


@dataclass(frozen=True, slots=True)
class HttpTimeouts:
    """Seconds. The client that is too slow gets 408 where a response is still possible, else its connection ends.

    A healthy exchange may be slow: events, long polls, reports that are computed. So bodies and responses have what
    tunnels have, an idle time, and only clients can be asked for a rate."""

    head: float = 10.0
    """From the first byte of a request to the end of its header section."""
    idle: float = 60.0
    """Between two requests on one connection, and until the first."""
    body: float = 300.0
    """Between two reads of a body that bring bytes, in both directions."""
    body_grace: float = 10.0
    """How long a client's body may be read at less than ``body_rate``."""
    body_rate: float = 0.0
    """Bytes a second that a client must average while its body is waited for; 0 for no minimum."""
    write: float = 300.0
    """Until a peer takes what was written to it."""
    response: float = 300.0
    """From the end of a request to an upstream's response (504)."""
    expect_continue: float = 1.0
    """How long an upstream's 100 (Continue) is waited for before the body is sent without."""
    watch: float = 1.0
    """How long a request is served before it is worth watching whether its client has reset the connection."""
    linger: float = 2.0
    """How long what a client still sends is discarded, so that it can read the response that refused it."""
