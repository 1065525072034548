"""Rules and verdicts: the vocabulary of policy. Values only; nothing here touches the kernel.

Times are CLOCK_BOOTTIME nanoseconds, which is what the kernel programs compare with: a TTL goes on while the machine
sleeps, and setting the wall clock changes nothing.
"""

from __future__ import annotations

import enum
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Final

from ..core.errors import RamaError
from .prefixes import IPNetwork, Prefixes, unmap_network

__all__ = [
    "DEFAULT_ACTIONS",
    "LONGEST_SECONDS",
    "RULE_ACTIONS",
    "RUNTIME",
    "Action",
    "Ban",
    "Feed",
    "IPNetwork",
    "PolicyError",
    "Rule",
    "RuleSet",
    "Settings",
    "Stage",
    "SynLimit",
    "Verdict",
    "boottime_ns",
    "parse_network",
    "parse_ttl",
    "source_text",
]

LONGEST_SECONDS: Final = 315_360_000
"""Ten years: no rule and no ban with an end lasts longer."""
RUNTIME: Final = "runtime"
"""Origin of the rules that are put into force one by one, on top of the set that was loaded."""


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


PRECEDENCE: Final = {Action.DROP: 3, Action.REJECT: 2, Action.LIMIT: 1, Action.ALLOW: 0}
"""Among rules of one prefix and port the highest decides: deny, then limit, then allow."""

RULE_ACTIONS: Final = tuple(action.name.lower() for action in Action if action is not Action.NONE)
"""What a rule can say."""

DEFAULT_ACTIONS: Final = tuple(name for name in RULE_ACTIONS if name != "limit")
"""What a policy can say of clients that no rule names."""


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
class Feed:
    """Where a rule's sources come from: a file, or an HTTP or HTTPS URL, with one network a line.

    It is read again every ``refresh`` seconds. Lines that are no network are left out, unless they are more than
    ``max_bad`` of all (0 to 1): then the feed is refused as a whole. ``timeout`` (seconds, at most 300) and
    ``max_size`` (bytes, also when unpacked) bound a transfer. A list that names every address, or that had networks
    and has none any more, is refused unless ``allow_default`` and ``allow_empty``; so is one of at least a hundred that
    shrinks or grows by more than ``max_change`` (a share; 0: any). ``format`` is one of
    :data:`~.feed_formats.FORMATS`, ``path``, ``column``, ``to``, ``delimiter`` and ``where`` are what
    :class:`~.feed_formats.FormatOptions` has. Of a rule that turns away no network is taken that has fewer than
    ``max_width`` bits (IPv6: twice as many), is private (unless ``private``), or lies in ``never`` (CIDRs). Raises
    :class:`PolicyError`.
    """

    source: str
    refresh: float = 3600.0
    max_bad: float = 0.05
    timeout: float = 30.0
    max_size: int = 64 * 1024 * 1024
    allow_default: bool = False
    allow_empty: bool = False
    format: str = "plain"
    path: str = ""
    column: str = "1"
    to: str = ""
    delimiter: str = ","
    where: str = ""
    max_change: float = 0.5
    max_width: int = 8
    private: bool = False
    never: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "never", tuple(self.never))
        scheme, separator, _ = self.source.partition("://")
        if separator and scheme not in ("http", "https"):
            raise PolicyError(f"feed {self.source}: use http, https, or the path of a file")
        if not separator and not self.source.startswith("/"):
            raise PolicyError(f"feed {self.source}: use an absolute path")
        if not 0 < self.timeout <= 300:
            raise PolicyError(f"feed {self.source}: timeout {self.timeout:g} s: use at most 5 minutes")

    @property
    def is_url(self) -> bool:
        return "://" in self.source


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: connections from ``sources`` to ``port`` (None: any listener) get ``action``.

    ``name`` (1–63 of ``[A-Za-z0-9._:/@+-]``) appears in counters and log lines. ``expires`` is when it ends (None:
    never). A ``dry_run`` rule decides nothing, but counts what it would have decided. ``limit`` belongs to
    :attr:`Action.LIMIT`. ``origin`` says where it came from (``runtime``, ``file``). ``feed`` is where the sources
    come from, if not from the rule itself. ``at`` is the file and line that it was read from; rules that differ in
    nothing else are equal. Raises :class:`PolicyError`.
    """

    name: str
    sources: Sequence[IPNetwork]
    action: Action
    port: int | None = None
    expires: int | None = None
    dry_run: bool = False
    limit: SynLimit | None = None
    reason: str = ""
    origin: str = RUNTIME
    feed: Feed | None = None
    at: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", Prefixes.of(self.sources))
        if not re.fullmatch(r"[A-Za-z0-9._:/@+-]{1,63}", self.name):
            raise PolicyError(f"rule name {self.name!r}: use 1 to 63 characters of A-Z a-z 0-9 . _ : / @ + -")
        if self.action is Action.NONE:
            raise PolicyError(f"rule {self.name}: an action is needed ({', '.join(RULE_ACTIONS)})")
        if (self.action is Action.LIMIT) != (self.limit is not None):
            raise PolicyError(f"rule {self.name}: action limit and a rate belong together")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise PolicyError(f"port {self.port}: use 1 to 65535")
        if len(self.reason.encode()) > 119:
            raise PolicyError(f"reason {self.reason!r}: at most 119 bytes")
        if len(self.origin.encode()) > 31:
            raise PolicyError(f"origin {self.origin!r}: at most 31 bytes")

    def packed(self, version: int) -> Sequence[int]:
        """The sources of one IP version as :mod:`.prefixes` packs them, sorted."""
        return Prefixes.of(self.sources).packed(version)

    @property
    def order(self) -> int:
        """Rank among the rules of one prefix, 0 to 15: one for this port before one for any, then precedence, then
        runtime rules before loaded ones. The enumeration ``rank`` of ``policy.h`` in Python."""
        return 8 * (self.port is not None) + 2 * PRECEDENCE[self.action] + (self.origin == RUNTIME)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a policy says besides its rules: the action for whom no rule names (any but limit), and limits on
    the connections that it lets in, per source (/32 or /64) and overall. Raises :class:`PolicyError`."""

    default: Action = Action.ALLOW
    per_source: SynLimit | None = None
    overall: SynLimit | None = None

    def __post_init__(self) -> None:
        if self.default.name.lower() not in DEFAULT_ACTIONS:
            raise PolicyError(f"default {self.default.name.lower()}: use allow, drop or reject")


