"""Bans are of the source that is counted, leave room for operators, and outlive a start by the million."""

from __future__ import annotations

import errno
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path

import pytest

from rama_ebpf.control.api import ControlApi
from rama_ebpf.control.events import EventHub
from rama_ebpf.control.policy_thread import PolicyThread
from rama_ebpf.control.worker_requests import WorkerRequests
from rama_ebpf.core.client import SourceLengths
from rama_ebpf.kernel import bpf
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy import ban_snapshot, ban_walk
from rama_ebpf.policy import store as policy_store
from rama_ebpf.policy.ban_log import BanLog
from rama_ebpf.policy.ban_record import BanBlock, ban_key, ban_value
from rama_ebpf.policy.ban_snapshot import write_snapshot
from rama_ebpf.policy.ban_walk import BanRound, BanWalk
from rama_ebpf.policy.bans import Bans
from rama_ebpf.policy.kernel_store import KernelStore
from rama_ebpf.policy.local import LocalStore
from rama_ebpf.policy.rule import Action, Ban, PolicyError, Rule, Stage, boottime_ns, parse_ttl
from rama_ebpf.policy.store import PolicyStore

from .conftest import bans_in

MOST = 64
"""How many bans the stores here hold."""
SHARE = 56
"""How many of them services may make."""
HOUR = 3600 * 10**9


@pytest.fixture(params=["kernel", "local"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], PolicyStore]]:
    """Opens a store with room for 64 bans, again and again; its bans are kept in ``tmp_path``."""
    opened: list[KernelStore] = []

    def make() -> PolicyStore:
        if request.param == "local":
            store: PolicyStore = LocalStore(max_entries=MOST)
        else:
            opened.append(KernelStore(request.getfixturevalue("pinned")))
            store = opened[-1]
        store.remember_in(tmp_path)
        return store

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def store(make_store: Callable[[], PolicyStore]) -> PolicyStore:
    return make_store()


def stage(store: PolicyStore, address: str) -> Stage:
    return store.verdict(ip_address(address), 1080).stage


def sources(store: PolicyStore) -> set[str]:
    return {ban.source for ban in store.bans()}


def struck(store: PolicyStore, address: str, ttl: float = 3600, reason: str = "strikes") -> Ban:
    return store.ban(store.source(ip_address(address)), ttl=ttl, reason=reason, automatic=True)


# -- whom a ban shuts out ---------------------------------------------------------------------------------------------


def test_a_service_s_ban_shuts_out_all_addresses_of_the_source(store: PolicyStore) -> None:
    assert struck(store, "2001:db8:7::1").source == "2001:db8:7::/64"
    assert struck(store, "198.18.7.7").source == "198.18.7.7"
    assert stage(store, "2001:db8:7::ffff") is Stage.BAN
    assert stage(store, "2001:db8:7:0:ffff:ffff:ffff:ffff") is Stage.BAN
    assert stage(store, "2001:db8:7:1::1") is Stage.DEFAULT
    assert stage(store, "198.18.7.8") is Stage.DEFAULT
    assert stage(store, "::ffff:198.18.7.7") is Stage.BAN


def test_what_stands_for_a_source_can_be_set_and_earlier_bans_stay(store: PolicyStore) -> None:
    struck(store, "2001:db8:7::1")
    store.set_source_lengths(SourceLengths(24, 48))
    assert struck(store, "2001:db8:8:9::1").source == "2001:db8:8::/48"
    assert struck(store, "198.18.7.7").source == "198.18.7.0/24"
    for address in ("2001:db8:7::2", "2001:db8:8:a::1", "198.18.7.200"):
        assert stage(store, address) is Stage.BAN, address
    assert stage(store, "2001:db8:7:1::2") is Stage.DEFAULT
    assert store.unban(ip_network("198.18.7.0/24"))
    assert stage(store, "198.18.7.200") is Stage.DEFAULT


