"""What a layer costs a call: ``python bench/layer_cost.py [--check]``.

Each layer is measured as the difference between a stack with it (twenty of the empty one) and the bare service, over
many calls, on one CPU; the table shows the median and the best of several rounds. ``--check`` exits with 1 if an empty
layer costs 1 µs or more.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

from rama_ebpf.core import ClientAddress, Extensions, IPAddress, Service, SocketAddress, Stream, stack
from rama_ebpf.core.matchers import Source
from rama_ebpf.core.wrapped import WrappedStream
from rama_ebpf.layers import (
    AccessLogLayer,
    AddExtensionLayer,
    ByteCounter,
    ByteCountLayer,
    ConcurrencyLimitLayer,
    FilterLayer,
    MetricsLayer,
    RateLimitLayer,
    StrikeLayer,
    TimeoutLayer,
    TraceLayer,
    by_source,
)
from rama_ebpf.layers.strikes import StrikeLimit

ROUNDS = 9
CALLS = 20_000


class EmptyLayer:
    """Does nothing but call the service inside."""

    def __call__(self, inner: Service[Any, Any]) -> Service[Any, Any]:
        async def serve(input: Any) -> Any:
            return await inner(input)

        return serve


class Still(WrappedStream):
    """A stream that is never read or written."""

    def __init__(self) -> None:
        Stream.__init__(self, Extensions())
        self.extensions.add(CLIENT)

    @property
    def peer(self) -> SocketAddress | None:
        return CLIENT.address

    @property
    def local(self) -> SocketAddress | None:
        return CLIENT.address


CLIENT = ClientAddress(SocketAddress(ip_address("198.18.0.1"), 40000))


class NoStrikes:
    async def strike(self, ip: IPAddress, limit: StrikeLimit, /, *, reason: str) -> None: ...


async def bare(stream: Stream) -> None: ...


LAYERS: dict[str, tuple[int, Callable[[], Any]]] = {
    "empty": (20, EmptyLayer),
    "add-extension": (1, lambda: AddExtensionLayer(CLIENT)),
    "filter by source": (1, lambda: FilterLayer(Source("198.18.0.0/15"))),
    "concurrency": (1, lambda: ConcurrencyLimitLayer(1000)),
    "concurrency per source": (1, lambda: ConcurrencyLimitLayer(1000, key=by_source())),
    "rate per source": (1, lambda: RateLimitLayer(1e9, burst=1_000_000, key=by_source())),
    "strikes, none": (1, lambda: StrikeLayer(NoStrikes())),
    "timeout": (1, lambda: TimeoutLayer(10)),
    "byte counter": (1, lambda: ByteCountLayer(ByteCounter())),
    "trace, off": (1, TraceLayer),
    "access log, to nowhere": (1, lambda: AccessLogLayer(lambda record: None)),
    "metrics": (1, MetricsLayer),
}


async def seconds_per_call(service: Service[Stream, Any]) -> float:
    streams = [Still() for _ in range(CALLS)]
    gc.collect()
    gc.disable()
    started = time.perf_counter()
    for stream in streams:
        await service(stream)
    elapsed = time.perf_counter() - started
    gc.enable()
    return elapsed / CALLS


async def main(check: bool) -> int:
    """Measure, print, and compare."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    costs: dict[str, list[float]] = {name: [] for name in LAYERS}
    floor: list[float] = []
    for _ in range(ROUNDS):
        base = await seconds_per_call(bare)
        floor.append(base)
        for name, (count, make) in LAYERS.items():
            cost = await seconds_per_call(stack(*(make() for _ in range(count)), bare))
            costs[name].append((cost - base) / count)
    print(f"{'layer':<26}{'median':>10}{'best':>10}   µs a call, {ROUNDS} rounds of {CALLS} calls")
    print(f"{'(the bare service)':<26}{statistics.median(floor) * 1e6:>10.3f}{min(floor) * 1e6:>10.3f}")
    for name, found in costs.items():
        print(f"{name:<26}{statistics.median(found) * 1e6:>10.3f}{min(found) * 1e6:>10.3f}")
    if check and statistics.median(costs["empty"]) >= 1e-6:
        print("an empty layer costs 1 µs or more", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    sys.exit(asyncio.run(main(parser.parse_args().check)))
