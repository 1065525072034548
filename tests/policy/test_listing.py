"""Listings of what an operator wants to see."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from rama_ebpf.control.api import ControlApi
from rama_ebpf.policy.local import LocalStore
from rama_ebpf.policy.rule import Action, PolicyError, Rule, RuleSet, parse_network


@pytest.fixture
def api() -> ControlApi:
    store = LocalStore(max_entries=64)
    rules = (("web-a", ["198.18.0.0/16"]), ("web-b", ["198.18.7.0/24", "2001:db8::/32"]), ("mail", ["198.19.0.0/16"]))
    store.replace(
        RuleSet(
            tuple(Rule(name, list(map(parse_network, sources)), Action.DROP, origin="file") for name, sources in rules)
        )
    )
    store.add(Rule("block", (parse_network("198.18.7.7"),), Action.DROP), ttl=10**12)
    store.ban(ip_address("198.18.7.7"))
    store.ban(ip_address("198.19.1.1"))
    for source, count in (("198.19.0.1", 3), ("198.18.7.1", 2), ("198.18.1.1", 1)):
        for _ in range(count):
            store.count(store.verdict(ip_address(source), 1080), ip_address(source), 1080)
    return ControlApi(store)


@pytest.mark.parametrize(
    ("params", "names", "bans", "matched"),
    [
        ({}, ["web-a", "web-b", "mail", "block"], 2, 4),
        ({"rule": "web-*"}, ["web-a", "web-b"], 0, 2),
        ({"source": "198.18.7.7"}, ["web-a", "web-b", "block"], 1, 3),
        ({"source": "198.18.7.0/25"}, ["web-a", "web-b"], 0, 2),
        ({"source": "2001:db8:1::/48"}, ["web-b"], 0, 1),
        ({"sort": "hits"}, ["mail", "web-b", "web-a", "block"], 2, 4),
        ({"sort": "hits", "limit": 1}, ["mail"], 1, 4),
        ({"sort": "name"}, ["block", "mail", "web-a", "web-b"], 2, 4),
        ({"sort": "expires", "limit": 2}, ["block", "web-a"], 2, 4),
        ({"sort": "sources", "limit": 1}, ["web-b"], 1, 4),
    ],
)
def test_a_listing_shows_what_was_asked_for(
    api: ControlApi, params: dict[str, object], names: Sequence[str], bans: int, matched: int
) -> None:
    result: Any = api.call("list", params)
    assert [rule["name"] for rule in result["rules"]] == names
    assert (len(result["bans"]), result["matched"]) == (bans, matched)


@pytest.mark.parametrize(
    ("params", "why"),
    [({"sort": "size"}, "use one of hits, name"), ({"limit": 0}, "above 0"), ({"source": "x"}, "is not an address")],
)
def test_a_listing_that_makes_no_sense_is_refused(api: ControlApi, params: dict[str, object], why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        api.call("list", params)


def test_rules_that_can_never_matter_are_told(tmp_path: Path) -> None:
    store = LocalStore(max_entries=64)
    store.set_failsafe([parse_network("198.18.9.0/24")])
    path = tmp_path / "policy.toml"
    rows = (
        ("first", "drop", "198.18.1.0/24", ""),
        ("shadowed", "allow", "198.18.1.0/24", ""),
        ("dry", "reject", "198.18.1.0/24", "dry_run = true"),
        ("of-a-port", "allow", "198.18.1.0/24", "port = 80"),
        ("wider", "drop", "198.18.0.0/16", ""),
        ("safe", "drop", "198.18.9.7", ""),
    )
    path.write_text(
        "".join(
            f'[[rules]]\nname = "{name}"\naction = "{action}"\nsources = ["{source}"]\n{more}\n'
            for name, action, source, more in rows
        )
    )
    result: Any = ControlApi(store).call("load", {"path": str(path)})
    assert result["futile"] == [
        "rule shadowed can never matter: for each of its networks another rule decides first",
        "rule dry can never matter: for each of its networks another rule decides first",
        "rule safe can never matter: the failsafe lets in all of its networks",
    ]
