"""Rules by origin: of an AS, a country, Tor, out of data files that the operator names."""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from rama_ebpf.policy.feed import FeedError, parse_feed
from rama_ebpf.policy.feed_formats import FormatOptions
from rama_ebpf.policy.feed_store import FeedStore
from rama_ebpf.policy.local import LocalStore
from rama_ebpf.policy.refresh import with_feeds
from rama_ebpf.policy.rule import Action, Feed, Rule, RuleSet


def _field(value: object) -> bytes:
    """A field of MaxMind DB's data section: maps, texts, numbers."""
    if isinstance(value, Mapping):
        return bytes([7 << 5 | len(value)]) + b"".join(_field(key) + _field(one) for key, one in value.items())
    if isinstance(value, str):
        data = value.encode()
        assert len(data) < 29
        return bytes([2 << 5 | len(data)]) + data
    if isinstance(value, list):
        return bytes([len(value), 11 - 7]) + b"".join(map(_field, value))
    assert isinstance(value, int)
    data = value.to_bytes((value.bit_length() + 7) // 8, "big")
    return bytes([6 << 5 | len(data)]) + data


def mmdb(rows: Mapping[str, Mapping[str, object]]) -> bytes:
    """A MaxMind DB of format 2.0 with records of 24 bits: a tree of IPv6, where IPv4 is ::/96."""
    data, places = b"", {}
    tree: list[list[object]] = [[None, None]]
    for text, record in rows.items():
        network = ipaddress.ip_network(text)
        length = network.prefixlen + (96 if network.version == 4 else 0)
        address, node = int(network.network_address), 0
        places[text] = len(data)
        data += _field(record)
        for depth in range(length):
            bit = address >> (127 - depth) & 1
            if depth == length - 1:
                tree[node][bit] = text
                break
            below = tree[node][bit]
            if not isinstance(below, int):
                tree.append([None, None])
                below = tree[node][bit] = len(tree) - 1
            node = below

    def pointer(entry: object) -> bytes:
        if isinstance(entry, str):
            return (len(tree) + 16 + places[entry]).to_bytes(3, "big")
        return (len(tree) if entry is None else int(str(entry))).to_bytes(3, "big")

    nodes = b"".join(pointer(left) + pointer(right) for left, right in tree)
    metadata = {
        "node_count": len(tree),
        "record_size": 24,
        "ip_version": 6,
        "database_type": "Test",
        "languages": ["en"],
        "binary_format_major_version": 2,
        "binary_format_minor_version": 0,
        "build_epoch": 1_700_000_000,
        "description": {"en": "test"},
    }
    return nodes + bytes(16) + data + b"\xab\xcd\xefMaxMind.com" + _field(metadata)


ROWS: dict[str, dict[str, object]] = {
    "198.18.0.0/16": {"country": {"iso_code": "XX"}, "autonomous_system_number": 64500},
    "198.19.0.0/17": {"country": {"iso_code": "YY"}, "autonomous_system_number": 64501},
    "198.19.128.0/18": {"country": {"iso_code": "XX"}, "autonomous_system_number": 64501},
    "2001:db8:1::/48": {"country": {"iso_code": "XX"}, "autonomous_system_number": 64500},
    "2001:db8:2::/48": {"country": {"iso_code": "ZZ"}},
}
BY_ASN = "network,asn\n198.18.0.0/16,64500\n198.19.0.0/16,64501\n"
GEOIP = "# of tor-geoipdb\n3323068416,3323133951,XX\n3323133952,3323199487,YY\n"


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ("country.iso_code=xx", {"198.18.0.0/16", "198.19.128.0/18", "2001:db8:1::/48"}),
        ("country.iso_code=YY|ZZ", {"198.19.0.0/17", "2001:db8:2::/48"}),
        ("autonomous_system_number=64500", {"198.18.0.0/16", "2001:db8:1::/48"}),
    ],
)
def test_networks_of_an_as_or_a_country_are_taken_from_an_mmdb(where: str, wanted: set[str]) -> None:
    content = parse_feed(mmdb(ROWS), format="mmdb", options=FormatOptions(where=where))
    assert {str(network) for network in content.prefixes} == wanted


@pytest.mark.parametrize(
    ("text", "options", "wanted"),
    [
        (GEOIP, FormatOptions(column="1", to="2", where="3=XX"), {"198.18.0.0/16"}),
        (BY_ASN, FormatOptions(column="network", where="asn=64501"), {"198.19.0.0/16"}),
        ("198.18.0.0/16,hosting\n198.19.0.0/16,isp\n", FormatOptions(where="2=hosting"), {"198.18.0.0/16"}),
    ],
)  # fmt: skip
def test_networks_of_an_origin_are_taken_from_csv(text: str, options: FormatOptions, wanted: set[str]) -> None:
    content = parse_feed(text.encode(), format="csv", options=options)
    assert {str(network) for network in content.prefixes} == wanted
    assert content.bad_count == 0


def test_an_mmdb_that_is_damaged_or_of_another_edition_is_one_clear_line() -> None:
    whole, pick, refused = mmdb(ROWS), random.Random(2), 0
    for _ in range(200):
        data = bytearray(whole)
        if pick.random() < 0.3:
            del data[pick.randrange(len(data)) :]
        for _ in range(pick.randint(1, 3)):
            if data:
                data[pick.randrange(len(data))] = pick.randrange(256)
        try:
            parse_feed(bytes(data) or b"x", format="mmdb", options=FormatOptions(where="country.iso_code=XX"))
        except FeedError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017
    assert refused > 20
    other = whole.replace(b"binary_format_major_version\xc1\x02", b"binary_format_major_version\xc1\x09")
    assert other != whole
    for data, where, why in (
        (other, "a=b", "is an MMDB of format 9"),
        (whole, "", "say which with where"),
        (whole, "a", "write for"),
    ):
        with pytest.raises(FeedError, match=why):
            parse_feed(data, format="mmdb", options=FormatOptions(where=where))


def test_a_rule_of_a_country_judges_by_the_data_file(tmp_path: Path) -> None:
    (tmp_path / "country.mmdb").write_bytes(mmdb(ROWS))
    feed = Feed(str(tmp_path / "country.mmdb"), format="mmdb", where="country.iso_code=XX")
    ruleset, _ = with_feeds(
        RuleSet((Rule("country:XX", (), Action.DROP, origin="file", feed=feed),)), FeedStore(tmp_path / "copies")
    )
    store = LocalStore(max_entries=16)
    store.replace(ruleset)
    for source, rule in (("198.18.3.4", "country:XX"), ("198.19.3.4", "default"), ("2001:db8:1::1", "country:XX")):
        assert store.verdict(ipaddress.ip_address(source), 1080).rule == rule
