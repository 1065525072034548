"""A configuration as plain values and as TOML, with every default filled in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from .decode import Table, encode
from .model import Config

__all__ = ["effective", "inline", "to_toml"]


def effective(config: Config, *, hidden: bool = False) -> dict[str, Any]:
    """Return the values of a configuration, defaults included; :func:`~.load.config_of` reads them back. With
    ``hidden`` they are for people: without passwords."""
    return cast("dict[str, Any]", encode(config, Table(Config), hidden=hidden))


def to_toml(values: Mapping[str, Any]) -> str:
    """Write plain values as TOML: tables with headers, and what is inside arrays in one line."""
    return "\n".join(_table((), values)).strip() + "\n"


def _table(path: tuple[str, ...], values: Mapping[str, Any]) -> list[str]:
    # A service is a choice, { name = { … } }, and reads better in its line.
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping) and key != "service"}
    plain = {key: value for key, value in values.items() if key not in tables}
    lines: list[str] = []
    if path and (plain or not tables):
        lines += ["", f"[{'.'.join(map(_key, path))}]"]
    lines += [f"{_key(key)} = {inline(value)}" for key, value in plain.items()]
    for key, value in tables.items():
        lines += _table((*path, key), value)
    return lines


def _key(key: str) -> str:
    bare = key and all(character.isascii() and (character.isalnum() or character in "_-") for character in key)
    return key if bare else _string(key)


def inline(value: Any) -> str:
    """Write one plain value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_key(key)} = {inline(item)}" for key, item in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list):
        items = [inline(item) for item in value]
        line = f"[{', '.join(items)}]"
        return line if len(line) <= 90 else "[\n" + "".join(f"    {item},\n" for item in items) + "]"
    return str(value)


def _string(text: str) -> str:
    # JSON's escapes are TOML's, except for DEL, which TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
