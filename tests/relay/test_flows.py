"""Random flows through each relay: nothing lost, reordered, duplicated or truncated."""

from __future__ import annotations

import asyncio
import os
import random

import pytest

from rama_ebpf.relay import CloseReason, RelayKind, tunnels

from .flows import open_descriptors, plan, relay_by, run_flow

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

FLOWS = int(os.environ.get("RAMA_EBPF_FLOWS", "250"))
AT_ONCE = 25


async def test_random_flows_arrive_exactly(kind: RelayKind) -> None:
    """Sizes from nothing to megabytes, tiny and huge writes, stalls, half-close and reset by either side."""
    relay = relay_by(kind)
    before = open_descriptors()
    turn = asyncio.Semaphore(AT_ONCE)
    seeds = random.Random(f"flows {kind}").sample(range(1 << 30), FLOWS)

    async def one(seed: int) -> CloseReason:
        async with turn:
            flow = plan(seed, largest=3_000_000)
            report = await run_flow(flow, relay)
            if not flow.resets:
                assert (report.to_upstream, report.to_client) == (flow.client.size, flow.upstream.size)
            return report.reason

    reasons = await asyncio.gather(*(one(seed) for seed in seeds))
    if FLOWS >= 250:  # every kind of end was among them
        assert {CloseReason.EOF, CloseReason.CLIENT_RESET, CloseReason.UPSTREAM_RESET} <= set(reasons)
    assert len(tunnels) == 0
    assert open_descriptors() == before
