"""The control API: what an operator can ask of a policy and change in it, in terms of JSON.

One class serves both ways in: a command that may open the pinned maps calls it directly on a ``KernelStore``; where
the policy lives in the server's process, the server calls it for what arrives on the control socket. So the answers
are the same.
"""

from __future__ import annotations

import builtins
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Final, cast

from ..core.address import IPAddress, unmap
from ..policy.difference import difference
from ..policy.feed import overlapping, parse_feed
from ..policy.feed_store import FeedStore
from ..policy.futile import futile_rules
from ..policy.kernel_store import KernelStore
from ..policy.prefixes import Prefixes
from ..policy.refresh import FeedReport, Refresher, with_feeds
from ..policy.rule import (
    Action,
    Ban,
    IPNetwork,
    PolicyError,
    Rule,
    RuleSet,
    Settings,
    Stage,
    boottime_ns,
    parse_network,
    parse_ttl,
)
from ..policy.store import PolicyStore
from ..policy.stored import RuleRecord, StoredRule
from .enforced import Decision, InForce, Judge, StoreJudge, carry_out, enforcement, targets, unheard
from .listing import Selection
from .replaying import CutBound, Replaying, span_of

__all__ = ["ControlApi", "Json", "feed_rows"]

Json = dict[str, object]

_TEST_ATTEMPTS: Final = 3
_SOURCES_SHOWN: Final = 1000
"""A listing names so many sources of a rule; ``policy export`` names all."""


