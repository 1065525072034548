"""Offsets of members of kernel structures, from the running kernel's own type information (BTF).

Reference: ``Documentation/bpf/btf.rst``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

__all__ = ["BtfUnavailable", "member_offsets"]

_VMLINUX: Final = Path("/sys/kernel/btf/vmlinux")
_HEADER: Final = struct.Struct("=HBBIIIII")
_TYPE: Final = struct.Struct("=III")
_MEMBER: Final = struct.Struct("=III")
_MAGIC: Final = 0xEB9F
_STRUCT: Final = 4
# Bytes that follow a type of each kind, fixed or per element (`vlen`).
_FIXED: Final = {1: 4, 3: 12, 14: 4, 17: 4}  # INT, ARRAY, VAR, DECL_TAG
_PER_ELEMENT: Final = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}  # STRUCT, UNION, ENUM, FUNC_PROTO, DATASEC, ENUM64


class BtfUnavailable(RuntimeError):
    """The kernel has no type information, or not the member that was looked for."""


def member_offsets(members: Iterable[tuple[str, str]], source: Path = _VMLINUX) -> dict[tuple[str, str], int]:
    """Return the offset in bytes of each (structure, member). Raises :class:`BtfUnavailable`."""
    wanted = set(members)
    try:
        data = source.read_bytes()
    except OSError as error:
        raise BtfUnavailable(f"no type information in {source}: {error.strerror}") from error
    magic, _version, _flags, header, types, types_size, strings, strings_size = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise BtfUnavailable(f"{source} is no BTF of this byte order")
    texts = data[header + strings : header + strings + strings_size]
    names = {texts.find(b"\0" + name.encode() + b"\0") + 1: name for name, _ in wanted}
    found: dict[tuple[str, str], int] = {}
    position, end = header + types, header + types + types_size
    while position < end:
        name, info, _size = _TYPE.unpack_from(data, position)
        position += _TYPE.size
        kind, count = info >> 24 & 0x1F, info & 0xFFFF
        if kind == _STRUCT and count and name in names:
            bitfields = info >> 31
            for index in range(count):
                member, _type, bits = _MEMBER.unpack_from(data, position + index * _MEMBER.size)
                key = (names[name], texts[member : texts.index(b"\0", member)].decode())
                if key in wanted:
                    found[key] = (bits & 0xFFFFFF if bitfields else bits) // 8
        position += _FIXED.get(kind, 0) + _PER_ELEMENT.get(kind, 0) * count
    missing = wanted - found.keys()
    if missing:
        raise BtfUnavailable("the kernel has no " + ", ".join(sorted(f"{s}.{m}" for s, m in missing)))
    return found
