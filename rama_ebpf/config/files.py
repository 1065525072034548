"""The files that a configuration names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from .decode import settings_of
from .kinds import Kind
from .model import Config

__all__ = ["named_files", "watched_directories"]


def named_files(value: object, *, secret: bool = False) -> Iterator[Path]:
    """Yield what the settings in ``value`` (settings, or a table or array of some) name, or only what of it is a
    ``secret``."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from named_files(item, secret=secret)
    elif isinstance(value, tuple):
        for item in value:
            yield from named_files(item, secret=secret)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in settings_of(type(value)):
            kind, found = field.metadata["kind"], getattr(value, field.name)
            if not isinstance(kind, Kind):
                yield from named_files(found, secret=secret)
            elif found is not None and (kind.is_secret if secret else kind.is_path):
                yield Path(found)


def watched_directories(config: Config) -> list[str]:
    """Return the directories of the files that services name. Workers read these again when they change, and a file
    that is replaced is another one, in the same directory."""
    found = (path if path.is_dir() else path.absolute().parent for path in named_files(config.stacks))
    return sorted({str(path) for path in found if path != Path("/")})
