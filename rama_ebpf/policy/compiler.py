"""From a set of rules to what the kernel looks up: intervals of addresses, and for each the rules that may decide.

To all addresses of an interval the same prefixes apply. Its value leads to a *chain*, the rules of those prefixes in
the order in which they decide, up to the first that is certain to: one for any port that neither expires nor is a dry
run. What comes after it can never matter and is left out, so most chains have one rule.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from ..kernel import abi
from . import document, vectors
from .intervals import MAX_VALUE, PAGE, Table, build_table, build_table_of_many
from .prefixes import unpack_network
from .rule import PolicyError, Rule, RuleSet

__all__ = ["MAPPED", "MAX_CHAIN", "CompiledSet", "compile_rules", "read_chain"]

MAX_CHAIN: Final = 64  # as in policy.h

_RULE_BITS: Final = 20  # an IPv4 key then fits into 60 bits

MAPPED: Final = {4: 96, 6: 0}
"""What the IPv4-mapped form adds to a prefix length."""

_Chain = tuple[tuple[int, int], ...]
"""(prefix length of the IPv4-mapped form, index of the rule), the first to decide first."""


@dataclass(frozen=True, slots=True)
class CompiledSet:
    """A set, ready to be put into force once its rules have ids."""

    ruleset: RuleSet
    tables: tuple[Table, Table]
    slots: tuple[array[int], array[int]]
    """The slots of both families, two numbers each."""
    pages: bytes
    """The intervals of both families, then the encoded rule set."""
    document_at: int
    document_size: int
    chain: tuple[tuple[int, int, bool], ...]
    """All chains' items: index of a rule (-1 for none), prefix length, whether it is the last."""

    def chains(self, ids: Sequence[int]) -> bytes:
        """Return the chains (``struct chain_item``), given the rules' ids."""
        return b"".join(
            abi.CHAIN_ITEM.pack(ids[index] if index >= 0 else 0, length, end) for index, length, end in self.chain
        )

    def all_pages(self, ids: Sequence[int]) -> bytes:
        """Return the pages, ended by the rules' ids and how many there are."""
        end = array("Q", (*ids, len(ids))).tobytes()
        return self.pages + bytes(-(len(self.pages) + len(end)) % PAGE) + end


@dataclass(slots=True)
class _Chains:
    """All chains that occur, each once, one after the other in the cells. Chain 0 is the empty one."""

    rules: Sequence[Rule]
    cells: list[tuple[int, int, bool]] = field(default_factory=lambda: [(-1, 0, True)])
    _at: dict[_Chain, int] = field(default_factory=dict)
    _items: dict[int, _Chain] = field(default_factory=lambda: {0: ()})
    _step: dict[int, int] = field(default_factory=dict)

    def extend(self, parent: int, key: int, version: int) -> int:
        """Return the chain of a prefix: that of the prefix around it with one rule more.

        ``key`` is the packed prefix and the rule's index.
        """
        length, index = (key >> _RULE_BITS & 0xFF) + MAPPED[version], key & (1 << _RULE_BITS) - 1
        order = lambda item: (-item[0], -self.rules[item[1]].order, item[1])  # noqa: E731
        chain = self._prune(sorted((*self._items[parent], (length, index)), key=order))
        at = self._at.get(chain)
        if at is None:
            if len(chain) > MAX_CHAIN:
                network = unpack_network(version, key >> _RULE_BITS)
                raise PolicyError(
                    f"{len(chain)} rules may apply to {network} depending on port, time or dry runs: the kernel looks "
                    f"at {MAX_CHAIN} at most; drop some rules that expire, are dry runs or name a port"
                )
            at = self._at[chain] = len(self.cells)
            if at + len(chain) > MAX_VALUE:
                raise PolicyError(
                    f"the rules make more than {MAX_VALUE} combinations of rule and prefix length: put sources "
                    f"that share an action into one rule"
                )
            self._items[at] = chain
            self.cells += [(index, length, (length, index) == chain[-1]) for length, index in chain]
        return at

    def _prune(self, chain: Sequence[tuple[int, int]]) -> _Chain:
        """Leave out what an earlier rule makes certain never to matter."""
        kept = []
        settled: set[tuple[bool, int | None]] = set()  # (dry run, port)
        for item in chain:
            rule = self.rules[item[1]]
            if (False, rule.port) in settled or (rule.dry_run and {(True, rule.port), (True, None)} & settled):
                continue
            kept.append(item)
            if rule.expires is None:
                if not rule.dry_run and rule.port is None:
                    break
                settled.add((rule.dry_run, rule.port))
        return tuple(kept)


