"""A TCP forwarder for the benches: every connection is relayed to one target, in one process on uvloop.

python bench/forward.py ADDRESS:PORT HOST:PORT auto|sockmap|splice|copy
"""

from __future__ import annotations

import asyncio
import ipaddress
import sys

import uvloop

from rama_ebpf.core.address import Authority
from rama_ebpf.core.stream import Stream
from rama_ebpf.kernel.splice import SpliceMaps
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.relay import RelayKind, RelayOptions, relay
from rama_ebpf.relay.engine import Engine
from rama_ebpf.relay.sockmap import Sockmap
from rama_ebpf.services.connect import Connector
from rama_ebpf.services.resolver import SystemResolver
from rama_ebpf.services.tcp import TcpServer, bind_tcp


async def main() -> None:
    at, target, kind = sys.argv[1].split(":"), sys.argv[2], RelayKind(sys.argv[3])
    host, _, target_port = target.rpartition(":")
    networks = tuple(map(ipaddress.ip_network, ("127.0.0.0/8", "198.18.0.0/15")))
    connect = Connector(SystemResolver(), EgressPolicy(allow=networks))
    options = RelayOptions(kind)
    if kind in (RelayKind.SOCKMAP, RelayKind.AUTO):
        Engine.current().use_sockmap(Sockmap(SpliceMaps.load(1, 8192).fds))

    async def forward(client: Stream) -> None:
        client.extensions.add(options)
        await relay(client, await connect(Authority.of(host, int(target_port))))

    TcpServer(bind_tcp(at[0], int(at[1])), forward).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


uvloop.run(main())
