"""What holds for a policy wherever it lives: in the kernel's maps or in a process."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from rama_ebpf.control import upkeep
from rama_ebpf.control.policy_thread import PolicyThread
from rama_ebpf.kernel import abi, bpf
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.ban_log import BanLog
from rama_ebpf.policy.ban_record import ban_key
from rama_ebpf.policy.journal import Journal
from rama_ebpf.policy.kernel_store import KernelStore
from rama_ebpf.policy.local import LocalStore
from rama_ebpf.policy.rule import Action, PolicyError, Rule, RuleSet, Settings, SynLimit, boottime_ns
from rama_ebpf.policy.store import PolicyStore
from rama_ebpf.policy.stored import StaleRevision, StaleSet

from ..lab import wait_for
from .conftest import bans_in

PORT = 1080
MakeStore = Callable[[], PolicyStore]


@pytest.fixture
def make_kernel_store(pinned: Instance, tmp_path: Path) -> Iterator[Callable[[], KernelStore]]:
    """Opens the same pinned maps again and again; bans and journal are in ``tmp_path``."""
    opened: list[KernelStore] = []

    def make() -> KernelStore:
        opened.append(KernelStore(pinned))
        opened[-1].remember_in(tmp_path)
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def make_local_store(tmp_path: Path) -> MakeStore:
    """Makes an empty store each time; bans and journal are in ``tmp_path``."""

    def make() -> PolicyStore:
        local = LocalStore(max_entries=4095)
        local.remember_in(tmp_path)
        return local

    return make


@pytest.fixture(params=["kernel", "local"])
def make_store(request: pytest.FixtureRequest) -> MakeStore:
    made: MakeStore = request.getfixturevalue(f"make_{request.param}_store")
    return made


@pytest.fixture
def store(make_store: MakeStore) -> PolicyStore:
    return make_store()


@pytest.fixture
def kernel_store(make_kernel_store: Callable[[], KernelStore]) -> KernelStore:
    return make_kernel_store()


def loaded(name: str, action: Action, *sources: str, **more: object) -> Rule:
    return Rule(name, tuple(map(ip_network, sources)), action, origin="file", **more)  # type: ignore[arg-type]


def block(source: str, **more: object) -> Rule:
    return Rule(f"block:{source}", (ip_network(source),), Action.DROP, **more)  # type: ignore[arg-type]


def decided(store: PolicyStore, source: str) -> str:
    verdict = store.verdict(ip_address(source), PORT)
    return f"{verdict.action.name.lower()} by {verdict.rule}"


# -- the set ----------------------------------------------------------------------------------------------------------


def test_a_set_replaces_the_set_before_and_leaves_the_rest(store: PolicyStore) -> None:
    store.set_failsafe([ip_network("198.18.9.0/24")])
    store.add(block("198.18.1.0/24"))
    store.ban(ip_address("198.18.2.2"))
    store.replace(RuleSet((loaded("old", Action.DROP, "198.18.3.0/24"),)))
    store.replace(RuleSet((loaded("new", Action.DROP, "198.18.4.0/24"),), Settings(Action.REJECT)))
    assert decided(store, "198.18.3.1") == "reject by default"
    assert decided(store, "198.18.4.1") == "drop by new"
    assert decided(store, "198.18.1.1") == "drop by block:198.18.1.0/24"
    assert decided(store, "198.18.2.2") == "drop by ban"
    assert decided(store, "198.18.9.9") == "allow by "


def test_a_set_is_read_back_as_it_was_loaded(store: PolicyStore) -> None:
    rules = (
        loaded("all", Action.DROP, "198.18.0.0/16", "2001:db8::/32", "198.18.3.4", "2001:db8::1", port=443),
        loaded("slow", Action.LIMIT, "0.0.0.0/0", limit=SynLimit(100, 20), reason="häufig"),
        loaded("soon", Action.ALLOW, "::/0", expires=boottime_ns() + 10**12, dry_run=True),
        loaded("none", Action.ALLOW),
    )
    wanted = RuleSet(rules, Settings(Action.DROP, SynLimit(10, 5), SynLimit(1000, 1000)))
    store.replace(wanted)
    assert store.ruleset() == wanted
    assert [record.rule.name for record in store.records()] == ["all", "slow", "soon", "none"]
    assert list(store.records()[0].sources) == list(rules[0].sources)


def test_an_unchanged_rule_keeps_its_id_and_a_changed_one_does_not(store: PolicyStore) -> None:
    keep, change = loaded("keep", Action.DROP, "198.18.1.0/24"), loaded("change", Action.DROP, "198.18.2.0/24")
    store.replace(RuleSet((keep, change)))
    before = {record.rule.name: record.rule.id for record in store.records()}
    store.replace(RuleSet((replace(change, action=Action.REJECT), loaded("keep", Action.DROP, "198.18.7.0/24"))))
    after = {record.rule.name: record.rule.id for record in store.records()}
    assert after["keep"] == before["keep"]
    assert after["change"] != before["change"]
    assert decided(store, "198.18.7.1") == "drop by keep"
    assert decided(store, "198.18.1.1") == "allow by default"


def test_a_stale_revision_is_refused_and_changes_nothing(store: PolicyStore) -> None:
    seen = store.replace(RuleSet((loaded("first", Action.DROP, "198.18.1.0/24"),)))
    store.add(block("198.18.5.0/24"))  # somebody else
    with pytest.raises(StaleRevision, match=f"at revision {store.revision}, not {seen}"):
        store.replace(RuleSet(), expected_revision=seen)
    assert decided(store, "198.18.1.1") == "drop by first"
    assert store.replace(RuleSet(), expected_revision=store.revision) == store.revision


def test_a_set_that_was_replaced_meanwhile_is_not_overwritten(store: PolicyStore) -> None:
    token = store.set_token()
    store.add(block("198.18.5.0/24"))
    store.replace(RuleSet((loaded("mine", Action.DROP, "198.18.1.0/24"),)), expected_set=token)
    with pytest.raises(StaleSet):
        store.replace(RuleSet(), expected_set=token)
    assert decided(store, "198.18.1.1") == "drop by mine"


def test_what_the_kernel_cannot_express_is_refused_with_the_remedy(store: PolicyStore) -> None:
    store.replace(RuleSet((loaded("present", Action.DROP, "198.18.1.0/24"),)))
    ports = tuple(loaded(f"r{n}", Action.DROP, "198.18.0.0/16", port=n + 1) for n in range(65))
    with pytest.raises(PolicyError, match=r"65 rules may apply to 198\.18\.0\.0/16 .* 64 at most"):
        store.replace(RuleSet(ports))
    assert decided(store, "198.18.1.1") == "drop by present"
    store.replace(RuleSet(ports[:64]))
    assert store.verdict(ip_address("198.18.0.1"), 64).rule == "r63"


def test_prefixes_far_beyond_a_page_are_all_found(store: PolicyStore) -> None:
    """One slot with many pages of intervals, in each of the three layouts."""
    step4 = [f"10.7.{n >> 8}.{n & 255}" for n in range(0, 1 << 16, 7)]
    step6 = [f"2001:db8:7:{n:x}::/64" for n in range(0, 1 << 16, 7)]
    full6 = [*step6, *(f"2001:db8:8::{n:x}" for n in range(0, 1 << 12, 3))]
    for sources in (step4, step6, full6):
        store.replace(RuleSet((loaded("many", Action.DROP, *sources),)))
        for index in (0, 1, 1023, 1024, 1025, len(sources) // 2, len(sources) - 1):
            network = ip_network(sources[index])
            inside, after = network.broadcast_address, network.broadcast_address + 1
            assert decided(store, str(inside)) == "drop by many"
            assert decided(store, str(after)) == "allow by default"


# -- trials -----------------------------------------------------------------------------------------------------------


def lock_out(store: PolicyStore, seconds: float) -> None:
    everybody = loaded("everybody", Action.DROP, "0.0.0.0/0", "::/0")
    store.replace(RuleSet((everybody,), Settings(Action.DROP)), confirm_within=seconds)


def test_a_set_that_nobody_confirms_is_undone_with_its_settings(store: PolicyStore) -> None:
    store.replace(RuleSet((loaded("good", Action.REJECT, "198.18.1.0/24"),)))
    lock_out(store, 0.5)
    assert decided(store, "198.18.1.1") == "drop by everybody"
    assert store.pending is not None
    wait_for(lambda: store.pending is None)
    assert decided(store, "198.18.1.1") == "reject by good"
    assert decided(store, "198.18.2.2") == "allow by default"
    assert [rule.name for rule in store.ruleset().rules] == ["good"]
    with pytest.raises(PolicyError, match="nothing waits to be confirmed"):
        store.confirm()
    assert decided(store, "198.18.1.1") == "reject by good"
    store.replace(RuleSet())  # and the next load finds everything in order
    assert decided(store, "198.18.1.1") == "allow by default"


def test_the_end_of_a_trial_is_noted_when_it_was_and_before_what_follows(store: PolicyStore, tmp_path: Path) -> None:
    lock_out(store, 0.2)
    deadline = store.pending
    assert deadline is not None
    ended = datetime.fromtimestamp(time.time() + (deadline - boottime_ns()) / 1e9, tz=UTC)
    wait_for(lambda: boottime_ns() > deadline + 300_000_000)
    store.add(block("198.18.1.1"))
    *_, rollback, add = store.journal()
    assert (rollback["what"], rollback["reason"], add["what"]) == ("rollback", "not confirmed in time", "add")
    assert abs(datetime.fromisoformat(str(rollback["time"])) - ended) < timedelta(milliseconds=100)
    assert rollback["revision"] == add["revision"] - 1  # type: ignore[operator]


async def test_a_server_notes_the_end_of_a_trial_though_nothing_follows(store: PolicyStore) -> None:
    await asyncio.to_thread(lock_out, store, 0.1)
    with PolicyThread() as thread:
        noting = asyncio.ensure_future(upkeep.settle(store, thread))
        await asyncio.to_thread(wait_for, lambda: store.journal()[-1]["what"] == "rollback")
        noting.cancel()
        await asyncio.wait((noting,))


def test_a_confirmed_set_stays(store: PolicyStore) -> None:
    lock_out(store, 1.5)
    over = boottime_ns() + 1_500_000_000
    store.confirm()
    wait_for(lambda: boottime_ns() > over)
    assert decided(store, "198.18.1.1") == "drop by everybody"
    assert decided(store, "2001:db8::1") == "drop by everybody"


def test_a_trial_is_undone_on_demand_and_keeps_others_out(store: PolicyStore) -> None:
    store.replace(RuleSet((loaded("good", Action.REJECT, "198.18.1.0/24"),)))
    lock_out(store, 60)
    with pytest.raises(PolicyError, match="waits to be confirmed"):
        store.replace(RuleSet())
    store.add(block("198.18.5.0/24"))  # a rule at run time is no part of the trial
    store.roll_back()
    assert decided(store, "198.18.1.1") == "reject by good"
    assert decided(store, "198.18.5.1") == "drop by block:198.18.5.0/24"
    with pytest.raises(PolicyError, match="nothing to roll back"):
        store.roll_back()


# -- the runtime layer ------------------------------------------------------------------------------------------------


def test_a_runtime_rule_replaces_the_one_of_exactly_its_prefix_and_port(store: PolicyStore) -> None:
    store.add(block("198.18.1.0/24"))
    store.add(block("198.18.1.0/24", port=443))
    store.add(Rule("allow", (ip_network("198.18.1.0/24"),), Action.ALLOW))
    assert decided(store, "198.18.1.1") == "allow by allow"
    assert store.verdict(ip_address("198.18.1.1"), 443).action is Action.DROP
    assert store.remove(ip_network("198.18.1.0/24"))[0].name == "allow"
    assert store.remove(ip_network("198.18.1.0/24")) == []
    assert store.verdict(ip_address("198.18.1.1"), 443).action is Action.DROP
    assert len(store.records()) == 1


def test_expired_rules_are_swept_and_make_room(store: PolicyStore) -> None:
    past = boottime_ns() - 1
    store.add_all([block(f"198.18.{n >> 8}.{n & 255}", expires=past) for n in range(300)])
    store.add(block("198.18.0.0/16"))
    assert store.sweep() == 300
    assert decided(store, "198.18.0.1") == "drop by block:198.18.0.0/16"
    store.remove(ip_network("198.18.0.0/16"))
    store.sweep()
    store.add_all([block(f"198.19.{n >> 8}.{n & 255}") for n in range(4095)])  # all there is room for
    with pytest.raises(PolicyError, match="rules already"):
        store.add(block("198.18.0.1"))
    assert len(store.records()) == 4095


def test_many_rules_are_added_as_one_change_or_none_of_them(store: PolicyStore, tmp_path: Path) -> None:
    store.remember_in(tmp_path)
    store.add(Rule("before", (ip_network("198.18.1.0/24"),), Action.ALLOW))
    revision = store.revision
    added = store.add_all([block("198.18.1.0/24"), block("198.18.2.0/24", port=443)], ttl=3600 * 10**9)
    assert [rule.name for rule in added] == ["block:198.18.1.0/24", "block:198.18.2.0/24"]
    assert store.revision == revision + 1
    assert [record.rule for record in store.records()] == added
    assert store.add_all([]) == []
    rows = (tmp_path / "rules").read_bytes()
    refused = [
        Rule("r", (ip_network("198.18.1.0/24"),), Action.REJECT),
        block("198.18.3.0/24"),
        block("198.18.2.0/24", port=443),
    ]
    refused[-1] = replace(refused[-1], dry_run=True)
    with pytest.raises(PolicyError, match="has a rule already"):
        store.add_all(refused)
    with pytest.raises(PolicyError, match="rules already"):
        store.add_all([block(f"198.19.{n >> 8}.{n & 255}") for n in range(4095)])
    assert [record.rule.name for record in store.records()] == [rule.name for rule in added]
    assert (store.revision, (tmp_path / "rules").read_bytes()) == (revision + 1, rows)
    assert decided(store, "198.18.1.1") == "drop by block:198.18.1.0/24"


def test_many_prefix_lengths_at_run_time_are_all_looked_for(store: PolicyStore) -> None:
    for length in range(33):
        store.add(block(f"{ip_network((0xC0A80101 >> (32 - length) << (32 - length), length))}"))
    for length in range(32, -1, -1):
        network = ip_network((0xC0A80101 >> (32 - length) << (32 - length), length))
        assert decided(store, "192.168.1.1") == f"drop by block:{network}"
        store.remove(network)
    assert decided(store, "192.168.1.1") == "allow by default"


def test_too_many_ipv6_lengths_are_refused_in_the_kernel(kernel_store: KernelStore) -> None:
    for length in range(64):
        kernel_store.add(block(f"{ip_network((1 << 127, 128 - length), strict=False)}"))
    with pytest.raises(PolicyError, match="64 different prefix lengths"):
        kernel_store.add(block("8000::/32"))
    kernel_store.add(block("8000:1::/100"))


# -- bans and journal -------------------------------------------------------------------------------------------------


def test_bans_outlive_everything_but_their_end(make_store: MakeStore) -> None:
    store = make_store()
    store.ban(ip_address("198.18.1.1"), reason="struck", action=Action.REJECT)
    store.ban(ip_address("2001:db8::1"), ttl=3600)
    store.ban(ip_address("198.18.1.2"), ttl=0.01)
    store.ban(ip_address("198.18.1.3"))
    store.unban(ip_address("198.18.1.3"))
    if isinstance(store, KernelStore):  # as after a reboot: the maps are empty
        for ban in store.bans():
            store.tables.bans.drop(ban_key(ban.network))
    over = boottime_ns() + 10_000_000
    wait_for(lambda: boottime_ns() > over)
    again = make_store()
    assert again.restore_bans() == 2
    assert decided(again, "198.18.1.1") == "reject by ban"
    assert decided(again, "2001:db8::1") == "drop by ban"
    assert decided(again, "198.18.1.2") == "allow by default"
    assert decided(again, "198.18.1.3") == "allow by default"
    found = {ban.source: ban for ban in again.bans()}
    assert found["198.18.1.1"].reason == "struck"
    assert found["2001:db8::1"].expires is not None
    assert 3500e9 < found["2001:db8::1"].expires - boottime_ns() <= 3600e9
    assert again.restore_bans() == 0


def test_a_torn_log_of_bans_costs_no_whole_line(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store()
    for n in range(3):
        store.ban(ip_address(f"198.18.1.{n}"))
    log = tmp_path / "bans"
    log.write_bytes(log.read_bytes()[:-20])
    store.ban(ip_address("198.18.1.9"))
    if isinstance(store, KernelStore):
        for ban in store.bans():
            store.tables.bans.drop(ban_key(ban.network))
    again = make_store()
    assert again.restore_bans() == 3
    assert {ban.source for ban in again.bans()} == {"198.18.1.0", "198.18.1.1", "198.18.1.9"}
    assert len(bans_in(BanLog(log))) == 3


def test_a_disk_that_refuses_is_told_and_hinders_no_ban_of_a_service(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("no directory")
    local = LocalStore()
    local.remember_in(tmp_path / "taken")
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/taken/bans"):
        local.ban(ip_address("198.18.1.2"))  # an operator can try again, and is told
    assert decided(local, "198.18.1.2") == "allow by default"
    local.ban(ip_address("198.18.1.1"), automatic=True)
    assert decided(local, "198.18.1.1") == "drop by ban"
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert f"cannot write {tmp_path}/taken/bans" in caplog.text
    assert f"cannot write the journal {tmp_path}/taken/journal" in caplog.text
    assert local.restore_bans() == 0
    assert "bans of the previous run cannot be read, and stay on disk as they are" in caplog.text
    with pytest.raises(NotADirectoryError):
        local.journal()


def test_a_log_of_bans_that_cannot_be_read_is_not_overwritten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bans = tmp_path / "bans"
    bans.symlink_to("bans")  # to itself: not even root can read it, but its place could be taken
    local = LocalStore()
    local.ban(ip_address("198.18.1.1"))
    local.remember_in(tmp_path)
    assert local.restore_bans() == 0
    assert bans.is_symlink()
    assert "bans of the previous run cannot be read, and stay on disk as they are" in caplog.text


def test_bans_that_find_no_room_hinder_no_start_and_are_not_forgotten(
    kernel_store: KernelStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    larger = LocalStore()
    larger.remember_in(tmp_path)
    for n in range(70):
        larger.ban(ip_address(f"198.18.1.{n}"))
    assert kernel_store.restore_bans() == 64
    assert "6 bans of the previous run are not in force" in caplog.text
    assert "--max-bans above 64" in caplog.text
    again = LocalStore()
    again.remember_in(tmp_path)
    assert again.restore_bans() == 70


def test_full_map_of_bans_is_refused_with_the_remedy(kernel_store: KernelStore) -> None:
    for n in range(64):
        kernel_store.ban(ip_address(f"198.18.1.{n}"))
    with pytest.raises(PolicyError, match="--max-bans above 64"):
        kernel_store.ban(ip_address("198.18.2.1"))
    assert len(kernel_store.bans()) == 64


def test_the_journal_says_who_changed_what_and_outlives_its_writer(make_store: MakeStore) -> None:
    store = make_store()
    store.add(block("198.18.1.0/24", reason="noise"))
    store.remove(ip_network("198.18.1.0/24"))
    store.replace(RuleSet((loaded("a", Action.DROP, "198.18.0.0/24", "198.18.1.0/24"),)), origin="policy.toml")
    store.ban(ip_address("198.18.1.1"), ttl=60, reason="struck")
    store.unban(ip_address("198.18.1.1"))
    store.set_settings(Settings(Action.DROP))
    entries = make_store().journal()
    assert [entry["what"] for entry in entries] == ["add", "remove", "load", "ban", "unban", "settings"]
    assert [entry["revision"] for entry in entries] == [1, 2, 3, 3, 3, 4]
    assert [entry.get("ban_revision") for entry in entries] == [None, None, None, 1, 2, None]
    assert entries[0]["source"] == "198.18.1.0/24"
    assert entries[2]["prefixes"] == 2
    assert entries[2]["origin"] == "policy.toml"
    who = entries[0]["who"]
    assert isinstance(who, dict)
    assert who["uid"] == os.getuid()
    assert who["pid"] == os.getpid()


def test_a_journal_is_bounded_and_a_torn_line_is_skipped(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", max_bytes=4096)
    threads = [threading.Thread(target=lambda: [journal.append("add", {"n": n}) for n in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert kept <= 2 * (4096 + 300)
    assert len(journal.read()) == sum(len(path.read_text().splitlines()) for path in tmp_path.iterdir())
    with (tmp_path / "journal").open("ab") as file:
        file.write(b'{"what": "torn')
    journal.append("last", {})
    assert journal.read(1)[0]["what"] == "last"
    assert all(json.dumps(entry) for entry in journal.read())


def test_nothing_of_a_set_that_was_replaced_is_kept_in_the_kernel(kernel_store: KernelStore) -> None:
    for n in range(5):
        kernel_store.replace(RuleSet((loaded(f"n{n}", Action.DROP, f"198.18.{n}.0/24"),)))
    infos = bpf.map_lookup_batch(kernel_store.tables.maps["rule_info"], 4, abi.RULE_INFO.size)
    assert len(infos) == 1
    sets = [kernel_store.tables.sets.open(which) for which in (0, 1)]
    assert min(opened.pages for opened in sets) == 1
    for opened in sets:
        opened.close()
