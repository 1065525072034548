"""A TOML file as plain values, with the line of each, and the error that names every mistake in it."""

from __future__ import annotations

import os
import tomllib
from typing import Any

from ..core.errors import RamaError
from ..core.text_file import read_text_file
from .decode import Decoder, Mistake
from .positions import key_lines

__all__ = ["ConfigError", "read_toml"]


class ConfigError(RamaError, ValueError):
    """A configuration cannot be used. ``mistakes`` are all that were found; the text is one line for each."""

    kind = "config"

    def __init__(self, file: str, mistakes: list[Mistake]) -> None:
        super().__init__("\n".join(f"{file}:{' ' * (not mistake.line)}{mistake}" for mistake in sorted(mistakes)))
        self.mistakes = sorted(mistakes)


def read_toml(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Decoder]:
    """Read a file; return its values, and a decoder that knows their lines. Raises :class:`ConfigError`."""
    file = os.fspath(path)
    try:
        text = read_text_file(file)
        values = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(file, [Mistake(0, "", f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(file, [Mistake(1, "", f"is not UTF-8: {error.reason} at byte {error.start}")]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(file, [_syntax_mistake(error, text)]) from error
    return values, Decoder(key_lines(text), os.path.dirname(os.path.abspath(file)))


def _syntax_mistake(error: tomllib.TOMLDecodeError, text: str) -> Mistake:
    # Python 3.11 has the position in the message only: "… (at line 3, column 5)" or "… (at end of document)".
    message, _, position = str(error).rpartition(" (at ")
    line = position.split(",")[0].removeprefix("line ")
    return Mistake(int(line) if line.isdigit() else text.count("\n") + 1, "", f"not TOML: {message}")
