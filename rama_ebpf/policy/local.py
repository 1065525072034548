"""A policy in this process alone: the same meaning as in the kernel, for hosts without privileges.

It decides after accept(2), so a denied client costs a descriptor for a moment and learns that something listens.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..core.address import IPAddress
from ..kernel import abi
from .compiler import CompiledSet, compile_rules, read_chain
from .intervals import find
from .prefixes import IPNetwork, unmap_network
from .rule import Ban, PolicyError, Rule, RuleSet, Settings, Verdict, boottime_ns
from .store import PolicyStore
from .stored import StoredRule

__all__ = ["CountedPolicy", "LocalStore"]


@dataclass(slots=True)
class _Loaded:
    """A set in force: the same tables as in the kernel."""

    compiled: CompiledSet
    ids: Sequence[int]
    settings: Settings
    number: int = field(default_factory=itertools.count(1).__next__)
    chains: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.chains = self.compiled.chains(self.ids)

    def chain(self, source: IPAddress) -> list[tuple[int, int]]:
        """Return (prefix length, rule id) of the rules that may decide."""
        family = 0 if source.version == 4 else 1
        slots, pages, size = self.compiled.slots[family], self.compiled.pages, abi.CHAIN_ITEM.size
        value = find(
            lambda index: (slots[2 * index], slots[2 * index + 1]),
            lambda at, count: int.from_bytes(pages[at : at + count], sys.byteorder),
            self.compiled.tables[family],
            source.version,
            int(source),
        )
        return read_chain(lambda index: self.chains[size * index : size * (index + 1)], value, source.version)


class LocalStore(PolicyStore):
    """The tables as dictionaries. ``max_entries`` bounds rules and bans alike."""

    kind = "local"

    def __init__(self, *, max_entries: int = 1_048_576) -> None:
        self._max = max_entries
        self._lock = threading.RLock()
        self._on_top: dict[IPNetwork, dict[int, int]] = {}
        self._lengths: dict[int, Counter[int]] = {4: Counter(), 6: Counter()}
        empty = RuleSet()
        self._set = _Loaded(compile_rules(empty), (), empty.settings)
        self._trial: tuple[int, _Loaded] | None = None  # deadline, and the set that comes back then
        self._stored: dict[int, StoredRule] = {}
        self._counters: dict[str, list[int]] = {}
        self._banned: dict[IPAddress, Ban] = {}
        self._failsafe: list[IPNetwork] = []
        self._failsafe_ports: tuple[int, ...] = ()
        self._revision = 0
        self._next_id = 1

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            yield

    # -- the set -------------------------------------------------------------------------------------------------

    def _in_force(self) -> _Loaded:
        trial = self._trial
        return trial[1] if trial is not None and boottime_ns() >= trial[0] else self._set

    def _install(self, compiled: CompiledSet, ids: Sequence[int], deadline: int | None) -> int:
        loaded = _Loaded(compiled, ids, compiled.ruleset.settings)
        self._trial = None if deadline is None else (deadline, self._set)
        self._set = loaded
        if deadline is None:
            self._free_rules()
        return self._changed()

    @property
    def pending(self) -> int | None:
        trial = self._trial
        return trial[0] if trial is not None and boottime_ns() < trial[0] else None

    def _settle(self) -> None:
        if self._trial is not None and self.pending is None:
            self._roll_back()
            self._note("rollback", self.revision, reason="not confirmed in time")

    def _confirm(self) -> None:
        self._trial = None
        self._free_rules()
        self._changed()

    def _roll_back(self) -> None:
        assert self._trial is not None
        self._set, self._trial = self._trial[1], None
        self._free_rules()
        self._changed()

    def _chain(self, source: IPAddress) -> list[tuple[int, int]]:
        return self._in_force().chain(source)

    def set_token(self) -> int:
        return self._in_force().number

    def ruleset(self) -> RuleSet:
        loaded = self._in_force()
        return replace(loaded.compiled.ruleset, settings=loaded.settings)

    def _loaded_ids(self) -> Sequence[int]:
        return self._in_force().ids

    def settings(self) -> Settings:
        return self._in_force().settings

    def _set_settings(self, settings: Settings) -> int:
        self._set.settings = settings
        return self._changed()

    # -- the runtime layer ---------------------------------------------------------------------------------------

    def _runtime(self, network: IPNetwork, port: int) -> int | None:
        return self._on_top.get(network, {}).get(port)

    def _set_runtime(self, network: IPNetwork, port: int, rule_id: int) -> None:
        before = self._on_top.setdefault(network, {}).get(port)
        if before is None:
            self._lengths[network.version][network.prefixlen] += 1
        else:
            self._forget(before)
        self._on_top[network][port] = rule_id

    def _drop_runtime(self, network: IPNetwork, port: int) -> None:
        ports = self._on_top.get(network, {})
        rule_id = ports.pop(port, None)
        if rule_id is not None:
            self._forget(rule_id)
            self._lengths[network.version] -= Counter((network.prefixlen,))
        if not ports:
            self._on_top.pop(network, None)

    def _runtime_lengths(self, version: int) -> Sequence[int]:
        return sorted(self._lengths[version], reverse=True)

    def _runtime_entries(self) -> list[tuple[IPNetwork, int, int]]:
        entries = [(network, list(ports.items())) for network, ports in list(self._on_top.items())]
        return [(network, port, rule_id) for network, items in entries for port, rule_id in items]

    # -- rules ---------------------------------------------------------------------------------------------------

    def _new_rule(self, rule: Rule, created: int, keep: Collection[int] = (), *, replaces: bool = False) -> int:
        if not replaces and len(self._stored) >= self._max and not self._reclaim(keep):
            raise PolicyError(f"the policy holds {self._max} rules already: remove some")
        rule_id, self._next_id = self._next_id, self._next_id + 1
        self._stored[rule_id] = StoredRule(
            rule_id,
            rule.name,
            rule.action,
            rule.port,
            rule.expires,
            rule.dry_run,
            rule.limit,
            rule.reason,
            rule.origin,
            created,
            rule.order,
        )
        return rule_id

    def _rule(self, rule_id: int) -> StoredRule | None:
        return self._stored.get(rule_id)

    def _forget(self, rule_id: int) -> None:
        rule = self._stored.pop(rule_id, None)
        if rule is not None:
            self._counters.pop(rule.name, None)

    def _free_rules(self, keep: Collection[int] = ()) -> int:
        used = {rule_id for _, _, rule_id in self._runtime_entries()} | set(self._set.ids) | set(keep)
        if self._trial is not None:
            used |= set(self._trial[1].ids)
        unused = self._stored.keys() - used
        for rule_id in unused:
            self._forget(rule_id)
        return len(unused)

    def _check_size(self, rules: int) -> None:
        if len(self._runtime_entries()) + rules > self._max:
            raise PolicyError(f"a set of {rules} rules: the policy holds {self._max} with those at run time")

    def _rebuild(self) -> None:
        self._lengths = {4: Counter(), 6: Counter()}
        for network, ports in self._on_top.items():
            self._lengths[network.version][network.prefixlen] += len(ports)

    def _hits(self, rule_id: int) -> tuple[int, int]:
        decided, dry = self._counters.get(self._stored[rule_id].name, (0, 0))
        return decided, dry

    def _changed(self) -> int:
        self._revision += 1
        return self._revision

    @property
    def revision(self) -> int:
        return self._revision

    # -- bans and failsafe ---------------------------------------------------------------------------------------

    def _ban(self, address: IPAddress) -> Ban | None:
        return self._banned.get(address)

    def _set_ban(self, ban: Ban) -> None:
        full = ban.address not in self._banned and len(self._banned) >= self._max
        if full and not self._drop_expired_bans(boottime_ns()):
            raise PolicyError(f"{self._max} addresses are banned already: lift some")
        self._banned[ban.address] = ban

    def _drop_ban(self, address: IPAddress) -> bool:
        return self._banned.pop(address, None) is not None

    def _drop_expired_bans(self, now: int) -> int:
        expired = [ban.address for ban in self.bans() if ban.expires is not None and now >= ban.expires]
        for address in expired:
            self._drop_ban(address)
        return len(expired)

    def bans(self) -> list[Ban]:
        return list(self._banned.values())

    def _in_failsafe(self, source: IPAddress, port: int) -> bool:
        return port in self._failsafe_ports or any(source in network for network in self._failsafe)

    def failsafe(self) -> list[IPNetwork]:
        return list(self._failsafe)

    def _set_failsafe(self, networks: Sequence[IPNetwork], ports: Sequence[int]) -> int:
        self._failsafe, self._failsafe_ports = [unmap_network(network) for network in networks], tuple(ports)
        return self._changed()

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
