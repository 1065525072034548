"""Going by a way: what each fault does, who is blamed, what is tried next, and that nothing goes where it should not.

T1-T3, T9, T10 and the reports I1-I24 of WAYS.md are named where a test shows them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time

import pytest

from rama_ebpf.core import Authority, Extensions, PolicyDenied, User
from rama_ebpf.core.auth import Credentials
from rama_ebpf.core.notes import Note
from rama_ebpf.core.target import Target
from rama_ebpf.layers.auth import StaticUsers
from rama_ebpf.routes import Chain, Choose, Direct, Fault, HealthLimits, Key, Route, State
from rama_ebpf.services.connect import ConnectError, WayReset
from rama_ebpf.services.http import HttpProxy
from rama_ebpf.services.http.layers import ProxyAuthLayer
from rama_ebpf.services.route import parse_parent
from rama_ebpf.services.route.failure import WayFailed
from rama_ebpf.services.socks5 import Socks5Server

from .conftest import (
    Clock,
    Hosts,
    close,
    dead,
    direct,
    echo,
    group,
    hang,
    parent_of,
    reset,
    routed,
    says,
    socks_reply,
    status,
)

TARGET = Authority.of("127.0.0.1", 9)


async def ask(connector, target: Authority, data: bytes = b"hello") -> bytes:
    stream = await connector(target)
    try:
        await stream.write(data)
        return await stream.read_exactly(len(data))
    finally:
        await stream.close()


def noted(extensions: Extensions, key: str) -> str | None:
    return next((note.value for note in extensions.all(Note) if note.key == key), None)


# -- what a parent does, and what becomes of it ------------------------------------------------------------------

FAULTS = [
    # (scheme, what it does, errno for the client, whose fault)
    ("http", close, errno.ECONNRESET, Fault.WAY),
    ("http", reset, errno.ECONNRESET, Fault.WAY),
    ("http", says(b"SSH-2.0-OpenSSH_9.2\r\n"), errno.EPROTO, Fault.WAY),
    ("http", says(b"HTTP/1.1 2"), errno.ETIMEDOUT, Fault.DOUBT),
    ("http", says(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 20000), errno.EPROTO, Fault.WAY),
    ("http", status(407), errno.EKEYREJECTED, Fault.LOGIN),
    ("http", status(403), errno.EACCES, Fault.TARGET),
    ("http", status(429), errno.EIO, Fault.WAY),
    ("http", status(500), errno.EIO, Fault.DOUBT),
    ("http", status(502), errno.EHOSTUNREACH, Fault.TARGET),
    ("http", status(503), errno.EHOSTUNREACH, Fault.TARGET),
    ("http", status(504), errno.ETIMEDOUT, Fault.TARGET),
    ("http", hang, errno.ETIMEDOUT, Fault.DOUBT),
    ("socks5", close, errno.ECONNRESET, Fault.WAY),
    ("socks5", reset, errno.ECONNRESET, Fault.WAY),
    ("socks5", says(b"SSH-2.0-OpenSSH_9.2\r\n"), errno.EPROTO, Fault.WAY),
    ("socks5", says(b"\5\xff"), errno.EKEYREJECTED, Fault.LOGIN),
    ("socks5", says(b"\5"), errno.ETIMEDOUT, Fault.DOUBT),
    ("socks5", hang, errno.ETIMEDOUT, Fault.DOUBT),
    *(
        ("socks5", socks_reply(rep), number, fault)
        for rep, number, fault in (
            (1, errno.EIO, Fault.DOUBT),
            (2, errno.EACCES, Fault.TARGET),
            (3, errno.ENETUNREACH, Fault.TARGET),
            (4, errno.EHOSTUNREACH, Fault.TARGET),
            (5, errno.ECONNREFUSED, Fault.TARGET),
            (6, errno.ETIMEDOUT, Fault.TARGET),
            (7, errno.EOPNOTSUPP, Fault.UNABLE),
            (8, errno.EAFNOSUPPORT, Fault.UNABLE),
            (77, errno.EIO, Fault.DOUBT),
        )
    ),
    ("socks4", says(b"\0\x5b" + bytes(6)), errno.ECONNREFUSED, Fault.DOUBT),
    ("socks4", says(b"\0\x5d" + bytes(6)), errno.EKEYREJECTED, Fault.LOGIN),
    ("socks4", says(b"HTTP/1.1 400 Bad\r\n\r\n"), errno.EPROTO, Fault.WAY),
]


@pytest.mark.parametrize(("scheme", "does", "number", "fault"), FAULTS)
async def test_fault_of_a_parent_has_its_answer_and_its_blame(serve, scheme, does, number, fault):
    """T1: with a text that is never empty, and no password in it."""
    peer = await serve(does)
    login = "tom:s3cret@" if scheme != "socks4" else "tom@"
    connector = routed({"it": parent_of(peer, scheme, login)}, timeout=0.3 if fault is Fault.DOUBT else 5)
    with pytest.raises(WayFailed) as caught:
        await connector(TARGET)
    assert (caught.value.errno, caught.value.fault) == (number, fault)
    assert peer.accepted == 1
    assert not str(caught.value).rstrip().endswith(":")
    assert "s3cret" not in str(caught.value)
    health = connector.board.read("it")
    assert health.state is (State.QUARANTINED if fault is Fault.LOGIN else State.UP)
    doubtful = fault is Fault.DOUBT and number != errno.ETIMEDOUT  # one answer alone proves nothing
    assert health.failures == (0 if doubtful or fault in (Fault.TARGET, Fault.UNABLE) else 1)


async def test_dead_parent_is_left_alone_and_comes_back_through_a_trial(serve):
    """T2: not asked again for each target, nor for ever."""
    hanging, clock = True, Clock()

    async def sometimes(reader, writer):
        if hanging:
            await asyncio.Event().wait()
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await echo(reader, writer)

    peer = await serve(sometimes)
    limits = HealthLimits(fall=2, rise=2, hold=30)
    connector = routed({"it": parent_of(peer, limits=limits)}, timeout=0.2, clock=clock)
    for number in range(5):
        clock.now += 1
        with pytest.raises(WayFailed) as caught:
            await connector(Authority.of("127.0.0.1", 1000 + number))
        if number >= 2:
            assert "the way it is not asked now: it is down" in str(caught.value)
            assert caught.value.errno == errno.EIO
    assert peer.accepted == 2
    hanging = False
    clock.now += 40
    assert await ask(connector, TARGET) == b"hello"
    assert connector.board.read("it").state is State.TRIAL
    assert await ask(connector, TARGET) == b"hello"
    assert connector.board.read("it").usable()


async def test_parent_that_answers_others_is_not_blamed_for_a_silent_target(serve):
    """I13, I18: nxdomain.test and silent targets kill no parent."""
    clock, silent_asked = Clock(), asyncio.Event()

    async def one_is_silent(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        if b"silent" in head:
            silent_asked.set()
            await asyncio.Event().wait()
        writer.write(b"HTTP/1.1 502 No such name\r\n\r\n" if b"nx" in head else b"HTTP/1.1 200 OK\r\n\r\n")
        await echo(reader, writer)

    peer = await serve(one_is_silent)
    connector = routed({"it": parent_of(peer, limits=HealthLimits(fall=1))}, timeout=0.3, clock=clock)
    for _ in range(3):
        waiting = asyncio.create_task(connector(Authority("silent.test", 80)))
        await silent_asked.wait()
        silent_asked.clear()
        clock.now += 1
        with pytest.raises(ConnectError):
            await connector(Authority("nx.test", 80))
        with pytest.raises(WayFailed):
            await waiting
    assert connector.board.read("it").usable()


async def test_login_that_a_parent_refuses_is_sent_once_and_tells_an_operator(serve, caplog):
    """T3: each retry could lock our account there."""
    peer = await serve(status(407))
    connector = routed({"it": parent_of(peer, login="tom:s3cret@")})
    for _ in range(3):
        with pytest.raises(WayFailed):
            await connector(TARGET)
    assert peer.accepted == 1
    alarms = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(alarms) == 1
    assert "rama-ebpf route enable it" in alarms[0].getMessage()
    assert "s3cret" not in caplog.text
    connector.board.change("it", lambda health: health.enable(1.0) or True)
    with pytest.raises(WayFailed, match="407"):
        await connector(TARGET)
    assert peer.accepted == 2


async def test_address_of_a_parent_that_takes_connections_and_hangs_costs_a_moment(serve, run_service):
    """T3: each address is walked through the handshake, the next raced late."""
    good = await run_service(Socks5Server(direct()), "127.0.0.2")
    bad = await serve(hang, "127.0.0.1", good.port)
    target = await serve(echo)
    base = direct(hosts=Hosts(parent_test=["127.0.0.1", "127.0.0.2"]))
    connector = routed({"it": f"socks5://parent.test:{good.port}"}, base=base)
    assert await ask(connector, Authority.of(target.host, target.port)) == b"hello"
    assert bad.accepted == 1
    assert connector.board.read("it").usable()


# -- groups ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("does", [close, reset, says(b"SSH-2.0-x\r\n"), status(407), status(429), status(500), hang])
async def test_fault_of_a_way_moves_on_within_one_connection(serve, run_service, does):
    """I15, I19: everything that goes wrong before the answer, and that is the way's; hanging costs one late race."""
    bad, good, target = await serve(does), await run_service(HttpProxy(direct())), await serve(echo)
    ways = {"a": parent_of(bad), "b": parent_of(good), "it": group("a", "b")}
    connector, extensions = routed(ways, late=0.05), Extensions()
    assert await ask(connector, Target(Authority.of(target.host, 1).host, target.port, extensions)) == b"hello"
    assert (bad.accepted, noted(extensions, "way"), noted(extensions, "route")) == (1, "b", "all")


