"""The runtime layer: the rules that are put into force one by one, on top of the set that was loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network

from ..core.address import IPAddress
from .derived import DerivedState
from .prefixes import IPNetwork, Prefixes
from .rule import PolicyError, boottime_ns
from .tables import Place, Tables

__all__ = ["RuntimeRules"]


class RuntimeRules:
    """Which rule stands at which prefix and port. Changes are made under the policy's lock."""

    def __init__(self, tables: Tables, derived: DerivedState) -> None:
        self._tables = tables
        self._derived = derived

    def get(self, network: IPNetwork, port: int) -> int | None:
        """Return the id of the rule of exactly this prefix and port (0: any)."""
        return self._tables.runtime.get((network, port))

    def put(self, network: IPNetwork, port: int, rule_id: int) -> None:
        """Put a rule into force; one that stands there is replaced at once. Raises :class:`.tables.TableFull`, or
        :class:`.rule.PolicyError` for one prefix length too many."""
        try:
            self._derived.expect_rule(network, port)
        except PolicyError:  # one prefix length too many, unless all of one have ended
            if not self.drop_ended(boottime_ns()):
                raise
            self._derived.expect_rule(network, port)
        self._tables.runtime.put((network, port), rule_id)

    def ids_at(self, prefixes: Prefixes, port: int) -> list[int | None]:
        """Return the ids of the rules at many prefixes."""
        return self._tables.runtime.get_all(prefixes, port)

    def put_all(self, prefixes: Prefixes, port: int, ids: Sequence[int]) -> list[int | None]:
        """:meth:`put` many, all or none; return the ids that stood there."""
        for network in prefixes.widths():
            try:
                self._derived.expect_rule(network, port)
            except PolicyError:
                if not self.drop_ended(boottime_ns()):
                    raise
                self._derived.expect_rule(network, port)
        return self._tables.runtime.exchange(prefixes, port, ids)

    def exchange(self, prefixes: Prefixes, port: int, ids: Sequence[int | None]) -> list[int | None]:
        """Take many out of force, where there is no id, or put back what stood there; return what did."""
        return self._tables.runtime.exchange(prefixes, port, ids)

    def drop(self, network: IPNetwork, port: int) -> None:
        """Take it out of force. That its length may be gone is found out by the next rebuild of what is derived: until
        then one look-up more finds nothing."""
        self._tables.runtime.drop((network, port))

    def put_back(self, network: IPNetwork, port: int, rule_id: int | None) -> None:
        """Undo a change: have the rule in force that was before it, or none."""
        if rule_id is None:
            self.drop(network, port)
        else:
            self._tables.runtime.put((network, port), rule_id)

    def items(self) -> list[tuple[Place, int]]:
        """Return every (prefix, port) and rule id."""
        return self._tables.runtime.items()

    def matches(self, source: IPAddress, port: int) -> Iterator[tuple[int, int]]:
        """Yield (prefix length, rule id) of the rules whose prefix covers a source, the longest first."""
        for length in self._derived.lengths(source.version):
            network = _around(source, length)
            for key in (port, 0):
                rule_id = self.get(network, key)
                if rule_id is not None:
                    yield length, rule_id

    def ended(self, now: int) -> list[Place]:
        """Return where rules stand that have ended at ``now``. With 100,000 it takes a second."""
        return [place for place, rule_id in self.items() if self.has_ended(rule_id, now)]

    def drop_ended(self, now: int, places: Collection[Place] | None = None) -> int:
        """Take those out of the layer that have ended, of ``places`` or of all; return how many."""
        dropped = 0
        for network, port in self.ended(now) if places is None else places:
            rule_id = self.get(network, port)
            if rule_id is not None and self.has_ended(rule_id, now):
                self.drop(network, port)
                dropped += 1
        return dropped

    def has_ended(self, rule_id: int, now: int) -> bool:
        """Whether a rule has ended at ``now``, or is none."""
        rule = self._tables.rules.get(rule_id)
        return rule is None or (rule.expires is not None and now >= rule.expires)


def _around(source: IPAddress, length: int) -> IPNetwork:
    width = source.max_prefixlen
    address = int(source) >> (width - length) << (width - length)
    return IPv4Network((address, length)) if source.version == 4 else IPv6Network((address, length))