class ControlApi:
    """Methods by name over one store. Arguments and results are JSON values; mistakes raise :class:`PolicyError`."""

    def __init__(
        self,
        store: PolicyStore,
        feeds: FeedStore | None = None,
        judge: Judge | None = None,
        record: Path | None = None,
    ) -> None:
        """``feeds`` keeps the copies of feeds; without it, sets with feeds cannot be loaded. ``judge`` is asked what is
        decided, by default the policy itself."""
        self._store = store
        self._feeds = feeds
        self._judge = judge or StoreJudge(store, serving=False)
        self._replaying = Replaying(store, self._judge, record)

    def call(self, method: str, params: Mapping[str, object]) -> Json:
        """Run one method. Raises :class:`PolicyError` for an unknown method, or whatever the method raises."""
        handler = {
            "add": self.add,
            "add_many": self.add_many,
            "remove": self.remove,
            "remove_many": self.remove_many,
            "list": self.list,
            "test": self.test,
            "ban": self.ban,
            "ban_many": self.ban_many,
            "counters": self.counters,
            "bans": self.bans,
            "load": self.load,
            "diff": self.diff,
            "history": self.history,
            "feeds": self.feeds,
            "export": self.export,
            "confirm": self.confirm,
            "rollback": self.rollback,
            "refresh": self.refresh,
            "log": self.log,
        }.get(method)
        if handler is None:
            raise PolicyError(f"unknown method {method!r}")
        return handler(params)

    def add(self, params: Mapping[str, object]) -> Json:
        """Put a runtime rule into force: ``source``, ``action``, and optionally ``ttl``, ``port``, ``reason``,
        ``dry_run``."""
        source = parse_network(_text(params, "source"))
        action = Action[_text(params, "action").upper()]
        ttl = _optional_text(params, "ttl")
        port = params.get("port")
        rule = Rule(
            name=_text(params, "name") if params.get("name") else f"{action.name.lower()}:{source}",
            sources=(source,),
            action=action,
            port=cast("int | None", port),
            dry_run=bool(params.get("dry_run", False)),
            reason=_optional_text(params, "reason") or "",
        )
        lasts = None if ttl is None else parse_ttl(ttl)
        stored = carry_out(lambda: self._store.add(rule, ttl=lasts), lambda: self._is_there(rule, lasts))
        result = self._rule(stored, (source,)) | self._revision()
        return result | self._enforced(source, rule.port, _wanted(rule), "" if rule.dry_run else rule.name)

    def add_many(self, params: Mapping[str, object]) -> Json:
        """:meth:`add` for each of ``sources``, a list, as one change."""
        sources, action = _sources(params), Action[_text(params, "action").upper()]
        ttl, port = _optional_text(params, "ttl"), cast("int | None", params.get("port"))
        revision = self._store.add_many(
            sources,
            action,
            port=port,
            ttl=None if ttl is None else parse_ttl(ttl),
            reason=_optional_text(params, "reason") or "",
        )
        result: Json = {"count": len(sources), "revision": revision, "port": port}
        wanted = (lambda decision: decision.verdict.allowed) if action is Action.ALLOW else _is_denied
        return result | (self._enforced(sources[0], port, wanted) if sources else {})

    def remove_many(self, params: Mapping[str, object]) -> Json:
        """:meth:`remove` for each of ``sources``, a list."""
        sources, port = _sources(params), cast("int | None", params.get("port"))
        with self._store.held():
            lifted = self._store.unban_many(sources) if port is None else 0
            removed = self._store.remove_many(sources, port)
        return {"count": removed + lifted, "removed": removed, "lifted": lifted} | self._revision(bans=True)

    def ban_many(self, params: Mapping[str, object]) -> Json:
        """:meth:`ban` for each of ``sources``, a list, as one change."""
        sources, ttl = _sources(params), _optional_text(params, "ttl")
        self._store.ban_many(
            sources,
            ttl=None if ttl is None else parse_ttl(ttl) / 1e9,
            reason=_optional_text(params, "reason") or "",
            action=Action[(_optional_text(params, "action") or "drop").upper()],
        )
        result = {"count": len(sources)} | self._revision(bans=True)
        return result | (self._enforced(sources[0], None, _is_denied) if sources else {})

    def counters(self, _params: Mapping[str, object]) -> Json:
        """Return what the gate has counted: verdicts that took effect, by hook, stage and action."""
        if not isinstance(self._store, KernelStore):
            raise PolicyError(
                "the policy is in the server's process, not in the kernel: it counts by rule alone (list)"
            )
        totals = sorted(self._store.counters.totals().items())
        return {
            "verdicts": [
                {"hook": hook, "stage": stage, "action": action, "count": count}
                for (hook, stage, action), count in totals
            ],
            "silent_rejects": self._store.counters.silent_rejects(),
        }

    def _is_there(self, rule: Rule, ttl: int | None) -> bool:
        found = self._store.rule_at(rule.sources[0], rule.port)
        if found is None:
            return False
        facts = (found.name, found.action, found.expires is None, found.dry_run, found.reason)
        return facts == (rule.name, rule.action, ttl is None, rule.dry_run, rule.reason)

    def _revision(self, *, bans: bool = False) -> Json:
        """The revision after a change. Raises :class:`.enforced.InForce` where it cannot be read: all is done."""
        with _after_the_change():
            told: Json = {"revision": self._store.revision}
            return told | {"ban_revision": self._store.ban_revision} if bans else told

    def _enforced(
        self, network: IPNetwork, port: int | None, wanted: Callable[[Decision], bool], name: str = ""
    ) -> Json:
        """What is decided now, asked after the change."""
        try:
            return {"enforced": enforcement(self._judge, network, port, wanted, name)}
        except OSError as error:
            return {"enforced": {"state": None, "serving": self._judge.serving, "why": error.strerror or str(error)}}

    def _unheard(self, ruleset: RuleSet | None = None) -> Json:
        """Rules of the set in force that are not found by who decides."""
        try:
            return {"unheard": unheard(self._judge, (ruleset or self._store.ruleset()).rules)}
        except OSError as error:
            return {"unheard": None, "why": error.strerror or str(error)}

    def remove(self, params: Mapping[str, object]) -> Json:
        """Take the runtime rule of exactly ``source``, and its ban, out of force; with ``port`` the rule of that port
        alone, for a ban is for all ports."""
        source, port = parse_network(_text(params, "source")), cast("int | None", params.get("port"))
        # The ban first: where the disk refuses that, nothing is changed.
        with self._store.held():
            lifted = port is None and self._unban(source)
            try:
                removed = carry_out(
                    lambda: self._store.remove(source, port), lambda: self._store.rule_at(source, port) is None
                )
            except OSError as error:
                if lifted:
                    text = f"the ban of {source} is lifted, but its rule stays: {error}"
                    raise OSError(error.errno, text) from error
                raise
        with _after_the_change():
            wider = self._store.covering_ban(source.network_address) if port is None and not lifted else None
        result: Json = {
            "removed": [rule.name for rule in removed],
            "ban_lifted": lifted,
            "still_banned": None if wider is None else wider.source,
        } | self._revision(bans=True)
        if not lifted and not any(rule.action is not Action.ALLOW and not rule.dry_run for rule in removed):
            return result
        return result | self._enforced(source, port, lambda decision: decision.verdict.allowed)

    def _unban(self, network: IPNetwork) -> bool:
        return carry_out(lambda: self._store.unban(network), lambda: self._store.ban_of(network) is None)

    def ban(self, params: Mapping[str, object]) -> Json:
        """Shut out ``address`` (or the prefix that stands for a source) before all rules, optionally for ``ttl``, with
        ``reason``, by ``action``."""
        ttl, text, begun = _optional_text(params, "ttl"), _text(params, "address"), time.time_ns()
        banned = parse_network(text) if "/" in text else _address(text)

        def is_banned() -> bool:
            found = self._store.ban_of(banned)
            return found is not None and found.created >= begun

        ban = carry_out(
            lambda: self._store.ban(
                banned,
                ttl=None if ttl is None else parse_ttl(ttl) / 1e9,
                reason=_optional_text(params, "reason") or "",
                action=Action[(_optional_text(params, "action") or "drop").upper()],
            ),
            is_banned,
        )
        result = self._ban(ban) | self._revision(bans=True)
        return result | self._enforced(ban.network, None, _is_denied)

    # -- the set -------------------------------------------------------------------------------------------------

    def _read(
        self, params: Mapping[str, object]
    ) -> tuple[RuleSet, builtins.list[FeedReport], Callable[[Settings], Settings], CutBound]:
        """Return the set of a policy file with the sources of its feeds, and what it makes of the settings in force."""
        from ..config.policy import load_policy  # these bring in what most commands do not need
        from ..config.toml import ConfigError

        try:
            policy = load_policy(_text(params, "path"))
            ruleset = policy.ruleset(self._store.settings())
        except ConfigError as error:
            raise PolicyError(str(error)) from error
        bound = CutBound(policy.cut.share, policy.cut.least, policy.cut.then == "trial")
        if self._feeds is None:
            return ruleset, [], policy.settings, bound
        return *with_feeds(ruleset, self._feeds), policy.settings, bound

    def load(self, params: Mapping[str, object]) -> Json:
        """Put the set of the policy file ``path`` into force at once, if ``revision`` (optional) is the one in force;
        on trial for ``confirm_within`` seconds if that is given. What would cut many clients, or one of ``operators``
        (addresses), is refused, or goes on trial, unless that is given or ``yes``."""
        ruleset, reports, settings, bound = self._read(params)
        revision, within = params.get("revision"), params.get("confirm_within")
        if revision is not None and not isinstance(revision, int):
            raise PolicyError(f"revision must be a whole number, not {revision!r}")
        if within is not None and (not isinstance(within, int | float) or not 1 <= within <= 86400):
            raise PolicyError(f"confirm_within {within!r}: use 1 second to 1 day")
        compiled = self._store.compile(ruleset)
        replayed = self._replaying.of(compiled)
        if within is None and not params.get("yes"):
            within = self._replaying.hold_up(compiled, replayed, _texts(params, "operators"), bound)
        told = self._replaying.told(replayed)  # it asks the kernel: afterwards an error would be wrong
        futile = futile_rules(compiled, self._store.failsafe())
        token, origin = self._store.set_token(), _text(params, "path")
        new = carry_out(
            lambda: self._store.replace(
                ruleset,
                expected_revision=revision,
                confirm_within=within,
                origin=origin,
                settings=settings,
                compiled=compiled,
            ),
            lambda: self._store.set_token() != token,
        )
        overlaps = overlapping([(rule.name, Prefixes.of(rule.sources)) for rule in ruleset.rules if rule.feed])
        return {
            "revision": new,
            "rules": len(ruleset.rules),
            "prefixes": sum(len(rule.sources) for rule in ruleset.rules),
            "confirm_within": within,
            "futile": futile,
            "replay": told,
            "feeds": [_feed_report(report) for report in reports],
            "overlaps": [{"rule": one, "inside": other, "networks": count} for one, other, count in overlaps],
        } | self._unheard(ruleset)

    def diff(self, params: Mapping[str, object]) -> Json:
        """Say what loading the policy file ``path``, or the set of an earlier ``revision``, would change; with
        ``replay`` (a duration) what it would do to those who came since."""
        span = span_of(params)
        if params.get("revision") is None:
            ruleset, *_ = self._read(params)
        else:
            ruleset = self._store.past_set(_whole(params, "revision"))
        result = difference(self._store.ruleset(), ruleset) | {"revision": self._store.revision}
        if span is not None:
            result["replay"] = self._replaying.told(self._replaying.of(self._store.compile(ruleset), span), span)
        return result

    def history(self, _params: Mapping[str, object]) -> Json:
        """Return the sets that were in force before and are kept, the latest first."""
        return {
            "revision": self._store.revision,
            "sets": [
                {"revision": past.revision, "written": _wall(round(past.written * 1e9)), "bytes": past.size}
                for past in self._store.past_sets()
            ],
        }

    def export(self, _params: Mapping[str, object]) -> Json:
        """Return the set in force as the text of a policy file."""
        from ..config.policy import policy_values
        from ..config.show import to_toml

        return {"revision": self._store.revision, "toml": to_toml(policy_values(self._store.ruleset()))}

    def confirm(self, _params: Mapping[str, object]) -> Json:
        """Keep the set that is on trial."""
        tried = self._store.set_token()
        carry_out(lambda: self._store.confirm(expected_set=tried), lambda: self._store.pending is None)
        return self._revision() | self._unheard()

    def rollback(self, _params: Mapping[str, object]) -> Json:
        """Undo the set that is on trial."""
        tried = self._store.set_token()
        carry_out(lambda: self._store.roll_back(expected_set=tried), lambda: self._store.pending is None)
        return self._revision() | self._unheard()

    def refresh(self, params: Mapping[str, object]) -> Json:
        """Read all feeds of the set in force again, now; ``accept`` lists that have changed by any share."""
        if self._feeds is None:
            raise PolicyError("no place to keep feeds")
        reports = Refresher(self._store, self._feeds).run(all_feeds=True, accept=bool(params.get("accept")))
        return self._revision() | {"feeds": [_feed_report(report) for report in reports]}

    def feeds(self, _params: Mapping[str, object]) -> Json:
        """Return the feeds of the set in force: how many networks are in force of each, how old its last good copy is
        in seconds, when it was read last, and what is wrong with it."""
        if self._feeds is None:
            raise PolicyError("no place to keep feeds")
        return {"feeds": feed_rows(self._store, self._feeds)}

    def log(self, params: Mapping[str, object]) -> Json:
        """Return the last ``count`` entries of the journal."""
        count = params.get("count")
        if count is not None and (not isinstance(count, int) or count < 1):
            raise PolicyError(f"count {count!r}: use a whole number above 0")
        return {"entries": self._store.journal(count)}

    # -- asking --------------------------------------------------------------------------------------------------

    def list(self, params: Mapping[str, object]) -> Json:
        """Return everything in force, or what :class:`.listing.Selection` picks of it."""
        selection = Selection.of(params)
        store = self._store
        settings = store.settings()
        rules, matched = selection.rules(store.records())
        return {
            "store": store.kind,
            "revision": store.revision,
            "ban_revision": store.ban_revision,
            "default": settings.default.name.lower(),
            "confirm_within": None if store.pending is None else _seconds_left(store.pending),
            "failsafe": [str(network) for network in store.failsafe()],
            "rules": [self._record(record) for record in rules],
            "matched": matched,
            "bans": [self._ban(ban) for ban in selection.bans(self._bans_in_force())],
        }

    def bans(self, _params: Mapping[str, object]) -> Json:
        """Return the bans in force."""
        return {"bans": [self._ban(ban) for ban in self._bans_in_force()]}

    def _bans_in_force(self) -> builtins.list[Ban]:
        now = boottime_ns()
        return [ban for ban in self._store.bans() if ban.expires is None or now < ban.expires]

    def test(self, params: Mapping[str, object]) -> Json:
        """Say what is decided for a connection from ``source`` to ``port``, or without one to each listener."""
        source, port = _address(_text(params, "source")), params.get("port")
        if port is not None and (not isinstance(port, int) or not 1 <= port <= 65535):
            raise PolicyError(f"port {port}: use 1 to 65535")
        source = unmap(source)
        for attempt in range(_TEST_ATTEMPTS):
            revision = self._store.revision
            asked, _ = targets(self._judge, source.version, port)
            decisions = self._judge.decide((source, at) for at in asked)
            differing = [one for one in decisions if one.verdict != self._store.verdict(source, one.target.port)]
            if not differing or (self._store.revision == revision and attempt):
                break  # else it was changed meanwhile, or something ended
        rows = [decision.json() for decision in decisions]
        first = next((row for row in rows if row["action"] != Action.ALLOW.name.lower()), rows[0])
        shown = next(decision for decision, row in zip(decisions, rows, strict=True) if row is first)
        result = {"source": str(source), "port": shown.target.port} | {
            name: first[name] for name in ("action", "stage", "rule", "dry_run") if name in first
        }
        if first["stage"] == Stage.BAN.name.lower() and (ban := self._store.covering_ban(source)) is not None:
            result["banned"] = ban.source
        return result | {"decisions": rows, "disagreements": [one.json() for one in differing]}

    @staticmethod
    def _rule(rule: StoredRule, sources: Sequence[IPNetwork]) -> Json:
        return {
            "name": rule.name,
            "sources": [str(source) for source in sources[:_SOURCES_SHOWN]],
            "source_count": len(sources),
            "port": rule.port,
            "action": rule.action.name.lower(),
            "expires_in": _seconds_left(rule.expires),
            "dry_run": rule.dry_run,
            "reason": rule.reason,
            "origin": rule.origin,
            "created": _wall(rule.created),
        }

    def _record(self, record: RuleRecord) -> Json:
        counts: Json = {"hits": record.hits, "dry_hits": record.dry_hits}
        return self._rule(record.rule, record.sources) | counts

    @staticmethod
    def _ban(ban: Ban) -> Json:
        return {
            "address": ban.source,
            "action": ban.action.name.lower(),
            "expires_in": _seconds_left(ban.expires),
            "reason": ban.reason,
            "hits": ban.hits,
            "created": _wall(ban.created),
        }


