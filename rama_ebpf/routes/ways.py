"""All ways by name, checked as a whole: nothing unknown, no circles, nothing empty, no name twice or reserved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

from .model import RESERVED, Chain, Direct, Group, Parent, Refuse, Route, RouteError, Way, check_name

__all__ = ["MAX_DEPTH", "MAX_MEMBERS", "MAX_WAYS", "WayBook"]

MAX_DEPTH: Final = 4
"""Groups within groups."""
MAX_MEMBERS: Final = 1000
MAX_WAYS: Final = 2000
MAX_HOPS: Final = 8


class WayBook(Mapping[str, Way]):
    """The ways of a configuration, with those that are always there. Raises :class:`RouteError`."""

    def __init__(self, ways: Mapping[str, Way], *, direct: Direct | None = None) -> None:
        """``direct`` is what that name means, by default the host's own choice of everything."""
        if len(ways) > MAX_WAYS:
            raise RouteError(f"{len(ways)} ways: {MAX_WAYS} at most", ("way", next(iter(ways))))
        for name in ways:
            if name in RESERVED:
                text = f"way {name!r}: the name is reserved ({', '.join(sorted(RESERVED))}): choose another"
                raise RouteError(text, ("way", name))
            try:
                check_name(name, "way")
            except RouteError as error:
                raise RouteError(str(error), ("way", name)) from None
        own: dict[str, Way] = {"direct": direct or Direct(), "refuse": Refuse(), "reset": Refuse(reset=True)}
        self._ways: Mapping[str, Way] = MappingProxyType({**own, **ways})
        for name, way in ways.items():
            self._check(name, way)
        for name in ways:
            self._check_circle(name, ())

    def _check(self, name: str, way: Way) -> None:
        where = ("way", name)
        if isinstance(way, Group):
            if not way.members or not all(way.tiers):
                raise RouteError(f"group {name} is empty: name at least one way in each tier", where)
            if len(way.members) > MAX_MEMBERS:
                raise RouteError(f"group {name} has {len(way.members)} members: {MAX_MEMBERS} at most", where)
            twice = sorted({member for member in way.members if way.members.count(member) > 1})
            if twice:
                raise RouteError(f"group {name} names {', '.join(twice)} twice: use weights", where)
            if stray := sorted(way.weights.keys() - set(way.members)):
                raise RouteError(f"group {name} has weights for {', '.join(stray)}, not among its members", where)
            if any(not 1 <= weight <= 1000 for weight in way.weights.values()):
                raise RouteError(f"group {name}: weights are from 1 to 1000", where)
            self._check_known(way.members, f"group {name}", where)
            for member in way.members:
                if isinstance(self._ways[member], Refuse):
                    text = f"group {name} has the member {member}: leave it out, an unhealthy group refuses anyway"
                    raise RouteError(text, where)
        elif isinstance(way, Chain):
            if not way.hops:
                raise RouteError(f"chain {name} is empty: name the parents it goes through", where)
            if len(way.hops) > MAX_HOPS:
                raise RouteError(f"chain {name} has {len(way.hops)} hops: {MAX_HOPS} at most", where)
            self._check_known(way.hops, f"chain {name}", where)
            for hop in way.hops:
                if not isinstance(self._ways[hop], Parent):
                    raise RouteError(f"chain {name} goes through {hop}, which is no parent (a proxy)", where)
                if way.hops.count(hop) > 1:
                    raise RouteError(f"chain {name} goes through {hop} twice", where)

    def _check_known(self, names: Iterable[str], who: str, where: tuple[str, str]) -> None:
        for name in names:
            if name not in self._ways:
                known = ", ".join(sorted(self._ways))
                raise RouteError(f"{who} names the way {name!r}, which is not there; there are {known}", where)

    def _check_circle(self, name: str, outer: tuple[str, ...]) -> None:
        way = self._ways[name]
        if not isinstance(way, Group):
            return
        if name in outer:
            circle = " → ".join((*outer[outer.index(name) :], name))
            raise RouteError(f"groups go round in a circle: {circle}", ("way", outer[0]))
        path = (*outer, name)
        if len(path) > MAX_DEPTH:
            text = f"groups are nested {len(path)} deep ({' → '.join(path)}): {MAX_DEPTH} at most"
            raise RouteError(text, ("way", path[0]))
        for member in way.members:
            self._check_circle(member, path)

    def check_routes(self, routes: Iterable[Route]) -> None:
        """Raise :class:`RouteError` if a route leads to a way that is not there."""
        for route in routes:
            self._check_known((route.way,), f"route {route.name}", ("route", route.name))

    def leaves(self, name: str) -> Iterator[str]:
        """Yield the ways that have a health of their own: what is at the end of groups, each once."""
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            found = waiting.pop(0)
            way = self._ways[found]
            if isinstance(way, Group):
                waiting = [*way.members, *waiting]
            elif not isinstance(way, Refuse) and found not in seen:
                seen.add(found)
                yield found

    def hops(self, name: str) -> tuple[Parent, ...]:
        """Return the parents of a way, the nearest first; none for what is direct."""
        way = self._ways[name]
        if isinstance(way, Parent):
            return (way,)
        if isinstance(way, Chain):
            return tuple(hop for name in way.hops if isinstance(hop := self._ways[name], Parent))
        return ()

    def __getitem__(self, name: str) -> Way:
        return self._ways[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ways)

    def __len__(self) -> int:
        return len(self._ways)
