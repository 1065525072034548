"""Who else may read or change the files of a configuration: what ``check`` and ``run`` warn of."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..services.tls.certs import pairs_in
from .files import named_files
from .model import Config
from .routes import ProxyWaySettings

__all__ = ["exposures"]


def exposures(config: Config, file: str | os.PathLike[str]) -> list[str]:
    """Return a line for each file that others may change, or read although it holds secrets: ``file`` itself, and the
    keys, password files and key logs that it names. A group may read them, for the workers' user to be in it."""
    own = Path(file)
    found = [_exposure(own, secret=_has_logins(config))]
    found += [_exposure(path, secret=True) for path in dict.fromkeys(_secrets(config))]
    return [text for text in found if text]


def _has_logins(config: Config) -> bool:
    urls = [url for stack in config.stacks.values() for url in stack.connect.via]
    urls += [way.url for way in config.ways.values() if isinstance(way, ProxyWaySettings)]
    return any("@" in url for url in urls)


def _secrets(config: Config) -> Iterator[Path]:
    for path in named_files(config, secret=True):
        yield path
        if path.is_dir():
            yield from (pair.key for pair in pairs_in(path))


def _exposure(path: Path, *, secret: bool) -> str:
    try:
        mode = path.stat().st_mode
        around = path.absolute().parent.stat().st_mode
    except OSError:
        return ""  # a key log that is not there yet: it will be made with a mode of its own
    is_directory = stat.S_ISDIR(mode)
    good = "0700" if is_directory else "0600"
    shown = f"{path}: mode {stat.S_IMODE(mode):04o}"
    if mode & (stat.S_IWGRP | stat.S_IWOTH) and not (is_directory and mode & stat.S_ISVTX):
        whose = "everybody" if mode & stat.S_IWOTH else "its group"
        return f"{shown}: {whose} may change it: chmod {good}"
    if secret and not is_directory and mode & stat.S_IROTH:
        remedy = f"chmod 0640 with the workers' group, or {good} (then SIGHUP has it read again)"
        return f"{shown}: everybody may read it: {remedy}"
    if around & stat.S_IWOTH and not around & stat.S_ISVTX:
        return f"{path}: everybody may replace it: chmod o-w {path.absolute().parent}"
    return ""
