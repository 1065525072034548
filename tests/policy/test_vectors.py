"""What is done for millions of prefixes at once is what the loops do."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import pytest

from rama_ebpf.core.address import IPAddress
from rama_ebpf.kernel.gate_state import SetHead
from rama_ebpf.policy import vectors
from rama_ebpf.policy.compiler import CompiledSet, compile_rules
from rama_ebpf.policy.feed import FeedContent, overlapping, parse_feed
from rama_ebpf.policy.feed_record import decode, encode
from rama_ebpf.policy.feed_store import FeedStore
from rama_ebpf.policy.intervals import Table
from rama_ebpf.policy.local_tables import LocalSet
from rama_ebpf.policy.prefixes import Prefixes
from rama_ebpf.policy.rule import Action, Feed, Rule, RuleSet

Both = Callable[[Callable[[], object]], tuple[object, object]]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Both:
    """Call a function with numpy for whatever there is, and without."""
    assert vectors.numpy() is not None

    def call(function: Callable[[], object]) -> tuple[object, object]:
        monkeypatch.setattr(vectors, "MANY", 1)
        with_numpy = function()
        monkeypatch.setattr(vectors, "MANY", 1 << 60)
        return with_numpy, function()

    return call


def _random(pick: random.Random, version: int, count: int, longest: int) -> set[int]:
    """Packed prefixes, many of them inside of each other or side by side."""
    width, found = 32 if version == 4 else 128, set()
    for _ in range(count):
        length = pick.randint(pick.choice((0, 8)), longest)
        address = pick.getrandbits(width)
        if version == 6:
            address = 0x2001 << 112 | pick.getrandbits(20) << 92 | pick.getrandbits(92)
        if pick.random() < 0.3:
            address = address >> 40 << 40 if version == 6 else address >> 10 << 10
        found.add((address >> (width - length) << (width - length)) << 8 | length)
    return found


def _without_values(table: Table) -> Table:
    return replace(table, below=0, above=0, page=0)


@pytest.mark.parametrize("seed", range(8))
def test_a_set_is_cut_as_the_loop_cuts_it(both: Both, seed: int) -> None:
    pick = random.Random(seed)
    rules = [
        Rule(
            f"r{number}",
            Prefixes(_random(pick, 4, pick.choice((1, 300)), 32), _random(pick, 6, pick.choice((1, 150)), 64)),
            pick.choice((Action.DROP, Action.ALLOW, Action.REJECT)),
            port=pick.choice((None, None, 80)),
            expires=pick.choice((None, None, 1 << 60)),
            dry_run=pick.random() < 0.2,
            origin="file",
        )
        for number in range(pick.choice((1, 2, 5)))
    ]
    if seed % 3 == 0:
        rules.append(Rule("same", rules[0].sources, Action.DROP, port=81, origin="file"))
    if seed % 4 == 0:
        rules.append(Rule("all", Prefixes([0], [0]), Action.REJECT, origin="file"))
    quick, slow = both(lambda: compile_rules(RuleSet(tuple(rules))))
    assert isinstance(quick, CompiledSet)
    assert isinstance(slow, CompiledSet)
    assert list(map(_without_values, quick.tables)) == list(map(_without_values, slow.tables))
    one, other = (LocalSet(compiled, range(len(rules)), 0) for compiled in (quick, slow))
    for rule in rules:
        for network in list(rule.sources)[:15]:
            first, last = int(network.network_address), int(network.broadcast_address)
            kind: type[IPAddress] = type(network.network_address)
            for address in (first, last, max(0, first - 1), min(last + 1, (1 << network.max_prefixlen) - 1)):
                assert one.chain(SetHead(), kind(address)) == other.chain(SetHead(), kind(address))


def test_prefixes_beyond_64_bits_are_left_to_the_loop(both: Both) -> None:
    rules = (Rule("r", Prefixes([], [1 << 120 << 8 | 128, 1 << 126 << 8 | 32]), Action.DROP, origin="file"),)
    quick, slow = both(lambda: compile_rules(RuleSet(rules)).pages)
    assert quick == slow


_ODD = [
    *("", "# c", "1.2.3.4 # x", "01.2.3.4", "1.2.3.4/", "1.2.3.4/33", "256.1.1.1", "1.2.3", "1.2.3.4.5", "/8"),
    *("1.2.3.4/08", "1..2.3/4", "1.2.3.4//5", "9999.1.1.1", "1.2.3.7/24", "1.2.3.4/24/5", "....", "1.2.3.4\r"),
    *("a.b.c.d/8", "1.2.3.4 ", "0.0.0.0/0", "255.255.255.255", "\xff", "1.2.3.4/32;", "::ffff:1.2.3.4", "0.0.0.0"),
]


@pytest.mark.parametrize("seed", range(10))
def test_lines_mean_what_each_line_means(both: Both, seed: int) -> None:
    pick, lines = random.Random(seed), []
    for _ in range(pick.choice((1, 30, 1500))):
        kind = pick.random()
        length = pick.randint(0, 32)
        if kind < 0.6:
            lines.append(str(ip_network((pick.getrandbits(32) >> (32 - length) << (32 - length), length))))
        elif kind < 0.75:
            lines.append(str(ip_network(pick.getrandbits(32)).network_address))
        elif kind < 0.85:
            lines.append(pick.choice(_ODD))
        else:
            lines.append(str(ip_network((pick.getrandbits(64) << 64, 64))))
    data = "\n".join([*lines, "198.18.0.1", *pick.choice(([], [""]))]).encode("latin-1")
    quick, slow = both(lambda: parse_feed(data, max_bad=1))
    assert quick == slow
    assert isinstance(slow, FeedContent)
    content = slow
    some = Prefixes(content.prefixes.v4[::3], content.prefixes.v6[::2])
    pairs = [("all", content.prefixes), ("some", some)]
    quick, slow = both(lambda: (content.everybody(), content.covered(), overlapping(pairs)))
    assert quick == slow


def test_the_child_parses_many_lines_as_the_loop_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"{10 + n % 180}.{n >> 8 & 255}.{n & 255}.0/24" for n in range(60_000)]
    lines[40_000] = "nonsense"
    (tmp_path / "list").write_text("\n".join(lines))
    found = FeedStore(tmp_path / "copies").load(Feed(str(tmp_path / "list"), timeout=300)).content
    monkeypatch.setattr(vectors, "MANY", 1 << 60)
    assert found == parse_feed((tmp_path / "list").read_bytes())
    assert [line.number for line in found.bad] == [40_001]


def test_a_record_is_checked_as_the_loop_checks_it(both: Both) -> None:
    good = [198 << 32 | 24, 198 << 32 | 25, 199 << 32 | 32]
    for keys in (good, [*good, 7], good[::-1], [1 << 8 | 24], [1 << 40 | 32], [199 << 32 | 33], [good[0], good[0]]):
        record = encode(FeedContent(Prefixes.from_sorted(array("Q", keys), []), len(keys)))

        def read(record: bytes = record) -> object:
            try:
                return decode(record)[0].prefixes
            except ValueError as error:
                return str(error)

        quick, slow = both(read)
        assert quick == slow
