"""Behind a load balancer rules, bans and strikes are about the client in the header, and never about the balancer."""

from __future__ import annotations

from typing import Any

import pytest

from rama_ebpf.config.build import BuildEnvironment, build_stack
from rama_ebpf.config.layers import LAYERS, ProxyProtocolSettings, StrikesSettings, check_order
from rama_ebpf.config.model import StackConfig
from rama_ebpf.config.services import EchoSettings, Socks5Settings
from rama_ebpf.core import IPAddress, ProtocolError, Stream, stack
from rama_ebpf.core.shares import ShareExceeded, SourceLimits
from rama_ebpf.layers.strikes import LocalStrikes, StrikeLayer, StrikeLimit
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.policy.local import LocalStore
from rama_ebpf.policy.rule import parse_network
from rama_ebpf.services.proxy_protocol import ProxyProtocolLayer
from rama_ebpf.services.resolver import SystemResolver

from ..http.conftest import Run
from ..http.conftest import run as run

V1 = b"PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\n"
OTHER = b"PROXY TCP4 192.0.2.2 198.51.100.7 56324 443\r\n"
TRUSTED = ["127.0.0.0/8"]


class Policy:
    """A store in this process, asked as a worker asks the server's."""

    def __init__(self) -> None:
        self.store = LocalStore()
        self._strikes = LocalStrikes(self)
        self.spared: set[str] = set()

    async def verdict(self, ip: IPAddress, port: int, /) -> Any:
        return self.store.verdict(ip, port)

    async def ban(self, ip: IPAddress, /, *, ttl: float, reason: str) -> None:
        self.store.ban(self.store.source(ip), ttl=ttl, reason=reason, automatic=True)

    async def strike(
        self, ip: IPAddress, limit: StrikeLimit, /, *, reason: str, spared: IPAddress | None = None
    ) -> None:
        self.spared.add(str(spared))
        await self._strikes.strike(ip, limit, reason=reason, spared=spared)

    @property
    def banned(self) -> list[str]:
        return [ban.source for ban in self.store.bans()]


async def nonsense(stream: Stream) -> None:
    await stream.read()
    raise ProtocolError("nonsense")


def guarded(policy: Policy, *, inside: bool) -> Any:
    strikes, header = StrikeLayer(policy, strikes=2), ProxyProtocolLayer(TRUSTED)
    return stack(header, strikes, nonsense) if inside else stack(strikes, header, nonsense)


@pytest.mark.parametrize("inside", [False, True], ids=["strikes outside", "strikes inside"])
async def test_health_checks_and_silence_of_a_balancer_never_ban_it(run: Run, inside: bool) -> None:
    policy = Policy()
    server = run(guarded(policy, inside=inside))
    local = bytes.fromhex("0d0a0d0a000d0a515549540a20000000")  # the balancer's own connection: a health check
    for data in (b"", b"", b"", b"PROX", b"garbage\r\n", local + b"x", local + b"x", local + b"x"):
        with pytest.raises(ConnectionResetError):
            await server.exchange(data, eof=True)
    await server.idle()
    assert policy.banned == []


@pytest.mark.parametrize("inside", [False, True], ids=["strikes outside", "strikes inside"])
async def test_the_client_in_the_header_is_struck(run: Run, inside: bool) -> None:
    policy = Policy()
    server = run(guarded(policy, inside=inside))
    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            await server.exchange(V1 + b"nonsense")
    await server.idle()
    assert policy.banned == ["192.0.2.1"]
    assert policy.spared == {"127.0.0.1"}


async def test_the_source_of_the_client_in_the_header_is_banned_whatever_address_it_takes(run: Run) -> None:
    policy = Policy()
    environment = BuildEnvironment(
        policy, bytes(32), None, SystemResolver(threads=1), EgressPolicy(), "", lambda factory: factory
    )
    layers = (StrikesSettings(strikes=2), ProxyProtocolSettings(trusted=tuple(map(parse_network, TRUSTED))))
    server = run(build_stack(StackConfig(Socks5Settings(), layers=layers), environment))

    async def refused(address: str) -> bool:
        header = f"PROXY TCP6 {address} 2001:db8:5::7 56324 443\r\n".encode()
        try:
            return await server.exchange(header + b"\x05\x01\x00\x05\x09\x00\x01" + bytes(6)) == b""
        except ConnectionResetError:
            return True

    assert not await refused("2001:db8:7::1")
    assert not await refused("2001:db8:7::2")
    await server.idle()
    assert policy.banned == ["2001:db8:7::/64"]
    assert await refused("2001:db8:7::3")
    assert not await refused("2001:db8:7:1::1")


async def test_rules_and_bans_judge_the_client_in_the_header(run: Run) -> None:
    policy = Policy()
    environment = BuildEnvironment(
        policy, bytes(32), None, SystemResolver(threads=1), EgressPolicy(), "", lambda factory: factory
    )
    header = ProxyProtocolSettings(trusted=tuple(map(parse_network, TRUSTED)))
    server = run(build_stack(StackConfig(EchoSettings(), layers=(header,)), environment))
    assert await server.exchange(V1 + b"hello", eof=True) == b"hello"
    await policy.ban(parse_network("192.0.2.1/32").network_address, ttl=60, reason="test")
    with pytest.raises(ConnectionResetError):
        await server.exchange(V1 + b"hello", eof=True)
    assert await server.exchange(OTHER + b"hello", eof=True) == b"hello"


def test_orders_that_cannot_work_are_refused() -> None:
    header = ProxyProtocolSettings(trusted=(parse_network("192.0.2.0/24"),))
    limit = LAYERS["concurrency"](limit=5, per="source")
    check_order((header, limit, StrikesSettings()))
    check_order((StrikesSettings(), header))
    for layers, text in (((limit, header), 'limits per "source"'), ((header, header), "twice")):
        with pytest.raises(ValueError, match=text):
            StackConfig(EchoSettings(), layers=layers)


async def test_one_source_meets_its_limit_and_a_balancer_does_not(run: Run) -> None:
    environment = BuildEnvironment(
        Policy(),
        bytes(32),
        None,
        SystemResolver(threads=1),
        EgressPolicy(),
        "",
        lambda factory: factory,
        limits=SourceLimits(connections=1),
    )
    header = ProxyProtocolSettings(trusted=tuple(map(parse_network, TRUSTED)))
    server = run(build_stack(StackConfig(EchoSettings(), layers=(header,)), environment))
    reader, writer = await server.open()
    writer.write(V1 + b"held")
    assert await reader.readexactly(4) == b"held"
    assert await server.exchange(V1 + b"hello", eof=True) == b""
    assert isinstance(server.errors[-1], ShareExceeded)
    assert await server.exchange(OTHER + b"hello", eof=True) == b"hello"
    writer.close()
    await server.idle()
    assert await server.exchange(V1 + b"hello", eof=True) == b"hello"
