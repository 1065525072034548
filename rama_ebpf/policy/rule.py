"""Rules and verdicts: the vocabulary of policy. Values only; nothing here touches the kernel.

Times are CLOCK_BOOTTIME nanoseconds, which is what the kernel programs compare with: a TTL goes on while the machine
sleeps, and setting the wall clock changes nothing.
"""

from __future__ import annotations

import enum
import re
import time
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final

from ..core.errors import RamaError

__all__ = [
    "MAX_CANDIDATES",
    "Action",
    "IPNetwork",
    "PolicyError",
    "Rule",
    "Stage",
    "SynLimit",
    "Verdict",
    "boottime_ns",
    "parse_network",
    "parse_ttl",
]

IPNetwork = IPv4Network | IPv6Network

MAX_CANDIDATES: Final = 3
"""How many rules one prefix can hold for the case that earlier ones expire or are dry runs."""


class PolicyError(RamaError, ValueError):
    """The operator asked for something that cannot be: the text names the value and the remedy."""

    kind = "policy"


class Action(enum.IntEnum):
    """What happens to a connection attempt. Of several rules for one prefix the first of DROP, REJECT, LIMIT, ALLOW
    decides."""

    NONE = 0
    ALLOW = 1
    DROP = 2
    REJECT = 3
    LIMIT = 4


class Stage(enum.IntEnum):
    """Which part of the policy decided."""

    NONE = 0
    FAILSAFE = 1
    BAN = 2
    RULE = 3
    LIMIT = 4
    DEFAULT = 5
    PARSE = 6


PRECEDENCE: Final = {Action.DROP: 0, Action.REJECT: 1, Action.LIMIT: 2, Action.ALLOW: 3}


@dataclass(frozen=True, slots=True)
class SynLimit:
    """A rate of new connections: ``rate`` per second sustained, ``burst`` at once (at least 1)."""

    rate: float
    burst: int = 1

    def __post_init__(self) -> None:
        if not 0.001 <= self.rate <= 1e9:
            raise PolicyError(f"rate {self.rate}: use 0.001 to 1e9 connections per second")
        if not 1 <= self.burst <= 1_000_000:
            raise PolicyError(f"burst {self.burst}: use 1 to 1000000 connections")

    @property
    def emission_ns(self) -> int:
        """Nanoseconds between two admitted connections at the sustained rate."""
        return max(1, round(1e9 / self.rate))

    @property
    def tolerance_ns(self) -> int:
        """How far ahead of the sustained rate a burst may run."""
        return self.emission_ns * (self.burst - 1)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: connections from ``sources`` to ``port`` (None: any listener) get ``action``.

    ``name`` (1–63 of ``[A-Za-z0-9._:/@+-]``) appears in counters and log lines. ``expires`` is when it ends (None:
    never). A ``dry_run`` rule decides nothing, but counts what it would have decided. ``limit`` belongs to
    :attr:`Action.LIMIT`. ``origin`` says where it came from (``runtime``, ``file``, a feed's name). Raises
    :class:`PolicyError`.
    """

    name: str
    sources: tuple[IPNetwork, ...]
    action: Action
    port: int | None = None
    expires: int | None = None
    dry_run: bool = False
    limit: SynLimit | None = None
    reason: str = ""
    origin: str = "runtime"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._:/@+-]{1,63}", self.name):
            raise PolicyError(f"rule name {self.name!r}: use 1 to 63 characters of A-Z a-z 0-9 . _ : / @ + -")
        if self.action is Action.NONE:
            raise PolicyError(f"rule {self.name}: an action is needed (allow, drop, reject, limit)")
        if (self.action is Action.LIMIT) != (self.limit is not None):
            raise PolicyError(f"rule {self.name}: action limit and a rate belong together")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise PolicyError(f"port {self.port}: use 1 to 65535")
        if len(self.reason.encode()) > 119:
            raise PolicyError(f"reason {self.reason!r}: at most 119 bytes")
        if len(self.origin.encode()) > 31:
            raise PolicyError(f"origin {self.origin!r}: at most 31 bytes")

    def with_sources(self, *sources: IPNetwork) -> Rule:
        """Return the same rule for other sources."""
        return replace(self, sources=sources)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What policy says about one connection attempt.

    ``rule`` names the rule that decided ("" if none did). ``dry_rule`` and ``dry_action`` say what a dry-run rule
    would have decided.
    """

    action: Action
    stage: Stage
    rule: str = ""
    dry_rule: str = ""
    dry_action: Action = Action.NONE

    @property
    def allowed(self) -> bool:
        return self.action is Action.ALLOW


def boottime_ns() -> int:
    """The clock of expiries."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def parse_network(text: str) -> IPNetwork:
    """Parse an address or a CIDR; an IPv4-mapped IPv6 network of /96 or longer becomes IPv4.

    Raises :class:`PolicyError` with the remedy.
    """
    try:
        network = ip_network(text.strip())
    except ValueError as error:
        if "has host bits set" in str(error):
            widened = ip_network(text.strip(), strict=False)
            raise PolicyError(f"{text!r} has host bits set: write {widened}") from None
        raise PolicyError(f"{text!r} is not an address or CIDR: write for example 192.0.2.7 or 2001:db8::/32") from None
    if isinstance(network, IPv6Network) and network.prefixlen >= 96 and network.network_address.ipv4_mapped:
        return IPv4Network((network.network_address.ipv4_mapped, network.prefixlen - 96))
    return network


def parse_ttl(text: str) -> int:
    """Parse a duration such as ``90``, ``90s``, ``15m``, ``1h``, ``7d``, ``1h30m`` into nanoseconds.

    Raises :class:`PolicyError`, also for zero and for more than ten years.
    """
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    if re.fullmatch(r"\d{1,12}", text):
        seconds = int(text)
    elif re.fullmatch(r"(\d{1,9}[smhdw])+", text):
        seconds = sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([smhdw])", text))
    else:
        raise PolicyError(f"TTL {text!r}: write for example 90s, 15m, 1h, 7d or 1h30m")
    if not 1 <= seconds <= 315_360_000:
        raise PolicyError(f"TTL {text!r}: use 1 second to 10 years")
    return seconds * 1_000_000_000