@dataclass(frozen=True, slots=True)
class RuleSet:
    """Everything that is loaded at once. Of rules that rank the same, the first decides. Names are unique. Raises
    :class:`PolicyError`."""

    rules: tuple[Rule, ...] = ()
    settings: Settings = Settings()

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for rule in self.rules:
            if rule.name in seen:
                raise PolicyError(f"two rules are named {rule.name}: names must differ")
            seen.add(rule.name)
            if rule.origin == RUNTIME:
                raise PolicyError(f"rule {rule.name}: a loaded rule needs an origin other than {RUNTIME!r}")


@dataclass(frozen=True, slots=True)
class Ban:
    """A source that a service or an operator shut out: before all rules, after the failsafe. It is one address, or the
    prefix by which strikes are counted."""

    network: IPNetwork
    action: Action
    expires: int | None
    created: int
    """CLOCK_REALTIME nanoseconds"""
    hits: int
    reason: str
    automatic: bool = False
    """Made by a service, and not by an operator."""

    def in_force(self, now: int) -> bool:
        """Whether it has not ended at ``now``."""
        return self.expires is None or now < self.expires

    @property
    def source(self) -> str:
        """Its network as text; an address without its length."""
        return source_text(self.network)


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


def source_text(network: IPNetwork) -> str:
    """Return a network as text, an address without its length."""
    return str(network.network_address if network.prefixlen == network.max_prefixlen else network)


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
    return unmap_network(network)


def parse_ttl(text: str) -> int:
    """Parse a duration such as ``90``, ``90s``, ``15m``, ``1h``, ``7d``, ``1h30m`` into nanoseconds.

    More than ten years are ten years: what makes bans longer each time (fail2ban) need not stop. Raises
    :class:`PolicyError`, also for zero.
    """
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    if re.fullmatch(r"\d{1,40}", text):
        seconds = int(text)
    elif len(text) <= 80 and re.fullmatch(r"(\d{1,40}[smhdw])+", text):
        seconds = sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([smhdw])", text))
    else:
        raise PolicyError(f"TTL {text!r}: write for example 90s, 15m, 1h, 7d or 1h30m")
    if seconds < 1:
        raise PolicyError(f"TTL {text!r}: use 1 second to 10 years")
    return min(seconds, LONGEST_SECONDS) * 1_000_000_000
