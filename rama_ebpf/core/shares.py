"""What one source may hold at once, so that it cannot take it from the others.

A source is what a ban is for: an IPv4 address or an IPv6 /64. The defaults are generous, for many users can stand
behind one address (NAT). What is above a share is refused at once, counted, and never a strike.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from .address import IPAddress
from .client import source_prefix
from .counts import UNLIMITED, Counts, LocalCounts, SharesCounts
from .errors import Busy

__all__ = ["Held", "ShareExceeded", "SourceLimits", "SourceShare"]


class Held(enum.Enum):
    """What is counted for each source. The value is the ``kind`` of the refusal, and a label in metrics."""

    CONNECTIONS = "source_connections"
    HANDSHAKES = "source_handshakes"
    """TLS handshakes, and first bytes of TLS or of an unknown protocol, that are not complete."""
    ASSOCIATIONS = "source_associations"
    """UDP associations of SOCKS5."""
    BINDS = "source_binds"
    """Sockets that listen for BIND of SOCKS5."""
    CHECKS = "source_checks"
    """Passwords that wait to be checked."""


class ShareExceeded(Busy):
    """One source holds as much as it may, and may try again when it holds less."""

    kind = "source_share"

    def __init__(self, held: Held, limit: int) -> None:
        super().__init__(f"this source has {limit} {_NAMES[held]}, the limit")
        self.kind = held.value


_NAMES: Final = {
    Held.CONNECTIONS: "connections",
    Held.HANDSHAKES: "unfinished handshakes",
    Held.ASSOCIATIONS: "UDP associations",
    Held.BINDS: "listening sockets",
    Held.CHECKS: "passwords that wait to be checked",
}


@dataclass(frozen=True, slots=True)
class SourceLimits:
    """How much one source may hold at once; 0: any number."""

    connections: int = 400
    handshakes: int = 200
    associations: int = 128
    binds: int = 64
    checks: int = 128

    def of(self, held: Held) -> int:
        """Return the limit for one of these."""
        return int(getattr(self, held.name.lower()))


class SourceShare:
    """Counts what each source holds of ``held``, ``limit`` at most (0: any number).

    With ``shared`` the limit is one for all processes that share it. Shares with the same ``counts`` and ``label`` are
    one, whichever process made them, and after what else. ``observe`` is called with the value of ``held`` for each
    refusal. Sources within ``exempt`` are not counted: proxies, say, that come for many clients.
    """

    def __init__(
        self,
        held: Held,
        limit: int | None = None,
        *,
        shared: SharesCounts | None = None,
        counts: Counts | None = None,
        label: str = "",
        observe: Callable[[str], None] | None = None,
        exempt: Sequence[IPv4Network | IPv6Network] = (),
    ) -> None:
        self._exempt = tuple(exempt)
        self.held = held
        self.limit = SourceLimits().of(held) if limit is None else limit
        if self.limit < 0:
            raise ValueError(f"a limit must be at least 0, not {limit}")
        self.refused = 0
        """How many were refused."""
        self._observe = observe
        self._kind = held.value
        self._label = label
        if counts is None:
            counts = LocalCounts() if shared is None else shared.counts()
        self._counts = counts

    @contextlib.contextmanager
    def hold(self, ip: IPAddress | None) -> Iterator[None]:
        """Count one for the source of ``ip``. Raises :class:`ShareExceeded` at once where it has too many.

        Clients without an address (of a Unix socket) are not counted.
        """
        source = None if ip is None else self.enter(ip)
        try:
            yield
        finally:
            if source is not None:
                self._counts.leave(source)

    def enter(self, ip: IPAddress, *, ask_again: bool = False) -> Hashable | None:
        """Count one for the source of ``ip``; return what :meth:`leave` wants, None if it is not counted. Raises
        :class:`ShareExceeded`; that is no refusal yet if the caller will ``ask_again``."""
        if not self.limit or (self._exempt and any(ip in network for network in self._exempt)):
            return None
        source = (self._kind, self._label, source_prefix(ip))
        if not self._counts.enter(source, self.limit):
            raise ShareExceeded(self.held, self.limit) if ask_again else self.refusal()
        return source

    def add(self, ip: IPAddress) -> Hashable | None:
        """As :meth:`enter`, whatever the limit: for what is there already."""
        if not self.limit or (self._exempt and any(ip in network for network in self._exempt)):
            return None
        source = (self._kind, self._label, source_prefix(ip))
        return source if self._counts.enter(source, UNLIMITED) else None

    def leave(self, source: Hashable) -> None:
        """Count one less, of those that :meth:`enter` has counted."""
        self._counts.leave(source)

    def refusal(self) -> ShareExceeded:
        """Count a refusal, and return the error to raise."""
        self.refused += 1
        if self._observe is not None:
            self._observe(self.held.value)
        return ShareExceeded(self.held, self.limit)
