"""``python -m tests.relay.cables [--flows N] [--offloads] [--vlan] [--changing]``: random flows through the wire relay
between three hosts, over bad cables: 1 % of all packets are lost, 1 % come twice, 2 % late, and 1 % of those on the
client's side are corrupted.

Half of the flows are IPv4, half IPv6. ``--offloads`` leaves segmentation and checksums to the interfaces (then nothing
is corrupted, for there is no checksum to tell), ``--vlan`` has the target in a VLAN, and with ``--changing`` routes,
MTU and neighbours change all the time. Both ends compare each byte. How often a corrupted header has misled
the counters, or the end of a tunnel was only told by its idle time-out, is counted. Needs root and gcc (and 8021q for
``--vlan``), prints one JSON object, and ends with exit code 1 at the first wrong byte, or if anything is left.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvloop

from rama_ebpf.core.socket_stream import SocketStream
from rama_ebpf.relay import CloseReason, RelayKind, TunnelLimits, TunnelReport, tunnels
from rama_ebpf.relay.wire import Wire

from ..lab import PREFIX, Host, set_ethtool, wait_for
from ..namespace import network_namespace
from .flows import Peer, Plan, Wrong, check, open_descriptors, plan, relay_by
from .wire_relay import wire_relay

AT_ONCE = 50
LOSS, DUPLICATES, REORDER, CORRUPT = 100, 100, 200, 100
IDLE = 30.0
_OFFLOADS = (0x17, 0x1F, 0x24, 0x2C)  # ETHTOOL_STXCSUM, STSO, SGSO, SGRO


@dataclass(frozen=True)
class Scene:
    """Client and target; this thread is on the proxy. Addresses of the proxy for the one, and of the target."""

    client: Host
    target: Host
    near: dict[socket.AddressFamily, str]
    far: dict[socket.AddressFamily, str]


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True)


@contextlib.contextmanager
def scene(*, offloads: bool, vlan: bool) -> Iterator[Scene]:
    """Client, cable, proxy, cable, target: the proxy is this process, in a namespace of its own."""
    with contextlib.ExitStack() as undo:
        directory = undo.enter_context(tempfile.TemporaryDirectory())
        program = str(Path(directory) / "cable")
        subprocess.run(["gcc", "-O2", "-o", program, Path(__file__).with_name("cable.c")], check=True)
        undo.enter_context(network_namespace())
        hosts = []
        for side, name in enumerate(("client", "target")):
            host, middle = (f"{PREFIX}-{os.getpid()}-{one}" for one in (name, f"{name}-cable"))
            for netns in (host, middle):
                _ip("netns", "add", netns)
                undo.callback(_ip, "netns", "delete", netns)
            _ip("link", "add", f"p{side}", "type", "veth", "peer", "name", "to-proxy", "netns", middle)
            _ip("-n", host, "link", "add", "eth0", "type", "veth", "peer", "name", "to-host", "netns", middle)
            for end in ("to-proxy", "to-host"):
                _ip("-n", middle, "link", "set", end, "up")
            made = Host(name, host)
            undo.callback(made._stack.close)
            hosts.append(made)
            ours, theirs = f"p{side}", "eth0"
            for where, device in (([], ours), (["-n", host], theirs), (["-n", host], "lo")):
                _ip(*where, "link", "set", device, "up")
            if not offloads:
                for command in _OFFLOADS:
                    set_ethtool(ours, command, 0)
                    made.call(lambda command=command: set_ethtool("eth0", command, 0))  # type: ignore[misc]
            if vlan and name == "target":
                _ip("link", "add", "link", ours, "name", "v5", "type", "vlan", "id", "5")
                _ip("-n", host, "link", "add", "link", "eth0", "name", "v5", "type", "vlan", "id", "5")
                ours = theirs = "v5"
                _ip("link", "set", ours, "up")
                _ip("-n", host, "link", "set", theirs, "up")
            for where, device, number in (([], ours, 1), (["-n", host], theirs, 2)):
                _ip(*where, "address", "add", f"198.18.{side}.{number}/24", "dev", device)
                _ip(*where, "address", "add", f"2001:db8:{side}::{number}/64", "dev", device, "nodad")
            # Only one of them corrupts: two changes of one packet may have the old checksum.
            chances = map(str, (LOSS, DUPLICATES, REORDER, 0 if side else CORRUPT, side + 1))
            cable = Host(f"{name}-cable", middle)
            undo.callback(cable._stack.close)
            process = cable.popen(program, "to-proxy", "to-host", *chances, stdout=subprocess.PIPE)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        four, six = socket.AF_INET, socket.AF_INET6
        yield Scene(*hosts, {four: "198.18.0.1", six: "2001:db8:0::1"}, {four: "198.18.1.2", six: "2001:db8:1::2"})


class Meeting:
    """Connections to a listener, each end with the other."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self._came: dict[tuple[str, int], asyncio.Future[socket.socket]] = {}

    async def accept(self) -> None:
        """Do it for ever."""
        loop = asyncio.get_running_loop()
        while True:
            sock, (host, port, *_) = await loop.sock_accept(self.listener)
            future = self._future(host, port)
            if future.done():  # of one whose other end never knew of it
                future.result().close()
                future = self._came[host, port] = loop.create_future()
            future.set_result(sock)

    async def connect(self, sock: socket.socket) -> tuple[socket.socket, socket.socket]:
        """Connect; return both ends."""
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, self.listener.getsockname()[:2])
        host, port, *_ = sock.getsockname()
        other = await self._future(host, port)
        del self._came[host, port]
        return sock, other

    def _future(self, host: str, port: int) -> asyncio.Future[socket.socket]:
        return self._came.setdefault((host, port), asyncio.get_running_loop().create_future())


