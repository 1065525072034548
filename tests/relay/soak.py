"""The long runs behind the suite: ``python -m tests.relay.soak flows|rush|overlap|stall [--relay KIND] [--count N]``.

``flows`` plays random flows through each relay, ``rush`` small ones, all of which begin at once, ``overlap`` synthetic
connections on veth, ``stall`` holds a reader. They need root, print one JSON object a relay, and end with an exit code
other than 0 at the first wrong byte.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import resource
import socket
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from rama_ebpf.kernel.splice import SpliceMaps
from rama_ebpf.relay import CloseReason, RelayKind, TunnelReport, promotion, tunnels
from rama_ebpf.relay.engine import Engine
from rama_ebpf.relay.sockmap import Sockmap
from rama_ebpf.relay.wire import Wire

from .flows import MAX_SIZE, Wrong, open_descriptors, plan, relay_by, run_flow, running
from .test_overlap import outcomes, read_all, segments_on_veth, through
from .test_sockmap import entries
from .test_tunnel import Ends, push_until_held, receive, send
from .wire_relay import wire_relay

AT_ONCE = 25
STALLED = 64 << 20
CREDITS = (1, 1 << 16, 1 << 18, 1 << 20)
"""A small credit makes the kernel hand flows back, and take them over again, the more often."""


async def flows(
    kind: RelayKind, count: int, maps: SpliceMaps, at_once: int = AT_ONCE, largest: int = MAX_SIZE
) -> dict[str, object]:
    """Play ``count`` random flows, and see that nothing is left of them."""
    if kind is RelayKind.WIRE:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(at_once)
            async with wire_relay(listener):
                result = await _flows(kind, count, maps, at_once, largest, listener)
                return result | {"refused": dict(Wire.current().refused)}
    return await _flows(kind, count, maps, at_once, largest)


async def rush(kind: RelayKind, count: int, maps: SpliceMaps) -> dict[str, object]:
    """Play ``count`` small flows that all begin at once."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    return await flows(kind, count, maps, count, 20_000)


async def _flows(
    kind: RelayKind,
    count: int,
    maps: SpliceMaps,
    at_once: int,
    largest: int,
    listener: socket.socket | None = None,
) -> dict[str, object]:
    before = open_descriptors()
    sockmap = Engine.current().sockmap
    reply = b"" if listener is None else b"!"
    rng = random.Random(f"soak {kind}")
    seeds = iter([rng.randrange(1 << 40) for _ in range(count)])
    seen: collections.Counter[CloseReason] = collections.Counter()
    relays: collections.Counter[str] = collections.Counter()
    total = spills = 0

    async def player() -> None:
        nonlocal total, spills
        for seed in seeds:
            flow = plan(seed, largest=largest)
            if sockmap is not None:
                sockmap.credit = CREDITS[seed % len(CREDITS)]
            report: TunnelReport = await run_flow(
                flow, relay_by(kind, reply=reply), listener=listener, reply=len(reply)
            )
            if not flow.resets and (report.to_upstream, report.to_client) != (flow.client.size, flow.upstream.size):
                raise Wrong(f"seed {seed}: the counters are wrong")
            seen[report.reason] += 1
            relays[report.relay] += 1
            total += report.to_upstream + report.to_client
            spills += report.spills

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(player())
    result = {
        "flows": sum(seen.values()),
        "gib": round(total / (1 << 30), 2),
        "spills": spills,
        "relays": dict(relays),
        "ended": {reason.value: number for reason, number in seen.items()},
        "entries_left": entries(maps),
        "descriptors_left": open_descriptors() - before,
        "tunnels_left": len(tunnels),
    }
    if result["entries_left"] or result["descriptors_left"] or result["tunnels_left"]:
        raise Wrong(f"something is left: {result}")
    return result