@pytest.mark.parametrize(("scheme", "does"), [("http", status(403)), ("http", status(502)), ("socks5", socks_reply(5))])
async def test_answer_about_the_target_is_final(serve, scheme, does):
    first, second = await serve(does), await serve(hang)
    connector = routed({"a": parent_of(first, scheme), "b": parent_of(second), "it": group("a", "b")})
    with pytest.raises(WayFailed):
        await connector(TARGET)
    assert (first.accepted, second.accepted) == (1, 0)
    assert connector.board.read("a").failures == 0


async def test_frozen_member_is_skipped_after_some_late_races_and_is_tried_by_one(serve, run_service):
    frozen, good, target = await serve(hang), await run_service(Socks5Server(direct())), await serve(echo)
    ahead = 0.0
    ways = {"a": parent_of(frozen, "socks5"), "b": parent_of(good, "socks5"), "it": group("a", "b")}
    connector = routed(ways, late=0.02, clock=lambda: time.monotonic() + ahead)
    at = Authority.of(target.host, target.port)
    for _ in range(3):
        assert await ask(connector, at) == b"hello"
        await asyncio.sleep(0)  # the loser is told
    assert connector.board.read("a").state is State.DOWN
    before = frozen.accepted
    for _ in range(5):
        assert await ask(connector, at) == b"hello"
    assert frozen.accepted == before
    ahead = 30.0
    answers = await asyncio.gather(*(ask(connector, at) for _ in range(10)))
    assert answers == [b"hello"] * 10
    assert frozen.accepted == before + 1


