"""A policy in this process alone: the same meaning as in the kernel, for hosts without privileges.

It decides after accept(2), so a denied client costs a descriptor for a moment and learns that something listens.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network

from ..core.address import IPAddress
from .rule import IPNetwork, PolicyError, Rule, Verdict
from .store import Ban, PolicyStore, Settings, StoredRule

__all__ = ["CountedPolicy", "LocalStore"]


class LocalStore(PolicyStore):
    """The tables as dictionaries. ``max_entries`` bounds rules, entries and bans alike."""

    kind = "local"

    def __init__(self, *, max_entries: int = 1_048_576) -> None:
        self._max = max_entries
        self._lock = threading.RLock()
        self._tables: dict[tuple[int, int, int], dict[int, tuple[int, ...]]] = {}
        self._stored: dict[int, StoredRule] = {}
        self._counters: dict[str, list[int]] = {}
        self._banned: dict[IPAddress, Ban] = {}
        self._failsafe: list[IPNetwork] = []
        self._settings = Settings()
        self._revision = 0
        self._next_id = 1

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            yield

    @staticmethod
    def _key(network: IPNetwork, scope: int) -> tuple[int, int, int]:
        return (network.version, scope, network.prefixlen)

    def _entry(self, network: IPNetwork, scope: int) -> tuple[int, ...]:
        return self._tables.get(self._key(network, scope), {}).get(int(network.network_address), ())

    def _set_entry(self, network: IPNetwork, scope: int, ids: tuple[int, ...]) -> None:
        key, address = self._key(network, scope), int(network.network_address)
        if ids:
            table = self._tables.setdefault(key, {})
            if address not in table and sum(map(len, self._tables.values())) >= self._max:
                raise PolicyError(f"the policy holds {self._max} entries already: remove some")
            table[address] = ids
        elif key in self._tables:
            self._tables[key].pop(address, None)
            if not self._tables[key]:
                del self._tables[key]

    def _longest(self, source: IPAddress, scope: int, bits: int) -> tuple[int, tuple[int, ...]] | None:
        value, width = int(source), source.max_prefixlen
        for length in range(bits, -1, -1):
            table = self._tables.get((source.version, scope, length))
            if table is not None:
                ids = table.get(value >> (width - length) << (width - length))
                if ids is not None:
                    return length, ids
        return None

    def _entries(self) -> Iterator[tuple[IPNetwork, int, tuple[int, ...]]]:
        for (version, scope, length), table in self._tables.items():
            for address, ids in table.items():
                yield (IPv4Network((address, length)) if version == 4 else IPv6Network((address, length))), scope, ids

    def _new_rule(self, rule: Rule, created: int) -> StoredRule:
        if len(self._stored) >= self._max:
            raise PolicyError(f"the policy holds {self._max} rules already: remove some")
        stored = StoredRule(
            self._next_id,
            rule.name,
            rule.action,
            rule.expires,
            rule.dry_run,
            rule.limit,
            rule.reason,
            rule.origin,
            created,
        )
        self._next_id += 1
        self._stored[stored.id] = stored
        return stored

    def _rule(self, rule_id: int) -> StoredRule | None:
        return self._stored.get(rule_id)

    def _rules(self) -> list[StoredRule]:
        return list(self._stored.values())

    def _drop_rule(self, rule_id: int) -> None:
        rule = self._stored.pop(rule_id, None)
        if rule is not None:
            self._counters.pop(rule.name, None)

    def _hits(self, rule_id: int) -> tuple[int, int]:
        decided, dry = self._counters.get(self._stored[rule_id].name, (0, 0))
        return decided, dry

    def _changed(self) -> int:
        self._revision += 1
        return self._revision

    def _ban(self, address: IPAddress) -> Ban | None:
        return self._banned.get(address)

    def _set_ban(self, ban: Ban) -> None:
        if ban.address not in self._banned and len(self._banned) >= self._max:
            raise PolicyError(f"{self._max} addresses are banned already: lift some")
        self._banned[ban.address] = ban

    def _drop_ban(self, address: IPAddress) -> bool:
        return self._banned.pop(address, None) is not None

    def _in_failsafe(self, source: IPAddress) -> bool:
        return any(source in network for network in self._failsafe)

    @property
    def revision(self) -> int:
        return self._revision

    def settings(self) -> Settings:
        return self._settings

    def set_settings(self, settings: Settings) -> None:
        with self._lock:
            self._settings = settings
            self._changed()

    def bans(self) -> list[Ban]:
        return list(self._banned.values())

    def failsafe(self) -> list[IPNetwork]:
        return list(self._failsafe)

    def set_failsafe(self, networks: list[IPNetwork]) -> None:
        with self._lock:
            self._failsafe = list(networks)
            self._changed()

    def count(self, verdict: Verdict, source: IPAddress) -> None:
        """Count a verdict that took effect. The kernel counts its own; here the layer that asks has to."""
        if verdict.rule:
            self._counters.setdefault(verdict.rule, [0, 0])[0] += 1
        if verdict.dry_rule:
            self._counters.setdefault(verdict.dry_rule, [0, 0])[1] += 1
        ban = self._banned.get(source)
        if ban is not None and verdict.rule == "ban":
            self._banned[ban.address] = replace(ban, hits=ban.hits + 1)


class CountedPolicy:
    """A local store as the policy layer sees it: every verdict takes effect, so it is counted."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store

    def verdict(self, source: IPAddress, port: int, /) -> Verdict:
        """Judge and count one connection."""
        verdict = self._store.verdict(source, port)
        self._store.count(verdict, source)
        return verdict
