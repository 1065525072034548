"""The application of a configuration file, as workers load it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from ..core.service import stack
from ..layers.mapping import AddExtensionLayer
from ..process import Application, WorkerContext
from ..relay import RelayKind, RelayOptions
from .build import BuildEnvironment, build_stack
from .load import config_of
from .routes import make_routes

__all__ = ["application"]


def application(context: WorkerContext) -> Application:
    """Build the stacks of ``context.params["config"]``, an effective configuration."""
    config = config_of(cast("Mapping[str, Any]", context.params["config"]))
    resolver = config.resolver.make(context.observe_lookups)
    environment = BuildEnvironment(
        policy=context.policy,
        limits=config.limits.per_source(),
        counts=context.shared.counts(),
        observe_refusal=context.observe_refusal,
        observe_check=context.observe_check,
        secret=context.secret,
        shared=context.shared,
        resolver=resolver,
        egress=context.egress,
        directory=str(context.params["directory"]),
        call=lambda factory: factory(context),
        routes=make_routes(config.routes, config.ways),
        route_key=bytes.fromhex(str(context.params.get("route_key", "")) or "00" * 32),
        observe_way=context.observe_way,
    )
    stacks = {
        name: build_stack(stack_config, replace(environment, stack=name))
        for name, stack_config in config.stacks.items()
    }
    services = {
        name: stack(
            AddExtensionLayer(RelayOptions(RelayKind(listener.relay), listener.lossless, listener.survive)),
            stacks[listener.stack],
        )
        for name, listener in config.listeners.items()
    }
    environment.on_close(resolver.close)
    return Application(services, start=_all(environment.starts), close=_all(environment.closes))


def _all(calls: Sequence[Callable[[], None]]) -> Callable[[], None]:
    def call() -> None:
        for one in calls:
            one()

    return call
