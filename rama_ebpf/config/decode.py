"""Turning plain values into dataclasses, collecting every mistake, and back."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from .kinds import Kind
from .positions import Path

__all__ = [
    "AnyKind",
    "Choice",
    "Decoder",
    "ListOf",
    "MapOf",
    "Mistake",
    "Table",
    "describe",
    "encode",
    "is_required",
    "setting",
    "settings_of",
]


@dataclass(frozen=True, slots=True)
class ListOf:
    """An array of values of one kind."""

    kind: AnyKind


@dataclass(frozen=True, slots=True)
class MapOf:
    """A table with keys of the operator's choice."""

    kind: AnyKind


@dataclass(frozen=True, slots=True)
class Table:
    """A table with the settings of a dataclass."""

    type: type


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several tables, by name: ``"name"`` or ``{ name = { … } }``."""

    what: str
    types: Mapping[str, type]


AnyKind = Kind[Any] | ListOf | MapOf | Table | Choice

_BAD: Final = object()


def setting(
    kind: AnyKind,
    help: str,
    *,
    default: Any = dataclasses.MISSING,
    factory: Any = dataclasses.MISSING,
    unless: str = "",
) -> Any:
    """A dataclass field that is a setting of this ``kind``, with a line of ``help`` for the documentation. It is needed
    ``unless`` the setting of that name is given, whatever its default is."""
    metadata = {"kind": kind, "help": help, "unless": unless}
    if factory is not dataclasses.MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, order=True)
class Mistake:
    """Something wrong in a file. ``line`` counts from 1, and is 0 for the file as a whole; ``where`` is the setting's
    name in full."""

    line: int
    where: str
    text: str

    def __str__(self) -> str:
        line = f"{self.line}: " if self.line else ""
        return f"{line}{self.where}: {self.text}" if self.where else f"{line}{self.text}"


class Decoder:
    """Decodes values whose positions are known; :attr:`mistakes` holds all that was wrong.

    Relative paths of files are joined to ``directory``.
    """

    def __init__(self, lines: Mapping[Path, int], directory: str) -> None:
        self._lines = lines
        self._directory = directory
        self.mistakes: list[Mistake] = []

    def complain(self, path: Path, text: str) -> None:
        """Note a mistake at ``path``, or at the nearest table around it that is in the file."""
        near = path
        while near and near not in self._lines:
            near = near[:-1]
        self.mistakes.append(Mistake(self._lines.get(near, 1), _dotted(path), text))

    def line(self, path: Path) -> int:
        """Return the line of a value that is in the file."""
        return self._lines[path]

    def table(self, type_: type, value: Mapping[str, Any], path: Path = ()) -> Any:
        """Decode a dataclass; None if anything in it is wrong."""
        decoded = self._decode(Table(type_), value, path)
        return None if decoded is _BAD else decoded

    def _decode(self, kind: AnyKind, value: Any, path: Path) -> Any:
        if isinstance(kind, Kind):
            return self._scalar(kind, value, path)
        if isinstance(kind, ListOf):
            return self._list(kind, value, path)
        if isinstance(kind, MapOf):
            return self._map(kind, value, path)
        if isinstance(kind, Choice):
            return self._choice(kind, value, path)
        return self._dataclass(kind.type, value, path)

    def _scalar(self, kind: Kind[Any], value: Any, path: Path) -> Any:
        try:
            if kind.is_path and isinstance(value, str):
                value = os.path.join(self._directory, value)
            return kind.parse(value)
        except ValueError as error:
            shown = f'"{value}"' if isinstance(value, str) else _toml_word(value)
            if kind.hide is not None:
                shown = f'"{kind.hide(value)}"' if isinstance(value, str) else "what is written"
            self.complain(path, f"{shown}: {error}")
            return _BAD

    def _list(self, kind: ListOf, value: Any, path: Path) -> Any:
        if not isinstance(value, list):
            self.complain(path, "write an array: [ … ]")
            return _BAD
        decoded = [self._decode(kind.kind, item, (*path, index)) for index, item in enumerate(value)]
        return _BAD if _BAD in decoded else tuple(decoded)

    def _map(self, kind: MapOf, value: Any, path: Path) -> Any:
        if not isinstance(value, dict):
            self.complain(path, f"write a table: [{_dotted(path)}.NAME]")
            return _BAD
        decoded = {key: self._decode(kind.kind, item, (*path, key)) for key, item in value.items()}
        return _BAD if any(item is _BAD for item in decoded.values()) else decoded

    def _choice(self, kind: Choice, value: Any, path: Path) -> Any:
        if isinstance(value, str):
            value = {value: {}}
        if not isinstance(value, dict) or len(value) != 1:
            self.complain(path, f'name one {kind.what}: "name" or {{ name = {{ … }} }}; {_known(kind.types)}')
            return _BAD
        ((name, options),) = value.items()
        if name not in kind.types:
            self.complain(path, f'there is no {kind.what} "{name}"{_guess(name, kind.types)}; {_known(kind.types)}')
            return _BAD
        return self._dataclass(kind.types[name], options, (*path, name))

    def _dataclass(self, type_: type, value: Any, path: Path) -> Any:
        if not isinstance(value, dict):
            self.complain(path, "write a table: { … }")
            return _BAD
        settings = {f.name: f for f in settings_of(type_)}
        arguments: dict[str, Any] = {}
        for key, item in value.items():
            if key in settings:
                arguments[key] = self._decode(settings[key].metadata["kind"], item, (*path, key))
            else:
                self.complain((*path, key), f"there is no such setting{_guess(key, settings)}; {_known(settings)}")
        missing = [
            name
            for name, f in settings.items()
            if name not in arguments
            and (is_required(f) or (f.metadata["unless"] and f.metadata["unless"] not in value))
        ]
        for name in missing:
            other = settings[name].metadata["unless"]
            text = f"this setting is needed ({describe(settings[name].metadata['kind'])})"
            self.complain((*path, name), f"{text}, or {other}" if other else text)
        if missing or any(item is _BAD for item in arguments.values()) or value.keys() - settings.keys():
            return _BAD
        try:
            return type_(**arguments)
        except ValueError as error:
            self.complain(path, str(error))
            return _BAD


def settings_of(type_: type) -> Iterator[dataclasses.Field[Any]]:
    """The settings among the fields of a dataclass."""
    return (f for f in dataclasses.fields(type_) if "kind" in f.metadata)


def is_required(f: dataclasses.Field[Any]) -> bool:
    """Whether a setting has no default."""
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _dotted(path: Path) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _guess(word: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f': did you mean "{near[0]}"?' if near else ""


def _known(names: Mapping[str, object]) -> str:
    return "there are " + ", ".join(sorted(names)) if names else "there are none"


def _toml_word(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def describe(kind: AnyKind) -> str:
    """Say in a few words what is allowed."""
    if isinstance(kind, Kind):
        return kind.name
    if isinstance(kind, ListOf):
        return f"array of {describe(kind.kind)}"
    if isinstance(kind, Choice):
        return kind.what
    return "table"


def encode(value: Any, kind: AnyKind, *, hidden: bool = False) -> Any:
    """Return the plain value of a decoded one; settings that are None by default, and still are, are left out. With
    ``hidden`` passwords are left out as well, and it cannot be decoded again."""
    if isinstance(kind, Kind):
        return kind.hide(value) if hidden and kind.hide is not None else kind.show(value)
    if isinstance(kind, ListOf):
        return [encode(item, kind.kind, hidden=hidden) for item in value]
    if isinstance(kind, MapOf):
        return {key: encode(item, kind.kind, hidden=hidden) for key, item in value.items()}
    if isinstance(kind, Choice):
        name = next(name for name, type_ in kind.types.items() if type(value) is type_)
        return {name: encode(value, Table(type(value)), hidden=hidden)}
    return {
        f.name: encode(item, f.metadata["kind"], hidden=hidden)
        for f in settings_of(kind.type)
        if (item := getattr(value, f.name)) is not None or f.default is not None
    }
