"""Typed, append-only context that travels with a stream or a request.

A value is stored under its own type: ``extensions.add(User("tom"))`` is read back with ``extensions.get(User)``.
Nothing is ever removed or overwritten, so a layer can rely on what the layers outside it have added; a later value
of the same type shadows the earlier one, and :meth:`Extensions.all` still lists both. :meth:`Extensions.fork` gives
a request a context of its own on top of its connection's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

__all__ = ["Extensions"]

T = TypeVar("T")


class Extensions:
    """An append-only set of values keyed by their type, optionally on top of a parent's."""

    __slots__ = ("_latest", "_parent", "_values")

    def __init__(self, parent: Extensions | None = None) -> None:
        self._parent = parent
        self._values: list[object] | None = None
        self._latest: dict[type, object] | None = None

    def add(self, value: object) -> None:
        """Append ``value``; it is found under ``type(value)`` and shadows earlier values of that type."""
        self._latest = None
        if self._values is None:
            self._values = [value]
        else:
            self._values.append(value)

    def get(self, kind: type[T]) -> T | None:
        """Return the latest value whose type is exactly ``kind``, from here or the nearest parent, or None."""
        node: Extensions | None = self
        while node is not None:
            if node._values is not None:
                for value in reversed(node._values):
                    if type(value) is kind:
                        return value
            node = node._parent
        return None

    def require(self, kind: type[T]) -> T:
        """Like :meth:`get`, but raises :class:`LookupError` naming the type if there is none."""
        value = self.get(kind)
        if value is None:
            raise LookupError(f"no {kind.__name__} among the extensions: is the layer that adds it in the stack?")
        return value

    def all(self, kind: type[T]) -> Iterator[T]:
        """Yield every value of exactly this type, oldest first, a parent's before its fork's."""
        if self._parent is not None:
            yield from self._parent.all(kind)
        for value in self._values or ():
            if type(value) is kind:
                yield value

    def latest(self) -> dict[type, object]:
        """Return the latest value of each type, from here and from parents: for who asks for many."""
        if self._latest is not None:
            return self._latest.copy()
        found: dict[type, object] = {} if self._parent is None else self._parent.latest()
        for value in self._values or ():
            found[type(value)] = value
        if self._parent is None:  # a connection's: each of its requests asks
            self._latest = found.copy()
        return found

    def fork(self) -> Extensions:
        """Return a child: it sees what this one holds now and later, and what is added to it stays in it."""
        return Extensions(self)

    def adopt(self, fork: Extensions) -> None:
        """Append what was added to a fork of this: a request has become the whole connection (CONNECT, an upgrade)."""
        for value in fork._values or ():
            self.add(value)

    def __contains__(self, kind: type[object]) -> bool:
        return self.get(kind) is not None
