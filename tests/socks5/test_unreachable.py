"""What the kernel says about a route is what the client is told: each errno has its reply."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..namespace import network_namespace
from .peers import GREETING, exchange, failed, request

pytestmark = pytest.mark.root

NETWORKS = ("198.18.0.0/15", "2001:db8::/32")


@pytest.fixture(autouse=True)
def routes() -> Iterator[None]:
    with network_namespace(
        "route add unreachable 198.18.1.0/24",
        "route add prohibit 198.18.2.0/24",
        "route add blackhole 198.18.3.0/24",
        "-6 route add unreachable 2001:db8:1::/48",
        "-6 route add prohibit 2001:db8:2::/48",
        "-6 route add blackhole 2001:db8:3::/48",
        # A device that swallows every packet: its other end has no address, and nobody asks for one (no ARP).
        "link add swallow type veth peer name other",
        "link set swallow arp off up",
        "link set other up",
        "address add 198.18.4.1/24 dev swallow",
        "-6 address add 2001:db8:4::1/48 dev swallow nodad",
    ):
        yield


@pytest.mark.parametrize(
    ("target", "rep"),
    [
        ("198.18.0.1", 3),
        ("2001:db8::1", 3),
        ("198.18.1.1", 4),
        ("2001:db8:1::1", 4),
        ("198.18.2.1", 2),
        ("2001:db8:2::1", 2),
        ("198.18.3.1", 1),
        ("2001:db8:3::1", 1),
        ("198.18.4.9", 6),
        ("2001:db8:4::9", 6),
    ],
    ids=lambda value: str(value),
)
async def test_the_kernels_verdict_on_a_route_is_the_reply(run_proxy, target, rep):
    proxy = await run_proxy(allow=NETWORKS, timeout=0.5)
    assert await exchange(proxy, GREETING + request(target, 80)) == failed(rep)
