"""Which route decides: in order, by everything that a route can say, and at a bounded cost."""

from __future__ import annotations

import random
from ipaddress import ip_address, ip_network

import pytest

from rama_ebpf.routes import PortRange, Protocol, Question, Route, RouteError, RouteTable


def nets(*texts):
    return tuple(map(ip_network, texts))


def of(table: RouteTable, host: str = "a.example", port: int = 443, **more) -> str:
    try:
        ip, name = ip_address(host), None
    except ValueError:
        ip, name = None, host
    return table.decide(Question(port, name, ip, **more)).name


def test_first_route_that_matches_decides_and_without_one_all_is_refused():
    table = RouteTable([Route("one", "a", hosts=("*.example",)), Route("two", "b", hosts=("a.example",))])
    assert of(table) == "one"
    assert of(table, "example") == "none"
    decision = table.decide(Question(443, "other.test"))
    assert (decision.way, decision.route) == ("refuse", None)


@pytest.mark.parametrize(
    ("pattern", "matches", "fails"),
    [
        ("name.example", ["name.example", "NAME.example.", "Name.Example"], ["a.name.example", "xname.example"]),
        ("*.name.example", ["a.name.example", "b.a.name.example"], ["name.example", "aname.example"]),
        (".name.example", ["name.example", "a.name.example"], ["aname.example"]),
        ("*", ["x", "a.b.c"], ["198.18.0.1", "2001:db8::1"]),
        ("cdn-*.example", ["cdn-1.example", "cdn-.example"], ["cdn-1.x.example", "xcdn-1.example"]),
        ("?.example", ["a.example"], ["ab.example", ".example"]),
        ("bücher.example", ["xn--bcher-kva.example", "BÜCHER.example"], ["bucher.example"]),
    ],
)
def test_host_pattern_means_these_names_and_no_others(pattern, matches, fails):
    table = RouteTable([Route("it", "a", hosts=(pattern,))])
    assert [name for name in matches if of(table, name) != "it"] == []
    assert [name for name in fails if of(table, name) == "it"] == []


def test_expression_matches_the_whole_name_in_linear_time():
    table = RouteTable([Route("it", "a", regexes=(r"(a+)+b\.example", r"[0-9]{3}\.test"))])
    assert of(table, "aaab.example") == "it"
    assert of(table, "x.aaab.example") == "none"
    assert of(table, "123.test") == "it"
    assert of(table, "a" * 250) == "none"  # a backtracking engine would not come back


@pytest.mark.parametrize("bad", ["(", "a{2000}", r"(?=x)", r"\1", "x" * 1001])
def test_expression_that_re2_does_not_know_is_refused_with_its_route(bad):
    with pytest.raises(RouteError, match=r"route it: .*expression") as caught:
        RouteTable([Route("it", "a", regexes=(bad,))])
    assert caught.value.where == ("route", "it")


@pytest.mark.parametrize("bad", ["", ".", "*.", "a..b", "*x.[", "a b", "x" * 300])
def test_host_pattern_that_matches_nothing_is_refused(bad):
    with pytest.raises(RouteError):
        RouteTable([Route("it", "a", hosts=(bad,))])


def test_each_condition_has_to_hold():
    whole = Route(
        "it",
        "a",
        hosts=("*.example",),
        ports=(PortRange(443, 443), PortRange(8000, 8100)),
        users=("tom", "ann"),
        listeners=("front",),
        clients=nets("198.18.0.0/24", "2001:db8::/64"),
        protocols=(Protocol.SOCKS, Protocol.CONNECT),
        server_names=("*.example",),
    )
    good = {
        "user": "tom",
        "listener": "front",
        "client": ip_address("198.18.0.7"),
        "protocol": Protocol.SOCKS,
        "server_name": "www.example",
    }
    table = RouteTable([whole])
    assert of(table, **good) == "it"
    assert of(table, port=8050, **good | {"client": ip_address("::ffff:198.18.0.1")}) == "it"
    assert of(table, "b.test", **good) == "none"
    assert of(table, port=8101, **good) == "none"
    for wrong in (
        {"user": "tim"},
        {"user": None},
        {"listener": "back"},
        {"listener": None},
        {"client": ip_address("198.18.1.7")},
        {"client": None},
        {"protocol": Protocol.UDP},
        {"server_name": "www.test"},
        {"server_name": None},
    ):
        assert of(table, **good | wrong) == "none", wrong


