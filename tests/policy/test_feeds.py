"""Feeds: what they may hold, and that the last good copy stays in force whatever their servers do."""

from __future__ import annotations

import email.utils
import gzip
import os
import random
import resource
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from rama_ebpf.policy.feed import MAX_LINES, FeedError, overlapping, parse_feed
from rama_ebpf.policy.feed_record import decode, encode
from rama_ebpf.policy.feed_store import FeedStore
from rama_ebpf.policy.local import LocalStore
from rama_ebpf.policy.prefixes import Prefixes, unmap_network
from rama_ebpf.policy.refresh import Refresher, with_feeds
from rama_ebpf.policy.rule import Action, Feed, PolicyError, Rule, RuleSet
from rama_ebpf.policy.stored import StaleSet
from rama_ebpf.policy.unpacked import unpack

from ..lab import wait_for
from ..tls.pki import Authority

GOOD = b"198.18.1.0/24\n198.18.2.0/24\n2001:db8:1::/48\n"
NEW = b"198.18.7.0/24\n"


def networks(data: bytes, **limits: float) -> list[str]:
    return [str(network) for network in parse_feed(data, **limits).prefixes]


# -- what a feed may hold ---------------------------------------------------------------------------------------------


def test_comments_blank_lines_and_plain_addresses_are_read() -> None:
    text = (
        b"# list\r\n198.18.1.0/24 ; SBL1\r\n\r\n  198.18.2.3\t# one\n2001:db8::/32\n2001:db8::7\n::ffff:198.18.9.0/120"
    )
    assert networks(text) == ["198.18.1.0/24", "198.18.2.3/32", "198.18.9.0/24", "2001:db8::/32", "2001:db8::7/128"]


def test_duplicates_and_covered_networks_are_counted() -> None:
    content = parse_feed(b"198.18.0.0/16\n198.18.1.0/24\n198.18.1.0/24\n198.18.1.7\n198.19.0.0/24\n2001:db8::/32\n")
    assert (len(content.prefixes), content.duplicates, content.covered()) == (5, 1, 2)


def test_one_percent_of_bad_lines_is_reported_by_line_and_the_rest_is_loaded() -> None:
    lines = [f"198.18.{n >> 8}.{n & 255}/32" for n in range(9900)] + [f"bad-{n}" for n in range(100)]
    random.Random(4).shuffle(lines)
    content = parse_feed("\n".join(lines).encode(), max_bad=0.01)
    assert (len(content.prefixes), content.bad_count) == (9900, 100)
    assert [line.number for line in content.bad] == [n for n, line in enumerate(lines, 1) if line.startswith("bad")]
    assert str(content.bad[0]).startswith(f"line {content.bad[0].number}: '{content.bad[0].text}' is not an address")


def test_a_feed_above_its_share_of_bad_lines_is_refused_whole() -> None:
    lines = [f"198.18.{n >> 8}.{n & 255}" for n in range(9899)] + ["<html>"] * 101
    with pytest.raises(FeedError, match=r"101 of 10000 lines are no network, and more than 1% are not .*line 9900"):
        parse_feed("\n".join(lines).encode(), max_bad=0.01)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"198.18.1.0/24\n\xff\xfe\n", "1 of 2 lines are no network"),
        ("198.18.1.0/24\n".encode("utf-16"), "is UTF-16 text"),
        (b"198.18.1", "no network"),
    ],
)
def test_what_is_no_list_of_networks_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(FeedError, match=why):
        parse_feed(data)


def test_whatever_bytes_come_are_parsed_or_refused() -> None:
    pick = random.Random(8)
    seeds = (GOOD, b"::ffff:198.18.9.0/120\n1.2.3.4/33\n", gzip.compress(GOOD), "# häufig\r\n1.2.3.4 ; x\n".encode())
    refused = 0
    for _ in range(3000):
        data = bytearray(pick.choice(seeds) * pick.choice((1, 1, 50)))
        for _ in range(pick.randint(1, 4)):
            at = pick.randrange(len(data))
            data[at : at + pick.choice((0, 1, 5))] = pick.choice((b"", b"\n", b"/", b":", pick.randbytes(2), b"\0"))
        try:
            parse_feed(unpack(bytes(data), 4000), max_bad=pick.choice((0, 0.5, 1)))
        except ValueError:  # FeedError is one
            refused += 1
    assert 500 < refused < 2500


