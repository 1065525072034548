"""Which rules and bans a listing shows, and in which order: of a hundred thousand an operator wants a few."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Final

from ..policy.prefixes import IPNetwork, Prefixes
from ..policy.rule import Ban, PolicyError, parse_network
from ..policy.stored import RuleRecord

__all__ = ["SORTS", "Selection"]

_NEVER: Final = 1 << 63
SORTS: Final[Mapping[str, Callable[[RuleRecord], tuple[object, ...]]]] = {
    "hits": lambda record: (-(record.dry_hits if record.rule.dry_run else record.hits),),
    "name": lambda record: (record.rule.name,),
    "expires": lambda record: (record.rule.expires or _NEVER,),
    "created": lambda record: (-record.rule.created,),
    "sources": lambda record: (-len(record.sources),),
}
"""By what rules can be sorted; of equals the order stays."""


@dataclass(frozen=True, slots=True)
class Selection:
    """``rule`` is a pattern of names (``*``, ``?``), ``source`` a network all of whose addresses a rule is for;
    ``sort`` one of :data:`SORTS`, ``limit`` how many rules, and how many bans, are shown."""

    rule: str | None = None
    source: IPNetwork | None = None
    sort: str | None = None
    limit: int | None = None

    @classmethod
    def of(cls, params: Mapping[str, object]) -> Selection:
        """Read it from a request. Raises :class:`PolicyError`."""
        rule, source, sort, limit = (params.get(name) for name in ("rule", "source", "sort", "limit"))
        if sort is not None and sort not in SORTS:
            raise PolicyError(f"sort {sort!r}: use one of {', '.join(SORTS)}")
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise PolicyError(f"limit {limit!r}: use a whole number above 0")
        return cls(
            None if rule is None else str(rule),
            None if source is None else parse_network(str(source)),
            None if sort is None else str(sort),
            limit,
        )

    def rules(self, records: Sequence[RuleRecord]) -> tuple[list[RuleRecord], int]:
        """Return the rules that are shown, and how many there are of these."""
        found = [record for record in records if self._names(record.rule.name) and self._covers(record.sources)]
        if self.sort is not None:
            found.sort(key=SORTS[self.sort])
        return found[: self.limit], len(found)

    def bans(self, bans: Sequence[Ban]) -> list[Ban]:
        """Return the bans that are shown: none if rules are picked by their name."""
        if self.rule is not None:
            return []
        return [ban for ban in bans if self.source is None or _is_inside(self.source, ban.network)][: self.limit]

    def _names(self, name: str) -> bool:
        return self.rule is None or fnmatch.fnmatchcase(name, self.rule)

    def _covers(self, sources: Sequence[IPNetwork]) -> bool:
        if self.source is None:
            return True
        networks = Prefixes.of(sources)
        return any(network in networks for network in _around(self.source))


def _is_inside(inner: IPNetwork, outer: IPNetwork) -> bool:
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]


def _around(network: IPNetwork) -> Iterator[IPNetwork]:
    """A network, and those that it lies in."""
    for length in range(network.prefixlen, -1, -1):
        yield ip_network((network.network_address, length), strict=False)
