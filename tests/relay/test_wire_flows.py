"""Random flows through the wire relay: nothing lost, reordered, duplicated or truncated, and nothing left."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections import Counter

import pytest

from rama_ebpf.relay import RelayKind, tunnels
from rama_ebpf.relay.wire import Wire

from ..lab import wait_for
from .flows import plan, relay_by, run_flow
from .wire_relay import wire_relay

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

FLOWS = int(os.environ.get("RAMA_EBPF_FLOWS", "500"))
AT_ONCE = 25


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
async def test_random_flows_arrive_exactly(family: socket.AddressFamily) -> None:
    """Those that are refused go another way, as exactly."""
    relay = relay_by(RelayKind.WIRE, reply=b"!")
    seeds = random.Random(f"wire {family}").sample(range(1 << 30), FLOWS // 2)
    used: Counter[tuple[str, str]] = Counter()
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(seed: int, listener: socket.socket) -> None:
        async with turn:
            flow = plan(seed, largest=1_000_000, pause=0.1)
            report = await run_flow(flow, relay, listener=listener, reply=1)
            if not flow.resets:
                assert (report.to_upstream, report.to_client) == (flow.client.size, flow.upstream.size)
            used[report.relay, report.reason.value] += 1

    with socket.socket(family) as listener:
        listener.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        listener.listen(AT_ONCE)
        async with wire_relay(listener) as held:
            before = descriptors(held.pid)
            await asyncio.gather(*(one(seed, listener) for seed in seeds))
            assert sum(count for (name, _), count in used.items() if name == "wire") > FLOWS // 5, (
                used,
                Wire.current().refused,
            )
            assert len(tunnels) == 0
            # Those that linger, which another process tells nobody.
            await asyncio.to_thread(
                wait_for, lambda: descriptors(held.pid) <= before, timeout=20, what="the end of all tunnels"
            )


def descriptors(pid: int | None) -> int:
    assert pid is not None
    return len(os.listdir(f"/proc/{pid}/fd"))
