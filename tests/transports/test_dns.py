"""Names, as users of slow, broken and hostile name servers meet them. The servers are real, on port 53 of loopback."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import pytest

from rama_ebpf.core import Authority
from rama_ebpf.core.address import SocketAddress
from rama_ebpf.core.client import ClientAddress
from rama_ebpf.core.errors import Busy
from rama_ebpf.core.extensions import Extensions
from rama_ebpf.core.resolv_conf import ResolvConf
from rama_ebpf.core.target import Target
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.services.connect import Connector
from rama_ebpf.services.http.exchange.gateway import to_http_error
from rama_ebpf.services.resolver import DnsResolver, ResolveError, ResolveTimeout
from rama_ebpf.services.socks5.replies import reply_for
from rama_ebpf.services.socks5.wire import Reply
from rama_ebpf.services.tcp import bind_tcp

from ..relay.flows import open_descriptors
from .name_server import NameServer

pytestmark = pytest.mark.root

LOOPBACK = EgressPolicy.of(["127.0.0.0/8", "::1/128"])
V4, V6 = ip_address("127.0.0.1"), ip_address("::1")


@pytest.fixture
def server() -> Iterator[NameServer]:
    with NameServer("127.0.0.53") as started:
        yield started


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "hosts").write_text("")
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.53\n")
    return {"hosts": str(tmp_path / "hosts"), "resolv_conf": str(tmp_path / "resolv.conf")}


def target(name: str, port: int, source: str) -> Target:
    extensions = Extensions()
    extensions.add(ClientAddress(SocketAddress(ip_address(source), 1)))
    return Target(name, port, extensions)


def write(path: str, text: str) -> None:
    """Replace a file as editors and DHCP clients do."""
    Path(path + ".new").write_text(text, encoding="utf-8")
    os.rename(path + ".new", path)


def replace_by(path: Path, make: Callable[[Path], object]) -> None:
    """Have something else be where a file or a directory is, or was."""
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    make(path)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what happens in another thread."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def settled() -> None:
    """Let tasks that were cancelled end: each that waits for another takes a turn of the loop."""
    for _ in range(10):
        await asyncio.sleep(0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("name", "addresses"),
    [
        ("good.test", [V6, V4]),
        ("GOOD.test.", [V6, V4]),
        ("my_host.test", [V6, V4]),
        ("alias.test", [V6, V4]),
        ("noedns.test", [V6, V4]),
        ("halffail.test", [V4]),
        ("noaaaa.test", [V4]),
        ("forged.test", [V6, V4]),
        ("localhost", [V6, V4]),
        ("a.localhost", [V6, V4]),
        ("127.1", [V4]),
        ("１２７.0x1", [V4]),
    ],
)
async def test_names_that_have_addresses(server, files, name, addresses):
    assert await DnsResolver(**files).resolve(name) == addresses


@pytest.mark.parametrize(
    ("name", "text", "temporary"),
    [
        ("nowhere.test", "Name or service not known", False),
        ("empty.test", "No address associated", False),
        ("loop.test", "ChainTooLong", True),
        ("servfail.test", "SERVFAIL", True),
        ("huge.test", "octets", True),
        ("a" * 64 + ".test", "not a valid domain name", False),
        ("a..test", "not a valid domain name", False),
        (".".join(["a" * 60] * 5), "not a valid domain name", False),
    ],
)
async def test_names_that_have_none(server, files, name, text, temporary):
    with pytest.raises(ResolveError, match=text) as failed:
        await DnsResolver(timeout=60, **files).resolve(name)
    assert failed.value.temporary == temporary
    assert not isinstance(failed.value, ResolveTimeout)
    assert reply_for(failed.value) is Reply.HOST_UNREACHABLE


async def test_an_answer_that_does_not_fit_comes_over_tcp_and_is_bounded(server, files):
    assert len(await DnsResolver(**files).resolve("many.test")) == 64
    assert server.over_tcp == 1


async def test_silence_is_an_error_of_its_own(server, files):
    with pytest.raises(ResolveTimeout, match="no answer") as failed:
        await DnsResolver(timeout=0.2, **files).resolve("silent.test")
    assert reply_for(failed.value) is Reply.TTL_EXPIRED
    assert to_http_error(failed.value).status == 504


async def test_a_dead_server_delays_one_name_and_no_other(server, files):
    with NameServer("127.0.0.54", silent=True) as dead:
        resolver = DnsResolver([ip_address(dead.address), ip_address(server.address)], timeout=5.0, **files)
        assert await resolver.resolve("good.test") == [V6, V4]
        dead.asked.clear()
        for number in range(20):
            await resolver.resolve(f"good{number}.test")
        assert not dead.asked, "it is asked again only after a while"


async def test_a_server_that_is_back_is_asked_first_again(server, files):
    clock = Clock()
    with NameServer("127.0.0.54", silent=True) as first:
        resolver = DnsResolver([ip_address(first.address), ip_address(server.address)], clock=clock, **files)
        await resolver.resolve("good1.test")
        first.silent = False
        clock.now += 31
        await resolver.resolve("good2.test")  # asks both: whoever answers first is the answer
        for number in range(3, 10):
            clock.now += 31
            await resolver.resolve(f"good{number}.test")
        assert first.asked["good9.test/A"] == 1


async def test_where_nobody_listens_the_next_is_asked_at_once(server, files):
    resolver = DnsResolver([ip_address("127.0.0.99"), ip_address("127.0.0.53")], timeout=600, **files)
    assert await resolver.resolve("good.test") == [V6, V4], "a turn would last 2 s, and the refusal comes at once"


async def test_silent_names_say_nothing_about_the_servers(server, files):
    with NameServer("127.0.0.54") as second:
        resolver = DnsResolver([ip_address(server.address), ip_address(second.address)], timeout=0.2, **files)
        for number in range(3):
            with pytest.raises(ResolveTimeout):
                await resolver.resolve(f"silent{number}.test")
        second.asked.clear()
        await resolver.resolve("good.test")
        assert not second.asked


async def test_a_silent_aaaa_does_not_hold_up_the_connection(server, files):
    with bind_tcp("127.0.0.1", 0) as listener:
        resolver = DnsResolver(timeout=600, **files)
        stream = await Connector(resolver, LOOPBACK)(Authority("noaaaa.test", listener.getsockname()[1]))
        assert stream.peer is not None
        assert stream.peer.ip == V4
        await stream.close()
    await settled()
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == [], "nobody waits for AAAA"


async def test_a_look_up_that_nobody_awaits_is_dropped(server, files):
    before = open_descriptors()
    seen: list[str] = []
    resolver = DnsResolver(timeout=600, observe=lambda outcome, _: seen.append(outcome), **files)
    waiting = asyncio.create_task(resolver.resolve("silent.test"))
    await until(lambda: server.asked["silent.test/AAAA"] > 0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await settled()
    assert open_descriptors() == before
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
    assert seen == ["dropped"]


async def test_callers_of_one_name_share_its_questions(server, files):
    resolver = DnsResolver(**files)
    callers = [asyncio.create_task(resolver.resolve("good.test")) for _ in range(50)]
    await asyncio.sleep(0)
    callers[0].cancel()
    await asyncio.gather(*callers[1:])
    assert server.asked == {"good.test/A": 1, "good.test/AAAA": 1}


async def test_answers_are_kept_for_their_time_and_so_is_nothing(server, files):
    clock = Clock()
    resolver = DnsResolver(clock=clock, **files)
    for _ in range(3):
        await resolver.resolve("good.test")
        with pytest.raises(ResolveError):
            await resolver.resolve("nowhere.test")
    assert server.asked["good.test/A"] == server.asked["nowhere.test/A"] == 1
    clock.now += 299
    await resolver.resolve("good.test")
    assert server.asked["good.test/A"] == 1
    clock.now += 2
    await resolver.resolve("good.test")
    assert server.asked["good.test/A"] == 2


async def test_the_cache_is_bounded_and_can_be_off(server, files):
    small, none = DnsResolver(cache=4, **files), DnsResolver(cache=0, **files)
    for resolver in (small, none):
        for name in ("good1.test", "good2.test", "good3.test", "good1.test"):
            await resolver.resolve(name)
    assert server.asked["good1.test/A"] == 4
    assert len(small._cache._answers) == 4


async def test_one_source_cannot_take_the_names_of_another(server, files):
    """A thousand silent names of one source stand beside good ones: none of these fails or waits for them."""
    with bind_tcp("127.0.0.1", 0, backlog=512) as listener:
        port = listener.getsockname()[1]
        connect = Connector(DnsResolver(per_source=16, timeout=600, cache=0, **files), LOOPBACK)

        async def silent(number: int) -> None:
            with contextlib.suppress(Busy):
                await connect(target(f"silent{number}.test", port, "198.18.0.1"))

        attack = [asyncio.create_task(silent(number)) for number in range(1000)]
        await until(lambda: sum(server.asked.values()) >= 32)
        for number in range(100):
            stream = await connect(target(f"good{number}.test", port, f"198.18.1.{number}"))
            await stream.close()
        assert sum(count for name, count in server.asked.items() if name.startswith("silent")) <= 16 * 2 * 2
        shared = asyncio.create_task(connect(target("good.test", port, "198.18.0.1")))  # waits behind the attack's
        await asyncio.sleep(0)
        stream = await connect(target("good.test", port, "198.18.1.1"))  # and takes it along
        await stream.close()
        await (await shared).close()
        for task in attack:
            task.cancel()
        await asyncio.gather(*attack, return_exceptions=True)


async def test_a_full_queue_is_ours_to_answer_for(server, files):
    resolver = DnsResolver(per_source=1, timeout=600, **files)
    waiting = [resolver.look_up(f"silent{number}.test", "source") for number in range(1025)]
    with resolver.look_up("good.test", "source") as refused, pytest.raises(Busy) as failed:
        await refused.more()
    assert to_http_error(failed.value).status == 503
    assert reply_for(failed.value) is Reply.GENERAL_FAILURE
    for lookup in waiting:
        lookup.__exit__()


async def test_resolv_conf_is_followed(server, files):
    clock = Clock()
    write(files["resolv_conf"], "nameserver 127.0.0.99\n")
    resolver = DnsResolver(timeout=5.0, clock=clock, **files)
    with pytest.raises(ResolveError):
        await resolver.resolve("good.test")
    write(files["resolv_conf"], "\ufeffnameserver 127.0.0.53\nsearch sub.test test\n")
    clock.now += 2
    assert await resolver.resolve("good") == [V6, V4], "by its search list"
    os.unlink(files["resolv_conf"])
    clock.now += 2
    with pytest.raises(ResolveError):
        await resolver.resolve("good.test")  # resolv.conf(5): this host is asked


async def test_hosts_with_a_mark_and_100_000_lines(server, files):
    clock = Clock()
    lines = "".join(f"198.18.{n >> 8 & 255}.{n & 255} host{n} alias{n}.test # comment\n" for n in range(100_000))
    write(files["hosts"], "\ufeff127.0.0.9 FIRST.test\n::9 first.test\nnonsense first.test\n" + lines)
    resolver = DnsResolver(clock=clock, **files)
    assert await resolver.resolve("first.test") == [ip_address("::9"), ip_address("127.0.0.9")]
    assert await resolver.resolve("alias99999.test") == [ip_address("198.18.134.159")]
    write(files["hosts"], "127.0.0.8 first.test\n")
    clock.now += 2
    await resolver.resolve("first.test")
    await until(lambda: resolver._hosts.value.find("first.test") == [ip_address("127.0.0.8")])
    assert not server.asked


@pytest.mark.parametrize("name", ["hosts", "resolv_conf"])
async def test_what_is_no_file_holds_nobody_up_and_is_said_once(server, files, name, caplog):
    """Pipes, directories and loops where hosts or resolv.conf should be, at the start and while names are asked for."""
    clock = Clock()
    resolver = DnsResolver(clock=clock, **files)
    path = Path(files[name])
    for make in (os.mkfifo, os.mkdir, lambda at: at.symlink_to(at)):
        replace_by(path, make)
        caplog.clear()
        for number in range(3):
            clock.now += 2
            assert await resolver.resolve(f"good{number}.test") == [V6, V4], "by what was known"
        if resolver._reading is not None:
            await resolver._reading
        assert caplog.text.count("stays as it was") == 1
        DnsResolver(**files).close()
        replace_by(path, lambda at: None)


async def test_a_server_that_does_not_answer_is_said_once_and_its_return_too(server, files, caplog):
    caplog.set_level("INFO")
    clock = Clock()
    with NameServer("127.0.0.54", silent=True) as dead:
        servers = [ip_address(dead.address), ip_address(server.address)]
        resolver = DnsResolver(servers, timeout=0.4, attempts=1, clock=clock, cache=0, **files)
        for number in range(4):
            clock.now += 31
            await resolver.resolve(f"good{number}.test")
        assert caplog.text.count("name server 127.0.0.54 does not answer: 127.0.0.53 does") == 1
        dead.silent, server.silent = False, True
        await resolver.resolve("good9.test")
        assert caplog.text.count("name server 127.0.0.54 answers again") == 1


@pytest.mark.parametrize(("address", "name"), [("127.0.0.53", "silent"), ("127.0.0.99", "good")])
async def test_that_nobody_answers_is_said_once_and_that_they_do_again(server, files, address, name, caplog):
    """Where somebody is silent, and where nobody listens."""
    caplog.set_level("INFO")
    write(files["resolv_conf"], f"nameserver {address}\n")
    resolver = DnsResolver(timeout=0.05, **files)
    for number in range(12):
        with pytest.raises(ResolveError):
            await resolver.resolve(f"{name}{number}.test")
    assert caplog.text.count(f"no answer to the last 8 questions from any name server ({address})") == 1
    if address == server.address:
        resolver._servers._timeout = 60
        assert (await resolver._servers.ask("good.test", IPv4Address)).addresses == (V4,)
        assert caplog.text.count("name servers answer again") == 1


@pytest.mark.parametrize(
    ("text", "servers", "mistake"),
    [
        ("", "127.0.0.1", "it names no name server: 127.0.0.1 is asked"),
        ("nameserver nonsense\n", "127.0.0.1", "line 1: 'nonsense' is no address"),
        ("nameserver 127.1\n", "127.0.0.1", ""),
        ("nameserver 10.0.0.1\x0cnameserver 10.0.0.2\n", "10.0.0.1", ""),
        ("# x\u2028nameserver 10.0.0.2\nnameserver 10.0.0.3\n", "10.0.0.3", ""),
        ("nameserver 10.0.0.1\r\nnameserver fe80::1%eth0\r\n", "10.0.0.1 fe80::1%eth0", ""),
        ("nameserver " + "x" * 100_000 + "\nnameserver 10.0.0.1", "10.0.0.1", "line 1: 'xxx"),
        ("".join(f"nameserver 10.0.0.{n}\n" for n in range(1, 100)), "10.0.0.1", "of 99 name servers the first 8"),
        ("\ufeffnameserver 10.0.0.1\noptions ndots:-1 ndots:99999999999 rotate\n", "10.0.0.1", ""),
    ],
)
def test_a_resolv_conf_that_cannot_be_followed_says_so(text, servers, mistake):
    conf = ResolvConf.parse(text)
    assert " ".join(map(str, conf.servers)).startswith(servers)
    assert mistake in "; ".join(conf.mistakes)
    assert bool(mistake) == bool(conf.mistakes)


def test_resolv_conf_is_read_as_libc_reads_it():
    text = (
        "; comment\nnameserver 10.0.0.2 # inner\nsearch a.test b.test.\nnameserver fe80::1%eth0\n"
        "nameserver nonsense\nnameserver\noptions ndots:99 edns0 ndots:x\n\0\n"
    )
    conf = ResolvConf.parse(text)
    assert conf.servers == (ip_address("10.0.0.2"), ip_address("fe80::1%eth0"))
    assert conf.search == ("a.test", "b.test")
    assert conf.ndots == 15
    assert conf.candidates("x") == ["x.a.test", "x.b.test", "x"]
    assert conf.candidates("x.") == ["x"]
    assert ResolvConf.parse("").servers == (V4,)
    assert ResolvConf.parse("search t\n").candidates("a.b") == ["a.b", "a.b.t"]


async def test_the_time_of_a_name_is_bounded_over_servers_and_attempts(server, files):
    resolver = DnsResolver([ip_address("127.0.0.53")], timeout=4, attempts=4, **files)
    began = time.monotonic()
    with pytest.raises(ResolveTimeout):
        await asyncio.wait_for(resolver.resolve("silent.test"), 60)
    assert server.asked["silent.test/A"] == 4  # the last with a second to spare, for a busy machine
    assert time.monotonic() > began
