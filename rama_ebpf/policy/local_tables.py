"""A policy's tables in this process, with the same meaning as the kernel's maps."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from ..core.address import IPAddress
from ..kernel import abi
from ..kernel.gate_state import GateState, SetHead
from .ban_table import LocalBanTable
from .clients import LocalClients
from .compiler import CompiledSet, compile_rules, read_chain
from .intervals import find
from .prefixes import IPNetwork, Prefixes
from .rule import PolicyError, Rule, RuleSet
from .stored import StoredRule
from .tables import Place

__all__ = ["LocalSet", "LocalTables"]

_SPARE_RULES: Final = 8192
"""How many rules there may be beyond the bound, for the moment in which a set replaces another."""


class LocalTables:
    """Dictionaries. ``most`` bounds rules, ``most_bans`` bans. Whoever reads needs no lock: entries, the record and the
    sets are replaced as a whole."""

    kind = "local"
    most_lengths = 129
    owner = 0

    def __init__(self, most: int, most_bans: int) -> None:
        self._most = most
        self._gate = GateState()
        self.rules = LocalRules(most)
        self.runtime = _Runtime()
        self.bans = LocalBanTable(most_bans)
        self.failsafe = _Failsafe()
        self.sets = _Sets()
        self.clients = LocalClients()

    def gate(self) -> GateState:
        return self._gate

    def put_gate(self, gate: GateState) -> None:
        self._gate = gate

    def due(self, bucket: int, source: IPAddress) -> int | None:
        return None  # limits are of the kernel's programs

    def too_many_rules(self, what: str) -> PolicyError:
        return PolicyError(f"the policy holds {self._most} rules already: remove some")

    def check_size(self, rules: int, runtime: int) -> None:
        if runtime + rules > self._most:
            raise PolicyError(f"a set of {rules} rules: the policy holds {self._most} with those at run time")

    def too_many_bans(self, network: IPNetwork) -> PolicyError:
        return PolicyError(f"{self.bans.capacity} sources are banned already: lift some")


class LocalRules:
    """Rules by id, and what was counted by their names: verdicts know those."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.ids = most + 1 + min(most, _SPARE_RULES)
        self._stored: dict[int, StoredRule] = {}
        self._named: dict[str, int] = {}
        self._counters: dict[str, list[int]] = {}

    def add(self, rule_id: int, rule: Rule, created: int) -> bool:
        if rule_id in self._stored:
            return False
        self._stored[rule_id] = StoredRule.of(rule_id, rule, created)
        self._named[rule.name] = rule_id
        self._counters.pop(rule.name, None)
        return True

    def add_alike(self, ids: Sequence[int], names: Sequence[str], model: Rule, created: int) -> None:
        for rule_id, name in zip(ids, names, strict=True):
            self._stored[rule_id] = StoredRule.of(rule_id, replace(model, name=name), created)
            self._named[name] = rule_id
            self._counters.pop(name, None)

    def get(self, rule_id: int) -> StoredRule | None:
        return self._stored.get(rule_id)

    def drop(self, rule_id: int) -> None:
        rule = self._stored.pop(rule_id, None)
        if rule is not None and self._named.get(rule.name) == rule_id:
            del self._named[rule.name]
            self._counters.pop(rule.name, None)

    def drop_all(self, ids: Sequence[int]) -> None:
        for rule_id in ids:
            self.drop(rule_id)

    def known(self) -> set[int]:
        return set(self._stored)

    def have_room(self, count: int) -> bool:
        return count <= self._most

    def is_overfull(self, tries: int) -> bool:
        return len(self._stored) > self._most

    def next_end(self, now: int) -> int | None:
        ends = [rule.expires for rule in list(self._stored.values()) if rule.expires is not None and rule.expires > now]
        return min(ends, default=None)

    def hits(self, rule_id: int) -> tuple[int, int]:
        rule = self._stored.get(rule_id)
        decided, dry = self._counters.get("" if rule is None else rule.name, (0, 0))
        return decided, dry

    def count(self, name: str, *, dry: bool) -> None:
        """Count a verdict of a rule by its name."""
        self._counters.setdefault(name, [0, 0])[dry] += 1


class _Runtime:
    def __init__(self) -> None:
        self._rows: dict[Place, int] = {}

    def get(self, place: Place) -> int | None:
        return self._rows.get(place)

    def put(self, place: Place, rule_id: int) -> None:
        self._rows[place] = rule_id

    def drop(self, place: Place) -> bool:
        return self._rows.pop(place, None) is not None

    def is_empty(self) -> bool:
        return not self._rows

    def items(self) -> list[tuple[Place, int]]:
        return list(self._rows.items())

    def get_all(self, prefixes: Prefixes, port: int) -> list[int | None]:
        return [self._rows.get((network, port)) for network in prefixes]

    def exchange(self, prefixes: Prefixes, port: int, ids: Sequence[int | None]) -> list[int | None]:
        former = self.get_all(prefixes, port)
        for network, wanted in zip(prefixes, ids, strict=True):
            if wanted is None:
                self._rows.pop((network, port), None)
            else:
                self._rows[network, port] = wanted
        return former


class _Failsafe:
    def __init__(self) -> None:
        self._lists: list[tuple[IPNetwork, ...]] = [(), ()]

    def fill(self, which: int, networks: Sequence[IPNetwork]) -> None:
        self._lists[which] = tuple(networks)

    def networks(self, which: int) -> list[IPNetwork]:
        return list(self._lists[which])

    def covers(self, which: int, source: IPAddress) -> bool:
        return any(source in network for network in self._lists[which])

    def is_sound(self) -> bool:
        return True


class LocalSet:
    """A set: what the kernel has in its maps."""

    def __init__(self, compiled: CompiledSet, ids: Sequence[int], token: int) -> None:
        self.token = token
        self._compiled = compiled
        self._ids = ids
        self._chains = compiled.chains(ids)

    def chain(self, head: SetHead, source: IPAddress) -> list[tuple[int, int]]:
        family = 0 if source.version == 4 else 1
        slots, pages, size = self._compiled.slots[family], self._compiled.pages, abi.CHAIN_ITEM.size
        value = find(
            lambda index: (slots[2 * index], slots[2 * index + 1]),
            lambda at, count: int.from_bytes(pages[at : at + count], sys.byteorder),
            self._compiled.tables[family],
            source.version,
            int(source),
        )
        return read_chain(lambda index: self._chains[size * index : size * (index + 1)], value, source.version)

    def ruleset(self, head: SetHead) -> RuleSet:
        return self._compiled.ruleset

    def ids(self, head: SetHead) -> Sequence[int]:
        return self._ids

    def close(self) -> None:
        """Nothing is held."""


class _Sets:
    def __init__(self) -> None:
        self._tokens = itertools.count(1)
        self._empty = compile_rules(RuleSet())
        self._sets = [self._make(self._empty, ()), self._make(self._empty, ())]

    def _make(self, compiled: CompiledSet, ids: Sequence[int]) -> LocalSet:
        return LocalSet(compiled, ids, next(self._tokens))

    def fill(self, which: int, compiled: CompiledSet, ids: Sequence[int]) -> SetHead:
        self._sets[which] = self._make(compiled, ids)
        return SetHead(document_size=len(ids))  # so that it is told from an empty one, and emptied when it is replaced

    def empty(self, which: int) -> None:
        self._sets[which] = self._make(self._empty, ())

    def open(self, which: int) -> LocalSet:
        return self._sets[which]

    def wait_for_readers(self) -> None:
        """They hold the set that they opened."""