async def test_group_with_no_healthy_member_refuses_and_asks_the_last_good_one_once_a_second(serve):
    """I1, I8, I12, I21, I24: never direct, and what did well last is what is tried."""
    clock, target = Clock(), await serve(echo)
    a, b = await serve(close), await serve(close)
    limits = HealthLimits(fall=1)
    ways = {"a": parent_of(a, limits=limits), "b": parent_of(b, limits=limits), "it": group("a", "b")}
    connector = routed(ways, clock=clock)
    connector.board.change("b", lambda health: health.answer(clock.now))
    at = Authority.of(target.host, target.port)
    with pytest.raises(WayFailed):
        await connector(at)
    assert (a.accepted, b.accepted) == (1, 1)
    for _ in range(5):
        with pytest.raises(WayFailed):
            await connector(at)
    assert (a.accepted, b.accepted) == (2, 2)  # each once for want of a better one, within this second
    clock.now += 1.5
    with pytest.raises(WayFailed):
        await connector(at)
    assert (a.accepted, b.accepted) == (2, 3)
    assert target.accepted == 0


async def test_one_budget_holds_for_all_members_and_addresses():
    """I20."""
    seen: list[str] = []
    ways = {f"p{n}": dead() for n in range(8)}
    connector = routed({**ways, "it": group(*ways)}, tries=3, observe=lambda way, outcome: seen.append(way))
    with pytest.raises(WayFailed):
        await connector(TARGET)
    assert seen == ["p0", "p1", "p2"]