def _is_denied(decision: Decision) -> bool:
    return not decision.verdict.allowed


def _wanted(rule: Rule) -> Callable[[Decision], bool]:
    """What a decision is when a rule at run time does what it is for."""
    if rule.dry_run:
        return lambda decision: decision.verdict.dry_rule == rule.name
    if rule.action is Action.ALLOW:
        return lambda decision: decision.verdict.allowed and not decision.is_limited
    return _is_denied


@contextlib.contextmanager
def _after_the_change() -> Iterator[None]:
    """Raise :class:`.enforced.InForce` where something cannot be read: what was asked for is done."""
    try:
        yield
    except OSError as error:
        raise InForce(f"in force, but what is told of it cannot be read: {error}") from error


def _sources(params: Mapping[str, object]) -> Prefixes:
    """The networks of ``sources``, read as a feed is. Raises :class:`PolicyError` for the first that is none."""
    listed = params.get("sources")
    if not isinstance(listed, list) or not all(isinstance(source, str) for source in listed):
        raise PolicyError("sources must be a list of addresses and networks, as text")
    if not listed:
        return Prefixes()
    lines = [source if "/" in source else f"{source}/{128 if ':' in source else 32}" for source in listed]
    if any("#" in line or ";" in line or "\n" in line or not line.strip() for line in lines):
        bad = next(source for source in listed if not source.strip() or any(mark in source for mark in "#;\n"))
        raise PolicyError(f"{bad!r} is not an address or CIDR: write for example 192.0.2.7 or 2001:db8::/32")
    content = parse_feed("\n".join(lines).encode(errors="replace"), max_bad=1.0)
    if content.bad:
        raise PolicyError(f"nothing is changed: {content.bad[0].why}")
    return content.prefixes


