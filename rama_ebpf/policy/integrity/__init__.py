"""Whether a policy in the kernel is what its entries say: looked at in slices, and mended.

*Entries* (rules, bans, failsafe, the set's description) are what was asked for; what is *derived* from them (lengths,
flags, the rows that programs read, the intervals of a set) has to say the same. The programs themselves are asked
whether they find a rule: the rank of what they found must be no lower than the rule's.

All may raise OSError where the kernel refuses.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from ...core.address import IPAddress
from ...kernel.witness import Witness
from ..kernel_store import KernelStore
from .bans import BanCheck
from .difference import Difference
from .egress import EgressCheck
from .kept_rules import KeptCheck
from .loaded_set import SetCheck
from .record import RecordCheck
from .rows import RuleRows
from .runtime_rules import RuntimeCheck

__all__ = ["Difference", "EgressCheck", "Integrity"]


class Integrity:
    """Looks at a kernel store's tables; close it when done. To be used by one thread at a time."""

    def __init__(self, store: KernelStore, witness: Witness) -> None:
        rows = RuleRows(store.tables.maps)
        self._record = RecordCheck(store)
        self._runtime = RuntimeCheck(store, witness, rows)
        self._kept = KeptCheck(store, rows)
        self._set = SetCheck(store, witness, rows)
        self._bans = BanCheck(store, witness)

    def close(self) -> None:
        """Let go of what is held open."""
        self._kept.close()
        self._bans.close()
        self._record.close()

    def look(self, least: int, rounds: int) -> Iterator[Difference]:
        """Look at the whole record and at a slice of each table: at least ``least`` entries, and all within ``rounds``
        calls. What comes later needs in order what came before."""
        yield from self._record.look()
        yield from self._runtime.look(least, rounds)
        yield from self._kept.look(least, rounds)
        yield from self._set.look(least, rounds)
        yield from self._bans.look(least, rounds)

    def some_sources(self, count: int) -> list[IPAddress]:
        """Return sources at the edges of rules, of those that were looked at last and of the set."""
        near = self._runtime.networks
        networks = random.sample(near, min(count, len(near)))
        rules = self._set.rules
        for rule in random.choices(rules, k=count) if rules else ():
            if rule.sources:
                networks.append(rule.sources[random.randrange(len(rule.sources))])
        return [random.choice((network.network_address, network.broadcast_address)) for network in networks]

    def load_again(self) -> None:
        """Make the set anew of its description."""
        self._set.load_again()