class Players:
    """Plays flows between client and target, through the relay."""

    def __init__(self, place: Scene, largest: int) -> None:
        self._place = place
        self._largest = largest
        self.relays: collections.Counter[str] = collections.Counter()
        self.ended: collections.Counter[str] = collections.Counter()
        self.moved = self.unnoticed = self.miscounted = 0

    async def play(self, seed: int, listener: Meeting, target: Meeting) -> None:
        flow = plan(seed, largest=self._largest, pause=0.1)
        family = listener.listener.family
        client_far, client_near = await listener.connect(self._place.client.socket(family))
        upstream_near, upstream_far = await target.connect(socket.socket(family))
        report = await self._run(flow, client_far, client_near, upstream_near, upstream_far)
        exact = (report.to_upstream, report.to_client) == (flow.client.size, flow.upstream.size)
        if report.reason is CloseReason.IDLE_TIMEOUT:
            self.unnoticed += 1  # both ends have ended in order: the bookkeeping was misled by a corrupted header
        elif not flow.resets and not exact:
            self.miscounted += 1
        self.relays[report.relay] += 1
        self.ended[report.reason.value] += 1
        self.moved += report.to_upstream + report.to_client
        if self.relays.total() % 500 == 0:
            print(f"{self.relays.total()} flows", file=sys.stderr, flush=True)

    @staticmethod
    async def _run(flow: Plan, *sockets: socket.socket) -> TunnelReport:
        client_far, client_near, upstream_near, upstream_far = sockets
        replied = asyncio.Event()
        client = Peer(client_far, flow.client, flow.upstream, reply=1, replied=replied)
        upstream = Peer(upstream_far, flow.upstream, flow.client, replied=replied)
        relay = relay_by(RelayKind.WIRE, TunnelLimits(idle=IDLE), reply=b"!")
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(client.play())
                group.create_task(upstream.play())
                tunnel = group.create_task(_report(relay(SocketStream(client_near), SocketStream(upstream_near))))
        except BaseExceptionGroup as error:
            raise Wrong(f"seed {flow.seed}: {error.exceptions}") from error
        report = tunnel.result()
        try:
            check(flow, client, upstream)
        except Wrong as error:
            peers = [(peer.sent, peer.received, peer.eof, peer.error) for peer in (client, upstream)]
            raise Wrong(f"{error}; client and upstream have sent and received {peers}; {report}") from error
        return report


async def _report(running: object) -> TunnelReport:
    report = await running  # type: ignore[misc]
    assert isinstance(report, TunnelReport)
    return report