async def test_one_deadline_holds_for_all_members_and_blames_those_that_said_nothing(serve):
    peers = [await serve(hang) for _ in range(3)]
    ways = {f"p{n}": parent_of(peer) for n, peer in enumerate(peers)}
    connector, extensions = routed({**ways, "it": group(*ways)}, timeout=0.3, late=0.05), Extensions()
    with pytest.raises(WayFailed, match=r"by p0, p1, p2: no answer within 0\.3 s"):
        await connector(Target(TARGET.host, TARGET.port, extensions))
    assert [connector.board.read(name).failures for name in ways] == [1, 1, 1]
    assert noted(extensions, "tried") == "p0:no answer,p1:no answer,p2:no answer"


async def test_client_that_leaves_is_nobodys_fault(serve):
    asked = asyncio.Event()

    async def takes_it(reader, writer):
        asked.set()
        await asyncio.Event().wait()

    connector = routed({"it": parent_of(await serve(takes_it))})
    task = asyncio.create_task(connector(TARGET))
    await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert connector.board.read("it").failures == 0


async def test_drained_member_gets_no_new_connection(serve, run_service):
    a, b, target = await run_service(HttpProxy(direct())), await run_service(HttpProxy(direct())), await serve(echo)
    seen: list[str] = []
    ways = {"a": parent_of(a), "b": parent_of(b), "it": group("a", "b")}
    connector = routed(ways, observe=lambda way, _outcome: seen.append(way))
    at = Authority.of(target.host, target.port)
    await ask(connector, at)
    connector.board.change("a", lambda health: setattr(health, "drained", True) or True)
    await ask(connector, at)
    connector.board.change("a", lambda health: health.enable(0.0) or True)
    await ask(connector, at)
    assert seen == ["a", "b", "a"]


async def test_live_connections_of_members_are_counted_and_given_back(serve, run_service):
    proxy, target = await run_service(Socks5Server(direct())), await serve(echo)
    ways = {"a": parent_of(proxy, "socks5"), "b": parent_of(proxy, "socks5")}
    connector = routed({**ways, "it": group("a", "b", choose=Choose.LEAST)})
    streams = [await connector(Authority.of(target.host, target.port)) for _ in range(6)]
    assert [connector.board.live(name) for name in "ab"] == [3, 3]
    while streams:
        await streams.pop().close()
    assert [connector.board.live(name) for name in "ab"] == [0, 0]


# -- where nothing may go ----------------------------------------------------------------------------------------

PRIVATE = [
    "10.0.0.1",
    "192.168.1.1",
    "172.16.0.1",
    "100.64.0.1",
    "::ffff:10.0.0.1",
    "fd00::1",
    "64:ff9b::a00:1",
    "fc00::5efe:10.0.0.1",
]
NEVER = [
    "169.254.169.254",
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f000001",
    "017700000001",
    "127.0.0.1.",
    "0.0.0.0",
    "::1",
    "::",
    "localhost",
    "LOCALHOST.",
    "x.localhost",
    "fd00:ec2::254",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",
    "fc00::5efe:127.0.0.1",
]


