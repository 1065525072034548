"""What the gate in the kernel has room for, found out from the configuration alone."""

from __future__ import annotations

from collections.abc import Iterator

from ..kernel import abi
from ..kernel.gate_maps import MAX_EGRESS, MapSizes
from ..policy.compiler import compile_rules
from ..policy.egress_map import decisions
from ..policy.rule import PolicyError, Settings
from .model import Config

__all__ = ["beyond_limits", "does_not_compile"]

_Where = tuple[str | int, ...]


def beyond_limits(config: Config) -> Iterator[tuple[_Where, str]]:
    """Yield what there is too much of: the setting, and a sentence with the limit."""
    most = abi.constants()["MAX_LISTENERS"]
    count = 0
    for listener in config.listeners.values():
        if listener.address is None:
            count += len({binding.network.version for binding in listener.bindings})  # each has sockets of its own
        elif listener.address.address is not None:
            count += 1
    if count > most:
        yield ("listeners",), f"{count} TCP listeners: a gate has at most {most}"
    most = abi.constants()["MAX_INTERFACES"]
    if len(set(config.policy.xdp)) > most:
        yield ("policy", "xdp"), f"{len(set(config.policy.xdp))} interfaces: use at most {most}"
    rules, most = len(config.policy.rules), config.limits.max_rules or MapSizes().rules
    if rules >= most:
        yield (
            ("policy", "rules"),
            f"{rules} rules: there is room for {most - 1} (limits.max_rules above {rules} makes more)",
        )
    networks = len(decisions(config.egress.policy())) + len(config.resolver.name_servers())
    if networks > MAX_EGRESS:
        yield ("egress",), f"{networks} networks, with those that are denied by default: use at most {MAX_EGRESS}"


def does_not_compile(config: Config) -> Iterator[tuple[_Where, str]]:
    """Yield why the rules cannot be put into the kernel, as far as that shows before feeds are read. It takes as long
    as a load does."""
    try:
        compile_rules(config.policy.ruleset(Settings()))
    except PolicyError as error:
        yield ("policy", "rules"), str(error)
