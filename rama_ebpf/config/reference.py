"""Every table and setting of ``rama.toml`` as Markdown, written from the model itself.

``python -m rama_ebpf.config.reference docs/config.md`` writes it below the marker line of that file; a test holds the
file against the model.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from .decode import AnyKind, Choice, ListOf, MapOf, Table, describe, encode, is_required, settings_of
from .kinds import Kind
from .layers import LAYERS
from .model import Config
from .services import SERVICES
from .show import inline

__all__ = ["MARKER", "reference", "with_reference"]

MARKER = "<!-- below: written by python -m rama_ebpf.config.reference docs/config.md -->"


def reference() -> str:
    """Return the reference: the tables of the file, then the services and the layers that a stack can name."""
    lines: list[str] = []
    for path, type_ in _tables("", Config):
        if path:
            lines += _section("##", f"[{path}]", type_)
    for title, types in (("Services", SERVICES), ("Layers", LAYERS)):
        lines += [f"## {title}", ""]
        for name, type_ in sorted(types.items()):
            lines += _section("###", name, type_)
            for inner, inner_type in _tables(name, type_):
                if inner != name:
                    lines += _section("####", inner, inner_type)
    return "\n".join(lines).rstrip() + "\n"


def _tables(path: str, type_: type) -> Iterator[tuple[str, type]]:
    yield path, type_
    for field in settings_of(type_):
        kind = field.metadata["kind"]
        inner = f"{path.strip('[]')}.{field.name}" if path else field.name
        if isinstance(kind, MapOf):
            kind, inner = kind.kind, f"{inner}.NAME"
        elif isinstance(kind, ListOf):
            kind, inner = kind.kind, f"[{inner}]"
        if isinstance(kind, Table):
            yield from _tables(inner, kind.type)


def _section(level: str, name: str, type_: type) -> list[str]:
    lines = [f"{level} `{name}`", "", inspect.cleandoc(type_.__doc__ or ""), ""]
    rows = [_row(field) for field in settings_of(type_)]
    if rows:
        lines += ["| setting | allowed | default | is |", "|---|---|---|---|", *rows, ""]
    return lines


def _row(field: dataclasses.Field[object]) -> str:
    kind: AnyKind = field.metadata["kind"]
    cells = (f"`{field.name}`", _allowed(kind), _default(field, kind), str(field.metadata["help"]))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _allowed(kind: AnyKind) -> str:
    if isinstance(kind, ListOf):
        return f"array of {_allowed(kind.kind)}"
    if isinstance(kind, MapOf):
        return "a table for each name"
    if isinstance(kind, Choice):
        return f"a {kind.what}, see below"
    return describe(kind)


def _default(field: dataclasses.Field[object], kind: AnyKind) -> str:
    if is_required(field):
        return "**needed**"
    if not isinstance(kind, (Kind, ListOf)) or field.default in (None, dataclasses.MISSING):
        return ""
    return f"`{inline(encode(field.default, kind))}`"


def with_reference(text: str) -> str:
    """Return a file's text with all below the marker line written anew. Raises ValueError without a marker."""
    head, marker, _ = text.partition(MARKER)
    if not marker:
        raise ValueError(f"there is no line {MARKER}")
    return f"{head}{marker}\n\n{reference()}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(with_reference(target.read_text()))
