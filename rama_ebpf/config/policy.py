"""The settings of the policy: the table ``[policy]`` of ``rama.toml``, and files that hold nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network, IPv6Network
from typing import Any

from ..core.client import SourceLengths
from ..kernel.gate_maps import MAX_FAILSAFE
from ..policy.feed_formats import FORMATS
from ..policy.rule import (
    DEFAULT_ACTIONS,
    RULE_ACTIONS,
    Action,
    Feed,
    PolicyError,
    Rule,
    RuleSet,
    Settings,
    SynLimit,
    boottime_ns,
)
from .decode import Decoder, ListOf, Table, setting
from .kinds import BOOLEAN, DURATION, NETWORK, PORT, RATE, SIZE, TEXT, Rate, any_path, choice, integer, number
from .positions import Path
from .toml import ConfigError, read_toml

__all__ = [
    "BansConfig",
    "CutConfig",
    "FeedConfig",
    "PolicyConfig",
    "RateConfig",
    "RecordConfig",
    "RuleConfig",
    "load_policy",
    "located",
    "policy_values",
]

_NETWORKS = ListOf(NETWORK)
_GUARDS = ("max_change", "max_width", "private")


@dataclass(frozen=True)
class FeedConfig:
    """Where a rule's sources are read from. Plain is one network a line, with comments. All may be packed with gzip, xz
    or zstd."""

    file: str | None = setting(any_path(), "a file", default=None)
    url: str | None = setting(TEXT, "an HTTP or HTTPS URL", default=None)
    refresh: float = setting(DURATION, "how often it is read again", default=3600.0)
    max_bad: float = setting(number(0, 1), "the share of bad lines from which on it is refused", default=0.05)
    timeout: float = setting(DURATION, "for a transfer, at most 5m", default=30.0)
    max_size: int = setting(SIZE, "at most, also when unpacked", default=64 << 20)
    allow_default: bool = setting(BOOLEAN, "take it although it names every address", default=False)
    allow_empty: bool = setting(BOOLEAN, "take it although it had networks and has none any more", default=False)
    format: str = setting(choice(*FORMATS), "how it is written", default="plain")
    path: str | None = setting(
        TEXT, "of JSON: where texts are, as in prefixes[].ip_prefix; several with commas", default=None
    )
    column: str | None = setting(TEXT, "of CSV: number from 1, or its heading (1 by default)", default=None)
    to: str | None = setting(TEXT, "of CSV: the column of a range's end", default=None)
    delimiter: str = setting(TEXT, "of CSV: one character", default=",")
    where: str | None = setting(
        TEXT, "of CSV and MMDB: only entries with such a column or member: country.iso_code=XX|YY", default=None
    )
    max_change: float = setting(
        number(0, 100), "share by which a list of 100 networks or more may change at once (0: any)", default=0.5
    )
    max_width: int = setting(
        integer(0, 32), "bits that a network has at least, IPv6 twice as many, or it is left out", default=8
    )
    private: bool = setting(BOOLEAN, "take private networks, which are left out else", default=False)

    def __post_init__(self) -> None:
        if (self.file is None) == (self.url is None):
            raise ValueError("write a file or a url")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"{self.url}: write http://… or https://…")
        if self.path is not None and self.format != "json":
            raise ValueError("path is of JSON")
        if (self.column is not None or self.to is not None) and self.format != "csv":
            raise ValueError("column and to are of CSV")
        if self.where is not None and self.format not in ("csv", "mmdb"):
            raise ValueError("where is of CSV and MMDB")
        if (self.format == "mmdb") != (self.where is not None) and self.format != "csv":
            raise ValueError("an MMDB names all addresses there are: say which with where")
        if len(self.delimiter) != 1:
            raise ValueError(f"delimiter {self.delimiter!r}: write one character")
        self.feed()

    def feed(self, never: Sequence[IPv4Network | IPv6Network] = ()) -> Feed:
        """Return it as the policy takes it; ``never`` is what it may not close."""
        source = self.url if self.url is not None else os.path.abspath(str(self.file))
        return Feed(
            source,
            self.refresh,
            self.max_bad,
            self.timeout,
            self.max_size,
            allow_default=self.allow_default,
            allow_empty=self.allow_empty,
            format=self.format,
            path=self.path or "",
            column=self.column or "1",
            to=self.to or "",
            delimiter=self.delimiter,
            where=self.where or "",
            max_change=self.max_change,
            max_width=self.max_width,
            private=self.private,
            never=tuple(map(str, never)),
        )


@dataclass(frozen=True)
class RuleConfig:
    """A rule for sources, before accept."""

    name: str = setting(TEXT, "appears in counters and log lines")
    action: str = setting(choice(*RULE_ACTIONS), "what happens to their connections")
    sources: tuple[IPv4Network | IPv6Network, ...] = setting(_NETWORKS, "whom it is for", default=())
    feed: FeedConfig | None = setting(Table(FeedConfig), "where to read whom it is for", default=None)
    port: int | None = setting(PORT, "only on this port of ours (any by default)", default=None)
    ttl: float | None = setting(DURATION, "for so long after the start (for ever by default)", default=None)
    dry_run: bool = setting(BOOLEAN, "count what it would do, and do nothing", default=False)
    rate: Rate | None = setting(RATE, "of action limit: connections over time for each source", default=None)
    burst: int = setting(integer(1, 1_000_000), "of action limit: connections at once", default=1)
    reason: str | None = setting(TEXT, "shown in listings", default=None)
    at: str = field(default="", compare=False)
    """File and line, where they are known."""

    def __post_init__(self) -> None:
        if not self.sources and self.feed is None:
            raise ValueError(
                "sources is empty: name at least one network (0.0.0.0/0 and ::/0 are everybody), or a feed"
            )
        if self.sources and self.feed is not None:
            raise ValueError("write sources or a feed: two rules can have both")
        self.rule(0)  # raises PolicyError, a ValueError, for what does not go together

    def rule(self, now: int | None = None, never: Sequence[IPv4Network | IPv6Network] = ()) -> Rule:
        """Return it as the policy takes it, a feed not yet read, which may not close ``never``. ``now`` is
        CLOCK_BOOTTIME in nanoseconds."""
        start = boottime_ns() if now is None else now
        if self.action != "limit" and self.rate is not None:
            raise PolicyError("rate belongs to action limit")
        return Rule(
            name=self.name,
            sources=self.sources,
            action=Action[self.action.upper()],
            port=self.port,
            expires=None if self.ttl is None else start + round(self.ttl * 1e9),
            dry_run=self.dry_run,
            limit=None if self.rate is None else SynLimit(self.rate.per_second, self.burst),
            reason=self.reason or "",
            origin="file",
            feed=None if self.feed is None else self.feed.feed(never),
            at=self.at,
        )


@dataclass(frozen=True)
class RateConfig:
    """A limit on new connections."""

    rate: Rate = setting(RATE, "connections over time")
    burst: int = setting(integer(1, 1_000_000), "connections at once", default=1)

    def limit(self) -> SynLimit:
        """Return it as the policy takes it."""
        return SynLimit(self.rate.per_second, self.burst)


@dataclass(frozen=True)
class BansConfig:
    """Whom a strike counts against, and the ban that follows shuts out: all addresses that have so many bits in common.
    Bans that are in force stay as they are when these change."""

    ipv4: int = setting(integer(16, 32), "bits of an IPv4 address", default=32)
    ipv6: int = setting(integer(32, 128), "bits of an IPv6 address", default=64)

    def lengths(self) -> SourceLengths:
        """Return it as the policy takes it."""
        return SourceLengths(self.ipv4, self.ipv6)


@dataclass(frozen=True)
class CutConfig:
    """What becomes of a ``policy load`` that would cut many of the clients that connected in the last 24 hours."""

    share: float = setting(number(0, 1), "of them, from which on it is held up (1: never)", default=0.2)
    least: int = setting(integer(1, 1_000_000), "clients that it must cut for that", default=10)
    then: str = setting(
        choice("refuse", "trial"), "refuse it without --yes, or put it on trial for two minutes", default="refuse"
    )


@dataclass(frozen=True)
class RecordConfig:
    """The record of who came to which listener, and what became of them."""

    keep: float | None = setting(DURATION, "keep it on disk for so long (in memory alone by default)", default=None)


@dataclass(frozen=True)
class PolicyConfig:
    """Who may connect, decided in the kernel."""

    default: str | None = setting(
        choice(*DEFAULT_ACTIONS), "for clients that no rule names (as kept, or allow)", default=None
    )
    per_source: RateConfig | None = setting(Table(RateConfig), "for each source that the default lets in", default=None)
    overall: RateConfig | None = setting(Table(RateConfig), "for all that the default lets in together", default=None)
    failsafe: tuple[IPv4Network | IPv6Network, ...] | None = setting(
        _NETWORKS, "clients that nothing can shut out (as kept)", default=None
    )
    never: tuple[IPv4Network | IPv6Network, ...] = setting(_NETWORKS, "what no feed can close (rules can)", default=())
    require_kernel: bool = setting(BOOLEAN, "exit instead of serving with the policy in userspace", default=False)
    xdp: tuple[str, ...] = setting(ListOf(TEXT), "interfaces where XDP drops before the stack", default=())
    syn_cookies: bool = setting(BOOLEAN, "XDP sends the stack's SYN cookies", default=False)
    rejects: RateConfig | None = setting(
        Table(RateConfig), "RST that answer reject, to all together; silence beyond (1000/s, burst 50)", default=None
    )
    bans: BansConfig = setting(Table(BansConfig), "what strikes and bans of services are about", factory=BansConfig)
    cut: CutConfig = setting(Table(CutConfig), "loads that cut many clients", factory=CutConfig)
    record: RecordConfig = setting(Table(RecordConfig), "who came", factory=RecordConfig)
    kill: bool = setting(BOOLEAN, "end live connections of sources that come to be denied", default=False)
    persist: bool = setting(BOOLEAN, "leave the policy pinned in the kernel when the server stops", default=False)
    rules: tuple[RuleConfig, ...] = setting(ListOf(Table(RuleConfig)), "rules", default=())

    def __post_init__(self) -> None:
        if self.syn_cookies and not self.xdp:
            raise ValueError("syn_cookies: XDP sends them, so name at least one interface in xdp")
        if len(self.failsafe or ()) > MAX_FAILSAFE:
            raise ValueError(f"failsafe: {len(self.failsafe or ())} networks: use at most {MAX_FAILSAFE}")

    def ruleset(self, present: Settings) -> RuleSet:
        """Return what is loaded at once, feeds not yet read. What it says nothing about stays as in ``present``."""
        return RuleSet(self.set_rules(), self.settings(present))

    def set_rules(self) -> tuple[Rule, ...]:
        """Return its rules as the policy takes them."""
        return tuple(rule.rule(never=self.never) for rule in self.rules)

    def settings(self, present: Settings) -> Settings:
        """Return the settings. What is not said stays as in ``present``."""
        return Settings(
            present.default if self.default is None else Action[self.default.upper()],
            present.per_source if self.per_source is None else self.per_source.limit(),
            present.overall if self.overall is None else self.overall.limit(),
        )


def policy_values(ruleset: RuleSet) -> Mapping[str, Any]:
    """Return a set as plain values, which a policy file holds; the inverse of :meth:`PolicyConfig.ruleset`."""
    settings = ruleset.settings
    values: dict[str, Any] = {"default": settings.default.name.lower()}
    for name, limit in (("per_source", settings.per_source), ("overall", settings.overall)):
        if limit is not None:
            values[name] = _limit_values(limit)
    never = list(dict.fromkeys(text for rule in ruleset.rules if rule.feed for text in rule.feed.never))
    if never:
        values["never"] = never
    values["rules"] = [_rule_values(rule) for rule in ruleset.rules]
    return values


def _limit_values(limit: SynLimit) -> dict[str, Any]:
    return {"rate": limit.rate, "burst": limit.burst}


def _rule_values(rule: Rule) -> dict[str, Any]:
    values: dict[str, Any] = {"name": rule.name, "action": rule.action.name.lower()}
    if rule.feed is None:
        values["sources"] = [str(network) for network in rule.sources]
    else:
        feed = rule.feed
        where = {"url": feed.source} if feed.is_url else {"file": feed.source}
        values["feed"] = {
            **where,
            "refresh": feed.refresh,
            "max_bad": feed.max_bad,
            "timeout": feed.timeout,
            "max_size": feed.max_size,
        }
        usual = Feed("/")
        for name in ("allow_default", "allow_empty", "format", "path", "column", "to", "delimiter", "where", *_GUARDS):
            if getattr(feed, name) != getattr(usual, name):
                values["feed"][name] = getattr(feed, name)
    if rule.port is not None:
        values["port"] = rule.port
    if rule.expires is not None:
        values["ttl"] = max(0.001, round((rule.expires - boottime_ns()) / 1e9, 3))
    if rule.dry_run:
        values["dry_run"] = True
    if rule.limit is not None:
        values |= _limit_values(rule.limit)
    if rule.reason:
        values["reason"] = rule.reason
    return values


def located(policy: PolicyConfig, file: str, decoder: Decoder, path: Path = ()) -> PolicyConfig:
    """Return the same, whose rules know where they stand in ``file``; ``path`` is where the policy does."""
    name = os.path.abspath(file)
    rules = (
        replace(rule, at=f"{name}:{decoder.line((*path, 'rules', index))}") for index, rule in enumerate(policy.rules)
    )
    return replace(policy, rules=tuple(rules))


def load_policy(path: str | os.PathLike[str]) -> PolicyConfig:
    """Read a policy file: the settings of ``[policy]``, or a whole ``rama.toml``, of which only that is looked at.

    Raises :class:`~.load.ConfigError` with every mistake and its line.
    """
    values, decoder = read_toml(path)
    where: Path = ("policy",) if "policy" in values else ()
    if "policy" in values:
        config = decoder.table(PolicyConfig, values["policy"], ("policy",))
    else:
        config = decoder.table(PolicyConfig, values)
    seen: dict[str, int] = {}
    for index, rule in enumerate(config.rules if config is not None else ()):
        if seen.setdefault(rule.name, index) != index:
            decoder.complain(("rules", index, "name"), f'there are two rules "{rule.name}"')
    if config is None or decoder.mistakes:
        raise ConfigError(os.fspath(path), decoder.mistakes)
    assert isinstance(config, PolicyConfig)
    return located(config, os.fspath(path), decoder, where)
