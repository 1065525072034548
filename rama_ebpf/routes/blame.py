"""Whose fault a failed connection is, in one table: only the way's own faults move on to another way and count.

A parent that says 403 or 502 about one target is well; one that says 407 is not to be asked again with the same
password; one that says nothing is dead only if it says nothing to anybody (docs/routes.md#blame).
"""

from __future__ import annotations

import enum
import errno
from typing import Final

__all__ = ["FAULTS", "Fault", "direct_fault", "http_fault", "socks4_fault", "socks5_fault"]


class Fault(enum.Enum):
    """Who is to blame, and what follows."""

    WAY = "way"
    """Counted; another way is tried."""
    UNABLE = "unable"
    """The way cannot do this one thing, or not now: another is tried, nothing is counted."""
    LOGIN = "login"
    """It refuses our log-in: quarantined, with an alarm; another way is tried, never this one again."""
    DOUBT = "doubt"
    """The way's or the target's: another way is tried, and if that one gets there this one is to blame."""
    TARGET = "target"
    """The answer is final."""

    @property
    def moves_on(self) -> bool:
        """Whether another way may be tried."""
        return self is not Fault.TARGET


_W, _U, _L, _D, _T = Fault.WAY, Fault.UNABLE, Fault.LOGIN, Fault.DOUBT, Fault.TARGET

FAULTS: Final[tuple[tuple[str, str, Fault], ...]] = (
    # -- before any answer
    ("parent", "no connection to it, its name has no address", _W),
    ("parent", "TLS with it fails: alert, certificate, pin", _W),
    ("parent", "closes, resets or sends what is not its protocol", _W),
    ("parent", "a hop of a chain does not reach the next one", _W),
    ("parent", "no answer in time, and none to anybody else meanwhile", _W),
    ("parent", "no answer in time, but to others", _T),
    # -- HTTP
    ("http", "407", _L),
    ("http", "400, 404, 405, 429, 501, 505", _W),
    ("http", "500, 520-599", _D),
    ("http", "403, 451, 502, 503, 504, every other status", _T),
    # -- SOCKS5
    ("socks5", "our password is refused, no method of ours is taken", _L),
    ("socks5", "01 general failure, a code that is none", _D),
    ("socks5", "02 not allowed, 03, 04 unreachable, 05 refused, 06 expired", _T),
    ("socks5", "07 command, 08 address type not supported", _U),
    # -- SOCKS4
    ("socks4", "91 rejected or failed", _D),
    ("socks4", "92, 93 identd", _L),
    # -- direct
    ("direct", "no route, no device, no such source address, not permitted", _W),
    ("direct", "no answer in time, host unreachable", _D),
    ("direct", "refused, reset, denied by policy, no such name", _T),
)
"""(where, what, whose): what ``docs/routes.md`` shows."""

_HTTP: Final = {407: _L, 429: _W, 400: _W, 404: _W, 405: _W, 501: _W, 505: _W, 500: _D}
_SOCKS5: Final = {1: _D, 7: _U, 8: _U}
_SOCKS4: Final = {91: _D, 92: _L, 93: _L}
_DIRECT: Final = {
    errno.ENETUNREACH: _W,
    errno.ENETDOWN: _W,
    errno.ENODEV: _W,
    errno.EADDRNOTAVAIL: _W,
    errno.EPERM: _W,
    errno.EAFNOSUPPORT: _W,
    errno.ETIMEDOUT: _D,
    errno.EHOSTUNREACH: _D,
    errno.EHOSTDOWN: _D,
}


def http_fault(status: int) -> Fault:
    """Of a final status other than 2xx, to CONNECT."""
    return _HTTP.get(status, _D if 520 <= status <= 599 else _T)


def socks5_fault(reply: int) -> Fault:
    """Of a REP other than 0; numbers that RFC 1928 does not assign are doubtful."""
    return _SOCKS5.get(reply, _T if 2 <= reply <= 6 else _D)


def socks4_fault(code: int) -> Fault:
    """Of a CD other than 90."""
    return _SOCKS4.get(code, _W)


def direct_fault(number: int | None) -> Fault:
    """Of an errno of connect(2) from this host."""
    return _DIRECT.get(number or 0, _T)