async def overlap(kind: RelayKind | None, count: int, maps: SpliceMaps) -> dict[str, object]:
    """Play ``count`` synthetic connections; without a ``kind`` to plain TCP."""
    used: collections.Counter[str] = collections.Counter()
    seen = await outcomes(read_all if kind is None else through(kind, used), count, f"soak overlap {kind}")
    if seen["silently wrong"] or (kind is not RelayKind.SOCKMAP and seen["exact"] != count):
        raise Wrong(f"{kind}: {seen}")
    return {"outcomes": dict(seen), "relays": dict(used)}


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no MemAvailable")


def _tcp_memory() -> int:
    """Bytes that the kernel holds for TCP."""
    words = Path("/proc/net/sockstat").read_text().split("TCP:")[1].split()
    return int(words[words.index("mem") + 1]) * 4096


async def stall(kind: RelayKind, seconds: int, maps: SpliceMaps) -> dict[str, object]:
    """Hold a reader for ``seconds``, then let 64 MiB through."""
    with Ends() as ends:
        async with running(relay_by(kind), ends.client_near, ends.upstream_near) as tunnel:
            await send(ends.client, b"ping")
            await receive(ends.upstream, 4)
            available, memory = _available(), _tcp_memory()
            sent = await push_until_held(ends.client)
            used, started = [], time.monotonic()
            while time.monotonic() - started < seconds:
                await asyncio.sleep(1)
                used.append((available - _available(), _tcp_memory() - memory))
            sent += await push_until_held(ends.client)
            rest = asyncio.create_task(send(ends.client, bytes(STALLED - sent)))
            got = 0
            while got < STALLED:
                got += len(await receive(ends.upstream, 1 << 20))
            await rest
            ends.client.shutdown(socket.SHUT_WR)
            ends.upstream.shutdown(socket.SHUT_WR)
            report = await tunnel
    if report.to_upstream != STALLED + 4 or report.reason is not CloseReason.EOF or sent > 8 << 20:
        raise Wrong(f"{kind}: held at {sent}, {report}")
    return {
        "held_at_mib": round(sent / (1 << 20), 2),
        "mem_available_mib": round(statistics.median(free for free, _ in used) / (1 << 20), 1),
        "tcp_memory_mib": round(max(tcp for _, tcp in used) / (1 << 20), 1),
        "spills": report.spills,
    }


Run = Callable[[RelayKind, int, SpliceMaps], Awaitable[dict[str, object]]]
_RUNS: dict[str, tuple[Run, int]] = {
    "flows": (flows, 10_000),
    "rush": (rush, 1000),
    "overlap": (overlap, 2_000),
    "stall": (stall, 60),
}


async def _with_sockmap(run: Run, kind: RelayKind, count: int, maps: SpliceMaps) -> dict[str, object]:
    if kind is RelayKind.AUTO:
        promotion.MESSAGES, promotion.SMALL = 1, 1 << 20  # whoever speaks twice is promoted
    if kind in (RelayKind.SOCKMAP, RelayKind.AUTO):
        Engine.current().use_sockmap(Sockmap(maps.fds))
    return await run(kind, count, maps)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.relay.soak")
    parser.add_argument("what", choices=_RUNS)
    parser.add_argument("--relay", action="append", choices=[kind.value for kind in RelayKind])
    parser.add_argument("--count", type=int, help="flows or connections for each relay, or seconds of stall")
    args = parser.parse_args()
    run, usual = _RUNS[args.what]
    count = args.count or usual
    maps = SpliceMaps.load(shares=1, tunnels=1024)
    with segments_on_veth() if args.what == "overlap" else contextlib.nullcontext():
        if args.what == "overlap":
            print(json.dumps({"relay": "none"} | uvloop.run(overlap(None, count, maps))), flush=True)
        for kind in args.relay or [kind.value for kind in RelayKind]:
            started = time.monotonic()
            result = uvloop.run(_with_sockmap(run, RelayKind(kind), count, maps))
            print(json.dumps({"relay": kind} | result | {"seconds": round(time.monotonic() - started)}), flush=True)
    maps.close()


if __name__ == "__main__":
    main()
