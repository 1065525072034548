"""Many rules and bans at once: the same as one by one, as one change."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from rama_ebpf.kernel.gate_maps import GateMaps
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.image import PolicyImage
from rama_ebpf.policy.kept import KeptPolicy
from rama_ebpf.policy.kernel_store import KernelStore
from rama_ebpf.policy.local import LocalStore
from rama_ebpf.policy.prefixes import Prefixes
from rama_ebpf.policy.rule import Action, PolicyError, Rule
from rama_ebpf.policy.store import PolicyStore

SOURCES = Prefixes.of(["192.0.2.7", "198.18.0.0/16", "198.51.100.0/24", "2001:db8::/32", "2001:db8:7::1"])


@pytest.fixture(
    params=["local", pytest.param("kernel", marks=[pytest.mark.root, pytest.mark.ebpf])],
)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PolicyStore]:
    """An empty store with room for 4,095 rules and 64 bans, kept in ``tmp_path``."""
    if request.param == "local":
        made: PolicyStore = LocalStore(max_entries=4095, max_bans=64)
        made.remember_in(tmp_path)
        yield made
        return
    place: Instance = request.getfixturevalue("pinned")
    with GateMaps.open(place.pin_dir) as maps:
        made = KernelStore(place, maps)
        made.remember_in(tmp_path)
        yield made


def decided(store: PolicyStore, source: str, port: int = 443) -> str:
    verdict = store.verdict(ip_address(source), port)
    return f"{verdict.action.name.lower()} by {verdict.rule}"


def on_disk(directory: Path) -> PolicyImage:
    image = KeptPolicy(directory).read()
    return image if image is not None else PolicyImage(0, None)  # type: ignore[arg-type]


def facts(image: PolicyImage) -> set[tuple[object, ...]]:
    return {(one.rule.name, one.place, one.rule.action, one.rule.reason, one.rule.expires) for one in image.runtime}


def test_many_rules_are_what_each_would_be_alone(store: PolicyStore, tmp_path: Path) -> None:
    revision = store.revision
    assert store.add_many(SOURCES, Action.DROP, reason="many") == revision + 1
    assert decided(store, "192.0.2.7") == "drop by drop:192.0.2.7/32"
    assert decided(store, "198.18.3.4") == "drop by drop:198.18.0.0/16"
    assert decided(store, "2001:db8:7::1") == "drop by drop:2001:db8:7::1/128"
    assert decided(store, "2001:db8:7::2") == "drop by drop:2001:db8::/32"
    assert decided(store, "192.0.2.8") == "allow by default"
    at_once = {(record.rule.name, record.rule.reason, tuple(record.sources)) for record in store.records()}
    written = facts(on_disk(tmp_path))

    other = LocalStore(max_entries=4095)
    other.remember_in(tmp_path / "other")
    for source in SOURCES:
        other.add(Rule(f"drop:{source}", (source,), Action.DROP, reason="many"))
    assert at_once == {(record.rule.name, record.rule.reason, tuple(record.sources)) for record in other.records()}
    assert written == facts(on_disk(tmp_path / "other"))


def test_rules_of_a_port_and_with_an_end_stay_apart(store: PolicyStore) -> None:
    store.add_many(SOURCES, Action.DROP)
    store.add_many(SOURCES, Action.ALLOW, port=443, ttl=3600 * 10**9)
    assert decided(store, "192.0.2.7") == "allow by allow:192.0.2.7/32"
    assert decided(store, "192.0.2.7", 80) == "drop by drop:192.0.2.7/32"
    assert store.remove_many(SOURCES, 443) == len(SOURCES)
    assert decided(store, "192.0.2.7") == "drop by drop:192.0.2.7/32"


def test_what_stood_there_is_replaced_also_where_there_is_no_room_for_both(store: PolicyStore) -> None:
    many = Prefixes.of(ip_network((0xC6120000 + n, 32)) for n in range(4000))
    store.add(Rule("before", (many[17],), Action.ALLOW))
    store.add_many(many, Action.DROP, reason="first")
    assert len(store.records()) == 4000
    store.add_many(many, Action.REJECT, reason="second")
    assert {record.rule.reason for record in store.records()} == {"second"}
    assert decided(store, "198.18.0.17") == "reject by reject:198.18.0.17/32"
    assert store.remove_many(many) == 4000
    assert store.records() == []
    store.add_many(many, Action.DROP)  # there is room again, without a sweep
    assert len(store.records()) == 4000


def test_more_than_there_is_room_for_changes_nothing(store: PolicyStore, tmp_path: Path) -> None:
    store.add(Rule("before", (ip_network("192.0.2.7/32"),), Action.ALLOW))
    revision, rows = store.revision, (tmp_path / "rules").read_bytes()
    with pytest.raises(PolicyError, match="rules already"):
        store.add_many(Prefixes.of(ip_network((0xC6120000 + n, 32)) for n in range(4096)), Action.DROP)
    with pytest.raises(PolicyError, match="already"):
        store.ban_many(Prefixes.of(ip_network((0xC6120000 + n, 32)) for n in range(65)))
    assert [record.rule.name for record in store.records()] == ["before"]
    assert store.bans() == []
    assert (store.revision, (tmp_path / "rules").read_bytes()) == (revision, rows)


def test_many_bans_of_an_operator_take_the_place_of_services(store: PolicyStore, tmp_path: Path) -> None:
    for number in range(60):  # of which as many stay as services may have
        store.ban(ip_address(0xC6120000 + number), ttl=(number + 1) * 3600, automatic=True)
    for number in range(4):
        store.ban(ip_address(0xC6130000 + number))
    services = [f"198.18.0.{number}" for number in range(4, 60)]
    assert sorted(ban.source for ban in store.bans() if ban.automatic) == sorted(services)

    # Two that services have banned, so that no room is needed, and 10 where there is room for 4.
    store.ban_many(Prefixes.of(["198.18.0.4", "198.18.0.59", *(f"192.0.2.{number}" for number in range(1, 11))]))
    automatic = sorted(ban.source for ban in store.bans() if ban.automatic)
    assert automatic == sorted(f"198.18.0.{number}" for number in range(11, 59))
    assert len(store.bans()) == 64
    assert decided(store, "192.0.2.10") == decided(store, "198.18.0.4") == "drop by ban"
    before = store.bans()
    with pytest.raises(PolicyError, match="already"):
        store.ban_many(Prefixes.of(ip_network((0xC0000300 + n, 32)) for n in range(49)))
    assert {ban.source for ban in store.bans()} == {ban.source for ban in before}
    again = LocalStore(max_entries=4095, max_bans=64)
    again.remember_in(tmp_path)
    assert again.restore_bans() == 64
    assert {ban.source for ban in again.bans()} == {ban.source for ban in before}
    # A service's next ban takes the place of another one's, as the count of them says.
    store.ban(ip_address("192.0.2.99"), automatic=True)
    assert len(store.bans()) == 64
    assert decided(store, "192.0.2.99") == "drop by ban"


def test_disk_that_refuses_leaves_all_as_it_was(store: PolicyStore, tmp_path: Path) -> None:
    store.add(Rule("before", (SOURCES[0],), Action.ALLOW))
    store.ban(ip_address("192.0.2.7"), reason="before")
    (tmp_path / "rules").unlink()
    (tmp_path / "bans").unlink()
    for name in ("rules", "bans"):
        os.mkfifo(tmp_path / name)  # nothing can be kept there
    addresses = Prefixes.of(["192.0.2.7", "192.0.2.8"])
    for change in (
        lambda: store.add_many(SOURCES, Action.DROP),
        lambda: store.remove_many(SOURCES),
        lambda: store.ban_many(addresses, reason="after"),
        lambda: store.unban_many(addresses),
    ):
        with pytest.raises(OSError, match=r"cannot write|bans|rules"):
            change()
    store.unban_many(Prefixes.of(["198.18.0.1"]))  # there is none, so nothing is to be written
    assert [record.rule.name for record in store.records()] == ["before"]
    assert [(ban.source, ban.reason) for ban in store.bans()] == [("192.0.2.7", "before")]


def test_many_bans_are_what_each_would_be_alone(store: PolicyStore, tmp_path: Path) -> None:
    sources = Prefixes.of(["192.0.2.7", "192.0.2.9", "2001:db8:7::/64", "2001:db8::1"])
    store.ban(ip_address("192.0.2.7"), reason="a service", automatic=True)
    revision = store.ban_revision
    assert store.ban_many(sources, reason="many", action=Action.REJECT) == revision + 1
    assert decided(store, "192.0.2.9") == decided(store, "2001:db8:7::5") == "reject by ban"
    assert {(ban.source, ban.reason, ban.automatic) for ban in store.bans()} == {
        ("192.0.2.7", "many", False),
        ("192.0.2.9", "many", False),
        ("2001:db8:7::/64", "many", False),
        ("2001:db8::1", "many", False),
    }
    again = LocalStore(max_entries=16)
    again.remember_in(tmp_path)
    assert again.restore_bans() == 4
    assert {replace(ban, created=0, hits=0) for ban in again.bans()} == {
        replace(ban, created=0, hits=0) for ban in store.bans()
    }
    assert store.unban_many(sources) == 4
    assert store.bans() == []
    assert decided(store, "192.0.2.9") == "allow by default"
    empty = LocalStore(max_entries=16)
    empty.remember_in(tmp_path)
    assert empty.restore_bans() == 0


def test_ban_of_what_is_no_one_source_changes_nothing(store: PolicyStore) -> None:
    with pytest.raises(PolicyError, match="not one source"):
        store.ban_many(Prefixes.of(["192.0.2.7", "192.0.2.0/24"]))
    assert store.bans() == []


def test_texts_are_those_of_the_networks() -> None:
    assert SOURCES.texts() == [str(network) for network in SOURCES]
