"""A hundred feed files as they are published, good and damaged: the right set, or one clear line."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from backports import zstd

from rama_ebpf.kernel.own_addresses import local_networks
from rama_ebpf.policy.feed import FeedError, parse_feed
from rama_ebpf.policy.feed_formats import NO_OPTIONS, FormatOptions
from rama_ebpf.policy.feed_guard import guarded
from rama_ebpf.policy.feed_store import FeedStore
from rama_ebpf.policy.local import LocalStore
from rama_ebpf.policy.prefixes import IPNetwork, Prefixes
from rama_ebpf.policy.refresh import Refresher, with_feeds
from rama_ebpf.policy.rule import Action, Feed, Rule, RuleSet
from rama_ebpf.policy.unpacked import unpack

V4 = ["198.18.0.0/24", "198.18.7.0/25", "198.19.1.1/32", "203.0.113.0/28"]
V6 = ["2001:db8:1::/48", "2001:db8:2::7/128"]


@dataclass(frozen=True)
class File:
    """``data`` in a format, and what is in it; ``bad`` is how many entries are no network."""

    name: str
    format: str
    data: str
    wanted: Sequence[str]
    bad: int = 0
    options: FormatOptions = NO_OPTIONS


def _ends(text: str) -> tuple[str, str]:
    network = ip_network(text)
    return str(network.network_address), str(network.broadcast_address)


def _ranges(texts: Sequence[str], joint: str) -> str:
    return "".join(f"{begin}{joint}{end}\n" for begin, end in map(_ends, texts))


def _padded(text: str) -> str:
    return ".".join(f"{int(octet):03}" for octet in text.split("."))


SPAMHAUS = FormatOptions(path="cidr")
AWS = FormatOptions(path="prefixes[].ip_prefix,ipv6_prefixes[].ipv6_prefix")
GOOGLE = FormatOptions(path="prefixes[].ipv4Prefix,prefixes[].ipv6Prefix")
_ALL = [*V4, *V6]

GOOD = [
    File("plain", "plain", "\n".join(_ALL), _ALL),
    File("plain with comments", "plain", "# x\n" + "".join(f"{one} ; SBL1\n" for one in _ALL), _ALL),
    File("ranges", "range", _ranges(V4, "-"), V4),
    File("ranges with blanks", "range", _ranges(_ALL, " - "), _ALL),
    File("ranges and networks", "range", _ranges(V4, "-") + "\n".join(V6), _ALL),
    File(
        "a range that is no network",
        "range",
        "198.18.0.1-198.18.0.6\n",
        ["198.18.0.1/32", "198.18.0.2/31", "198.18.0.4/31", "198.18.0.6/32"],
    ),
    File("P2P", "p2p", "# list\n" + "".join(f"Somebody, Inc.:{b}-{e}\n" for b, e in map(_ends, V4)), V4),
    File(
        "P2P with colons and zeros",
        "p2p",
        "".join(f"a: b : c:{_padded(b)}-{_padded(e)}\r\n" for b, e in map(_ends, V4)),
        V4,
    ),
    File(
        "ipset save",
        "ipset",
        "create bad hash:net family inet hashsize 1024 maxelem 65536\n"
        + "".join(f'add bad {one} timeout 0 comment "x y"\n' for one in V4),
        V4,
    ),
    File(
        "ipset of IPv6", "ipset", "create six hash:net family inet6\n" + "".join(f"add six {one}\n" for one in V6), V6
    ),
    File("ipset restore with -A", "ipset", "-N x iphash\n" + "".join(f"-A x {one}\n" for one in V4) + "COMMIT\n", V4),
    File(
        "ipset of ranges", "ipset", "create r hash:net\n" + "".join(f"add r {b}-{e}\n" for b, e in map(_ends, V4)), V4
    ),
    File(
        "iptables-save",
        "iptables",
        "# Generated\n*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -i lo -j ACCEPT\n"
        + "".join(f"-A INPUT -s {one} -j DROP\n" for one in V4)
        + "-A INPUT -s 192.0.2.1/32 -j ACCEPT\nCOMMIT\n",
        V4,
    ),
    File(
        "iptables-save with counters and netmasks",
        "iptables",
        "*filter\n"
        + "".join(
            f"[1:60] -A INPUT -s {ip_network(one).with_netmask} -p tcp -m tcp -j REJECT --reject-with tcp-reset\n"
            for one in V4
        )
        + "COMMIT\n",
        V4,
    ),
    File(
        "iptables with src-range",
        "iptables",
        "".join(f"-A INPUT -m iprange --src-range {b}-{e} -j DROP\n" for b, e in map(_ends, V4)),
        V4,
    ),
    File(
        "ip6tables-save",
        "iptables",
        "*filter\n" + "".join(f"-A INPUT -s {one} -j DROP\n" for one in V6) + "COMMIT\n",
        V6,
    ),
    File(
        "DShield",
        "dshield",
        "#\n# DShield.org Recommended Block List\n#\nStart\tEnd\tNetmask\tAttacks\tName\tCountry\temail\n"
        + "".join(f"{b}\t{e}\t24\t2000\tSomebody\tXX\tabuse@example.net\n" for b, e in map(_ends, V4)),
        V4,
    ),
    File("DShield padded", "dshield", "".join(f"{_padded(b)}\t{_padded(e)}\t24\t9\n" for b, e in map(_ends, V4)), V4),
    File("hosts.deny", "hosts-deny", "# deny\n" + "".join(f"ALL: {one}\n" for one in V4), V4),
    File(
        "hosts.deny, many a line",
        "hosts-deny",
        f"sshd, vsftpd : {', '.join(V4[:2])} {V4[2]} \\\n  {V4[3]} : deny\n",
        V4,
    ),
    File(
        "hosts.deny with prefixes and masks",
        "hosts-deny",
        "sshd: 198.18.3.\nALL: 198.19.0.0/255.255.0.0\n",
        ["198.18.3.0/24", "198.19.0.0/16"],
    ),
    File("hosts.deny of IPv6", "hosts-deny", "ALL: [2001:db8:1::]/48 [2001:db8:2::7]\n", V6),
    File(
        "CSV, a column by number",
        "csv",
        "".join(f"{n},{one},x\n" for n, one in enumerate(V4)),
        V4,
        options=FormatOptions(column="2"),
    ),
    File(
        "CSV, by heading",
        "csv",
        "id,network,why\n" + "".join(f'{n},"{one}","a, b"\n' for n, one in enumerate(_ALL)),
        _ALL,
        options=FormatOptions(column="network"),
    ),
    File(
        "CSV, from and to",
        "csv",
        "".join(f'"{b}","{e}","XX"\n' for b, e in map(_ends, V4)),
        V4,
        options=FormatOptions(column="1", to="2"),
    ),
    File(
        "CSV, from and to by heading",
        "csv",
        "first;last\n" + _ranges(_ALL, ";"),
        _ALL,
        options=FormatOptions("", "first", "last", ";"),
    ),
    File("CSV with headings by number", "csv", "ip,score\n" + "".join(f"{one},9\n" for one in V4), V4),
    File(
        "CSV with numbers as addresses",
        "csv",
        "".join(f"{int(ip_address(b))},{int(ip_address(e))},-\n" for b, e in map(_ends, V4)),
        V4,
        options=FormatOptions(column="1", to="2"),
    ),
    File(
        "CSV with tabs and comments",
        "csv",
        "# c\n" + "".join(f"x\t{one}\n" for one in V4),
        V4,
        options=FormatOptions(column="2", delimiter="\t"),
    ),
    File(
        "Spamhaus DROP as JSON lines",
        "json",
        "".join(json.dumps({"cidr": one, "sblid": "SBL1", "rir": "x"}) + "\n" for one in _ALL)
        + json.dumps({"type": "metadata", "timestamp": 1}),
        _ALL,
        options=SPAMHAUS,
    ),
    File(
        "AWS",
        "json",
        json.dumps(
            {
                "syncToken": "1",
                "prefixes": [{"ip_prefix": one, "region": "x"} for one in V4],
                "ipv6_prefixes": [{"ipv6_prefix": one} for one in V6],
            },
            indent=2,
        ),
        _ALL,
        options=AWS,
    ),
    File(
        "Google",
        "json",
        json.dumps({"prefixes": [*({"ipv4Prefix": one} for one in V4), *({"ipv6Prefix": one} for one in V6)]}),
        _ALL,
        options=GOOGLE,
    ),
    File("an array of texts", "json", json.dumps(_ALL), _ALL),
    File(
        "deep arrays",
        "json",
        json.dumps({"a": {"b": [{"c": V4}, {"c": V6}]}}),
        _ALL,
        options=FormatOptions(path="a.b[].c[]"),
    ),
    File(
        "a member that is an array", "json", json.dumps({"addresses": V4}), V4, options=FormatOptions(path="addresses")
    ),
]

ODD = [
    File(
        "an ipset exception",
        "ipset",
        "create x hash:net\nadd x 198.18.0.0/16\nadd x 198.18.1.0/24 nomatch\n",
        ["198.18.0.0/16"],
        1,
    ),
    File(
        "an ipset with ports",
        "ipset",
        "create x hash:ip,port\nadd x 198.18.0.1\nadd x 198.18.0.2,tcp:80\n",
        ["198.18.0.1/32"],
        1,
    ),
    File(
        "an iptables rule that negates",
        "iptables",
        "-A INPUT ! -s 198.18.0.0/16 -j DROP\n-A INPUT -s 198.19.0.0/16 -j DROP\n",
        ["198.19.0.0/16"],
        1,
    ),
    File(
        "an iptables line of something else",
        "iptables",
        "hello\n-A INPUT -s 198.19.0.0/16 -j DROP\n",
        ["198.19.0.0/16"],
        1,
    ),
    File("hosts.deny with names", "hosts-deny", "ALL: .example.com, 198.18.0.1\n", ["198.18.0.1/32"], 1),
    File(
        "hosts.deny of everybody but",
        "hosts-deny",
        "ALL: ALL EXCEPT 198.18.0.1\nALL: 198.18.0.2\n",
        ["198.18.0.2/32"],
        1,
    ),
    File("hosts.deny with ALL", "hosts-deny", "ALL: ALL\nALL: 198.18.0.2\n", ["198.18.0.2/32"], 1),
    File("a range that ends before it begins", "range", "198.18.0.9-198.18.0.1\n198.18.1.1\n", ["198.18.1.1/32"], 1),
    File("a range of two families", "range", "198.18.0.9-2001:db8::1\n198.18.1.1\n", ["198.18.1.1/32"], 1),
    File("P2P without a range", "p2p", "nobody\nx:198.18.1.1-198.18.1.1\n", ["198.18.1.1/32"], 1),
    File("JSON with what is no text", "json", json.dumps([7, None, {"a": 1}, "198.18.0.1"]), ["198.18.0.1/32"], 3),
    File("CSV with short rows", "csv", "a,198.18.0.1\nb\n", ["198.18.0.1/32"], 1, FormatOptions(column="2")),
    File("a bad byte", "dshield", "198.18.0.0\t198.18.0.255\n\ufffd\t198.18.1.0\n", ["198.18.0.0/24"], 1),
    File("host bits", "csv", "198.18.0.7/24\n198.18.1.0/24\n", ["198.18.1.0/24"], 1),
]

NONE = [
    ("HTML", "json", "<html><body>404</body></html>", FormatOptions(), "is no JSON"),
    ("half a document", "json", '{"prefixes": [{"ip_prefix": "198.18.0.0/24"', AWS, "is no JSON"),
    (
        "a line of JSON lines that is torn",
        "json",
        '{"cidr": "198.18.0.0/24"}\n{"cidr": "198',
        SPAMHAUS,
        "is no JSON: line 2",
    ),
    ("nothing at the path", "json", '{"prefixes": []}', AWS, r"has nothing at prefixes\[\]"),
    ("another document", "json", '{"error": "slow down"}', AWS, "has nothing at"),
    ("deep JSON", "json", "[" * 200_000 + "]" * 200_000, FormatOptions(), "is no JSON"),
    (
        "CSV without the column",
        "csv",
        "a,b\n1,2\n",
        FormatOptions(column="network"),
        "has no column network; there are a, b",
    ),
    ("HTML as CSV", "csv", "<html>\n<body>\n", FormatOptions(column="1"), "no network"),
    ("HTML as P2P", "p2p", "<html>\n<body>\n", FormatOptions(), "2 of 2 lines are no network"),
    ("HTML as ipset", "ipset", "<html>\n", FormatOptions(), "1 of 1 lines are no network"),
    ("HTML as hosts.deny", "hosts-deny", "<html>\n", FormatOptions(), "1 of 1 lines are no network"),
    ("HTML as DShield", "dshield", "<html>\n", FormatOptions(), "1 of 1 lines are no network"),
    ("empty", "ipset", "", FormatOptions(), "is empty"),
]


def _texts(prefixes: Prefixes) -> set[str]:
    return {str(network) for network in prefixes}


@pytest.mark.parametrize("file", [*GOOD, *ODD], ids=lambda file: file.name)
def test_a_list_in_its_format_is_the_right_set(file: File) -> None:
    content = parse_feed(file.data.encode(), max_bad=1, format=file.format, options=file.options)
    assert _texts(content.prefixes) == set(file.wanted)
    assert content.bad_count == file.bad
    assert content.lines >= content.bad_count


@pytest.mark.parametrize(("name", "format", "data", "options", "why"), NONE, ids=[row[0] for row in NONE])
def test_what_is_no_such_list_is_one_clear_line(
    name: str, format: str, data: str, options: FormatOptions, why: str
) -> None:
    with pytest.raises(FeedError, match=why) as raised:
        parse_feed(data.encode(), max_bad=0.05, format=format, options=options)
    assert "\n" not in str(raised.value)
    with pytest.raises(FeedError) as raised:  # of a page nothing is told
        parse_feed(data.encode(), max_bad=0.05, quote=False, format=format, options=options)
    assert "html" not in str(raised.value)


@pytest.mark.parametrize("file", GOOD, ids=lambda file: file.name)
def test_a_list_that_was_cut_or_garbled_is_part_of_it_or_one_clear_line(file: File) -> None:
    """Two files of each: cut off somewhere, and with bytes changed."""
    pick, whole = random.Random(file.name), file.data.encode()
    cut = whole[: pick.randrange(1, len(whole))]
    garbled = bytearray(whole)
    for _ in range(3):
        garbled[pick.randrange(len(garbled))] = pick.choice(b"\xff\x00x.")
    wanted = {ip_network(text) for text in file.wanted}
    said: list[str] = []
    for data, is_cut in ((cut, True), (bytes(garbled), False)):
        try:
            content = parse_feed(data, max_bad=1, format=file.format, options=file.options)
        except FeedError as error:
            said.append(str(error))
            continue
        found = set(content.prefixes)
        if is_cut and file.format not in ("plain", "range", "hosts-deny"):  # a number that was cut is another number
            assert len(found - wanted) <= 1 + 8 * ("-" in file.data or "\t" in file.data or bool(file.options.to))
        assert len(found & wanted) >= len(wanted) - 4 - content.bad_count - 4 * is_cut * len(wanted)
    assert not any("\n" in text for text in said)


@pytest.mark.parametrize(
    "pack", [gzip.compress, lambda data: lzma.compress(data, lzma.FORMAT_XZ), zstd.compress], ids=["gzip", "xz", "zstd"]
)
def test_packed_lists_are_unpacked_as_far_as_may_be(pack: type[bytes]) -> None:
    data = "\n".join(V4 * 50).encode()
    packed = bytes(pack(data))
    assert unpack(packed, len(data)) == data
    assert unpack(packed + packed, 2 * len(data)) == data + data, "several one after the other"
    with pytest.raises(ValueError, match=f"longer than {len(data) - 1} bytes"):
        unpack(packed, len(data) - 1)
    for length in (len(packed) - 3, len(packed) // 2):
        with pytest.raises(ValueError, match=r"not whole (gzip|xz|zstd) data"):
            unpack(packed[:length], 1 << 20)
    with pytest.raises(ValueError, match="longer than 1000 bytes"):
        unpack(bytes(pack(bytes(30_000_000))), 1000)


# -- through the child, into a policy --------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> FeedStore:
    return FeedStore(tmp_path / "copies")


def _rule(feed: Feed, action: Action = Action.DROP) -> RuleSet:
    return RuleSet((Rule("listed", (), action, origin="file", feed=feed),))


def test_a_format_is_read_by_the_child_and_its_copy_is_its_own(tmp_path: Path, store: FeedStore) -> None:
    path = tmp_path / "aws.json.xz"
    file = next(file for file in GOOD if file.name == "AWS")
    path.write_bytes(lzma.compress(file.data.encode(), lzma.FORMAT_XZ))
    feed = Feed(str(path), format="json", path=file.options.path)
    assert _texts(store.load(feed).content.prefixes) == set(_ALL)
    path.write_bytes(b"<html>")
    kept = store.load(feed)
    assert "is no JSON" in kept.stale
    assert _texts(kept.content.prefixes) == set(_ALL)
    with pytest.raises(FeedError):  # the copy is of another path
        store.load(replace(feed, path="prefixes[].ip_prefix"))
    state = store.state(feed)
    assert state.fetched is not None
    assert state.checked is not None
    assert "is no JSON" in state.trouble


def test_what_no_feed_may_close_is_left_out_and_told(tmp_path: Path, store: FeedStore) -> None:
    own = next(str(network.network_address) for network in local_networks() if network.prefixlen == 32)
    path = tmp_path / "list.txt"
    path.write_text("\n".join([*V4, *V6, "8.0.0.0/7", "2000::/12", "10.1.0.0/16", "fc00:1::/32", "192.168.1.1", own]))
    feed = Feed(str(path), never=("198.18.0.64/28", "203.0.113.0/24", "2001:db8:2::/48"))
    ruleset, (report,) = with_feeds(_rule(feed), store)
    left = report.left_out
    assert (left.wide, left.private + left.own, left.never) == (2, 4, 3)  # this host's own may be private as well
    sources = set(ruleset.rules[0].sources)
    kept = set(map(ip_network, V4[1:3])) | {ip_network(V6[0])}
    pieces = set(ip_network("198.18.0.0/24").address_exclude(ip_network("198.18.0.64/28")))
    assert sources == kept | pieces
    assert "left out of feed" in report.trouble()
    allowed, _ = with_feeds(_rule(feed, Action.ALLOW), store)
    assert len(allowed.rules[0].sources) == len(V4) + len(V6) + 6, "a list of who may come in closes nobody out"


def test_guards_leave_out_the_same_as_a_look_at_each_network() -> None:
    pick = random.Random(5)
    for _ in range(20):
        networks = {
            ip_network((pick.getrandbits(32) >> (32 - length) << (32 - length), length))
            for length in (pick.randint(4, 32) for _ in range(pick.choice((3, 400))))
        }
        never = [
            ip_network((pick.getrandbits(32) >> (32 - length) << (32 - length), length))
            for length in (pick.randint(9, 30) for _ in range(4))
        ]
        closed: list[IPNetwork] = [*map(ip_network, ("10.0.0.0/8", "192.168.0.0/16", "172.16.0.0/12", "0.0.0.0/8"))]
        closed += [*map(ip_network, ("127.0.0.0/8", "169.254.0.0/16", "100.64.0.0/10")), *never]
        found, left = guarded(Prefixes.of(networks), max_width=8, never=never)
        for _ in range(80):
            address = pick.choice([*(n.network_address for n in (*networks, *never)), ip_address(pick.getrandbits(32))])
            wanted = any(
                address in network
                for network in networks
                if network.prefixlen >= 8 and not any(network.subnet_of(one) for one in closed)  # type: ignore[arg-type]
            ) and not any(address in one for one in never)
            assert any(address in network for network in found) == wanted
        assert bool(left) == (found != Prefixes.of(networks))


@pytest.mark.parametrize(("count", "is_taken"), [(50, False), (100, True), (299, True), (301, False), (0, False)])
def test_a_list_that_is_another_one_of_a_sudden_keeps_the_last_good_copy(
    tmp_path: Path, store: FeedStore, count: int, is_taken: bool
) -> None:
    def write(networks: int) -> None:
        text = "".join(f"198.18.{n >> 8}.{n & 255}\n" for n in range(networks))
        path.write_text(text or "# none\n")

    path = tmp_path / "list.txt"
    write(200)
    feed = Feed(str(path))
    policy = LocalStore(max_entries=16)
    policy.replace(with_feeds(_rule(feed), store)[0])
    write(count)
    (report,) = Refresher(policy, store).run(all_feeds=True)
    assert (len(policy.ruleset().rules[0].sources), not report.stale) == ((count, True) if is_taken else (200, False))
    if not is_taken and count:
        assert f"had 200 networks and now has {count}, a change of more than 50%" in report.stale
        Refresher(policy, store).run(all_feeds=True, accept=True)
        assert len(policy.ruleset().rules[0].sources) == count
        assert policy.ruleset().rules[0].feed == feed


@pytest.mark.parametrize(
    ("feed", "why"),
    [
        ('path = "a"', "path is of JSON"),
        ('column = "1"', "column and to are of CSV"),
        ('format = "csv", delimiter = "ab"', "write one character"),
        ('format = "xml"', '"xml": '),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, feed: str, why: str) -> None:
    from rama_ebpf.config.policy import load_policy
    from rama_ebpf.config.toml import ConfigError

    path = tmp_path / "policy.toml"
    path.write_text(f'[[rules]]\nname = "x"\naction = "drop"\nfeed = {{ file = "list", {feed} }}\n')
    with pytest.raises(ConfigError, match=why):
        load_policy(path)


def test_never_is_of_all_feeds_of_a_file_and_survives_an_export(tmp_path: Path) -> None:
    from rama_ebpf.config.policy import load_policy, policy_values
    from rama_ebpf.config.show import to_toml
    from rama_ebpf.policy.rule import Settings

    path = tmp_path / "policy.toml"
    path.write_text(
        'never = ["198.18.0.0/24"]\n[[rules]]\nname = "x"\naction = "drop"\n'
        'feed = { file = "list", format = "csv", column = "2", max_width = 9 }\n'
    )
    ruleset = load_policy(path).ruleset(Settings())
    assert ruleset.rules[0].feed is not None
    assert ruleset.rules[0].feed.never == ("198.18.0.0/24",)
    path.write_text(to_toml(policy_values(ruleset)))
    assert load_policy(path).ruleset(Settings()) == ruleset
