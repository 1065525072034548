"""Feeds in force: read when a set is loaded, and again as they fall due."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

from ..kernel.own_addresses import local_networks
from .feed import FeedContent, FeedError
from .feed_guard import NOTHING_LEFT_OUT, LeftOut, guarded
from .feed_store import FeedStore
from .prefixes import IPNetwork, Prefixes
from .rule import Action, Feed, PolicyError, Rule, RuleSet, Settings, parse_network
from .store import PolicyStore
from .stored import StaleSet

__all__ = ["FeedReport", "Refresher", "with_feeds"]

log = logging.getLogger(__name__)

_FIRST_RETRY: Final = 60.0
_LAST_RETRY: Final = 3600.0
_LONGEST_WAIT: Final = 86400.0
"""The longest Retry-After that is honoured, in seconds."""
_AT_ONCE: Final = 8
"""Feeds that are read at the same time: one that hangs does not hold up the rest."""


@dataclass(frozen=True, slots=True)
class FeedReport:
    """What reading the feed of a rule gave. ``stale`` says why an old copy is in use, or nothing (``content`` None).
    ``retry_after`` is in how many seconds its server wants to be asked again, if it said so."""

    rule: str
    feed: Feed
    content: FeedContent | None
    stale: str = ""
    retry_after: float | None = None
    left_out: LeftOut = NOTHING_LEFT_OUT
    """What it named and may not close."""

    def trouble(self) -> str:
        """What is wrong with the feed, in a line for the server's operator; nothing if nothing is."""
        if self.content is None:
            return f"rule {self.rule}: {self.stale}"
        if self.left_out:
            return f"rule {self.rule}: left out of feed {self.feed.source}: {self.left_out}"
        if self.content.bad_count:
            shown = "; ".join(map(str, self.content.bad[:3]))
            return (
                f"rule {self.rule}: {self.content.bad_count} lines of feed {self.feed.source} are no network and left "
                f"out: {shown}"
            )
        return ""

    def log(self) -> None:
        """Tell a server's operator what is wrong with the feed, if anything is."""
        if trouble := self.trouble():
            log.warning("%s", trouble)


def with_feeds(ruleset: RuleSet, feeds: FeedStore, *, known: RuleSet | None = None) -> tuple[RuleSet, list[FeedReport]]:
    """Return the set with the sources of its feeds read.

    A feed that can be had neither fresh nor as a last good copy raises :class:`FeedError`. For a server that starts or
    reloads, and must not wait for the network, ``known`` is the set in force: what it has of a feed is taken from
    there, else the last good copy is, and a feed of which there is neither leaves its rule without sources; the
    report says so. A :class:`Refresher` does the rest.
    """
    read = {rule.feed: rule.sources for rule in known.rules if rule.feed is not None} if known is not None else {}
    rules: list[Rule] = []
    reports = []
    own = _own_addresses()
    for rule in ruleset.rules:
        if rule.feed is None:
            rules.append(rule)
            continue
        if len(read.get(rule.feed, ())):
            rules.append(replace(rule, sources=read[rule.feed]))
            continue
        try:
            loaded = feeds.load(rule.feed) if known is None else feeds.at_hand(rule.feed)
        except FeedError as error:
            if known is None:
                raise
            rules.append(rule)
            reports.append(FeedReport(rule.name, rule.feed, None, f"it has no sources yet: {error}"))
            continue
        taken, left_out = _taken(rule, loaded.content, own)
        rules.append(replace(rule, sources=taken))
        reports.append(FeedReport(rule.name, rule.feed, loaded.content, loaded.stale, left_out=left_out))
    return replace(ruleset, rules=tuple(rules)), reports


