"""The reference of all settings, made from the model: ``python -m rama_ebpf.config.document``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from .decode import AnyKind, Choice, ListOf, MapOf, Table, describe, encode
from .model import Config
from .show import inline

__all__ = ["reference"]


def reference() -> str:
    """Return Markdown: a section for each table, one for each layer and service, a row for each setting."""
    lines: list[str] = []
    for section in dataclasses.fields(Config):
        kind: AnyKind = section.metadata["kind"]
        if isinstance(kind, MapOf):
            assert isinstance(kind.kind, Table)
            lines += _section(f"[{section.name}.NAME]", kind.kind.type)
        elif isinstance(kind, Table):
            lines += _section(f"[{section.name}]", kind.type)
    return "\n".join(lines).strip() + "\n"


def _section(title: str, type_: type) -> Iterator[str]:
    yield from ("", f"### `{title}`", "", _first_line(type_), "")
    yield from _table(type_)
    for field in dataclasses.fields(type_):
        kind = field.metadata["kind"]
        choice = kind.kind if isinstance(kind, ListOf) else kind
        if isinstance(choice, Choice):
            for name, chosen in sorted(choice.types.items()):
                yield from ("", f"#### {choice.what} `{name}`", "", _first_line(chosen), "")
                yield from _table(chosen)
        elif isinstance(choice, Table):
            yield from _section(f"{title[:-1]}.{field.name}]", choice.type)


def _first_line(type_: type) -> str:
    return (type_.__doc__ or "").strip().partition("\n")[0]


def _table(type_: type) -> Iterator[str]:
    fields = dataclasses.fields(type_)
    if not fields:
        yield "No settings."
        return
    yield "| setting | is | default | |"
    yield "|---|---|---|---|"
    for field in fields:
        kind = field.metadata["kind"]
        yield f"| `{field.name}` | {_cell(describe(kind))} | {_default(field)} | {_cell(field.metadata['help'])} |"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is None:
        return "–"
    if field.default is not dataclasses.MISSING:
        return f"`{_cell(inline(encode(field.default, field.metadata['kind'])))}`"
    return "needed" if field.default_factory is dataclasses.MISSING else "–"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
