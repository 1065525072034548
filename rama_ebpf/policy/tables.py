"""Where a policy is kept: what a place has to offer, in the kernel's maps or in this process.

A place has one record, :class:`~rama_ebpf.kernel.gate_state.GateState`, and *entries*: rules by id, the runtime layer
(which rule stands at a prefix and port), bans, the failsafe, and two sets of which one is in force. The parts of a
policy (:mod:`.loaded_set`, :mod:`.runtime_rules`, :mod:`.rule_ids`, :mod:`.bans`, :mod:`.failsafe`, :mod:`.derived`)
are written once, over these protocols. All operations may raise OSError where the kernel refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from ..core.address import IPAddress
from ..kernel.gate_state import GateState, SetHead
from .ban_table import BanTable, TableFull
from .clients import ClientTable
from .compiler import CompiledSet
from .prefixes import IPNetwork, Prefixes
from .rule import PolicyError, Rule, RuleSet
from .stored import StoredRule

__all__ = [
    "BanTable",
    "Exclusive",
    "FailsafeTable",
    "OpenSet",
    "Place",
    "RuleTable",
    "RuntimeTable",
    "SetTable",
    "Table",
    "TableFull",
    "Tables",
]

K = TypeVar("K", contravariant=True)
V = TypeVar("V")

Place = tuple[IPNetwork, int]
"""Where a rule of the runtime layer stands: a prefix, and a listener's port or 0 for any."""


class Table(Protocol[K, V]):
    """Entries by key. One is replaced as a whole: who reads sees the old one or the new one."""

    def get(self, key: K) -> V | None:
        """Return an entry, None if there is none."""

    def put(self, key: K, value: V) -> None:
        """Set an entry. Raises :class:`TableFull`."""

    def drop(self, key: K) -> bool:
        """Take an entry away; return whether there was one."""

    def is_empty(self) -> bool:
        """Whether there is no entry."""


class RuntimeTable(Table[Place, int], Protocol):
    """The runtime layer: rule ids by place."""

    def items(self) -> list[tuple[Place, int]]:
        """Return all entries."""

    def get_all(self, prefixes: Prefixes, port: int) -> list[int | None]:
        """Return the ids at many prefixes, in their order."""

    def exchange(self, prefixes: Prefixes, port: int, ids: Sequence[int | None]) -> list[int | None]:
        """Have these ids at many prefixes, in their order, None for no entry; return what was there. Raises
        :class:`TableFull`; nothing is changed then."""


class FailsafeTable(Protocol):
    """Two lists of networks that nothing can shut out, 0 and 1; the record says which is in force."""

    def fill(self, which: int, networks: Sequence[IPNetwork]) -> None:
        """Make a list anew. Whoever reads the other one sees that unchanged at every instant."""

    def networks(self, which: int) -> list[IPNetwork]:
        """Return all of a list."""

    def covers(self, which: int, source: IPAddress) -> bool:
        """Whether a source is in one of a list's."""

    def is_sound(self) -> bool:
        """Whether there is nothing but the two lists."""


class RuleTable(Protocol):
    """Rules by id, from 1; each with its counters."""

    @property
    def ids(self) -> int:
        """All ids are below this."""

    def add(self, rule_id: int, rule: Rule, created: int) -> bool:
        """Store a rule, with its counters at zero, under an id; False if that is taken. Raises :class:`TableFull`."""

    def add_alike(self, ids: Sequence[int], names: Sequence[str], model: Rule, created: int) -> None:
        """Store rules that differ from ``model`` by their names alone under ids that are free. Raises
        :class:`TableFull`; some may be stored then."""

    def get(self, rule_id: int) -> StoredRule | None:
        """Return a rule, None if there is none of this id."""

    def drop(self, rule_id: int) -> None:
        """Forget a rule."""

    def drop_all(self, ids: Sequence[int]) -> None:
        """Forget many."""

    def known(self) -> set[int]:
        """Return the ids that are taken."""

    def have_room(self, count: int) -> bool:
        """Whether there may be so many rules in all."""

    def is_overfull(self, tries: int) -> bool:
        """Whether there are more rules than there may be, now that one was added at the end of ``tries`` attempts."""

    def next_end(self, now: int) -> int | None:
        """Return when after ``now`` the next rule ends, None if none does."""

    def hits(self, rule_id: int) -> tuple[int, int]:
        """Return how often a rule decided, and would have as a dry run."""


class OpenSet(Protocol):
    """One of the two sets, as it was when it was opened. Its head is the one in the record."""

    @property
    def token(self) -> int:
        """A number that no other set ever has."""

    def chain(self, head: SetHead, source: IPAddress) -> list[tuple[int, int]]:
        """Return (prefix length, rule id) of the rules that may decide, in their order."""

    def ruleset(self, head: SetHead) -> RuleSet:
        """Return the set as it was compiled; its settings are those of then."""

    def ids(self, head: SetHead) -> Sequence[int]:
        """Return the id of each of its rules, in their order."""

    def close(self) -> None:
        """Let go of it."""


class SetTable(Protocol):
    """The two sets, 0 and 1."""

    def fill(self, which: int, compiled: CompiledSet, ids: Sequence[int]) -> SetHead:
        """Put a set where nobody reads; return its head."""

    def empty(self, which: int) -> None:
        """Free a set that nobody reads any more."""

    def open(self, which: int) -> OpenSet:
        """Open a set, to be closed."""

    def wait_for_readers(self) -> None:
        """Return when whoever judges by what was in force before has ended."""


class Tables(Protocol):
    """A place for a policy."""

    @property
    def kind(self) -> str:
        """``kernel`` or ``local``."""

    @property
    def owner(self) -> int:
        """The instance that it belongs to, :func:`~rama_ebpf.kernel.gate_state.owner_number`; 0 for none."""

    @property
    def most_lengths(self) -> int:
        """How many prefix lengths of one family the runtime layer may have."""

    @property
    def rules(self) -> RuleTable: ...

    @property
    def runtime(self) -> RuntimeTable: ...

    @property
    def bans(self) -> BanTable: ...

    @property
    def failsafe(self) -> FailsafeTable: ...

    @property
    def sets(self) -> SetTable: ...

    @property
    def clients(self) -> ClientTable: ...

    def due(self, bucket: int, source: IPAddress) -> int | None:
        """Return when the next connection of a limit is due (CLOCK_BOOTTIME, ns): of a rule's by its id, or one of
        the constants of ``enum bucket``; None if there was none, or nothing is counted here."""

    def gate(self) -> GateState:
        """Return the record."""

    def put_gate(self, gate: GateState) -> None:
        """Replace the record. It is copied word by word: who reads meanwhile may see some words of both."""

    # What is said where there is no room: each place has its own remedy.

    def too_many_rules(self, what: str) -> PolicyError:
        """``what`` finds no room."""

    def check_size(self, rules: int, runtime: int) -> None:
        """Raise :class:`PolicyError` if a set of so many rules does not fit beside so many at run time."""

    def too_many_bans(self, network: IPNetwork) -> PolicyError:
        """A ban of this network finds no room."""


Exclusive = Callable[[], AbstractContextManager[object]]
"""Keeps all other writers out while what it returns is entered; the same thread may do so again meanwhile. It waits, so
never on an event loop."""
