"""Header fields: ordered, case-preserving, looked up without regard to case, and never able to carry a line break."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from .fields import Field, field_of

__all__ = ["Headers", "Written"]

_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE: Final = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")


def _encode(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("latin-1")


@functools.lru_cache(1024)
def _checked_once(name: str, value: str) -> Field:
    return Headers._checked(name, value)


@functools.lru_cache(64)
def _via_field(via: bytes) -> Field:
    return field_of(b"via", b"Via", via)


class Written(NamedTuple):
    """Fields as a proxy writes them for the next hop: their lines, how many proxies Via has named before, and whether
    there is a Date among them."""

    dropped: frozenset[bytes]
    via: bytes | None
    lines: bytes
    hops: int
    dated: bool


class _Memory:
    """What was found out of a list of fields that several :class:`Headers` share, for as long as none changes it."""

    __slots__ = ("written",)

    def __init__(self) -> None:
        self.written: Written | None = None


class Headers:
    """A list of header fields (RFC 9110 section 5).

    Names and values may be given as text (ISO-8859-1, the reversible reading of arbitrary octets) or bytes and come
    back as text; :attr:`raw` has the bytes. :meth:`add` and :meth:`set` raise ValueError for a name that is not a
    token and for a value with CR, LF, NUL or any other control character but HTAB, so no value can split a message.
    """

    __slots__ = ("_items", "_memory")

    def __init__(self, items: Iterable[tuple[str | bytes, str | bytes]] = ()) -> None:
        # The list is shared by copies, and never changed: each change makes a new one.
        self._items: list[Field] = [self._checked(name, value) for name, value in items]
        self._memory: _Memory | None = None

    @classmethod
    def _of_fields(cls, fields: list[Field]) -> Headers:
        """Take fields (name in lower case, name, value) that a strict parser has validated already."""
        headers = cls.__new__(cls)
        headers._items = fields
        headers._memory = None
        return headers

    def _remembering(self) -> Headers:
        """Remember what is found out of these fields, for all copies of them."""
        self._memory = _Memory()
        return self

    def add(self, name: str | bytes, value: str | bytes) -> None:
        """Append a field; others of the same name stay."""
        self._items = [*self._items, self._checked(name, value)]
        self._memory = None

    def set(self, name: str | bytes, value: str | bytes) -> None:
        """Make this the only field of its name; it takes the place of the first one."""
        item = self._checked(name, value)
        kept: list[Field] = []
        placed = False
        for old in self._items:
            if old[0] != item[0]:
                kept.append(old)
            elif not placed:
                kept.append(item)
                placed = True
        if not placed:
            kept.append(item)
        self._items = kept
        self._memory = None

    def remove(self, *names: str) -> None:
        """Remove every field with one of these names; names that are absent are fine."""
        lowered = {name.lower().encode("latin-1") for name in names}
        self._items = [item for item in self._items if item[0] not in lowered]
        self._memory = None

    def get(self, name: str) -> str | None:
        """Return the value of the first field of this name, or None."""
        lowered = name.lower().encode("latin-1")
        for key, _, value, _ in self._items:
            if key == lowered:
                return value.decode("latin-1")
        return None

    def get_all(self, name: str) -> list[str]:
        """Return the values of all fields of this name, in order."""
        lowered = name.lower().encode("latin-1")
        return [value.decode("latin-1") for key, _, value, _ in self._items if key == lowered]

    def tokens(self, name: str) -> list[str]:
        """Return the members of a comma-separated list field (RFC 9110 section 5.6.1), in lower case.

        For fields whose members are tokens; a quoted string with a comma in it would be cut.
        """
        members = (member.strip().lower() for value in self.get_all(name) for member in value.split(","))
        return [member for member in members if member]

    def copy(self) -> Headers:
        """Return an independent copy."""
        clone = Headers.__new__(Headers)
        clone._items = self._items
        clone._memory = self._memory
        return clone

    def _replaced(self, dropped: frozenset[bytes], added: list[tuple[str, str]]) -> Headers:
        """Return a copy without some fields (names in lower case) and with others at its end. Raises ValueError as
        :meth:`add` does."""
        items = [item for item in self._items if item[0] not in dropped]
        items += [_checked_once(name, value) for name, value in added]
        return Headers._of_fields(items)

    def _passed_on(self, dropped: frozenset[bytes], via: bytes | None) -> tuple[Headers, int]:
        """Return a copy without some fields (names in lower case) and with ``via`` behind what Via says, which
        becomes one field: nothing reads a list field differently for that. And how many proxies Via named."""
        items = [item for item in self._items if item[0] not in dropped and item[0] != b"via"]
        if len(items) == len(self._items):  # most messages
            if via is not None:
                items.append(_via_field(via))
            return Headers._of_fields(items), 0
        items = []
        before: list[bytes] = []
        place = 0
        for item in self._items:
            name = item[0]
            if name == b"via":
                if not before:
                    place = len(items)
                before.append(item[2])
                if via is None:
                    items.append(item)
            elif name not in dropped:
                items.append(item)
        hops = sum(1 for value in before for member in value.split(b",") if member.strip()) if before else 0
        if via is not None and before:
            items.insert(place, field_of(b"via", b"Via", b", ".join([*before, via])))
        elif via is not None:
            items.append(_via_field(via))
        return Headers._of_fields(items), hops

    def _written(self, dropped: frozenset[bytes], via: bytes | None) -> Written:
        """Return the lines of :meth:`_passed_on`."""
        memory = self._memory
        if memory is not None:
            known = memory.written
            if known is not None and known.dropped is dropped and known.via == via:
                return known
        lines: list[bytes] = []
        dated = False
        hops = 0
        for name, _, _, line in self._items:
            if name == b"via":
                break
            if name not in dropped:
                lines.append(line)
                if name == b"date":
                    dated = True
        else:
            if via is not None:
                lines.append(_via_field(via)[3])
            written = Written(dropped, via, b"".join(lines), 0, dated)
            if memory is not None:
                memory.written = written
            return written
        passed, hops = self._passed_on(dropped, via)
        lines = [field[3] for field in passed._items]
        dated = "date" in passed
        written = Written(dropped, via, b"".join(lines), hops, dated)
        if memory is not None:
            memory.written = written
        return written

    @property
    def raw(self) -> list[tuple[bytes, bytes]]:
        """Names (as they were spelt) and values, as bytes."""
        return [(name, value) for _, name, value, _ in self._items]

    @staticmethod
    def _checked(name: str | bytes, value: str | bytes) -> Field:
        raw_name = _encode(name)
        raw_value = _encode(value).strip(b" \t")
        if _NAME.fullmatch(raw_name) is None:
            raise ValueError(f"{raw_name[:64]!r} is not a header name")
        if _VALUE.fullmatch(raw_value) is None:
            raise ValueError(f"the value of {raw_name.decode('latin-1')} holds a control character")
        return field_of(raw_name.lower(), raw_name, raw_value)

    def __contains__(self, name: str) -> bool:
        lowered = name.lower().encode("latin-1")
        for item in self._items:  # noqa: SIM110  # asked often; a generator costs twice as much
            if item[0] == lowered:
                return True
        return False

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for _, name, value, _ in self._items:
            yield name.decode("latin-1"), value.decode("latin-1")

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Headers):
            return NotImplemented
        return [(key, value) for key, _, value, _ in self._items] == [(key, value) for key, _, value, _ in other._items]

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"Headers({list(self)!r})"