def test_no_more_is_unpacked_than_may_be() -> None:
    bomb = gzip.compress(bytes(50_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="longer than 100000 bytes"):
            unpack(bomb, 100_000)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert len(unpack(gzip.compress(bytes(100_000)), 100_000)) == 100_000


def test_blocks_of_plain_lines_mean_what_each_line_means() -> None:
    """The fast path for whole blocks, beside ``ipaddress`` line by line."""
    pick = random.Random(11)
    for _ in range(30):
        version, wrong = pick.choice((4, 6)), pick.random() < 0.3
        width = 32 if version == 4 else 128
        lines = []
        for _ in range(pick.choice((1, 100, 4096, 4097, 9000))):
            length = pick.randint(0, width)
            address = pick.getrandbits(width) >> (width - length) << (width - length)
            if version == 6 and pick.random() < 0.01:
                address, length = 0xFFFF << 32 | pick.getrandbits(32), 128
            lines.append(str(ip_network((address, length))))
        if wrong:
            odd = [
                "198.18.1.1/24",
                "2001:db8::1/64",
                "198.18.1.0/33",
                "1.2.3",
                "1.2.3.4/",
                "/8",
                "::/129",
                "01.2.3.4/32",
            ]
            lines[pick.randrange(len(lines))] = pick.choice(odd)
        wanted, bad = [], 0
        for line in lines:
            try:
                wanted.append(unmap_network(ip_network(line)))
            except ValueError:
                bad += 1
        content = parse_feed("\n".join(lines).encode(), max_bad=1)
        assert (content.prefixes, content.bad_count) == (Prefixes.of(wanted), bad)


def test_overlaps_are_what_lies_inside() -> None:
    pick = random.Random(3)

    def some(most: int) -> Prefixes:
        chosen = set()
        for _ in range(most):
            length = pick.randint(4, 12)
            chosen.add(ip_network((pick.getrandbits(12) << 20 >> (32 - length) << (32 - length), length)))
        return Prefixes.of([*chosen, *(ip_network(f"2001:db8:{pick.randrange(4)}::/{n}") for n in (48, 64))])

    for _ in range(50):
        one, other = some(10), some(30)
        inside = sum(any(a.version == b.version and a.subnet_of(b) for b in other) for a in one)  # type: ignore[arg-type]
        found = {(a, b): count for a, b, count in overlapping([("one", one), ("other", other)])}
        assert found.get(("one", "other"), 0) == inside


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> FeedStore:
    return FeedStore(tmp_path / "feeds")


@pytest.mark.parametrize("harm", ["gone", "bad", "torn gzip", "too long", "a directory"])
def test_last_good_copy_of_a_file_stays_in_use_and_the_reason_is_told(
    tmp_path: Path, store: FeedStore, harm: str
) -> None:
    path = tmp_path / "list"
    feed = Feed(str(path), max_size=100)
    path.write_bytes(gzip.compress(GOOD))
    assert store.load(feed).content.prefixes == parse_feed(GOOD).prefixes
    path.unlink()
    if harm == "bad":
        path.write_bytes(b"<html>\n")
    elif harm == "torn gzip":
        path.write_bytes(gzip.compress(GOOD)[:-9])
    elif harm == "too long":
        path.write_bytes(gzip.compress(GOOD * 10))
    elif harm == "a directory":
        path.mkdir()
    later = FeedStore(tmp_path / "feeds")  # as after a restart
    loaded = later.load(feed)
    assert loaded.content.prefixes == parse_feed(GOOD).prefixes
    assert f"feed {path}: " in loaded.stale
    if harm == "a directory":
        path.rmdir()
    path.write_bytes(NEW)
    loaded = later.load(feed)
    assert (networks(NEW), loaded.stale) == ([str(network) for network in loaded.content.prefixes], "")


def test_a_feed_that_was_never_good_is_an_error(tmp_path: Path, store: FeedStore) -> None:
    with pytest.raises(FeedError, match="cannot be read: No such file"):
        store.load(Feed(str(tmp_path / "nothing")))


def test_a_torn_copy_is_not_used(tmp_path: Path, store: FeedStore, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "list"
    path.write_bytes(GOOD)
    store.load(Feed(str(path)))
    path.unlink()
    (copy,) = (tmp_path / "feeds").iterdir()
    copy.write_bytes(copy.read_bytes()[:-20])
    with pytest.raises(FeedError, match="cannot be read"):
        store.load(Feed(str(path)))
    assert "is damaged and not used: its checksum is wrong" in caplog.text


# -- servers ----------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.asked.append(dict(self.headers))
        self.server.answer(self)

    def log_message(self, *_: object) -> None:
        pass

    def say(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """An HTTP server whose next answers a test decides."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, str]] = []
        self.over = threading.Event()
        self.body, self.etag = GOOD, '"1"'
        self.answer: Callable[[Handler], None] = self.serve
        self.url = f"http://127.0.0.1:{self.server_port}/list"

    def serve(self, handler: Handler) -> None:
        if handler.headers.get("If-None-Match") == self.etag:
            handler.say(304, ETag=self.etag)
        else:
            handler.say(200, self.body, ETag=self.etag)

    def hang(self, handler: Handler) -> None:
        self.over.wait(60)

    def drip(self, handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not self.over.wait(0.05):
            handler.wfile.write(b"1")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.05,))
        thread.start()
        yield made
        made.over.set()
        made.shutdown()
        thread.join()


def test_a_feed_that_has_not_changed_is_not_sent_again(server: Server, store: FeedStore) -> None:
    feed = Feed(server.url)
    assert store.load(feed).content.prefixes == parse_feed(GOOD).prefixes
    assert "If-None-Match" not in server.asked[0]
    again = store.load(feed)
    assert server.asked[1]["If-None-Match"] == '"1"'
    assert (again.content.prefixes, again.stale) == (parse_feed(GOOD).prefixes, "")
    server.body, server.etag = gzip.compress(NEW), '"2"'
    assert store.load(feed).content.prefixes == parse_feed(NEW).prefixes
    store.load(feed)
    assert server.asked[3]["If-None-Match"] == '"2"'


BOMB = gzip.compress(bytes(5_000_000))
assert len(BOMB) < 10_000, "it would be refused before it is unpacked"

ANSWERS: dict[str, tuple[Callable[[Server, Handler], None], str]] = {
    "hangs": (Server.hang, "not there within 1.5 s"),
    "drips": (Server.drip, "not there within 1.5 s"),
    "fails": (lambda server, handler: handler.say(503), "HTTP status 503"),
    "cut": (lambda server, handler: handler.say(200, NEW, length=99), "cut off|IncompleteRead"),
    "long": (lambda server, handler: handler.say(200, b"198.18.7.0/24\n" * 1000), "longer than 10000 bytes"),
    "bomb": (lambda server, handler: handler.say(200, BOMB), "longer than 10000 bytes"),
    "torn gzip": (lambda server, handler: handler.say(200, gzip.compress(NEW)[:-5]), "not whole gzip data"),
    "page": (lambda server, handler: handler.say(200, b"<html>\n<body>\n"), "2 of 2 lines are no network"),
    "empty": (lambda server, handler: handler.say(200), "is empty"),
    "to a file": (lambda server, handler: handler.say(302, Location="file:///etc/passwd"), "status 302"),
    "in circles": (lambda server, handler: handler.say(302, Location="/list"), "infinite loop"),
    "no HTTP": (lambda server, handler: (handler.wfile.write(b"SSH-2.0-x\r\n" * 99), None)[1], "is not HTTP"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_whatever_a_server_does_the_last_good_copy_stays(server: Server, store: FeedStore, answer: str) -> None:
    slow = answer in ("hangs", "drips")
    feed = Feed(server.url, timeout=30, max_size=10_000)
    good = store.load(feed).content.prefixes
    does, why = ANSWERS[answer]
    server.answer = lambda handler: does(server, handler)
    feed = Feed(server.url, timeout=1.5 if slow else 30, max_size=10_000)
    loaded = store.load(feed)
    assert loaded.content.prefixes == good
    assert f"feed {server.url}: " in loaded.stale
    assert any(word in loaded.stale for word in why.split("|")), loaded.stale
    server.answer = server.serve
    if slow:
        assert store.load(Feed(server.url, timeout=30)).stale == ""


def test_https_is_read_only_from_a_server_that_proves_its_name(
    server: Server, store: FeedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as directory:  # that nobody, too, can look into
        Path(directory).chmod(0o755)
        authority = Authority(Path(directory))
        leaf = authority.issue("127.0.0.1")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(leaf.chain, leaf.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        url = server.url.replace("http:", "https:")
        with pytest.raises(FeedError, match="certificate verify failed"):
            store.load(Feed(url))
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
        assert store.load(Feed(url)).content.prefixes == parse_feed(GOOD).prefixes
        with pytest.raises(FeedError, match="certificate verify failed"):
            store.load(Feed(url.replace("127.0.0.1", "localhost")))
        server.answer = lambda handler: handler.say(302, Location="http://127.0.0.1:1/")
        assert "refusing to be redirected to http://127.0.0.1:1/" in store.load(Feed(url)).stale


def test_one_feed_that_hangs_does_not_hold_up_the_others(server: Server, tmp_path: Path, store: FeedStore) -> None:
    """Both are read at once: the file's rule would otherwise wait for the server's five minutes."""
    path, local = tmp_path / "list", LocalStore()
    path.write_bytes(NEW)
    first = ruleset_of(Feed(server.url, timeout=300)).rules[0]
    second = Rule("second", (), Action.DROP, origin="file", feed=Feed(str(path)))
    local.replace(RuleSet((first, second)))
    server.answer = server.hang
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(Refresher(local, store).run)
        wait_for(lambda: server.asked and any((tmp_path / "feeds").glob("*")), what="both to be read")
        store.cancel()
        stale = {report.rule: report.stale for report in running.result(60)}
    assert (stale["second"], "ended with -9" in stale["listed"]) == ("", True)
    assert decided(local, "198.18.7.1") == "second"


def test_a_server_that_does_not_listen_is_an_error_that_says_so(store: FeedStore) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(FeedError, match="Connection refused"):
            store.load(Feed(f"http://127.0.0.1:{taken.getsockname()[1]}/"))


def _children() -> list[str]:
    text = "".join(path.read_text() for path in Path("/proc/self/task").glob("*/children"))
    return text.split()


def test_bytes_from_the_network_are_parsed_without_privileges_and_a_stop_does_not_wait(
    server: Server, store: FeedStore
) -> None:
    server.answer = server.hang
    before = set(_children())
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(store.load, Feed(server.url, timeout=300))
        wait_for(lambda: server.asked, what="the request")
        (child,) = set(_children()) - before
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{child}/status").read_text().splitlines())
        assert status["Uid"].split() == ["65534"] * 4
        assert status["Gid"].split() == ["65534"] * 4
        assert status["Groups"].strip() == ""
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert status["NoNewPrivs"] == "1"
        started = time.monotonic()
        store.cancel()
        with pytest.raises(FeedError, match="ended with -9"):
            loading.result(60)
        assert time.monotonic() - started < 60  # not the feed's 300 s
    assert child not in _children()
    with pytest.raises(FeedError, match="the server stops"):
        store.load(Feed(server.url))


def test_lines_of_a_gzip_bomb_are_refused_in_the_child_and_not_here(server: Server, store: FeedStore) -> None:
    """A gzip of 64 KB that is 33,000,000 bad lines: it was parsed in the supervisor, for nine minutes."""
    bomb = gzip.compress(b"x\n" * 33_000_000, 6)
    assert len(bomb) < 100_000
    server.answer = lambda handler: handler.say(200, bomb)
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(FeedError, match=f"has more than {MAX_LINES} lines|longer than"):
        store.load(Feed(server.url, timeout=300, max_size=80 << 20))
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 16 * 1024, "KiB: the text was here"


def test_a_stop_ends_the_child_that_parses_a_file(tmp_path: Path, store: FeedStore) -> None:
    path = tmp_path / "list"
    path.write_bytes(b"x\n" * (MAX_LINES - 1))
    before = set(_children())
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(store.load, Feed(str(path), timeout=300))
        wait_for(lambda: set(_children()) - before, what="the child")
        store.cancel()
        with pytest.raises(FeedError, match="ended with -9"):
            loading.result(60)
    assert set(_children()) <= before


@pytest.mark.parametrize("status", [201, 203, 206, 226, 299])
def test_only_200_is_the_whole_list(server: Server, store: FeedStore, status: int) -> None:
    good = store.load(Feed(server.url)).content.prefixes
    server.answer = lambda handler: handler.say(status, NEW)
    loaded = store.load(Feed(server.url))
    assert (loaded.content.prefixes, f"HTTP status {status}" in loaded.stale) == (good, True)


@pytest.mark.parametrize("everybody", ["0.0.0.0/0", "::/0", "0.0.0.0/1\n128.0.0.0/1", "::/1\n::/0\n8000::/1"])
def test_a_list_that_names_everybody_is_refused_unless_that_is_meant(
    server: Server, store: FeedStore, everybody: str
) -> None:
    good = store.load(Feed(server.url)).content.prefixes
    server.body, server.etag = NEW + everybody.encode(), '"2"'
    loaded = store.load(Feed(server.url))
    assert loaded.content.prefixes == good
    assert "allow_default = true" in loaded.stale
    meant = store.load(Feed(server.url, allow_default=True))
    assert (meant.stale, len(meant.content.prefixes)) == ("", 1 + everybody.count("/"))
    with pytest.raises(FeedError, match="allow_default"):  # the copy of what was meant is not taken either
        store.load(Feed(server.url))


def test_a_list_that_shrinks_to_nothing_is_refused_unless_that_is_meant(server: Server, store: FeedStore) -> None:
    good = store.load(Feed(server.url)).content.prefixes
    server.body, server.etag = b"# moved\n", '"2"'
    loaded = store.load(Feed(server.url))
    assert (loaded.content.prefixes, "had 3 networks and now has none" in loaded.stale) == (good, True)
    meant = store.load(Feed(server.url, allow_empty=True))
    assert (meant.stale, len(meant.content.prefixes)) == ("", 0)


@pytest.mark.parametrize("lines", [3, 20_000])
def test_a_byte_order_mark_costs_no_line(lines: int) -> None:
    text = "".join(f"198.18.{n >> 8}.{n & 255}\n" for n in range(lines))
    content = parse_feed(text.encode("utf-8-sig"), max_bad=0)
    assert (len(content.prefixes), content.bad_count) == (lines, 0)


def test_a_byte_that_is_no_utf8_costs_its_own_line_only() -> None:
    assert networks(b"# M\xfcller\n198.18.1.0/24 ; caf\xe9\n", max_bad=0) == ["198.18.1.0/24"]
    content = parse_feed(GOOD + b"198.18.9.\xb2\n", max_bad=0.5)
    assert ([line.number for line in content.bad], len(content.prefixes)) == ([4], 3)


SECRET = b"root-password-is-hunter2\n" * 3


def test_a_redirect_to_this_host_is_not_followed_and_nothing_of_a_page_is_told(
    server: Server, store: FeedStore
) -> None:
    with Server() as inside:
        inside.body = SECRET
        thread = threading.Thread(target=inside.serve_forever, args=(0.05,))
        thread.start()
        try:
            port = inside.server_port
            for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433"):
                url = f"http://{host}:{port}/"
                server.answer = lambda handler, url=url: handler.say(302, Location=url)  # type: ignore[misc]
                with pytest.raises(FeedError, match=f"refusing to be redirected to .*{port}|{host}") as refusal:
                    store.load(Feed(server.url))
                assert "hunter2" not in str(refusal.value)
            assert inside.asked == []
            with pytest.raises(FeedError, match="3 of 3 lines are no network") as named:
                store.load(Feed(inside.url))  # the operator's own word: read, but not told
            assert "hunter2" not in str(named.value)
        finally:
            inside.shutdown()
            thread.join()


def test_what_a_server_says_of_itself_is_not_told_either(server: Server, store: FeedStore) -> None:
    server.answer = lambda handler: (handler.send_response(503, "hunter2"), handler.end_headers())[1]
    with pytest.raises(FeedError, match="HTTP status 503 Service Unavailable") as refusal:
        store.load(Feed(server.url))
    assert "hunter2" not in str(refusal.value)


def test_a_feed_that_is_no_regular_file_does_not_hold_up_anybody(tmp_path: Path, store: FeedStore) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(FeedError, match="not a regular file"):
        store.load(Feed(str(path)))


def test_whatever_a_child_hands_over_is_checked() -> None:
    """It parses what strangers wrote, and may be theirs by now."""
    good = encode(parse_feed(GOOD), unchanged=False, validators={})
    assert decode(good)[0].prefixes == parse_feed(GOOD).prefixes
    pick = random.Random(15)
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(pick.randint(1, 3)):
            at = pick.randrange(len(data))
            data[at : at + pick.choice((0, 1, 9))] = pick.choice((b"", b"[" * 99, b"9" * 30, pick.randbytes(1)))
        try:
            prefixes = decode(bytes(data))[0].prefixes
        except ValueError:
            continue
        assert Prefixes.of(list(prefixes)) == prefixes


# -- in force ---------------------------------------------------------------------------------------------------------


def decided(local: LocalStore, source: str) -> str:
    return local.verdict(ip_address(source), 1080).rule


def ruleset_of(feed: Feed) -> RuleSet:
    return RuleSet((Rule("listed", (), Action.DROP, origin="file", feed=feed),))


def test_feeds_are_read_again_when_due_and_sooner_after_a_failure(tmp_path: Path, store: FeedStore) -> None:
    path, now, local = tmp_path / "list", [1000.0], LocalStore()
    path.write_bytes(GOOD)
    local.replace(with_feeds(ruleset_of(Feed(str(path), refresh=600)), store)[0])
    refresher = Refresher(local, store, clock=lambda: now[0])
    (listed,) = local.records()
    assert refresher.run() == []
    path.write_bytes(NEW)
    now[0] += 599
    assert refresher.run() == []
    now[0] += 1
    assert [report.stale for report in refresher.run()] == [""]
    assert (decided(local, "198.18.7.1"), decided(local, "198.18.1.1")) == ("listed", "default")
    assert local.records()[0].rule.id == listed.rule.id, "its counters start anew"
    revision = local.revision
    path.unlink()
    now[0] += 600
    assert "No such file" in refresher.run()[0].stale
    assert (decided(local, "198.18.7.1"), local.revision) == ("listed", revision)
    path.write_bytes(GOOD)
    now[0] += 61
    assert refresher.run()[0].stale == ""
    assert decided(local, "198.18.1.1") == "listed"


def test_failures_are_repeated_ever_more_slowly_and_as_the_server_says(server: Server, store: FeedStore) -> None:
    now, local = [1000.0], LocalStore()
    feed = Feed(server.url, refresh=86400)
    local.replace(with_feeds(ruleset_of(feed), store)[0])
    refresher = Refresher(local, store, clock=lambda: now[0])
    refresher.run(all_feeds=True)
    server.answer = lambda handler: handler.say(503)
    now[0] += 86400
    refresher.run()
    pauses = []
    for _ in range(8):
        since = now[0]
        while not refresher.run():
            now[0] += 30
        pauses.append(now[0] - since)
    assert pauses == [60, 120, 240, 480, 960, 1920, 3600, 3600]


@pytest.mark.parametrize("said", ["7200", "a date"])
def test_a_server_that_says_when_to_come_back_is_asked_no_sooner(server: Server, store: FeedStore, said: str) -> None:
    now, local = [1000.0], LocalStore()
    local.replace(ruleset_of(Feed(server.url)))
    header = said if said.isdecimal() else email.utils.formatdate(time.time() + 7205, usegmt=True)
    server.answer = lambda handler: handler.say(429, **{"Retry-After": header})
    refresher = Refresher(local, store, clock=lambda: now[0])
    assert "HTTP status 429" in refresher.run()[0].stale
    now[0] += 7190
    assert refresher.run() == []
    now[0] += 20
    assert len(refresher.run()) == 1


def test_bad_lines_are_logged_when_they_change_and_not_at_each_refresh(
    tmp_path: Path, store: FeedStore, caplog: pytest.LogCaptureFixture
) -> None:
    path, local = tmp_path / "list", LocalStore()
    path.write_bytes(GOOD + b"bad\n")
    local.replace(ruleset_of(Feed(str(path), max_bad=0.5)))
    refresher = Refresher(local, store)
    for _ in range(3):
        refresher.log_news(refresher.run(all_feeds=True))
    assert caplog.text.count("are no network and left out") == 1
    path.write_bytes(GOOD + b"bad\nbad\n")
    refresher.log_news(refresher.run(all_feeds=True))
    assert caplog.text.count("are no network and left out") == 2
    path.unlink()
    for _ in range(3):
        refresher.log_news(refresher.run(all_feeds=True))
    assert caplog.text.count("stays in use") == 1


def test_a_set_that_was_loaded_while_a_feed_was_read_stays(server: Server, store: FeedStore) -> None:
    local = LocalStore()
    local.replace(with_feeds(ruleset_of(Feed(server.url)), store)[0])
    mine = RuleSet((Rule("mine", (ip_network("198.18.9.0/24"),), Action.DROP, origin="file"),))

    def meanwhile(handler: Handler) -> None:
        local.replace(mine)
        handler.say(200, NEW)

    server.answer = meanwhile
    with pytest.raises(StaleSet):
        Refresher(local, store).run(all_feeds=True)
    assert local.ruleset() == mine


def test_feeds_wait_while_a_set_is_on_trial(server: Server, store: FeedStore) -> None:
    local = LocalStore()
    local.replace(with_feeds(ruleset_of(Feed(server.url)), store)[0], confirm_within=3600)
    server.body, server.etag = NEW, '"2"'
    with pytest.raises(PolicyError, match="on trial"):
        Refresher(local, store).run(all_feeds=True)
    local.confirm()
    Refresher(local, store).run(all_feeds=True)
    assert decided(local, "198.18.7.1") == "listed"


def test_a_start_does_not_wait_for_the_network(server: Server, store: FeedStore) -> None:
    feed = Feed(server.url, timeout=300)
    server.answer = server.hang
    ruleset, (report,) = with_feeds(ruleset_of(feed), store, known=RuleSet())
    assert (len(ruleset.rules[0].sources), report.content, server.asked) == (0, None, [])
    server.answer = server.serve
    store.load(feed)
    server.answer = server.hang
    ruleset, (report,) = with_feeds(ruleset_of(feed), store, known=RuleSet())
    assert ruleset.rules[0].sources == parse_feed(GOOD).prefixes


def test_the_child_opens_nothing_any_more_once_it_has_all_that_it_parses() -> None:
    program = """
import errno, socket
from rama_ebpf.policy.fetch_child import _close_off
_close_off()
for what in (lambda: open("/etc/passwd"), lambda: socket.socket()):
    try:
        what()
    except OSError as error:
        assert error.errno == errno.EMFILE, error
    else:
        raise AssertionError("it could")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