async def _change(rng: random.Random) -> None:
    """Neighbours are forgotten, a path's MTU goes down and up, and routes to the target come and go."""
    metric = 100
    while True:
        for device in ("p0", "p1"):
            await _run_ip("neigh", "flush", "dev", device)
            await _run_ip("link", "set", device, "mtu", str(rng.choice((1500, 1400, 1300))))
        metric += 1
        await _run_ip("route", "add", "198.18.1.2/32", "dev", "p1", "metric", str(metric))
        await _run_ip("-6", "route", "add", "2001:db8:1::2/128", "dev", "p1", "metric", str(metric))
        await asyncio.sleep(0.5)
        await _run_ip("route", "del", "198.18.1.2/32", "dev", "p1", "metric", str(metric))
        await _run_ip("-6", "route", "del", "2001:db8:1::2/128", "dev", "p1", "metric", str(metric))
        await asyncio.sleep(0.5)


async def _run_ip(*args: str) -> None:
    process = await asyncio.create_subprocess_exec("ip", *args, stderr=asyncio.subprocess.DEVNULL)
    await process.wait()


@contextlib.asynccontextmanager
async def _changing(wanted: bool) -> AsyncIterator[None]:
    task = asyncio.create_task(_change(random.Random(5))) if wanted else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
            await asyncio.wait((task,))


async def soak(place: Scene, count: int, largest: int, *, changing: bool) -> dict[str, object]:
    """Play ``count`` flows, and see that nothing is left of them."""
    players = Players(place, largest)
    rng = random.Random(f"cables {changing}")
    with contextlib.ExitStack() as cleanup:
        ways = []
        for family in (socket.AF_INET, socket.AF_INET6):
            listener = cleanup.enter_context(socket.socket(family))
            target = cleanup.enter_context(place.target.socket(family))
            for sock, name in ((listener, place.near[family]), (target, place.far[family])):
                sock.bind((name, 0))
                sock.listen(256)
                sock.setblocking(False)
            ways.append((Meeting(listener), Meeting(target)))
        accepting = [asyncio.create_task(one.accept()) for way in ways for one in way]
        async with wire_relay(*(listener.listener for listener, _ in ways)) as held:
            before, theirs = open_descriptors(), _descriptors(held.pid)
            seeds = iter([(rng.randrange(1 << 40), number % 2) for number in range(count)])

            async def player() -> None:
                for seed, which in seeds:
                    await players.play(seed, *ways[which])

            async with _changing(changing), asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(player())
            refused = dict(Wire.current().refused)
            left: Callable[[], bool] = lambda: _descriptors(held.pid) <= theirs  # noqa: E731
            await asyncio.to_thread(wait_for, left, timeout=30, what="the end of all tunnels in their process")
            for task in accepting:
                task.cancel()
            await asyncio.wait(accepting)
            descriptors = open_descriptors() - before
    return {
        "flows": sum(players.relays.values()),
        "mib": round(players.moved / (1 << 20)),
        "relays": dict(players.relays),
        "ended": dict(players.ended),
        "refused": refused,
        "ends_unnoticed": players.unnoticed,
        "miscounted": players.miscounted,
        "tunnels_left": len(tunnels),
        "descriptors_left": descriptors,
    }


def _descriptors(pid: int | None) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.relay.cables")
    parser.add_argument("--flows", type=int, default=5000)
    parser.add_argument("--largest", type=int, default=300_000, help="bytes of a flow each way, at most")
    parser.add_argument("--offloads", action="store_true")
    parser.add_argument("--vlan", action="store_true")
    parser.add_argument("--changing", action="store_true")
    args = parser.parse_args()
    started = time.monotonic()
    with scene(offloads=args.offloads, vlan=args.vlan) as place:
        result = uvloop.run(soak(place, args.flows, args.largest, changing=args.changing))
    print(json.dumps(vars(args) | result | {"seconds": round(time.monotonic() - started)}))
    return 1 if result["tunnels_left"] or result["descriptors_left"] else 0


if __name__ == "__main__":
    sys.exit(main())
