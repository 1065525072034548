"""Behind an HTTP proxy rules, bans and strikes are about the client that it names, and never about the proxy."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest

from rama_ebpf.config.build import BuildEnvironment, build_stack
from rama_ebpf.config.layers import ConcurrencySettings, StrikesSettings
from rama_ebpf.config.model import StackConfig
from rama_ebpf.config.reverse import ReverseSettings, RouteSettings
from rama_ebpf.core import Authority, stack
from rama_ebpf.core.shares import ShareExceeded, SourceLimits
from rama_ebpf.layers import StaticUsers
from rama_ebpf.layers.strikes import StrikeLayer
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.policy.rule import parse_network
from rama_ebpf.services.http import ForwardedField, ForwardedLayer, HttpServer, Request, Response, TrustedPeersLayer
from rama_ebpf.services.http.layers import BasicAuthLayer
from rama_ebpf.services.resolver import SystemResolver

from ..proxy_protocol.test_behind_balancer import Policy
from .conftest import Origin, Run, RunOrigin, Server, eventually

LOOPBACK = (parse_network("127.0.0.0/8"),)
MALFORMED = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"


class Front:
    """A reverse proxy that believes its peers on loopback."""

    def __init__(self, run: Run, origin: Origin, policy: Policy, **settings: Any) -> None:
        self.policy = policy
        limits = settings.pop("limits", SourceLimits())
        environment = BuildEnvironment(
            policy,
            bytes(32),
            None,
            SystemResolver(threads=1),
            EgressPolicy.of(["127.0.0.0/8"]),
            "",
            lambda factory: factory,
            limits=limits,
        )
        routes = (RouteSettings(backends=(Authority.of("127.0.0.1", origin.port),)),)
        service = ReverseSettings(routes=routes, **({"trusted": LOOPBACK} | settings))
        self.server: Server = run(build_stack(StackConfig(service, layers=(StrikesSettings(strikes=1),)), environment))

    async def status(self, field: str = "", name: str = "X-Forwarded-For") -> int:
        told = f"{name}: {field}\r\n" if field else ""
        answer = await self.server.exchange(
            f"GET / HTTP/1.1\r\nHost: a.test\r\n{told}Connection: close\r\n\r\n".encode()
        )
        return int(answer.split()[1])


Start = Callable[..., Front]


@pytest.fixture
def front(run: Run, run_origin: RunOrigin) -> Start:
    def start(**settings: Any) -> Front:
        origin = run_origin(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        return Front(run, origin, Policy(), **settings)

    return start


async def ban(front: Front, address: str) -> None:
    await front.policy.ban(parse_network(address).network_address, ttl=60, reason="test")


async def test_banned_client_that_a_trusted_proxy_names_gets_403_and_others_do_not(front: Start) -> None:
    proxy = front()
    assert await proxy.status("192.0.2.1") == 200
    await ban(proxy, "192.0.2.1/32")
    assert await proxy.status("192.0.2.1") == 403
    assert await proxy.status("198.51.100.9, 192.0.2.1, 127.0.0.9") == 403  # behind another trusted hop
    assert await proxy.status("192.0.2.1, 198.51.100.9") == 200  # what the client itself says is not believed
    assert await proxy.status() == 200  # the proxy for itself: a health check


async def test_each_request_on_a_kept_connection_is_judged(front: Start) -> None:
    proxy = front()
    await ban(proxy, "192.0.2.1/32")
    head = "GET / HTTP/1.1\r\nHost: a.test\r\nX-Forwarded-For: {}\r\n{}\r\n"
    answer = await proxy.server.exchange(
        (head.format("192.0.2.1", "") + head.format("192.0.2.2", "Connection: close\r\n")).encode()
    )
    assert answer.index(b"HTTP/1.1 403 ") < answer.index(b"HTTP/1.1 200 ")


async def test_standard_field_is_read_strictly(front: Start) -> None:
    proxy = front(forwarded="forwarded")
    await ban(proxy, "192.0.2.1/32")
    await ban(proxy, "2600::1/128")
    for field, status in (
        ("for=192.0.2.1", 403),
        ('For="192.0.2.1:4711";proto=https', 403),
        ('for="[2600::1]:80"', 403),
        ("for=192.0.2.1, for=198.51.100.9", 200),
        ("for=unknown", 200),
        ("for=_hidden;by=_here", 200),
        ('for="[2600:0:1::1]"', 200),
        # A client that could make the list unreadable could hide behind it.
        ('for=", for=192.0.2.1', 400),
        ('for=""x, for=192.0.2.1', 400),
        ("for=192.0.2.9;for=192.0.2.1", 400),
        ("nonsense, for=192.0.2.1", 400),
        ("for=2600::1", 400),
    ):
        assert (field, await proxy.status(field, "Forwarded")) == (field, status)


async def test_what_peers_say_that_nobody_trusts_is_not_judged(front: Start) -> None:
    proxy = front(trusted=(parse_network("10.0.0.0/8"),))
    await ban(proxy, "192.0.2.1/32")
    assert await proxy.status("192.0.2.1") == 200


async def test_judging_can_be_switched_off(front: Start) -> None:
    proxy = front(judge=False)
    await ban(proxy, "192.0.2.1/32")
    assert await proxy.status("192.0.2.1") == 200


async def test_trusted_proxy_is_not_struck_for_what_its_clients_send(front: Start) -> None:
    proxy = front()
    assert (await proxy.server.exchange(MALFORMED)).startswith(b"HTTP/1.1 400 ")
    await proxy.server.idle()
    assert proxy.policy.banned == []
    stranger = front(trusted=(parse_network("10.0.0.0/8"),))
    assert (await stranger.server.exchange(MALFORMED)).startswith(b"HTTP/1.1 400 ")
    await stranger.server.idle()
    assert stranger.policy.banned == ["127.0.0.1"]


async def test_client_that_a_trusted_proxy_names_is_struck_for_its_guesses(run: Run) -> None:
    async def app(request: Request) -> Response:
        return Response(204)

    policy = Policy()
    guarded = stack(
        ForwardedLayer(ForwardedField.X_FORWARDED, trusted=["127.0.0.0/8"], policy=policy),
        BasicAuthLayer(StaticUsers({"tom": "secret"})),
        app,
    )
    server = run(stack(StrikeLayer(policy, strikes=2), TrustedPeersLayer(["127.0.0.0/8"]), HttpServer(guarded)))
    guess = base64.b64encode(b"tom:wrong").decode()
    told = f"X-Forwarded-For: 192.0.2.1\r\nAuthorization: Basic {guess}\r\n"
    head = f"GET / HTTP/1.1\r\nHost: a\r\n{told}Connection: close\r\n\r\n"
    for status in (b"401", b"401", b"403"):
        assert (await server.exchange(head.encode())).split()[1] == status
        await server.idle()
    assert policy.banned == ["192.0.2.1"]


async def test_trusted_proxies_may_have_any_number_of_connections(front: Start) -> None:
    one = SourceLimits(connections=1)
    for trusted, refused in ((LOOPBACK, False), ((parse_network("10.0.0.0/8"),), True)):
        proxy = front(trusted=trusted, limits=one)
        _, writer = await proxy.server.open()
        writer.write(b"GET ")
        assert await proxy.status() == (503 if refused else 200)
        await eventually(lambda tcp=proxy.server.tcp: tcp.live == 1)  # type: ignore[misc]
        assert any(isinstance(error, ShareExceeded) for error in proxy.server.errors) is refused
        writer.close()


def test_orders_and_settings_that_cannot_work_are_refused() -> None:
    routes = (RouteSettings(backends=(Authority.of("127.0.0.1", 80),)),)
    with pytest.raises(ValueError, match='concurrency per "source" would count the proxies'):
        StackConfig(
            ReverseSettings(routes=routes, trusted=LOOPBACK), layers=(ConcurrencySettings(limit=5, per="source"),)
        )
    StackConfig(ReverseSettings(routes=routes, trusted=LOOPBACK), layers=(ConcurrencySettings(limit=5),))
    with pytest.raises(ValueError, match="it is off"):
        ReverseSettings(routes=routes, trusted=LOOPBACK, forwarded="off")
