"""Reading a configuration file and finding everything that is wrong with it."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import RamaError
from .build import check_stack
from .decode import Decoder, Mistake
from .model import Config
from .positions import key_lines

__all__ = ["ConfigError", "config_of", "load_config"]


class ConfigError(RamaError, ValueError):
    """A configuration cannot be used. ``mistakes`` are all that were found; the text is one line for each."""

    kind = "config"

    def __init__(self, file: str, mistakes: list[Mistake]) -> None:
        super().__init__("\n".join(f"{file}:{mistake}" for mistake in sorted(mistakes)))
        self.mistakes = sorted(mistakes)


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read and check a file. Relative paths in it are seen from its directory. Raises :class:`ConfigError`."""
    file = os.fspath(path)
    try:
        text = Path(file).read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(file, [Mistake(1, "", f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(file, [Mistake(1, "", f"is not UTF-8: {error.reason} at byte {error.start}")]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(file, [_syntax_mistake(error, text)]) from error
    directory = os.path.dirname(os.path.abspath(file))
    decoder = Decoder(key_lines(text), directory)
    config: Config | None = decoder.table(Config, values)
    if config is not None:
        _check_whole(config, decoder, directory)
    if config is None or decoder.mistakes:
        raise ConfigError(file, decoder.mistakes)
    return config


def config_of(values: Mapping[str, Any]) -> Config:
    """Decode what :func:`~.show.effective` has encoded. Raises :class:`ConfigError`."""
    decoder = Decoder({}, "/")
    config: Config | None = decoder.table(Config, values)
    if config is None:
        raise ConfigError("configuration", decoder.mistakes)
    return config


def _syntax_mistake(error: tomllib.TOMLDecodeError, text: str) -> Mistake:
    # Python 3.11 has the position in the message only: "… (at line 3, column 5)" or "… (at end of document)".
    message, _, position = str(error).rpartition(" (at ")
    line = position.split(",")[0].removeprefix("line ")
    return Mistake(int(line) if line.isdigit() else text.count("\n") + 1, "", f"not TOML: {message}")


def _check_whole(config: Config, decoder: Decoder, directory: str) -> None:
    """What no single setting shows: references, doubles, and stacks that do not compose."""
    if not config.listeners:
        decoder.complain(("listeners",), "there is no listener: write [listeners.NAME]")
    seen: dict[str, str] = {}
    for name, listener in config.listeners.items():
        if listener.stack not in config.stacks:
            names = ", ".join(sorted(config.stacks)) or "none"
            text = f'there is no stack "{listener.stack}"; there are {names}'
            decoder.complain(("listeners", name, "stack"), text)
        other = seen.setdefault(str(listener.address), name)
        if other != name and not (listener.address.address is not None and listener.address.address.port == 0):
            decoder.complain(("listeners", name, "address"), f"{listener.address} is also that of listener {other}")
    rules: dict[str, int] = {}
    for index, rule in enumerate(config.policy.rules):
        if rules.setdefault(rule.name, index) != index:
            decoder.complain(("policy", "rules", index, "name"), f'there are two rules "{rule.name}"')
    for name, stack in config.stacks.items():
        try:
            check_stack(config, stack, directory)
        except (RamaError, ValueError, OSError) as error:
            decoder.complain(("stacks", name), str(error))