def _address(text: str) -> IPAddress:
    try:
        return ip_address(text)
    except ValueError:
        raise PolicyError(f"{text!r} is not an address: write for example 192.0.2.7 or 2001:db8::7") from None


def feed_rows(store: PolicyStore, feeds: FeedStore) -> builtins.list[Json]:
    """Return what is known of each feed of the set in force."""
    rows: builtins.list[Json] = []
    now = time.time()
    for rule in store.ruleset().rules:
        if rule.feed is None:
            continue
        state = feeds.state(rule.feed)
        rows.append(
            {
                "rule": rule.name,
                "source": rule.feed.source,
                "format": rule.feed.format,
                "networks": len(rule.sources),
                "age": None if state.fetched is None else round(max(0.0, now - state.fetched), 1),
                "checked": None if state.checked is None else _wall(round(state.checked * 1e9)),
                "refresh": rule.feed.refresh,
                "trouble": state.trouble or None,
            }
        )
    return rows


def _feed_report(report: FeedReport) -> Json:
    content = report.content
    row: Json = {"rule": report.rule, "source": report.feed.source, "stale": report.stale or None}
    if content is not None:
        row |= {
            "networks": len(content.prefixes),
            "bad_lines": content.bad_count,
            "bad": [str(line) for line in content.bad],
            "duplicates": content.duplicates,
            "covered": content.covered(),
            "left_out": {**asdict(report.left_out)},
        }
    return row


def _text(params: Mapping[str, object], name: str) -> str:
    value = params.get(name)
    if not isinstance(value, str) or not value:
        raise PolicyError(f"{name} is missing")
    return value


def _whole(params: Mapping[str, object], name: str) -> int:
    value = params.get(name)
    if not isinstance(value, int) or value < 0:
        raise PolicyError(f"{name} must be a whole number, not {value!r}")
    return value


def _texts(params: Mapping[str, object], name: str) -> Sequence[str]:
    value = params.get(name) or []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise PolicyError(f"{name} must be a list of texts, not {value!r}")
    return value


def _optional_text(params: Mapping[str, object], name: str) -> str | None:
    value = params.get(name)
    if value is not None and not isinstance(value, str):
        raise PolicyError(f"{name} must be text, not {value!r}")
    return value


def _seconds_left(expires: int | None) -> float | None:
    return None if expires is None else round(max(0, expires - boottime_ns()) / 1e9, 1)


def _wall(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds / 1e9, tz=UTC).isoformat(timespec="seconds")