def test_more_lengths_than_are_looked_for_are_refused_until_those_of_one_are_gone(store: PolicyStore) -> None:
    for length in (64, 60, 56):
        store.set_source_lengths(SourceLengths(32, length))
        struck(store, "2001:db8:7::1")
    store.set_source_lengths(SourceLengths(32, 52))
    with pytest.raises(PolicyError, match="prefix lengths 64, 60, 56 already"):
        struck(store, "2001:db8:7::1")
    store.ban(ip_address("2001:db8:9::1"))  # an exact address is always one of them
    assert store.unban(ip_network("2001:db8:7::/60"))
    store.sweep()
    assert struck(store, "2001:db8:7::1").source == "2001:db8:7::/52"
    assert stage(store, "2001:db8:9::1") is Stage.BAN


def test_of_two_bans_the_longer_prefix_decides(store: PolicyStore) -> None:
    store.ban(ip_network("2001:db8:7::/64"), action=Action.DROP)
    store.ban(ip_address("2001:db8:7::1"), action=Action.REJECT)
    assert store.verdict(ip_address("2001:db8:7::1"), 1080).action is Action.REJECT
    assert store.verdict(ip_address("2001:db8:7::2"), 1080).action is Action.DROP
    store.unban(ip_address("2001:db8:7::1"))
    assert store.verdict(ip_address("2001:db8:7::1"), 1080).action is Action.DROP


def test_an_operator_s_ban_is_of_an_address_or_of_one_source(store: PolicyStore) -> None:
    api = ControlApi(store)
    assert api.ban({"address": "2001:db8:7::1"})["address"] == "2001:db8:7::1"
    assert stage(store, "2001:db8:7::2") is Stage.DEFAULT
    assert api.ban({"address": "2001:db8:7::/64"})["address"] == "2001:db8:7::/64"
    for other in ("2001:db8:7::/48", "198.18.0.0/24", "0.0.0.0/0"):
        with pytest.raises(PolicyError, match=f"rama-ebpf block {other}"):
            api.ban({"address": other})
    test = api.test({"source": "2001:db8:7::9", "port": 1080})
    assert (test["stage"], test["banned"]) == ("ban", "2001:db8:7::/64")
    left = api.remove({"source": "2001:db8:7::9"})
    assert (left["ban_lifted"], left["still_banned"]) == (False, "2001:db8:7::/64")
    assert api.remove({"source": "2001:db8:7::/64"})["ban_lifted"] is True
    assert sources(store) == {"2001:db8:7::1"}


def test_times_above_ten_years_are_ten_years(store: PolicyStore) -> None:
    for text in ("11y".replace("11y", "5000d"), "99999999999999999999", "9" * 39 + "w"):
        assert parse_ttl(text) == 315_360_000 * 10**9, text
    answer = ControlApi(store).ban({"address": "198.18.1.1", "ttl": "604800000000w"})
    assert answer["expires_in"] == pytest.approx(315_360_000, abs=60)
    with pytest.raises(PolicyError, match="use 1 second"):
        parse_ttl("0")


async def test_a_ban_does_not_shut_out_the_balancer_that_named_the_client(store: PolicyStore) -> None:
    with PolicyThread() as thread:
        requests = WorkerRequests(store, thread, EventHub())
        await requests.ban(requests.target("2001:db8:7::66", "2001:db8:7::1"), 3600, "strikes")
        await requests.ban(requests.target("2001:db8:8::66", "2001:db8:7::1"), 3600, "strikes")
    assert sources(store) == {"2001:db8:7::66", "2001:db8:8::/64"}
    assert stage(store, "2001:db8:7::1") is Stage.DEFAULT


# -- room -------------------------------------------------------------------------------------------------------------


def test_a_table_full_of_services_bans_has_room_for_operators_and_new_offenders(store: PolicyStore) -> None:
    for n in range(2 * MOST):
        struck(store, f"2001:db8:{n + 1:x}::1", ttl=1000 + n)
    assert len(store.bans()) == SHARE
    for n in range(MOST - SHARE):
        store.ban(ip_address(f"198.18.1.{n}"), reason="an operator's")
    assert len(store.bans()) == MOST
    struck(store, "198.18.2.1", ttl=5000)
    assert stage(store, "198.18.2.1") is Stage.BAN
    store.ban(ip_address("198.18.1.99"), reason="an operator's")  # beyond the room that is kept
    assert stage(store, "198.18.1.99") is Stage.BAN
    operators = {ban.source for ban in store.bans() if not ban.automatic}
    assert operators == {f"198.18.1.{n}" for n in (*range(MOST - SHARE), 99)}
    assert len(store.bans()) == MOST