class Refresher:
    """Keeps the feeds of the set in force fresh. ``clock`` is monotonic seconds."""

    def __init__(self, store: PolicyStore, feeds: FeedStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._feeds = feeds
        self._clock = clock
        self._due: dict[tuple[str, Feed], float] = {}
        self._failures: dict[tuple[str, Feed], int] = {}
        self._said: dict[str, str] = {}

    def log_news(self, reports: Sequence[FeedReport]) -> None:
        """Log what is wrong with feeds, each time that it changes."""
        for report in reports:
            trouble = report.trouble()
            if trouble != self._said.get(report.rule, ""):
                report.log()
            self._said[report.rule] = trouble

    def run(self, *, all_feeds: bool = False, accept: bool = False) -> list[FeedReport]:
        """Read the feeds that are due, or all, and put what is new into force together. Blocks for as long as the
        slowest takes, which is its ``timeout`` at most. ``accept``: lists that have changed by any share are taken.

        A feed that cannot be read leaves its rule as it is, and is tried again after a minute, then after twice that
        and so on up to an hour, or when its server says (RFC 9110 section 10.2.3) within a day. Raises
        :class:`PolicyError` while a set is on trial, and where what is new cannot be put into force;
        :class:`.stored.StaleSet` if another set was loaded meanwhile, which stays.
        """
        if self._store.pending is not None:
            raise PolicyError("feeds are not read again before the set on trial is confirmed or undone")
        token, ruleset = self._store.set_token(), self._store.ruleset()
        keys = {(rule.name, rule.feed) for rule in ruleset.rules if rule.feed is not None}
        now = self._clock()
        self._due = {key: self._due.get(key, self._first_due(key, ruleset, now)) for key in keys}
        due = {rule.name: rule.feed for rule in ruleset.rules if rule.feed is not None}
        if not all_feeds:
            due = {name: feed for name, feed in due.items() if self._due[name, feed] <= now}
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            wanted = [replace(feed, max_change=0.0) if accept else feed for feed in due.values()]
            read = pool.map(self._read, due, wanted)
            reports = {name: replace(report, feed=feed) for (name, feed), report in zip(due.items(), read, strict=True)}
        own, guards = _own_addresses(), {rule.name: rule for rule in ruleset.rules}
        fresh = {}
        for name, report in reports.items():
            if report.content is not None:
                fresh[name], left_out = _taken(guards[name], report.content, own)
                reports[name] = replace(report, left_out=left_out)
        for name, report in reports.items():
            self._due[name, report.feed] = self._clock() + self._pause((name, report.feed), report)
        new = replace(
            ruleset,
            rules=tuple(
                replace(rule, sources=fresh[rule.name]) if rule.name in fresh else rule for rule in ruleset.rules
            ),
        )
        if new != ruleset:
            try:
                origin = f"feeds: {', '.join(reports)}"
                self._store.replace(new, expected_set=token, settings=_as_they_are, origin=origin, must_be_kept=False)
            except StaleSet:
                self._due.clear()
                raise
        return list(reports.values())

    def _pause(self, key: tuple[str, Feed], report: FeedReport) -> float:
        """How many seconds later to read a feed again."""
        if not report.stale and report.content is not None:
            self._failures.pop(key, None)
            return report.feed.refresh
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        pause: float = min(
            _FIRST_RETRY * 2.0 ** min(failures - 1, 10), max(_FIRST_RETRY, min(report.feed.refresh, _LAST_RETRY))
        )
        return max(pause, min(report.retry_after or 0.0, _LONGEST_WAIT))

    @staticmethod
    def _first_due(key: tuple[str, Feed | None], ruleset: RuleSet, now: float) -> float:
        """A rule whose feed was never read is due at once; so is one of a URL, whose sources may be those of an old
        copy. A file was read when its set was loaded."""
        rule = next(rule for rule in ruleset.rules if rule.name == key[0])
        assert rule.feed is not None
        return now + rule.feed.refresh if len(rule.sources) and not rule.feed.is_url else now

    def _read(self, rule: str, feed: Feed) -> FeedReport:
        try:
            loaded = self._feeds.load(feed)
        except FeedError as error:
            return FeedReport(rule, feed, None, str(error), error.retry_after)
        return FeedReport(rule, feed, loaded.content, loaded.stale, loaded.retry_after)


def _as_they_are(settings: Settings) -> Settings:
    """Whoever reads feeds knows only the settings of before."""
    return settings


def _own_addresses() -> tuple[IPNetwork, ...]:
    try:
        return tuple(local_networks())
    except OSError as error:
        log.warning("this host's own addresses cannot be told, and feeds may name them: %s", error)
        return ()


def _taken(rule: Rule, content: FeedContent, own: Iterable[IPNetwork]) -> tuple[Prefixes, LeftOut]:
    """What a rule takes of its feed: all, if it lets in, or else what a feed may close."""
    feed = rule.feed
    if feed is None or rule.action is Action.ALLOW:
        return content.prefixes, NOTHING_LEFT_OUT
    width = 0 if feed.allow_default else feed.max_width
    never = tuple(map(parse_network, feed.never))
    return guarded(content.prefixes, max_width=width, never=never, own=own, private=feed.private)
