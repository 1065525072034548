"""Who is to blame for what went wrong: one table, from the kind of an error to a verdict.

A client is struck, and after some strikes banned, for what proves abuse by that client and for nothing else. This
table is the only statement of it: :class:`~rama_ebpf.layers.strikes.StrikeLayer` acts on it, ``docs/layers.md`` is
written from it (:func:`markdown`), and a test fails for an error kind that has no row.

Three questions decide a row. Could our own slowness cause it? Could an honest but misconfigured client? Could a web
page make a visitor's browser send it (a URL, a header it may set, a TURN server it may name)? One yes: no strike.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .errors import RamaError

__all__ = ["BLAME", "Blame", "Judgement", "judge", "markdown", "speaks_another_protocol"]


class Blame(enum.Enum):
    """Who caused an error."""

    ABUSE = "abuse"
    """No honest client does this. The only blame that strikes."""
    CLIENT = "client"
    """The client's doing, but harmless: a mistake, a silence, or something a web page can cause."""
    OURS = "ours"
    """We are slow, full, or misconfigured, or our policy says no."""
    UPSTREAM = "upstream"
    """The target, its name servers or a proxy on the way to it."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A row of the table: what ``event`` of which ``protocol`` a kind stands for, who is to blame, and why."""

    protocol: str
    event: str
    blame: Blame
    why: str

    @property
    def strikes(self) -> bool:
        """Whether it is a strike."""
        return self.blame is Blame.ABUSE


_NAT: Final = "many users can share one address"
_A, _C, _O, _U = Blame.ABUSE, Blame.CLIENT, Blame.OURS, Blame.UPSTREAM

BLAME: Final[Mapping[str, Judgement]] = {
    # -- any protocol
    "protocol": Judgement("any", "bytes that are of no protocol or break it", _A, "no client of the protocol sends it"),
    "wrong_protocol": Judgement(
        "any",
        "HTTP, TLS, STUN or SOCKS on another protocol's port",
        _C,
        "a URL or a TURN server in a web page, or the wrong kind of proxy in a browser's settings",
    ),
    "peer_closed": Judgement("any", "closed early: preconnects, health checks", _C, "leaving is no offence"),
    "handshake_timeout": Judgement("any", "no complete handshake in time", _C, "silence; under load the delay is ours"),
    "tunnel_timeout": Judgement("any", "a tunnel passed its time-out", _C, "silence"),
    "idle_timeout": Judgement("any", "no byte moved for too long", _C, "silence"),
    "total_timeout": Judgement("any", "older than a connection may be", _C, "our limit"),
    "error": Judgement("any", "anything else", _O, "what is not understood proves nothing"),
    # -- who may come, and how many
    "policy_denied": Judgement("policy", "source or target not allowed", _O, "asking is allowed; we refuse"),
    "policy_strike": Judgement("policy", "a rule whose action is strike", _A, "the operator says so"),
    "limit": Judgement("limits", "a bound is reached", _O, "the bound is ours"),
    "concurrency_limit": Judgement("limits", "too many at once", _O, _NAT),
    "rate_limit": Judgement("limits", "too many a second", _O, _NAT),
    "table_full": Judgement("limits", "more sources than the table holds", _O, "the table is ours"),
    "busy": Judgement("limits", "we have no time for it now", _O, "the queue is ours; retry"),
    "source_queue": Judgement("limits", "more connections of one source wait than all have room", _O, _NAT),
    "client_reset": Judgement("any", "a reset before the first byte", _C, "leaving is no offence"),
    "source_share": Judgement("limits", "more of anything than one source may hold", _O, _NAT),
    "source_connections": Judgement("limits", "more connections than one source may have", _O, _NAT),
    "source_handshakes": Judgement("limits", "more unfinished handshakes of one source", _O, _NAT),
    "source_associations": Judgement("limits", "more UDP associations of one source", _O, _NAT),
    "source_binds": Judgement("limits", "more BINDs of one source", _O, _NAT),
    "source_checks": Judgement("limits", "more passwords of one source wait to be checked", _O, _NAT),
    "untrusted_proxy": Judgement("PROXY", "a peer that nobody trusts", _C, "a stray client"),
    "proxy_protocol": Judgement(
        "PROXY", "a missing or bad header of a trusted peer", _C, "trusted peers are never struck"
    ),
    # -- passwords
    "auth_failed": Judgement("auth", "a wrong password", _A, "guessing"),
    "auth_repeated": Judgement("auth", "the same wrong password while it is checked", _C, "stale, not guessed"),
    "auth_absent": Judgement("auth", "no password, or no method that we take", _C, "clients begin without"),
    # -- SOCKS
    "socks_target": Judgement("SOCKS", "a host name that can be none", _C, "a web page chooses host names"),
    "socks_command": Judgement("SOCKS", "a known command that is not served here", _C, "an honest client may ask"),
    # -- TLS
    "tls_protocol": Judgement("TLS", "a ClientHello that breaks the protocol", _A, "no TLS library sends it"),
    "tls_not_served": Judgement(
        "TLS", "a name, version or ALPN that is not served", _C, "any link can name any host; old clients are old"
    ),
    "not_tls": Judgement("TLS", "other bytes on a TLS port", _C, "http:// for https:// is a typing error"),
    "tls": Judgement("TLS", "a bad record or an alert after the handshake", _C, "middleboxes and lost keys do it"),
    "tls_truncated": Judgement("TLS", "closed without close_notify", _C, "most clients do"),
    "tls_handshake": Judgement("TLS", "no agreement; an alert about our certificate", _C, "it may be our certificate"),
    "tls_certificate": Judgement("TLS", "a certificate that does not verify", _U, "the upstream's, or a mistake"),
    "tls_denied": Judgement("TLS", "a TLS rule whose action is close", _O, "the operator says only to close"),
    "tls_strike": Judgement("TLS", "a TLS rule whose action is strike", _A, "the operator says so"),
    # -- HTTP
    "http": Judgement("HTTP", "an error status that a service chose", _C, "any page can ask for any URL"),
    "http_refused": Judgement(
        "HTTP", "400 for target, Host or field, 408, 413, 414, 417, 431, 501", _C, "a page can make a browser send it"
    ),
    "http_malformed": Judgement(
        "HTTP",
        "framing that two parsers read differently (smuggling), noise",
        _A,
        "browsers frame their messages themselves",
    ),
    "http_dropped": Judgement("HTTP", "a service closed without a response", _O, "the service's wish"),
    "body_too_large": Judgement("HTTP", "413", _C, "a form can do it"),
    "h2": Judgement("HTTP/2", "a connection error of RFC 9113", _A, "browsers frame their messages themselves"),
    "h2_flood": Judgement("HTTP/2", "floods of cheap frames or resets", _C, "a page can abort many requests; we close"),
    # -- on the way to the target
    "connect": Judgement("upstream", "the target cannot be reached", _U, "not the client's"),
    "resolve": Judgement("upstream", "the name has no address", _U, "not the client's"),
    "resolve_timeout": Judgement("upstream", "no name server answers in time", _U, "not the client's"),
    "refused": Judgement("upstream", "a proxy on the way refuses", _U, "not the client's"),
    "circuit_open": Judgement("upstream", "the target is left alone for now", _U, "not the client's"),
    "no_destination": Judgement("upstream", "a client of a Unix socket has no original destination", _O, "our config"),
    "no_route": Judgement("upstream", "no backend for it", _O, "our configuration"),
}
"""By kind. What an operator's own configuration or the server itself raises has no row: no client meets it."""