def read_chain(item: Callable[[int], bytes], value: int, version: int) -> list[tuple[int, int]]:
    """Return the chain of an interval's value as (prefix length, rule id); ``item(i)`` is a ``struct chain_item``."""
    found: list[tuple[int, int]] = []
    end = not value
    while not end:
        rule_id, length, end = abi.CHAIN_ITEM.unpack(item(value))
        found.append((length - MAPPED[version], rule_id))
        value += 1
    return found


def compile_rules(ruleset: RuleSet) -> CompiledSet:
    """Compile a set. Raises :class:`PolicyError` for what the kernel cannot express."""
    if len(ruleset.rules) >= 1 << _RULE_BITS:
        raise PolicyError(f"{len(ruleset.rules)} rules: use fewer than {1 << _RULE_BITS}; a rule can have many sources")
    chains = _Chains(ruleset.rules)
    pages = bytearray()
    tables, slots = [], []
    for version in (4, 6):
        table, pairs = _table(ruleset.rules, version, chains, pages)
        tables.append(table)
        slots.append(pairs)
    document_at = len(pages)
    pages.extend(document.encode(ruleset))
    return CompiledSet(
        ruleset,
        (tables[0], tables[1]),
        (slots[0], slots[1]),
        bytes(pages) + bytes(-len(pages) % 8),
        document_at,
        len(pages) - document_at,
        tuple(chains.cells),
    )


def _table(rules: Sequence[Rule], version: int, chains: _Chains, pages: bytearray) -> tuple[Table, array[int]]:
    """Cut the space of a family and append its intervals: with numpy, if there are many prefixes and it can."""
    sides = [rule.packed(version) for rule in rules]
    if sum(map(len, sides)) >= vectors.MANY and vectors.numpy() is not None:
        found = vectors.cut(sides, version, _RULE_BITS, lambda parent, key: chains.extend(parent, key, version))
        if found is not None:
            return build_table_of_many(pages, version, *found)
    return build_table(pages, version, *_sweep(_keys(rules, version), chains, version))


def _keys(rules: Sequence[Rule], version: int) -> list[int]:
    """Return every (prefix, rule) as one integer; sorted, a prefix comes after those around it."""
    keys: list[int] = []
    for index, rule in enumerate(rules):
        keys += [packed << _RULE_BITS | index for packed in rule.packed(version)]
    keys.sort()
    return keys


def _sweep(keys: list[int], chains: _Chains, version: int) -> tuple[Sequence[int], array[int]]:
    """Walk the prefixes in order of address and cut the space where the chain changes.

    One pass with a stack of the prefixes that are open. This loop is most of the time that a large set takes to
    load, hence the local names.
    """
    bits = 32 if version == 4 else 128
    sizes = [1 << (bits - length) for length in range(bits + 1)]
    starts: array[int] | list[int] = array("I", (0,)) if version == 4 else [0]
    values = array("I", (0,))
    add_start, add_value = starts.append, values.append
    open_ends: list[int] = []
    open_values: list[int] = []
    known: dict[int, int] = {}
    end, value = 1 << 129, 0  # of the innermost open prefix
    last, shown = 0, 0  # start and value of the last interval
    low = (1 << _RULE_BITS + 8) - 1
    for key in keys:
        start = key >> _RULE_BITS + 8
        while end <= start:
            at, end, value = end, open_ends.pop(), open_values.pop()
            if at == last:
                last, shown = _replace(starts, values, value)
            elif value != shown:
                add_start(at)
                add_value(value)
                last, shown = at, value
        open_ends.append(end)
        open_values.append(value)
        # Which chain a prefix gets depends on the one around it, its length and its rule, not on its address.
        step = value << 32 | key & low
        found = known.get(step)
        if found is None:
            found = known[step] = chains.extend(value, key, version)
        value = found
        end = start + sizes[key >> _RULE_BITS & 0xFF]
        if start == last:
            last, shown = _replace(starts, values, value)
        elif value != shown:
            add_start(start)
            add_value(value)
            last, shown = start, value
    while end < 1 << bits:
        at, end, value = end, open_ends.pop(), open_values.pop()
        if at == last:
            last, shown = _replace(starts, values, value)
        elif value != shown:
            add_start(at)
            add_value(value)
            last, shown = at, value
    return starts, values


def _replace(starts: array[int] | list[int], values: array[int], value: int) -> tuple[int, int]:
    """Give the last interval another value, which may make it one with the interval before it."""
    if len(values) > 1 and values[-2] == value:
        starts.pop()
        values.pop()
    else:
        values[-1] = value
    return starts[-1], value
