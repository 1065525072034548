"""``python -m tests.relay.wrap [GIB]``: one flow through the wire relay of so many GiB each way, 4.5 by default:
sequence numbers wrap around in both directions. Both ends compare each byte. Needs root, prints one JSON object."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time

import uvloop

from rama_ebpf.relay import RelayKind, tunnels

from ..namespace import network_namespace
from .flows import Plan, Side, Wrong, relay_by, run_flow
from .wire_relay import wire_relay


async def wrap(size: int) -> dict[str, object]:
    """Play the flow; again where the relay does not take it, as on a busy machine."""
    sides = [
        Side(start, size, writes=(100_000, 500_000), speaks_after=0, stall_at=0, stall=0.0, reset_at=None)
        for start in (7, 11)
    ]
    flow, relay = Plan(0, sides[0], sides[1], buffers=(0, 0, 0, 0)), relay_by(RelayKind.WIRE, reply=b"!")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        async with wire_relay(listener):
            for _ in range(50):
                began = time.monotonic()
                playing = asyncio.create_task(run_flow(flow, relay, listener=listener, reply=1))
                while not len(tunnels) and not playing.done():  # noqa: ASYNC110  nobody tells
                    await asyncio.sleep(0.01)
                if [one.relay for one in tunnels] == ["wire"]:
                    break
                playing.cancel()
                await asyncio.gather(playing, return_exceptions=True)
            report = await playing
    if (report.to_upstream, report.to_client) != (size, size):
        raise Wrong(f"the counters are wrong: {report}")
    seconds = time.monotonic() - began
    return {"bytes_each_way": size, "relay": report.relay, "reason": report.reason.value, "seconds": round(seconds)}


def main() -> int:
    size = int(float(sys.argv[1] if sys.argv[1:] else "4.5") * (1 << 30))
    with network_namespace():
        result = uvloop.run(wrap(size))
    print(json.dumps(result))
    return 0 if result["relay"] == "wire" else 1


if __name__ == "__main__":
    sys.exit(main())
