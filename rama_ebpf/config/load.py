"""Reading a configuration file and finding everything that is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network
from typing import Any

from ..core.binding import Binding, conflict
from ..core.errors import RamaError
from ..routes.model import RouteError
from .build import check_stack
from .decode import Decoder
from .limits import beyond_limits, does_not_compile
from .model import Config
from .policy import located
from .positions import Path
from .routes import make_routes
from .toml import ConfigError, read_toml

__all__ = ["ConfigError", "config_of", "load_config"]

IPNetwork = IPv4Network | IPv6Network


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
    for where, text in _doubly_bound(config):
        decoder.complain(where, text)
    for name, listener in config.listeners.items():
        if listener.stack not in config.stacks:
            names = ", ".join(sorted(config.stacks)) or "none"
            text = f'there is no stack "{listener.stack}"; there are {names}'
            decoder.complain(("listeners", name, "stack"), text)
    rules: dict[str, int] = {}
    for index, rule in enumerate(config.policy.rules):
        if rules.setdefault(rule.name, index) != index:
            decoder.complain(("policy", "rules", index, "name"), f'there are two rules "{rule.name}"')
    try:
        make_routes(config.routes, config.ways)
    except RouteError as error:
        decoder.complain(_place(config, error.where), str(error))
        return
    for index, route in enumerate(config.routes):
        for position, listener_name in enumerate(route.listeners):
            if listener_name not in config.listeners:
                known = ", ".join(sorted(config.listeners)) or "none"
                text = f'there is no listener "{listener_name}"; there are {known}'
                decoder.complain(("routes", index, "listeners", position), text)
    for name, stack in config.stacks.items():
        try:
            check_stack(config, stack, directory)
        except (RamaError, ValueError, OSError) as error:
            decoder.complain(("stacks", name), str(error))


def _doubly_bound(config: Config) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What two listeners would serve, and none of the two more specifically."""
    seen: dict[str, str] = {}
    bound: dict[IPNetwork, list[tuple[str, str, Binding]]] = {}
    for name, listener in config.listeners.items():
        if listener.address is not None:
            address = listener.address.address
            if address is not None and address.port == 0:
                continue
            other = seen.setdefault(str(listener.address), name)
            if other != name:
                yield ("listeners", name, "address"), f"{listener.address} is also that of listener {other}"
                continue
        single = None if listener.address is None else listener.address.address
        own = listener.bindings if single is None else (Binding.at(single),)
        for binding in own:
            others = bound.setdefault(binding.network, [])
            for other, text, earlier in others:
                if conflict(binding, earlier):
                    whose = "twice in it" if other == name else f"also that of listener {other}"
                    same = "" if str(binding) == text else f" ({text})"
                    setting = "listen" if single is None else "address"
                    yield (
                        ("listeners", name, setting),
                        (f"{binding} overlaps: it is {whose}{same}, and neither is the more specific one"),
                    )
                    break
            others.append((name, str(binding), binding))


def _place(config: Config, where: tuple[str, str]) -> Path:
    """Where the route or way stands that an error is about."""
    kind, name = where
    if kind == "way":
        return ("ways", name)
    indexes = [index for index, route in enumerate(config.routes) if route.name == name]
    return ("routes", indexes[-1]) if indexes else ("routes",)
