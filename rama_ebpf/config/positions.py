"""Where in a TOML text each value stands. tomllib reads the values but forgets their lines.

The text has been accepted by tomllib before, so this only has to find its way, not to judge (TOML 1.0.0).
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["Path", "key_lines"]

Path = tuple[str | int, ...]
"""The way to a value: table keys, and indexes in arrays."""

_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
_BLANK: Final = re.compile(r"[ \t]*")
_FILLER: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SCALAR: Final = re.compile(r"[^,\]}\n#]*")
_ESCAPE: Final = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL)
_ESCAPES: Final = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", '"': '"', "\\": "\\"}


def key_lines(text: str) -> dict[Path, int]:
    """Return the line (from 1) on which each key, table and array element of a valid TOML ``text`` begins."""
    return _Scanner(text).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._lines: dict[Path, int] = {}
        self._counts: dict[Path, int] = {}
        self._counted_to = 0
        self._line = 1

    def scan(self) -> dict[Path, int]:
        table: Path = ()
        self._skip(_FILLER)
        while self._at < len(self._text):
            if self._text[self._at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip(_FILLER)
        return self._lines

    def _note(self, path: Path) -> None:
        self._line += self._text.count("\n", self._counted_to, self._at)
        self._counted_to = self._at
        self._lines.setdefault(path, self._line)

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        assert match is not None  # all patterns match the empty string, or what tomllib has accepted
        self._at = match.end()
        return match.group()

    def _header(self) -> Path:
        is_array = self._text.startswith("[[", self._at)
        start = self._at
        self._at += 2 if is_array else 1
        path = self._resolve(self._keys())
        self._at += 2 if is_array else 1
        end, self._at = self._at, start
        if is_array:
            index = self._counts.get(path, 0)
            self._counts[path] = index + 1
            self._note(path)
            path = (*path, index)
        self._note(path)
        self._at = end
        return path

    def _resolve(self, keys: list[str]) -> Path:
        """A header's key that names an array of tables means its latest element."""
        path: Path = ()
        for key in keys[:-1]:
            path = (*path, key)
            if path in self._counts:
                path = (*path, self._counts[path] - 1)
            self._note(path)
        return (*path, keys[-1])

    def _keys(self) -> list[str]:
        keys = []
        while True:
            self._skip(_BLANK)
            keys.append(self._string() if self._text[self._at] in "\"'" else self._skip(_BARE))
            self._skip(_BLANK)
            if self._text[self._at] != ".":
                return keys
            self._at += 1

    def _pair(self, table: Path) -> None:
        start = self._at
        keys = self._keys()
        end, self._at = self._at, start
        path = table
        for key in keys:
            path = (*path, key)
            self._note(path)
        self._at = end + 1  # the equals sign
        self._skip(_BLANK)
        self._value(path)

    def _value(self, path: Path) -> None:
        self._note(path)
        first = self._text[self._at]
        if first in "\"'":
            self._string()
        elif first == "[":
            self._array(path)
        elif first == "{":
            self._inline_table(path)
        else:
            self._skip(_SCALAR)

    def _array(self, path: Path) -> None:
        self._at += 1
        index = 0
        self._skip(_FILLER)
        while self._text[self._at] != "]":
            self._value((*path, index))
            index += 1
            self._skip(_FILLER)
            if self._text[self._at] == ",":
                self._at += 1
                self._skip(_FILLER)
        self._at += 1

    def _inline_table(self, path: Path) -> None:
        self._at += 1
        self._skip(_FILLER)
        while self._text[self._at] != "}":
            self._pair(path)
            self._skip(_FILLER)
            if self._text[self._at] == ",":
                self._at += 1
                self._skip(_FILLER)
        self._at += 1

    def _string(self) -> str:
        quote = self._text[self._at]
        if self._text.startswith(quote * 3, self._at):
            return self._multiline(quote)
        start = end = self._at + 1
        while self._text[end] != quote:
            end += 2 if quote == '"' and self._text[end] == "\\" else 1
        self._at = end + 1
        raw = self._text[start:end]
        return raw if quote == "'" else _ESCAPE.sub(_unescape, raw)

    def _multiline(self, quote: str) -> str:
        """Skip it; no key is written like this, so its text is of no interest."""
        end = self._at + 3
        while not self._text.startswith(quote * 3, end):
            end += 2 if quote == '"' and self._text[end] == "\\" else 1
        end += 3
        while self._text.startswith(quote, end):  # up to two quotes may stand before the closing three
            end += 1
        self._at = end
        return ""


def _unescape(match: re.Match[str]) -> str:
    short, long, letter = match.groups()
    return _ESCAPES.get(letter, letter) if letter is not None else chr(int(short or long, 16))
