"""A map from host name patterns to values: exact names, and suffixes that the longest match wins among."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

__all__ = ["NameMap", "NameSet"]

T = TypeVar("T")


class NameMap(Generic[T]):
    """Looks a host name up among patterns, in a time that depends on its labels and not on their number.

    ``example.com`` stands for that name alone, ``*.example.com`` for every name below it, ``.example.com`` for both,
    ``*`` for every name. An exact pattern beats a suffix, a longer suffix a shorter one. Case does not matter.
    """

    def __init__(self, entries: Iterable[tuple[str, T]] = ()) -> None:
        self._exact: dict[str, T] = {}
        self._below: dict[str, T] = {}
        for pattern, value in entries:
            self.add(pattern, value)

    def add(self, pattern: str, value: T) -> None:
        """Add or replace an entry. Raises ValueError for a pattern that no name can match."""
        text = pattern.lower().removesuffix(".")
        if pattern == "*":
            self._below[""] = value
            return
        name = text.removeprefix("*").removeprefix(".")
        if not name or "*" in name or "" in name.split(".") or (text[0] == "*" and text[1] != "."):
            raise ValueError(f"{pattern!r} is not a pattern: write name.example, *.name.example, .name.example or *")
        if text[0] != "*":
            self._exact[name] = value
        if text[0] in "*.":
            self._below[name] = value

    def find(self, name: str) -> T | None:
        """Return the value of the best match, None if nothing matches."""
        if (found := self._exact.get(name)) is not None:
            return found
        while name:
            name = name.partition(".")[2]
            if (found := self._below.get(name)) is not None:
                return found
        return None

    def __len__(self) -> int:
        return len(self._exact.keys() | {"*." + name for name in self._below})


class NameSet:
    """A set of the patterns of :class:`NameMap`."""

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        self._map = NameMap((pattern, True) for pattern in patterns)

    def __contains__(self, name: str | None) -> bool:
        return name is not None and self._map.find(name) is not None

    def __bool__(self) -> bool:
        return bool(len(self._map))