def test_target_network_means_literals_and_a_name_only_where_the_route_looks_it_up():
    literal = RouteTable([Route("net", "a", networks=nets("10.0.0.0/8", "2001:db8::/32")), Route("rest", "b")])
    assert of(literal, "10.1.2.3") == "net"
    assert of(literal, "::ffff:10.1.2.3") == "net"
    assert of(literal, "2001:db8::5") == "net"
    assert of(literal, "11.0.0.1") == "rest"
    asked = literal.decide(Question(443, "a.example"))
    assert (asked.name, asked.asks) == ("rest", False)  # I39: nobody is looked up for a route that did not ask
    table = RouteTable(
        [
            Route("first", "a", hosts=("early.example",)),
            Route("net", "a", networks=nets("10.0.0.0/8"), resolve=True),
            Route("rest", "b"),
        ]
    )
    assert not table.decide(Question(443, "early.example")).asks
    assert not table.decide(Question(443, ip=ip_address("11.0.0.1"))).asks
    assert table.decide(Question(443, "a.example")).asks
    inside, outside = [ip_address("10.1.1.1")], [ip_address("11.1.1.1")]
    assert table.decide(Question(443, "a.example", ips=inside)).name == "net"
    assert table.decide(Question(443, "a.example", ips=outside)).name == "rest"
    assert table.decide(Question(443, "a.example", ips=())).name == "rest"


def test_two_routes_of_one_name_are_refused():
    with pytest.raises(RouteError, match="two routes 'it'"):
        RouteTable([Route("it", "a"), Route("it", "b")])


def test_table_agrees_with_asking_one_route_after_the_other():
    rng = random.Random(7)
    names = [f"{a}.{b}.example" for a in "abc" for b in "xyz"] + ["x.example", "example"]
    addresses = [ip_address(0x0A000000 + rng.randrange(1 << 12)) for _ in range(40)] + [ip_address("2001:db8::1")]

    def some(values, most=2):
        return tuple(rng.sample(values, rng.randrange(most + 1)))

    patterns = [*names, "*.example", ".x.example", "*.y.example", "?.z.example", "*"]
    cidrs = [str(ip_network((int(a) & 0xFFFFFF00, 24))) for a in addresses[:-1]] + ["10.0.0.0/20", "2001:db8::/64"]
    for _ in range(30):
        routes = [
            Route(
                f"r{n}",
                "w",
                hosts=some(patterns),
                networks=nets(*some(cidrs)),
                ports=tuple(PortRange(p, p + rng.randrange(3)) for p in some([1, 2, 3, 4])),
                users=some(["tom", "ann"]),
                clients=nets(*some(cidrs)),
                protocols=some(list(Protocol)),
            )
            for n in range(12)
        ]
        table, single = RouteTable(routes), [RouteTable([route]) for route in routes]
        for _ in range(60):
            host = rng.choice([*names, *map(str, addresses)])
            more = {
                "user": rng.choice(["tom", "ann", None]),
                "client": rng.choice([*addresses, None]),
                "protocol": rng.choice(list(Protocol)),
            }
            port = rng.randrange(1, 7)
            wanted = next(
                (r.name for r, t in zip(routes, single, strict=True) if of(t, host, port, **more) != "none"), "none"
            )
            assert of(table, host, port, **more) == wanted


def test_what_may_decide_is_known_before_a_target_is_named():
    table = RouteTable(
        [
            Route("far", "a", hosts=("x.example",), users=("tom",)),
            Route("ann", "b", users=("ann",)),
            Route("all", "c", protocols=(Protocol.UDP,)),
            Route("later", "d"),
        ]
    )
    asked = [route.name for route in table.possible(Question(0, protocol=Protocol.UDP, user="tom"))]
    assert asked == ["far", "all"]
