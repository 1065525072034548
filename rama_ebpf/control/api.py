"""The control API: what an operator can ask of a policy and change in it, in terms of JSON.

One class serves both ways in: a command that may open the pinned maps calls it directly on a ``KernelStore``; where
the policy lives in the server's process, the server calls it for what arrives on the control socket. So the answers
are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import cast

from ..policy.rule import Action, IPNetwork, PolicyError, Rule, Verdict, boottime_ns, parse_network, parse_ttl
from ..policy.store import Ban, PolicyStore, RuleRecord, StoredRule

__all__ = ["ControlApi", "Json"]

Json = dict[str, object]


class ControlApi:
    """Methods by name over one store. Arguments and results are JSON values; mistakes raise :class:`PolicyError`."""

    def __init__(self, store: PolicyStore) -> None:
        self._store = store

    def call(self, method: str, params: Mapping[str, object]) -> Json:
        """Run one method. Raises :class:`PolicyError` for an unknown method, or whatever the method raises."""
        handler = {
            "add": self.add,
            "remove": self.remove,
            "list": self.list,
            "test": self.test,
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
            expires=None if ttl is None else boottime_ns() + parse_ttl(ttl),
            dry_run=bool(params.get("dry_run", False)),
            reason=_optional_text(params, "reason") or "",
        )
        return self._rule(self._store.add(rule), (source,)) | {"revision": self._store.revision}

    def remove(self, params: Mapping[str, object]) -> Json:
        """Take the runtime rules, and the ban, of exactly ``source`` (and ``port``) out of force."""
        source = parse_network(_text(params, "source"))
        removed = self._store.remove(source, cast("int | None", params.get("port")))
        lifted = source.prefixlen == source.max_prefixlen and self._store.unban(source.network_address)
        return {
            "removed": [rule.name for rule in removed],
            "ban_lifted": lifted,
            "revision": self._store.revision,
        }

    def list(self, _params: Mapping[str, object]) -> Json:
        """Return everything in force."""
        store = self._store
        settings = store.settings()
        return {
            "store": store.kind,
            "revision": store.revision,
            "default": settings.default.name.lower(),
            "failsafe": [str(network) for network in store.failsafe()],
            "rules": [self._record(record) for record in store.records()],
            "bans": [self._ban(ban) for ban in store.bans() if ban.expires is None or boottime_ns() < ban.expires],
        }

    def test(self, params: Mapping[str, object]) -> Json:
        """Say what would be decided for a connection from ``source`` to ``port``."""
        text, port = _text(params, "source"), params.get("port")
        try:
            source = ip_address(text)
        except ValueError:
            raise PolicyError(f"{text!r} is not an address: write for example 192.0.2.7 or 2001:db8::7") from None
        if not isinstance(port, int) or not 1 <= port <= 65535:
            raise PolicyError(f"port {port}: use 1 to 65535")
        return {"source": str(source), "port": port} | self._verdict(self._store.verdict(source, port))

    @staticmethod
    def _verdict(verdict: Verdict) -> Json:
        result: Json = {
            "action": verdict.action.name.lower(),
            "stage": verdict.stage.name.lower(),
            "rule": verdict.rule,
        }
        if verdict.dry_rule:
            result["dry_run"] = {"rule": verdict.dry_rule, "action": verdict.dry_action.name.lower()}
        return result

    @staticmethod
    def _rule(rule: StoredRule, sources: Sequence[IPNetwork]) -> Json:
        return {
            "name": rule.name,
            "sources": [str(source) for source in sources],
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
            "address": str(ban.address),
            "action": ban.action.name.lower(),
            "expires_in": _seconds_left(ban.expires),
            "reason": ban.reason,
            "hits": ban.hits,
            "created": _wall(ban.created),
        }


def _text(params: Mapping[str, object], name: str) -> str:
    value = params.get(name)
    if not isinstance(value, str) or not value:
        raise PolicyError(f"{name} is missing")
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
