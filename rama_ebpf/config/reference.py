"""Every table and setting of ``rama.toml`` as Markdown, written from the model itself.

``python -m rama_ebpf.config.reference docs/config.md docs/layers.md`` writes it below the marker line of each: the
tables and services into the one, the layers into the other, where they are described. A test holds the files against
the model.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from .decode import AnyKind, Choice, ListOf, MapOf, Table, describe, encode, is_required, settings_of
from .kinds import Kind
from .layers import LAYERS
from .model import Config
from .routes import WAYS
from .services import SERVICES
from .show import inline

__all__ = ["layers_reference", "reference", "with_reference"]


def reference() -> str:
    """Return the reference of the file's tables, of ways, and of the services that a stack can name."""
    lines: list[str] = []
    for path, type_ in _tables("", Config):
        if path:
            lines += _section("##", f"[{path}]", type_)
    return _text([*lines, *_named("Ways", WAYS), *_named("Services", SERVICES)])


def layers_reference() -> str:
    """Return the reference of the layers that a stack can name."""
    return _text(_named("In `rama.toml`", LAYERS))


def _named(title: str, types: Mapping[str, type]) -> list[str]:
    lines = [f"## {title}", ""]
    for name, type_ in sorted(types.items()):
        lines += _section("###", name, type_)
        for inner, inner_type in _tables(name, type_):
            if inner != name:
                lines += _section("####", inner, inner_type)
    return lines


def _text(lines: list[str]) -> str:
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


_WRITTEN: Final[Mapping[str, Callable[[], str]]] = {
    f"<!-- below: written by python -m rama_ebpf.config.reference {path} -->": written
    for path, written in (("docs/config.md", reference), ("docs/layers.md", layers_reference))
}
"""What stands below each marker line."""


def with_reference(text: str) -> str:
    """Return a file's text with all below its marker line written anew. Raises ValueError without a marker."""
    for marker, written in _WRITTEN.items():
        head, found, _ = text.partition(marker)
        if found:
            return f"{head}{marker}\n\n{written()}"
    raise ValueError(f"there is no line {' or '.join(_WRITTEN)}")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        target = Path(name)
        target.write_text(with_reference(target.read_text()))