@pytest.mark.parametrize("host", PRIVATE + NEVER)
async def test_literal_is_judged_before_a_parent_hears_of_it(serve, host):
    """T10: what is refused to ourselves is refused to a parent, in every spelling."""
    peer = await serve(hang)
    parent = parent_of(peer)
    base = direct(allow=())

    class OnlyTheParent:
        """Egress that knows the parent; all else is as it is by default."""

        def check(self, ip, port=None, /):
            if port != peer.port:
                base.egress.check(ip, port)

    from dataclasses import replace

    connector = routed({"it": parent}, base=replace(base, egress=OnlyTheParent()), timeout=0.3)
    with pytest.raises(PolicyDenied):
        await connector(Authority.of(host, 80))
    assert peer.accepted == 0
    trusted = routed({"it": replace(parent, trusted=True)}, base=replace(base, egress=OnlyTheParent()), timeout=0.2)
    with pytest.raises(PolicyDenied if host in NEVER else WayFailed):
        await trusted(Authority.of(host, 80))
    assert peer.accepted == (0 if host in NEVER else 1)


async def test_name_is_not_looked_up_here_unless_the_way_says_so(serve, run_service):
    """I39, and names = "here": what a name means is judged where that is known."""
    hosts = Hosts(good_test=["10.0.0.1", "127.0.0.1"], bad_test=["10.0.0.1"])
    far_hosts, target = Hosts(good_test=["127.0.0.1"]), await serve(echo)
    far = await run_service(HttpProxy(direct(hosts=far_hosts)))
    there = routed({"it": parent_of(far)}, base=direct(hosts=hosts))
    assert await ask(there, Authority("good.test", target.port)) == b"hello"
    assert (hosts.asked, far_hosts.asked) == ([], ["good.test"])
    here = routed({"it": parent_of(far, resolve_here=True)}, base=direct(hosts=hosts))
    assert await ask(here, Authority("good.test", target.port)) == b"hello"
    assert (hosts.asked, far_hosts.asked) == (["good.test"], ["good.test"])
    with pytest.raises(PolicyDenied):
        await here(Authority("bad.test", target.port))


async def test_without_a_route_and_by_refuse_and_reset_nobody_is_asked(serve):
    target = await serve(echo)
    at = Authority.of(target.host, target.port)
    with pytest.raises(PolicyDenied, match="no route leads there") as caught:
        await routed({}, Route("other", "direct", hosts=("x.example",)))(at)
    assert caught.value.rule == "route:none"
    with pytest.raises(PolicyDenied, match="the route no refuses it") as caught:
        await routed({}, Route("no", "refuse"))(at)
    assert (type(caught.value), caught.value.rule) == (PolicyDenied, "route:no")
    with pytest.raises(WayReset):
        await routed({}, Route("no", "reset"))(at)
    assert target.accepted == 0


async def test_operator_may_lead_a_route_elsewhere(serve):
    target = await serve(echo)
    overrides = {"all": "refuse", "gone": "x"}
    connector = routed({}, Route("all", "direct"), overrides=lambda: overrides)
    with pytest.raises(PolicyDenied):
        await connector(Authority.of(target.host, target.port))
    overrides["all"] = "nowhere"  # a way of an earlier configuration: the route is as it is written
    assert await ask(connector, Authority.of(target.host, target.port)) == b"hello"


# -- ways --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["http", "socks5", "socks5h", "socks4", "socks4a"])
async def test_parent_of_each_kind_reaches_the_target(serve, run_service, scheme):
    hosts = Hosts(target_test=["127.0.0.1"])
    service = HttpProxy(direct(hosts=hosts)) if scheme == "http" else Socks5Server(direct(hosts=hosts))
    parent, target = await run_service(service), await serve(echo)
    connector = routed({"it": parent_of(parent, scheme)}, base=direct(hosts=Hosts(target_test=["127.0.0.1"])))
    for host in ("127.0.0.1", "target.test"):
        assert await ask(connector, Authority.of(host, target.port)) == b"hello"
    assert hosts.asked == ([] if scheme == "socks4" else ["target.test"])


