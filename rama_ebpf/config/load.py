"""Reading a configuration file and finding everything that is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..core.errors import RamaError
from .build import check_stack
from .decode import Decoder
from .limits import beyond_limits, does_not_compile
from .model import Config
from .policy import located
from .toml import ConfigError, read_toml

__all__ = ["ConfigError", "config_of", "load_config"]


def load_config(path: str | os.PathLike[str], *, compile_rules: bool = False) -> Config:
    """Read and check a file; with ``compile_rules`` find out, too, what a start finds when it puts them into force.
    Relative paths in it are seen from its directory. Raises :class:`ConfigError`."""
    file = os.fspath(path)
    values, decoder = read_toml(file)
    config: Config | None = decoder.table(Config, values)
    if config is not None:
        _check_whole(config, decoder, os.path.dirname(os.path.abspath(file)))
        for where, text in does_not_compile(config) if compile_rules else ():
            decoder.complain(where, text)
    if config is None or decoder.mistakes:
        raise ConfigError(file, decoder.mistakes)
    return replace(config, policy=located(config.policy, file, decoder, ("policy",)))


def config_of(values: Mapping[str, Any]) -> Config:
    """Decode what :func:`~.show.effective` has encoded. Raises :class:`ConfigError`."""
    decoder = Decoder({}, "/")
    config: Config | None = decoder.table(Config, values)
    if config is None:
        raise ConfigError("configuration", decoder.mistakes)
    return config


def _check_whole(config: Config, decoder: Decoder, directory: str) -> None:
    """What no single setting shows: references, doubles, and stacks that do not compose."""
    if not config.listeners:
        decoder.complain(("listeners",), "there is no listener: write [listeners.NAME]")
    for where, text in beyond_limits(config):
        decoder.complain(where, text)
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
