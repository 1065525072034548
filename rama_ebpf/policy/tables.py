"""The tables that a policy is kept in, as operations: what a place for a policy has to offer.

A policy has two layers. The *set* was loaded as a whole and is replaced as a whole; the *runtime layer* on top of it
holds the rules that are put into force one by one. Beside them stand bans and the failsafe.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Collection, Sequence

from ..core.address import IPAddress
from .compiler import CompiledSet
from .prefixes import IPNetwork
from .rule import Ban, Rule, RuleSet, Settings
from .stored import StoredRule

__all__ = ["PolicyTables"]


class PolicyTables(abc.ABC):
    """Operations on the tables of one policy. All may raise OSError where the kernel refuses."""

    kind: str
    """``kernel`` or ``local``."""

    # -- table operations, one process or many -----------------------------------------------------------------

    @abc.abstractmethod
    def _locked(self) -> contextlib.AbstractContextManager[None]:
        """Keep all other writers out; the same thread may do so again meanwhile."""

    @abc.abstractmethod
    def _runtime(self, network: IPNetwork, port: int) -> int | None:
        """Return the id of the runtime rule of exactly this prefix and port (0: any)."""

    @abc.abstractmethod
    def _set_runtime(self, network: IPNetwork, port: int, rule_id: int) -> None:
        """Set it. Raises :class:`PolicyError` when the table is full."""

    @abc.abstractmethod
    def _drop_runtime(self, network: IPNetwork, port: int) -> None: ...

    @abc.abstractmethod
    def _runtime_lengths(self, version: int) -> Sequence[int]:
        """Return the prefix lengths that the runtime layer has, the longest first."""

    @abc.abstractmethod
    def _runtime_entries(self) -> list[tuple[IPNetwork, int, int]]:
        """Return every (prefix, port, rule id)."""

    @abc.abstractmethod
    def _chain(self, source: IPAddress) -> list[tuple[int, int]]:
        """Return (prefix length, rule id) of the rules of the set that may decide, in their order."""

    @abc.abstractmethod
    def _new_rule(self, rule: Rule, created: int, keep: Collection[int] = (), *, replaces: bool = False) -> int:
        """Store a rule with its counters at zero and return its id; room may be made as by :meth:`_reclaim`.

        ``replaces``: another rule goes for it, so that it is not one more. Raises :class:`PolicyError` when full."""

    @abc.abstractmethod
    def _rule(self, rule_id: int) -> StoredRule | None: ...

    @abc.abstractmethod
    def _loaded_ids(self) -> Sequence[int]:
        """Return the id of each rule of the set in force, in the order of :meth:`ruleset`."""

    @abc.abstractmethod
    def _free_rules(self, keep: Collection[int] = ()) -> int:
        """Forget the rules that nothing refers to, but for the ids of ``keep``; return how many."""

    @abc.abstractmethod
    def _check_size(self, rules: int) -> None:
        """Raise :class:`PolicyError` if a set of so many rules does not fit beside the runtime layer."""

    @abc.abstractmethod
    def _hits(self, rule_id: int) -> tuple[int, int]:
        """Return (decided, dry)."""

    @abc.abstractmethod
    def _changed(self) -> int:
        """Bump and return the revision."""

    @abc.abstractmethod
    def _install(self, compiled: CompiledSet, ids: Sequence[int], deadline: int | None) -> int:
        """Put a set into force at once; fall back to the present one at ``deadline``. Return the new revision."""

    @abc.abstractmethod
    def _settle(self) -> None:
        """If a deadline has passed unconfirmed, make the fall-back final."""

    @abc.abstractmethod
    def _confirm(self) -> None: ...

    @abc.abstractmethod
    def _roll_back(self) -> None: ...

    @abc.abstractmethod
    def _ban(self, address: IPAddress) -> Ban | None: ...

    @abc.abstractmethod
    def _set_ban(self, ban: Ban) -> None:
        """Set it; bans that have ended make room. Raises :class:`PolicyError` when full."""

    @abc.abstractmethod
    def _drop_ban(self, address: IPAddress) -> bool: ...

    @abc.abstractmethod
    def _drop_expired_bans(self, now: int) -> int: ...

    @abc.abstractmethod
    def _rebuild(self) -> None:
        """Derive from the entries what the programs are told of them (which lengths and kinds there are)."""

    @abc.abstractmethod
    def _in_failsafe(self, source: IPAddress, port: int) -> bool: ...

    # -- the whole policy --------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def revision(self) -> int:
        """Grows with every change."""

    @property
    @abc.abstractmethod
    def pending(self) -> int | None:
        """When the set that was loaded last will be undone unless it is confirmed, None if it need not be."""

    @abc.abstractmethod
    def set_token(self) -> int:
        """Return a number that names the set in force: it differs after every :meth:`replace` and roll-back."""

    @abc.abstractmethod
    def ruleset(self) -> RuleSet:
        """Return the set in force, with the settings in force."""

    @abc.abstractmethod
    def settings(self) -> Settings: ...

    @abc.abstractmethod
    def _set_settings(self, settings: Settings) -> int:
        """Change the settings of the set in force; return the new revision."""

    @abc.abstractmethod
    def bans(self) -> list[Ban]: ...

    @abc.abstractmethod
    def failsafe(self) -> list[IPNetwork]: ...

    @abc.abstractmethod
    def _set_failsafe(self, networks: Sequence[IPNetwork], ports: Sequence[int]) -> int:
        """Replace the failsafe; return the new revision."""