async def test_chain_goes_through_all_and_what_an_inner_hop_says_is_the_ways_fault(serve, run_service):
    auth = StaticUsers({"tom": "secret"})
    first = await run_service(Socks5Server(direct(), auth=auth))
    second, target = await run_service(HttpProxy(direct())), await serve(echo)
    ways = {
        "a": parent_of(first, "socks5", "tom:%73ecret@"),
        "b": parent_of(second),
        "gone": dead("http"),
        "it": Chain(("a", "b")),
        "broken": Chain(("a", "gone")),
    }
    assert await ask(routed(ways), Authority.of(target.host, target.port)) == b"hello"
    connector = routed(ways, way="broken")
    with pytest.raises(WayFailed) as caught:
        await connector(Authority.of(target.host, target.port))
    assert (caught.value.errno, caught.value.fault) == (errno.EIO, Fault.WAY)


async def test_direct_way_has_its_source_and_no_other_family(serve):
    sources: list[str] = []

    async def note(reader, writer):
        sources.append(writer.get_extra_info("peername")[0])
        await echo(reader, writer)

    from ipaddress import ip_network

    target = await serve(note)
    at = Authority.of(target.host, target.port)
    await ask(routed({"it": Direct((ip_network("127.0.0.9/32"),))}), at)
    assert sources == ["127.0.0.9"]
    spread = routed({"it": Direct((ip_network("127.7.0.0/16"),))})
    for _ in range(4):
        await ask(spread, at)
    assert len(set(sources[1:])) == 4
    assert all(source.startswith("127.7.") for source in sources[1:])
    keyed = routed({"it": Direct((ip_network("127.8.0.0/16"),), key=Key.USER)})
    for name in ("tom", "ann", "tom", "tom"):
        extensions = Extensions()
        extensions.add(User(name))
        await ask(keyed, Target(at.host, at.port, extensions))
    tom, ann, *rest = sources[5:]
    assert rest == [tom, tom]
    assert ann != tom
    with pytest.raises(PolicyDenied, match="no IPv6 source"):
        await spread(Authority.of("::1", target.port))


async def test_plain_requests_reach_an_http_parent_in_absolute_form(serve, run_service):
    """T10: squid refuses CONNECT to port 80."""
    heads: list[bytes] = []

    async def parent(reader, writer):
        while head := await reader.readuntil(b"\r\n\r\n"):
            heads.append(head)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    peer = await serve(parent)
    front = await run_service(HttpProxy(routed({"it": parent_of(peer, login="tom:s3cret@")})))
    reader, writer = await asyncio.open_connection(front.host, front.port)
    for path in (b"/a?b=c", b"/d"):
        writer.write(
            b"GET http://ok.test:9000%b HTTP/1.1\r\nHost: ok.test:9000\r\nProxy-Authorization: Basic eDp5\r\n\r\n"
            % path
        )
        answer = await reader.readuntil(b"ok")
        assert answer.startswith(b"HTTP/1.1 200")
    writer.close()
    assert [head.split(b"\r\n")[0] for head in heads] == [
        b"GET http://ok.test:9000/a?b=c HTTP/1.1",
        b"GET http://ok.test:9000/d HTTP/1.1",
    ]
    for head in heads:
        assert head.lower().count(b"proxy-authorization") == 1
        assert b"Proxy-Authorization: Basic dG9tOnMzY3JldA==\r\n" in head
        assert b"Host: ok.test:9000\r\n" in head
    assert peer.accepted == 1


async def test_parent_that_refuses_our_login_for_a_request_is_no_question_to_our_client(serve, run_service):
    peer = await serve(says(b"HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=x\r\nContent-Length: 0\r\n\r\n"))
    connector = routed({"it": parent_of(peer)})
    front = await run_service(HttpProxy(connector))
    for _ in range(2):
        reader, writer = await asyncio.open_connection(front.host, front.port)
        writer.write(b"GET http://ok.test/ HTTP/1.1\r\nHost: ok.test\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 502")
        assert b"Proxy-Authenticate" not in answer
        writer.close()
    assert connector.board.read("it").state is State.QUARANTINED
    assert peer.accepted == 1


