"""How a rule set is written on disk and in the kernel, where other versions may find it."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

from rama_ebpf.policy.document import decode, encode
from rama_ebpf.policy.prefixes import Prefixes
from rama_ebpf.policy.rule import Action, Feed, Rule, RuleSet

# Of version 0.1 with layout 4 of the pins.
KNOWN = {"name", "action", "port", "expires", "dry_run", "limit", "reason", "origin", "feed", "counts"}

RULE = Rule("listed", Prefixes.of(["192.0.2.0/24", "2001:db8::/32"]), Action.DROP, origin="file", at="rama.toml:7")


def _rows(ruleset: RuleSet) -> list[dict[str, object]]:
    data = encode(ruleset)
    size = struct.unpack_from("<I", data)[0]
    rows: list[dict[str, object]] = json.loads(data[4 : 4 + size])["rules"]
    return rows


def test_a_version_that_does_not_know_an_option_reads_a_set_that_does_not_use_it() -> None:
    fed = replace(RULE, name="fed", feed=Feed("/etc/list.txt"))
    rows = _rows(RuleSet((RULE, fed)))
    assert [set(row) for row in rows] == [KNOWN, KNOWN]
    assert rows[1]["feed"] == {"source": "/etc/list.txt"}


def test_every_option_and_the_place_of_a_rule_are_read_back() -> None:
    feed = Feed("/etc/list.csv", format="csv", column="2", never=("192.0.2.1/32",), max_width=9)
    written = RuleSet((RULE, replace(RULE, name="fed", feed=feed, at="")))
    read = decode(encode(written))
    assert read == written
    assert [rule.at for rule in read.rules] == ["rama.toml:7", ""]