def test_those_that_end_first_make_room(store: PolicyStore) -> None:
    order = list(range(3 * SHARE))
    random.Random(7).shuffle(order)
    for n in order[: 2 * SHARE]:
        struck(store, f"198.18.3.{n}", ttl=1000 + 10 * n)
    best: set[int] = set()
    for n in order[: 2 * SHARE]:  # as a reader of the rule would do it
        if len(best) == SHARE:
            best.remove(min(best))
        best.add(n)
    assert sources(store) == {f"198.18.3.{n}" for n in best}


def test_a_ban_that_made_room_does_not_come_back(make_store: Callable[[], PolicyStore], tmp_path: Path) -> None:
    store = make_store()
    for n in range(2 * SHARE):
        struck(store, f"198.18.3.{n}", ttl=1000 + n)
    kept = {ban.source for ban in bans_in(BanLog(tmp_path / "bans"))}
    assert kept == sources(store)


def test_a_service_s_ban_is_on_disk_before_it_is_in_force(
    store: PolicyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be made without the lock, and the audit of another server takes away what the disk does not know."""
    put, seen = Bans.put, []

    def look(bans: Bans, ban: Ban) -> list[Ban]:
        seen.append(str(ban.network) in {str(kept.network) for kept in bans_in(BanLog(tmp_path / "bans"))})
        return put(bans, ban)

    monkeypatch.setattr(Bans, "put", look)
    store.ban(ip_address("198.18.1.1"), ttl=60, automatic=True)
    store.ban(ip_address("2001:db8::1"), ttl=60, automatic=True)
    assert seen == [True, True]


def test_a_service_s_ban_without_room_leaves_the_disk_as_it_was(store: PolicyStore, tmp_path: Path) -> None:
    for number in range(MOST):
        store.ban(ip_address(f"198.18.0.{number}"))
    before = {ban.network for ban in bans_in(BanLog(tmp_path / "bans"))}
    with pytest.raises(PolicyError):
        store.ban(ip_address("198.18.9.9"), ttl=60, automatic=True)
    assert {ban.network for ban in bans_in(BanLog(tmp_path / "bans"))} == before


def test_operators_bans_alone_fill_the_table_and_a_service_s_is_refused(store: PolicyStore) -> None:
    for n in range(MOST):
        store.ban(ip_address(f"198.18.1.{n}"))
    with pytest.raises(PolicyError, match="banned already"):
        struck(store, "198.18.2.1")
    assert len(store.bans()) == MOST


def test_ended_bans_hold_no_room(store: PolicyStore) -> None:
    for n in range(MOST):
        store.ban(ip_address(f"198.18.1.{n}"), ttl=1e-9)
    store.ban(ip_address("198.18.2.1"))
    assert stage(store, "198.18.2.1") is Stage.BAN


def test_a_burst_is_one_ban(store: PolicyStore, tmp_path: Path) -> None:
    first = struck(store, "2001:db8:7::1")
    written, revision = (tmp_path / "bans").read_bytes(), store.ban_revision
    for n in range(50):
        assert struck(store, f"2001:db8:7::{n:x}").created == first.created
        assert store.stands(store.source(ip_address(f"2001:db8:7::{n:x}")), 3600)
    assert ((tmp_path / "bans").read_bytes(), store.ban_revision) == (written, revision)
    assert not store.stands(ip_network("2001:db8:7::/64"), 7200)
    assert struck(store, "2001:db8:7::1", ttl=7200).created > first.created


def test_a_service_never_touches_an_operator_s_ban(store: PolicyStore) -> None:
    store.ban(ip_network("2001:db8:7::/64"), ttl=60, reason="an operator's")
    assert struck(store, "2001:db8:7::1").reason == "an operator's"
    assert store.stands(ip_network("2001:db8:7::/64"), 3600)
    (ban,) = store.bans()
    assert not ban.automatic


def test_bans_have_a_revision_of_their_own(store: PolicyStore) -> None:
    before = store.revision, store.ban_revision
    struck(store, "198.18.1.1")
    store.ban(ip_address("198.18.1.2"))
    store.unban(ip_address("198.18.1.2"))
    assert (store.revision, store.ban_revision) == (before[0], before[1] + 3)


def test_a_million_bans_are_not_looked_through_at_each_sweep(
    store: PolicyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_store, "_QUICK_SURVEY", -1.0)  # as if they were so many
    monkeypatch.setattr(policy_store, "_SURVEY_SHARE", 1e12)
    looked: list[int] = []
    survey = store._bans.survey
    monkeypatch.setattr(store._bans, "survey", lambda now, revision: looked.append(now) or survey(now, revision))
    struck(store, "198.18.0.1", ttl=0.001)
    store.add(Rule("drop:198.18.9.9/32", (ip_network("198.18.9.9"),), Action.DROP, expires=boottime_ns() + 10**6))
    now = boottime_ns() + HOUR
    assert store.sweep(now=now) == 2
    struck(store, "198.18.0.2", ttl=0.001)
    store.add(Rule("drop:198.18.9.9/32", (ip_network("198.18.9.9"),), Action.DROP, expires=boottime_ns() + 10**6))
    assert store.sweep(now=now) == 1  # rules as ever
    assert len(looked) == 1


def test_a_sweep_forgets_what_has_ended_and_not_what_was_banned_anew(store: PolicyStore) -> None:
    store.ban(ip_address("198.18.1.1"), ttl=1e-9)
    struck(store, "2001:db8:7::1", ttl=1e-9)
    survey = store._bans.survey(boottime_ns(), store.ban_revision)
    store.ban(ip_address("198.18.1.1"))
    assert store._bans.settle(survey, boottime_ns()) == 1
    assert sources(store) == {"198.18.1.1"}
    assert stage(store, "198.18.1.1") is Stage.BAN


# -- on disk ----------------------------------------------------------------------------------------------------------


def rows(count: int, expires: int | None = None) -> list[tuple[bytes, bytes]]:
    bans = (
        Ban(
            IPv4Network((0xC6120000 + n, 32)) if n % 2 else IPv6Network((0x20010DB8 << 96 | n << 64, 64)),
            Action.DROP,
            expires,
            0,
            0,
            "strikes",
            automatic=True,
        )
        for n in range(count)
    )
    return [(ban_key(ban.network), ban_value(ban)) for ban in bans]


def test_a_snapshot_and_the_log_after_it_are_what_is_in_force(
    make_store: Callable[[], PolicyStore], tmp_path: Path
) -> None:
    store = make_store()
    for n in range(10):
        store.ban(ip_address(f"198.18.1.{n}"), reason="x" * 200, ttl=None if n % 2 else 3600)
    log = BanLog(tmp_path / "bans")
    log.compact(nullcontext, store._bans.in_force)
    assert not (tmp_path / "bans").exists()
    store.unban(ip_address("198.18.1.3"))
    store.ban(ip_address("198.18.1.4"), reason="again")
    struck(store, "2001:db8:7::1")
    found = {ban.source: ban for ban in bans_in(log)}
    expected = {ban.source: ban for ban in store.bans()}
    assert found.keys() == expected.keys() == {*(f"198.18.1.{n}" for n in range(10) if n != 3), "2001:db8:7::/64"}
    for source, ban in found.items():
        assert (ban.action, ban.expires, ban.reason, ban.automatic) == (
            expected[source].action,
            expected[source].expires,
            expected[source].reason,
            expected[source].automatic,
        )


class Killed(BaseException):
    pass


def test_a_compaction_that_is_killed_anywhere_loses_nothing(
    store: PolicyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = BanLog(tmp_path / "bans")
    calls = ("open", "rename", "fsync", "fdatasync", "unlink")
    for stop in range(100):
        address = ip_address(f"198.18.{stop // 30}.{stop % 30}")
        store.ban(address)
        store.unban(address)
        store.ban(ip_address(f"198.18.1.{stop % 20}"))
        count = 0

        def dying(real: Callable[..., object], *, last: int = stop) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal count
                count += 1
                if count > last:
                    raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                log.compact(nullcontext, store._bans.in_force)
                finished = True
            except Killed:
                finished = False
        assert {ban.source for ban in bans_in(BanLog(tmp_path / "bans"))} == sources(store), stop
        if finished:
            break
    assert stop > 5
    assert {path.name for path in tmp_path.iterdir()} - {"journal"} == {"bans", "bans.snapshot"}


def test_a_change_while_a_snapshot_is_made_is_in_the_log(store: PolicyStore, tmp_path: Path) -> None:
    for n in range(10):
        store.ban(ip_address(f"198.18.1.{n}"))

    def blocks() -> Iterator[BanBlock]:
        found = list(store._bans.in_force())
        store.unban(ip_address("198.18.1.1"))
        store.ban(ip_address("198.18.1.77"))
        yield from found

    log = BanLog(tmp_path / "bans")
    log.compact(nullcontext, blocks)
    assert {ban.source for ban in bans_in(log)} == sources(store)


def walk_on(walk: BanWalk, count: int) -> tuple[BanRound, list[Ban]]:
    """Walk to the end of the round."""
    while (ended := walk.next(count)) is None:
        pass
    return ended


def test_a_walk_finds_bans_that_are_on_disk_and_not_in_force_by_the_disk_s_last_word(
    store: PolicyStore, tmp_path: Path
) -> None:
    for n in range(10):
        store.ban(ip_address(f"198.18.1.{n}"))
    BanLog(tmp_path / "bans").compact(nullcontext, store._bans.in_force)
    struck(store, "2001:db8:7::1")
    store.unban(ip_address("198.18.1.3"))
    walk = store.repairs.walk_bans()
    assert walk is not None
    assert walk_on(walk, 1)[1] == []
    for gone in ("198.18.1.3", "198.18.1.4", "198.18.1.5", "198.18.1.6", "2001:db8:7::"):
        store._bans.drop(store.source(ip_address(gone)))
    ended, lost = walk_on(walk, 1000)
    assert {ban.source for ban in lost} == {"198.18.1.4", "198.18.1.5", "198.18.1.6", "2001:db8:7::/64"}
    assert all(map(ended.is_lost, lost))

    store.repairs.bring_back_ban(next(ban for ban in lost if ban.source == "198.18.1.4"))
    store.ban(ip_address("198.18.1.5"))  # meanwhile
    with (tmp_path / "bans").open("ab") as log:
        log.write(b'{"address": "198.18.1.6", "lifted": true}\n{"address": "torn')
    assert [ban.source for ban in lost if ended.is_lost(ban)] == ["2001:db8:7::/64"]

    BanLog(tmp_path / "bans").compact(nullcontext, store._bans.in_force)  # other files by now
    assert not any(map(ended.is_lost, lost))
    assert walk_on(walk, 1000)[1] == []
    walk.close()


def test_a_walk_looks_at_no_more_than_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ban_snapshot, "_BLOCK", 16)
    monkeypatch.setattr(ban_snapshot, "_BLOCK_SIZE", 4 + 16 * len(b"".join(rows(1)[0])))
    monkeypatch.setattr(ban_walk, "_CHUNK", 512)
    write_snapshot(tmp_path / "bans.snapshot", [BanBlock.of(rows(500))])
    (tmp_path / "bans").write_text("".join(f'{{"address": "10.0.0.{n}", "lifted": true}}\n' for n in range(200)))
    looked = 0

    def has(_key: bytes) -> bool:
        nonlocal looked
        looked += 1
        return True

    walk = BanLog(tmp_path / "bans").walk(has)
    turns, ended = 0, None
    while ended is None:
        before, turns = looked, turns + 1
        ended = walk.next(20)
        assert looked - before < 20 + 16
    assert (looked, walk.known, ended[1]) == (500, 700, [])
    assert turns >= 700 // 36
    walk.close()


def test_a_walk_finds_bans_that_are_in_force_and_not_on_disk_by_the_disk_s_last_word(
    store: PolicyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(10):
        store.ban(ip_address(f"198.18.1.{n}"))
    BanLog(tmp_path / "bans").compact(nullcontext, store._bans.in_force)
    store.ban(ip_address("198.18.2.1"))
    store.unban(ip_address("198.18.1.3"))
    with monkeypatch.context() as patch:
        patch.setattr(BanLog, "banned", _disk_full)
        struck(store, "2001:db8:7::1")  # in force, and written when the disk takes it
    walk = store.repairs.walk_bans()
    assert walk is not None
    assert store.repairs.unknown_bans(walk_on(walk, 1)[0]) == []
    foreign = [Ban(ip_network(f"198.18.{n}.1"), Action.DROP, None, 0, 0, "") for n in (3, 4)]
    for ban in foreign:
        store._bans.put(ban)
    store._bans.put(replace(foreign[0], network=ip_network("198.18.1.3/32")))
    ended, _ = walk_on(walk, 1000)
    found = store.repairs.unknown_bans(ended)
    assert {ban.source for ban in found} == {"198.18.3.1", "198.18.4.1", "198.18.1.3"}
    BanLog(tmp_path / "bans").banned(foreign[0])  # meanwhile
    assert {ban.source for ban in found if store.repairs.is_unknown_ban(ended, ban)} == {"198.18.4.1", "198.18.1.3"}
    for ban in found[:]:
        if store.repairs.is_unknown_ban(ended, ban):
            store.repairs.take_ban_away(ban)
    assert store.repairs.unknown_bans(walk_on(walk, 1000)[0]) == []
    assert {ban.source for ban in store.bans()} >= {"198.18.3.1", "198.18.2.1", "2001:db8:7::/64"}
    walk.close()
    store.sync()
    assert "2001:db8:7::/64" in {ban.source for ban in bans_in(BanLog(tmp_path / "bans"))}


def _disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_damaged_block_of_a_snapshot_costs_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "bans.snapshot"
    assert write_snapshot(path, [BanBlock.of(rows(5000))]) == 5000
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert len(bans_in(BanLog(tmp_path / "bans"))) == 5000 - 1024
    assert f"1024 bans of {path} are damaged" in caplog.text
    path.write_bytes(data[: -len(data) // 3])
    assert 0 < len(bans_in(BanLog(tmp_path / "bans"))) < 5000 - 1024
    data[0] ^= 1
    path.write_bytes(data)
    assert bans_in(BanLog(tmp_path / "bans")) == []
    assert path.with_name("bans.snapshot.damaged").read_bytes() == data
    path.write_bytes(b"")
    assert bans_in(BanLog(tmp_path / "bans")) == []


def test_after_a_reboot_a_snapshot_holds_for_as_long_as_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, now = tmp_path / "bans.snapshot", boottime_ns()
    endless, short, long = (rows(3, end)[n] for n, end in enumerate((None, now + HOUR, now + 3 * HOUR)))
    with monkeypatch.context() as earlier:
        earlier.setattr(ban_snapshot, "boot_id", lambda: "a" * 36)
        wall = time.time() - 7200
        earlier.setattr(ban_snapshot.time, "time", lambda: wall)
        write_snapshot(path, [BanBlock.of([endless, short, long])])
    left = {ban.source: ban.expires for ban in bans_in(BanLog(tmp_path / "bans"))}
    assert len(left) == 2  # the short one ended meanwhile
    (end,) = (end for end in left.values() if end is not None)
    assert abs(end - (boottime_ns() + HOUR)) < 60 * 10**9
    # A wall clock that begins in 1970 prolongs nothing.
    monkeypatch.setattr(ban_snapshot.time, "time", lambda: 0.0)
    assert all(
        ban.expires is None or ban.expires <= boottime_ns() + 3 * HOUR for ban in bans_in(BanLog(tmp_path / "bans"))
    )


def test_hostile_bytes_in_the_log_cost_their_line_only(tmp_path: Path) -> None:
    good = [
        json.dumps({"address": address, "action": "drop", "until": None, "created": 1, "reason": ""}).encode()
        for address in ("198.18.1.1", "2001:db8:7::/64", "198.18.1.2")
    ]
    hostile = [
        b"\xef\xbb\xbf" + good[0],
        b"\0" * 100,
        b"[" * 60_000,
        b'{"address": "' + b"9" * 3_000_000 + b'"}',
        good[1],
        good[0].replace(b"198.18.1.1", b"0.0.0.0/0"),
        good[0].replace(b"198.18.1.1", b"198.18.1.9%eth0"),
        good[0].replace(b"null", b"1e999").replace(b"1.1", b"1.3"),
        good[0].replace(b"null", b"1e308").replace(b"1.1", b"1.4"),
        good[0].replace(b"drop", b"allow").replace(b"1.1", b"1.5"),
        good[0].replace(b"}", b', "x": ' + b"[" * 30_000 + b"}").replace(b"1.1", b"1.6"),
        good[0].replace(b": 1,", b": " + b"9" * 5000 + b",").replace(b"1.1", b"1.7"),
        b"\xff\xfe",
        b"",
        good[2],
        good[0].replace(b"1.1", b"1.8")[:-5],
    ]
    (tmp_path / "bans").write_bytes(b"\n".join(hostile))
    assert {ban.source for ban in bans_in(BanLog(tmp_path / "bans"))} == {"198.18.1.1", "2001:db8:7::/64", "198.18.1.2"}


def test_what_a_ban_says_that_disk_and_kernel_cannot_hold_does_not_cost_it(store: PolicyStore, tmp_path: Path) -> None:
    store.ban(ip_address("fe80::1%eth0"), reason="\udcff" + "\N{SNOWMAN}" * 100)
    assert stage(store, "fe80::1") is Stage.BAN
    (kept,), (ban,) = bans_in(BanLog(tmp_path / "bans")), store.bans()
    assert (kept.source, kept.reason) == (ban.source, ban.reason) == ("fe80::1", "?" + "\N{SNOWMAN}" * 20)


def test_a_pipe_among_the_files_holds_no_start_up(store: PolicyStore, tmp_path: Path) -> None:
    for name in ("bans", "bans.snapshot"):
        os.mkfifo(tmp_path / name)
        assert store.restore_bans() == 0
        (tmp_path / name).unlink()


def test_a_line_longer_than_memory_is_never_held(tmp_path: Path) -> None:
    with (tmp_path / "bans").open("wb") as file:
        file.write(b'{"address": "198.18.1.1", "action": "drop", "until": null, "created": 1, "reason": ""}\n')
        file.truncate(3 << 30)  # NUL bytes, of which the disk holds none
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"address": "198.18.1.2", "action": "drop", "until": null, "created": 1, "reason": ""}\n')
    assert {ban.source for ban in bans_in(BanLog(tmp_path / "bans"))} == {"198.18.1.1", "198.18.1.2"}


@pytest.mark.root
@pytest.mark.ebpf
def test_many_bans_are_put_into_force_in_batches(
    pinned: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshot(tmp_path / "bans.snapshot", [BanBlock.of(rows(60))])
    calls = []
    for name in ("map_update", "map_update_batch"):
        real = getattr(bpf, name)
        monkeypatch.setattr(
            bpf, name, lambda *args, real=real, name=name, **more: (calls.append(name), real(*args, **more))[1]
        )
    with KernelStore(pinned) as store:
        store.remember_in(tmp_path)
        assert store.restore_bans() == 60
        assert calls.count("map_update_batch") == 1
        assert calls.count("map_update") <= 2
        assert stage(store, "198.18.0.1") is Stage.BAN
        assert stage(store, "2001:db8:0:2::5") is Stage.BAN
        assert store.restore_bans() == 0


def test_where_there_is_no_room_operators_bans_and_those_that_end_last_are_restored(
    make_store: Callable[[], PolicyStore], tmp_path: Path
) -> None:
    larger = LocalStore()
    larger.remember_in(tmp_path)
    for n in range(100):
        larger.ban(ip_address(f"198.18.3.{n}"), ttl=1000 + n, automatic=True)
    for n in range(10):
        larger.ban(ip_address(f"198.18.1.{n}"))
    store = make_store()
    assert store.restore_bans() == MOST
    expected = {*(f"198.18.1.{n}" for n in range(10)), *(f"198.18.3.{n}" for n in range(46, 100))}
    assert sources(store) == expected
    struck(store, "198.18.4.1")
    assert stage(store, "198.18.4.1") is Stage.BAN