async def test_reset_leaves_the_client_without_a_word(serve, run_service):
    connector = routed({}, Route("no", "reset"))
    socks = await run_service(Socks5Server(connector))
    reader, writer = await asyncio.open_connection(socks.host, socks.port)
    writer.write(b"\5\1\0" + b"\5\1\0\1\x7f\0\0\1\0\x50")
    assert await reader.readexactly(2) == b"\5\0"
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    http = await run_service(HttpProxy(connector))
    reader, writer = await asyncio.open_connection(http.host, http.port)
    writer.write(b"CONNECT 127.0.0.1:80 HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n")
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()


async def test_direct_address_stays_in_callbacks_and_is_noted(serve, run_service):
    connector = routed({"exit": dead()}, Route("local", "direct", hosts=(), ports=()), Route("rest", "exit"))
    target = await serve(echo)
    seen: list[Extensions] = []

    async def never(_target):
        raise AssertionError("a task was asked for")

    server = Socks5Server(connector)
    assert server.at_once is not None
    begun = connector.begin(Authority.of(target.host, target.port), extensions := Extensions())
    assert begun is not None
    assert begun.stream is not None
    begun.stream.abort()
    seen.append(extensions)
    assert (noted(extensions, "route"), noted(extensions, "way")) == ("local", "direct")
    assert connector.begin(Authority("name.test", 1), Extensions()) is None
    front = await run_service(server)
    reader, writer = await asyncio.open_connection(front.host, front.port)
    writer.write(b"\5\1\0" + b"\5\1\0\1\x7f\0\0\1" + target.port.to_bytes(2, "big") + b"hello")
    assert (await reader.readexactly(12 + 5))[-5:] == b"hello"
    writer.close()


async def test_user_of_http_and_socks_takes_the_users_route(serve, run_service):
    auth, target = StaticUsers({"tom": "x", "ann": "x"}), await serve(echo)
    connector = routed({}, Route("tom", "direct", users=("tom",)))
    socks = await run_service(Socks5Server(connector, auth=auth))
    http = await run_service(HttpProxy(connector, layers=[ProxyAuthLayer(auth)]))
    for name, code, rep in ((b"tom", b"200", 0), (b"ann", b"403", 2)):
        reader, writer = await asyncio.open_connection(socks.host, socks.port)
        writer.write(b"\5\1\2\1\3" + name + b"\1x" + b"\5\1\0\1\x7f\0\0\1" + target.port.to_bytes(2, "big"))
        assert (await reader.readexactly(2 + 2 + 10))[5] == rep
        writer.close()
        reader, writer = await asyncio.open_connection(http.host, http.port)
        import base64

        login = base64.b64encode(name + b":x")
        head = b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nProxy-Authorization: Basic %b\r\n\r\n"
        writer.write(head % (target.port, target.port, login))
        assert code in await reader.readline()
        writer.close()


def test_url_of_a_parent_that_is_wrong_is_refused_without_its_password():
    for url in (
        "ftp://tom:s3cret@h",
        "socks5://tom:s3cret@",
        "http://tom:s3cret@h:99999",
        "http://tom:s3cret@h/x",
        "http://tom:s3cret@h:0",
    ):
        with pytest.raises(ValueError, match="proxy URL") as caught:
            parse_parent(url)
        assert "s3cret" not in str(caught.value)
    assert parse_parent("socks5://tom:%40@h").credentials == Credentials("tom", "@")


async def test_way_is_noted_once_however_often_it_is_tried(serve):
    connector, extensions = routed({"it": parent_of(await serve(close))}), Extensions()
    for _ in range(3):
        with pytest.raises(WayFailed):
            await connector(Target(TARGET.host, TARGET.port, extensions))
    assert [note.key for note in extensions.all(Note)] == ["route", "way"]
