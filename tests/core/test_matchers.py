from __future__ import annotations

from ipaddress import ip_address

import pytest

from rama_ebpf.core import (
    Authority,
    ClientAddress,
    Extensions,
    LocalAddress,
    PolicyDenied,
    SocketAddress,
    StackError,
    Stream,
    User,
)
from rama_ebpf.core.matchers import (
    ANY,
    ListenerPort,
    Matcher,
    Source,
    TargetHost,
    TargetNetwork,
    TargetPort,
    UserIs,
    where,
)
from rama_ebpf.core.routing import Either, NoRoute, Router
from rama_ebpf.core.service import accepts_of, stack
from rama_ebpf.layers.hijack import FilterLayer, HijackLayer


class Input:
    def __init__(self, *values: object) -> None:
        self.extensions = Extensions()
        for value in values:
            self.extensions.add(value)


def client(ip: str) -> ClientAddress:
    return ClientAddress(SocketAddress(ip_address(ip), 40000))


@pytest.mark.parametrize(
    ("matcher", "value", "expected"),
    [
        (Source("198.18.0.0/15", "2001:db8::/32"), client("198.19.255.255"), True),
        (Source("198.18.0.0/15", "2001:db8::/32"), client("198.20.0.0"), False),
        (Source("198.18.0.0/15", "2001:db8::/32"), client("2001:db8::1"), True),
        (Source("198.18.0.0/15"), client("::ffff:198.18.0.1"), True),
        (Source("0.0.0.0/0"), User("no address"), False),
        (TargetPort(443, 8443), Authority.of("a.example", 443), True),
        (TargetPort(443, 8443), Authority.of("a.example", 80), False),
        (TargetPort(443), User("no target"), False),
        (TargetNetwork("10.0.0.0/8"), Authority.of("10.1.2.3", 1), True),
        (TargetNetwork("10.0.0.0/8"), Authority.of("::ffff:10.1.2.3", 1), True),
        (TargetNetwork("0.0.0.0/0"), Authority.of("localhost", 1), False),
        (TargetHost("*.example.com"), Authority.of("A.Example.COM.", 1), True),
        (TargetHost("*.example.com"), Authority.of("example.com", 1), False),
        (TargetHost("*"), Authority.of("10.0.0.1", 1), False),
        (UserIs("tom", "anna"), User("anna"), True),
        (UserIs("tom"), User("bob"), False),
        (UserIs("tom"), client("198.18.0.1"), False),
        (ListenerPort(1080), LocalAddress(SocketAddress(ip_address("127.0.0.1"), 1080)), True),
        (ListenerPort(1081), LocalAddress(SocketAddress(ip_address("127.0.0.1"), 1080)), False),
        (ListenerPort(1080), User("a Unix socket has no port"), False),
        (ANY, User("any"), True),
    ],
)
def test_each_matcher(matcher: Matcher, value: object, expected: bool) -> None:
    assert matcher(Input(value)) is expected


def test_target_matchers_ask_an_authority_itself() -> None:
    assert TargetPort(53)(Authority.of("a.example", 53))


def test_and_or_not_combine_and_stop_early() -> None:
    def never(input: object) -> bool:
        raise AssertionError("the left side has decided")

    yes, no = where(lambda input: True), where(lambda input: False)
    assert not (no & where(never))(None)
    assert (yes | where(never))(None)
    assert (~no & (no | yes))(None)
    assert not (~(yes | no))(None)


@pytest.mark.parametrize("bad", ["10.0.0.1/8", "host.example", ""])
def test_bad_network_is_refused_when_the_matcher_is_made(bad: str) -> None:
    with pytest.raises(ValueError, match=r"network|host bits|address"):
        Source(bad)


async def mail(input: object) -> str:
    return "mail"


async def web(input: object) -> str:
    return "web"


async def other(input: object) -> str:
    return "other"


async def test_router_takes_the_first_match_and_else_the_fallback() -> None:
    router = Router((TargetPort(25), mail), (TargetPort(25, 80), web), fallback=other)
    assert [await router(Authority.of("a", port)) for port in (25, 80, 22)] == ["mail", "web", "other"]


async def test_router_without_a_match_or_a_fallback_says_so() -> None:
    with pytest.raises(NoRoute, match="none of 1 routes"):
        await Router((TargetPort(25), mail))(Authority.of("a", 80))


async def test_either_and_hijack() -> None:
    either = Either(TargetPort(25), mail, web)
    hijacked = stack(HijackLayer(TargetPort(25), mail), web)
    for service in (either, hijacked):
        assert [await service(Authority.of("a", port)) for port in (25, 80)] == ["mail", "web"]


async def test_filter_refuses_in_the_name_of_its_rule() -> None:
    service = stack(FilterLayer(~TargetPort(25), "no-mail"), web)
    assert await service(Authority.of("a", 80)) == "web"
    with pytest.raises(PolicyDenied) as refused:
        await service(Authority.of("a", 25))
    assert refused.value.rule == "no-mail"


async def on_stream(stream: Stream) -> None: ...


async def on_target(target: Authority) -> None: ...


def test_router_takes_what_its_routes_take() -> None:
    assert accepts_of(Router((ANY, on_stream), fallback=web)) is Stream
    with pytest.raises(StackError, match="take Stream, but on_target takes Authority"):
        Router((ANY, on_stream), fallback=on_target)
