"""Read ``policy.h``: its constants, and the layout of each structure as :mod:`struct` has it.

It is the one description of what the kernel programs and userspace share. Python says by name, and in which order, it
takes a structure's members (see :mod:`.abi`); a header that has others is refused here, before anything is loaded.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Header", "HeaderMismatch"]

_SCALARS: Final = {"__u8": "B", "char": "B", "__u16": "H", "__u32": "I", "u32": "I", "__u64": "Q", "u64": "Q"}
_FLAT: Final = ("limit", "lengths", "finding", "verdict")
"""Structures whose members take part in the format of what they are in; others are bytes there."""


class HeaderMismatch(RuntimeError):
    """The header has other members, or another order of them, than this code packs."""


@dataclass(frozen=True, slots=True)
class _Layout:
    members: tuple[str, ...]
    format: str
    size: int
    align: int


class Header:
    """The text of a header, read. Only declarations of the forms that ``policy.h`` has are understood."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
        self.constants: Final = {
            name: int(value, 0)
            for body in re.findall(r"enum\s+\w+\s*\{(.*?)\}", text, flags=re.S)
            for name, value in re.findall(r"(\w+)\s*=\s*(0x[0-9a-fA-F]+|\d+)", body)
        }
        # It is packed, and has a union in it.
        self._layouts: Final = {"address": _Layout(("b",), "16s", 16, 4)}
        for name, body in re.findall(r"^struct (\w+) \{(.*?)^\}", text, flags=re.S | re.M):
            if name not in self._layouts:
                self._layouts[name] = self._read(body)

    @classmethod
    def read(cls, path: Path) -> Header:
        """Read a file."""
        return cls(path.read_text(encoding="utf-8"))

    @property
    def structures(self) -> Sequence[str]:
        """The names of all structures."""
        return list(self._layouts)

    def layout(self, name: str, *members: str) -> struct.Struct:
        """Return how a structure is packed, padding between members included.

        ``members`` are those that the caller packs, in its order. Raises :class:`HeaderMismatch` if they are not the
        structure's.
        """
        found = self._layouts.get(name)
        if found is None:
            raise HeaderMismatch(f"policy.h has no struct {name}")
        if found.members != members:
            raise HeaderMismatch(f"struct {name} has {', '.join(found.members)}; packed are {', '.join(members)}")
        return struct.Struct("=" + found.format)

    def _read(self, body: str) -> _Layout:
        members: list[str] = []
        parts: list[str] = []
        size, widest = 0, 1
        for declaration in body.split(";"):
            found = re.fullmatch(r"\s*(?:struct\s+)?(\w+)\s+(.+?)\s*", declaration, flags=re.S)
            if found is None:
                continue  # what is left after the last semicolon
            for declarator in found[2].split(","):
                name, _, length = declarator.strip().partition("[")
                count = self._number(length.rstrip("]")) if length else None
                code, width, align = self._member(found[1], name, count)
                gap = -size % align
                parts.append(f"{gap}x {code}" if gap else code)
                members.append(name)
                size += gap + width * (1 if count is None else count)
                widest = max(widest, align)
        tail = -size % widest
        return _Layout(tuple(members), " ".join([*parts, *([f"{tail}x"] if tail else [])]), size + tail, widest)

    def _member(self, kind: str, name: str, count: int | None) -> tuple[str, int, int]:
        """Return a member's format, the width of one element, and its alignment."""
        code = _SCALARS.get(kind)
        if code is None:
            inner = self._layouts[kind]
            one = inner.format if kind in _FLAT else f"{inner.size}s"
            return " ".join([one] * (1 if count is None else count)), inner.size, inner.align
        width = struct.calcsize(f"={code}")
        if count is None:
            return code, width, width
        if name.startswith("pad"):
            return f"{count * width}x", width, width
        return (f"{count}s" if width == 1 else f"{count}{code}"), width, width

    def _number(self, text: str) -> int:
        return int(text) if text.isdigit() else self.constants[text]
