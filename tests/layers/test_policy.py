from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, ip_network

from rama_ebpf.core import ClientAddress, IPAddress, PolicyDenied, SocketAddress, Stream, stack
from rama_ebpf.layers.policy import PolicyLayer

from .conftest import Serve, echo


@dataclass(frozen=True)
class Judgement:
    allowed: bool
    rule: str


class DenyNetwork:
    """The smallest policy: one network may not come to any port."""

    def __init__(self, cidr: str) -> None:
        self.network = ip_network(cidr)
        self.asked: list[tuple[IPAddress, int]] = []

    async def verdict(self, ip: IPAddress, port: int, /) -> Judgement:
        self.asked.append((ip, port))
        return Judgement(ip not in self.network, "no-test-net")


async def test_a_denied_source_is_reset_and_the_rule_is_named(serve: Serve) -> None:
    policy = DenyNetwork("127.0.9.0/24")
    server = await serve(stack(PolicyLayer(policy), echo))
    denied = await server.open("127.0.9.1")
    error = await server.outcome()
    assert isinstance(error, PolicyDenied)
    assert error.rule == "no-test-net"
    assert await denied.ended() == "reset"
    assert await (await server.open("127.0.8.1")).ask(b"in") == b"in"
    assert policy.asked[0] == (IPv4Address("127.0.9.1"), server.port)


async def test_the_address_that_a_trusted_proxy_told_is_judged(serve: Serve) -> None:
    behind_proxy = stack(PolicyLayer(DenyNetwork("198.18.0.0/15")), echo)

    async def believes_header(stream: Stream) -> object:
        stream.extensions.add(ClientAddress(SocketAddress(IPv4Address("198.18.0.7"), 1)))
        return await behind_proxy(stream)

    server = await serve(believes_header)
    await server.open()
    assert isinstance(await server.outcome(), PolicyDenied)