def judge(error: BaseException) -> Judgement | None:
    """Return the row for ``error``: of its kind, or the kind of the nearest base class that has one.

    None for an error that is not a :class:`RamaError`, and for kinds without any row: they never strike.
    """
    if not isinstance(error, RamaError):
        return None
    if error.kind in BLAME:
        return BLAME[error.kind]
    kinds = (vars(base).get("kind") for base in type(error).__mro__)
    return next((BLAME[kind] for kind in kinds if isinstance(kind, str) and kind in BLAME), None)


_STUN_COOKIE: Final = b"\x21\x12\xa4\x42"
_HTTP_METHODS: Final = (b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"CONNECT", b"PRI", b"TRACE")

_HTTP_VERSIONS: Final = (b"HTTP/1.0", b"HTTP/1.1", b"HTTP/2.0")
_LONGEST_LINE: Final = 4096

_FIRST_BYTES: Final = frozenset({method[0] for method in _HTTP_METHODS} | {0x16} | set(range(6)))
"""Of HTTP, TLS, STUN and SOCKS: most garbage begins with none of them."""
_MOST_METHODS: Final = 9


def speaks_another_protocol(data: bytes) -> bool:
    """Whether first bytes can be those of HTTP, TLS or STUN, which a web page can make a browser send to any port, or
    of SOCKS, where a browser was told the wrong kind of proxy.

    Doubt counts for the client: bytes that may become one of these count as one.
    """
    start = bytes(data[:8])
    if start and start[0] not in _FIRST_BYTES:
        return False
    if any(start.startswith(method) or method.startswith(start) for method in _HTTP_METHODS):
        line, ended, _ = bytes(data[:_LONGEST_LINE]).partition(b"\n")
        version = line.rstrip(b"\r").rpartition(b" ")[2]
        return not ended or not version.startswith(b"HTTP/") or version in _HTTP_VERSIONS
    if b"\x16\x03".startswith(start[:2]):
        return True
    if start[:1] in (b"\4", b"\5"):  # RFC 1928 section 3: how many methods; SOCKS4: CONNECT or BIND
        return len(start) < 2 or 1 <= start[1] <= (2 if start[0] == 4 else _MOST_METHODS)
    # RFC 8489 section 5: two zero bits, and the magic cookie at offset 4.
    cookie = start[4:8]
    return bool(start) and start[0] < 0x04 and _STUN_COOKIE.startswith(cookie) and len(start) > 1


def markdown() -> Iterator[str]:
    """The lines of the table in ``docs/layers.md``."""
    yield "| kind | protocol | event | to blame | strike | why |"
    yield "|---|---|---|---|---|---|"
    for kind, row in BLAME.items():
        strike = "**yes**" if row.strikes else "no"
        yield f"| `{kind}` | {row.protocol} | {row.event} | {row.blame.value} | {strike} | {row.why} |"


_BEGIN, _END = "<!-- strikes: written from rama_ebpf/core/blame.py -->", "<!-- end of strikes -->"


def main() -> None:
    """Write the table into the page that is named on the command line."""
    page = Path(sys.argv[1])
    before, _, rest = page.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    page.write_text(f"{before}{_BEGIN}\n" + "\n".join(markdown()) + f"\n{_END}{after}")


if __name__ == "__main__":
    main()
