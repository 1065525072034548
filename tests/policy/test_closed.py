"""The gate stays closed where a writer dies between two writes, room is short, or the disk refuses."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from rama_ebpf.control.api import ControlApi
from rama_ebpf.control.enforced import InForce
from rama_ebpf.kernel import bpf
from rama_ebpf.kernel.gate_state import GateState
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.atomic import write_atomically
from rama_ebpf.policy.ban_log import BanLog
from rama_ebpf.policy.kernel_store import KernelStore
from rama_ebpf.policy.local import LocalStore
from rama_ebpf.policy.rule import Action, Ban, PolicyError, Rule, RuleSet, Settings, boottime_ns
from rama_ebpf.policy.store import PolicyStore

from .conftest import bans_in


class Killed(BaseException):
    """The writer's end."""


@pytest.fixture
def kernel_store(pinned: Instance, tmp_path: Path) -> Iterator[KernelStore]:
    with KernelStore(pinned) as store:
        store.remember_in(tmp_path)
        yield store


@pytest.fixture(params=["kernel", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> PolicyStore:
    if request.param == "kernel":
        made: PolicyStore = request.getfixturevalue("kernel_store")
        return made
    local = LocalStore(max_entries=4095)
    local.remember_in(tmp_path)
    return local


def block(source: str, **more: object) -> Rule:
    return Rule(f"block:{source}", (ip_network(source),), Action.DROP, **more)  # type: ignore[arg-type]


def told(store: KernelStore) -> bool:
    """Whether the programs were told of every entry there is."""
    gate = store.tables.gate()
    before = gate
    store.rebuild()
    counted = store.tables.gate()
    lengths = all(counted.runtime[n] & ~before.runtime[n] == 0 for n in (0, 1))
    return lengths and counted.flags & ~before.flags == 0


@pytest.mark.parametrize("calls", range(12))
def test_the_programs_know_of_every_entry_wherever_a_writer_dies(
    kernel_store: KernelStore, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    written, deleted = bpf.map_update, bpf.map_delete
    changes = (
        lambda: kernel_store.add(block("198.18.1.1")),
        lambda: kernel_store.add(block("2001:db8::/48", port=443)),
        lambda: kernel_store.ban(ip_address("198.18.1.2")),
        lambda: kernel_store.set_failsafe([ip_network("198.18.9.0/24")]),
        lambda: kernel_store.remove(ip_network("198.18.1.1")),
        lambda: kernel_store.unban(ip_address("198.18.1.2")),
    )
    for change in changes:
        left = calls

        def count() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        def update(fd: int, key: bytes, value: bytes, flags: int = bpf.BPF_ANY) -> None:
            count()
            written(fd, key, value, flags)

        def delete(fd: int, key: bytes) -> bool:
            count()
            return deleted(fd, key)

        with monkeypatch.context() as patch:
            patch.setattr(bpf, "map_update", update)
            patch.setattr(bpf, "map_delete", delete)
            with contextlib.suppress(Killed):
                change()
        assert told(kernel_store)
        kernel_store.add(block("198.18.1.7"))
        assert told(kernel_store)
        change()


@pytest.mark.parametrize("died", [True, False], ids=["killed", "refused"])
def test_a_failsafe_changes_as_a_whole_and_the_next_sweep_forgets_the_other(
    kernel_store: KernelStore, monkeypatch: pytest.MonkeyPatch, died: bool
) -> None:
    before = [ip_network("198.18.0.0/16"), ip_network("198.18.1.0/24"), ip_network("2001:db8::/32")]
    after = [ip_network("198.18.1.128/25"), ip_network("198.18.2.0/24"), ip_network("0.0.0.0/1")]
    sources = [*map(ip_address, ("198.18.1.1", "198.18.1.200", "198.18.2.2", "198.18.9.9", "9.9.9.9", "2001:db8::1"))]
    updated, deleted = bpf.map_update, bpf.map_delete
    kernel_store.set_settings(Settings(Action.DROP))

    def let_in() -> list[bool]:
        return [kernel_store.verdict(source, 1080).allowed for source in sources]

    kernel_store.set_failsafe(before, (22,))
    old, new = let_in(), [any(source in network for network in after) for source in sources]
    for calls in range(40):
        kernel_store.set_failsafe(before, (22,))
        left, done = calls, False

        def count() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed if died else OSError(errno.ENOMEM, "no memory")

        def update(fd: int, key: bytes, value: bytes, flags: int = bpf.BPF_ANY) -> None:
            count()
            updated(fd, key, value, flags)
            assert let_in() in (old, new)

        def delete(fd: int, key: bytes) -> bool:
            count()
            return deleted(fd, key)

        with monkeypatch.context() as patch:
            patch.setattr(bpf, "map_update", update)
            patch.setattr(bpf, "map_delete", delete)
            with contextlib.suppress(Killed, OSError):
                kernel_store.set_failsafe(after)
                done = True
        found = let_in()
        assert found in ([new] if done else [old, new] if died else [old])
        assert set(kernel_store.failsafe()) == set(before if found == old else after)
        kernel_store.sweep()
        assert let_in() == found
        assert kernel_store.tables.failsafe.is_sound()
        assert kernel_store.tables.failsafe.networks(1 - kernel_store.tables.gate().failsafe_list) == []
        if done:
            break
    assert done
    assert calls >= 4


def test_a_change_writes_the_gate_record_once(kernel_store: KernelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_store.add(block("198.18.1.1"))  # its length is known from now on
    kernel_store.set_failsafe([ip_network("198.18.9.0/24")])
    written, gate, count = bpf.map_update, kernel_store.tables.maps["gate"], 0

    def update(fd: int, key: bytes, value: bytes, flags: int = bpf.BPF_ANY) -> None:
        nonlocal count
        count += fd == gate
        written(fd, key, value, flags)

    monkeypatch.setattr(bpf, "map_update", update)
    for change in (
        lambda: kernel_store.add(block("198.18.1.2")),
        lambda: kernel_store.add(Rule("other", (ip_network("198.18.1.2"),), Action.ALLOW)),
        lambda: kernel_store.remove(ip_network("198.18.1.2")),
        lambda: kernel_store.set_failsafe([ip_network("198.18.8.0/24")]),
        lambda: kernel_store.set_settings(Settings(Action.DROP)),
    ):
        count = 0
        change()
        assert count == 1


def test_a_service_never_shortens_a_ban(store: PolicyStore) -> None:
    address = ip_address("198.18.1.1")
    store.ban(address, reason="for good")
    assert store.ban(address, ttl=60, reason="strikes", automatic=True).reason == "for good"
    assert store.bans()[0].expires is None
    store.ban(address, ttl=60, reason="the operator's own wish")
    assert store.ban(address, ttl=3600, reason="strikes", automatic=True).reason == "the operator's own wish"
    other = ip_address("198.18.1.2")
    store.ban(other, ttl=60, reason="strikes", automatic=True)
    assert store.ban(other, ttl=3600, reason="more strikes", automatic=True).reason == "more strikes"


def test_unblock_of_a_port_leaves_the_ban(store: PolicyStore) -> None:
    api = ControlApi(store)
    store.ban(ip_address("198.18.1.1"))
    store.add(block("198.18.1.1", port=443))
    answer = api.remove({"source": "198.18.1.1", "port": 443})
    assert (answer["removed"], answer["ban_lifted"]) == (["block:198.18.1.1"], False)
    assert len(store.bans()) == 1
    assert api.remove({"source": "198.18.1.1"})["ban_lifted"] is True


def test_a_lift_that_the_disk_refuses_changes_nothing(store: PolicyStore, tmp_path: Path) -> None:
    store.ban(ip_address("198.18.1.1"))
    (tmp_path / "taken").write_text("no directory")
    store.remember_in(tmp_path / "taken")
    with pytest.raises(OSError, match="cannot write"):
        store.unban(ip_address("198.18.1.1"))
    assert len(store.bans()) == 1


def test_expired_rules_hold_no_room_and_an_own_rule_is_replaced_in_a_full_table(store: PolicyStore) -> None:
    past = boottime_ns() - 1
    store.add_all([block(f"198.18.{n >> 8}.{n & 255}", expires=past) for n in range(4095)])
    store.add_all([block(f"198.19.{n >> 8}.{n & 255}") for n in range(4000)])
    for n in range(4000, 4095):
        store.add(block(f"198.19.{n >> 8}.{n & 255}"))
    store.add(Rule("mine", (ip_network("198.19.0.1"),), Action.ALLOW))
    assert store.verdict(ip_address("198.19.0.1"), 1080).rule == "mine"
    with pytest.raises(PolicyError, match="rules already"):
        store.add(block("198.18.0.1"))


def test_prefix_lengths_of_what_has_ended_hold_no_room(kernel_store: KernelStore) -> None:
    past = boottime_ns() - 1
    for length in range(64):
        kernel_store.add(block(f"2001:db8::/{32 + length}", expires=past))
    kernel_store.add(block("2001:db8::/128"))
    assert kernel_store.verdict(ip_address("2001:db8::"), 1080).rule == "block:2001:db8::/128"
    for length in (96, 80, 64):
        kernel_store.ban(ip_network(f"2001:db8:1::/{length}"), ttl=1e-9, automatic=True)
    kernel_store.ban(ip_address("2001:db8:2::1"))
    kernel_store.ban(ip_network("2001:db8:3::/56"), ttl=60, automatic=True)
    for banned in ("2001:db8:2::1", "2001:db8:3::1"):
        assert kernel_store.verdict(ip_address(banned), 1080).rule == "ban"


def test_a_set_is_replaced_in_its_own_size(store: PolicyStore) -> None:
    for name in "ab":
        rules = (
            Rule(f"{name}{n}", (ip_network(f"198.18.{n >> 8}.{n & 255}"),), Action.DROP, origin="file")
            for n in range(4095)
        )
        store.replace(RuleSet(tuple(rules)))
    assert store.verdict(ip_address("198.18.0.1"), 1080).rule == "b1"


def _log(tmp_path: Path, *rows: dict[str, object]) -> BanLog:
    (tmp_path / "bans").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return BanLog(tmp_path / "bans")


def test_more_rules_than_there_is_room_for_at_once_change_nothing_and_can_be_changed_in_parts() -> None:
    store, network = LocalStore(max_entries=9000), ip_network("198.18.1.1/32")

    def named(name: str, count: int) -> tuple[Rule, ...]:
        return tuple(Rule(f"{name}{number}", (network,), Action.DROP, origin="file") for number in range(count))

    first, second = named("first", 8600), named("second", 8600)
    store.replace(RuleSet(first))
    with pytest.raises(
        PolicyError, match=r"8600 rules are new or changed, also by name, and there is no room .* parts"
    ):
        store.replace(RuleSet(second))
    assert store.ruleset().rules == first
    store.replace(RuleSet(second[:8000] + first[8000:]))
    store.replace(RuleSet(second))
    assert store.ruleset().rules == second


def test_a_ban_ends_when_it_was_to_whatever_the_wall_clock_was_set_to(tmp_path: Path) -> None:
    log = BanLog(tmp_path / "bans")
    given = Ban(ip_network("198.18.1.1"), Action.DROP, boottime_ns() + 3600 * 10**9, 0, 0, "")
    log.banned(given)
    row = json.loads((tmp_path / "bans").read_text())
    for wrong in (-(10**9), 10**9):  # seconds: the clock that was right is wrong now
        (found,) = bans_in(_log(tmp_path, {**row, "until": row["until"] + wrong}))
        assert found.expires is not None
        assert abs(found.expires - boottime_ns() - 3600 * 10**9) < 10**11


def test_no_ban_holds_longer_than_was_given_after_a_boot_with_a_wrong_clock(tmp_path: Path) -> None:
    row = {"address": "198.18.1.1", "action": "drop", "created": 0, "reason": "", "boot": "another", "boot_until": 1}
    (found,) = bans_in(_log(tmp_path, {**row, "until": time.time() + 20 * 365 * 86400, "left": 3600}))
    assert found.expires is not None
    assert found.expires <= boottime_ns() + 3600 * 10**9
    assert bans_in(_log(tmp_path, {**row, "until": time.time() - 1, "left": 3600})) == []


def test_hostile_rows_of_bans_hinder_no_start(tmp_path: Path) -> None:
    good = '{"address": "198.18.1.1", "action": "drop", "until": null, "created": 1, "reason": ""}'
    hostile = (
        good.replace("null", "1e999"),
        good.replace('"created": 1', '"created": 1e999'),
        "[" * 100_000,
        "[]",
        "7",
        good.replace("1.1", "1.3").replace("drop", "dance"),
    )
    (tmp_path / "bans").write_text("\n".join([*hostile, good]) + "\n", encoding="utf-8")
    assert [ban.source for ban in bans_in(BanLog(tmp_path / "bans"))] == ["198.18.1.1"]


def test_what_reads_feeds_keeps_the_settings_that_changed_meanwhile(store: PolicyStore) -> None:
    token, ruleset = store.set_token(), store.ruleset()
    store.set_settings(Settings(Action.DROP))
    store.replace(ruleset, expected_set=token, settings=lambda present: present)
    assert store.settings().default is Action.DROP


def test_what_a_killed_writer_left_is_removed_by_the_next_and_what_a_live_one_writes_stays(tmp_path: Path) -> None:
    file, left, live = tmp_path / "bans", tmp_path / ".bans-killed", tmp_path / ".bans-live"
    left.write_text("torn")
    with live.open("w") as written:
        fcntl.flock(written, fcntl.LOCK_EX)
        write_atomically(file, b"whole")
        assert file.read_bytes() == b"whole"
        assert {path.name for path in tmp_path.iterdir()} == {"bans", ".bans-live"}


def test_what_follows_the_end_of_a_trial_may_fail_and_it_has_ended(
    kernel_store: KernelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (
        RuleSet((Rule(name, (ip_network("198.18.1.0/24"),), Action.DROP, origin="file"),)) for name in ("one", "other")
    )
    kernel_store.replace(one)
    for end, stays in ((kernel_store.roll_back, "one"), (kernel_store.confirm, "other")):
        kernel_store.replace(other, confirm_within=600)
        with monkeypatch.context() as patch:
            patch.setattr(kernel_store.tables.sets, "wait_for_readers", _refuse)
            end()
        assert kernel_store.pending is None
        assert kernel_store.ruleset().rules[0].name == stays
        kernel_store.sweep()
        assert kernel_store.tables.gate().deadline == 0
        kernel_store.replace(one)


def _refuse(*_: object) -> None:
    raise OSError(errno.ENOMEM, "no memory")


def test_a_load_that_dies_before_its_trial_begins_keeps_no_other_out(
    kernel_store: KernelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, calls = kernel_store.tables.put_gate, 0

    def dies(gate: GateState) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first one only prepares
            raise Killed
        put(gate)

    with monkeypatch.context() as patch:
        patch.setattr(kernel_store.tables, "put_gate", dies)
        with contextlib.suppress(Killed):
            kernel_store.replace(RuleSet(()), confirm_within=600)
    assert kernel_store.pending is None
    kernel_store.replace(RuleSet(()), confirm_within=600)
    kernel_store.confirm()


def test_a_lifted_ban_is_told_of_where_its_rule_cannot_be_removed(
    store: PolicyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = ControlApi(store)
    store.ban(ip_address("198.18.1.1"))
    store.add(block("198.18.1.1"))
    with monkeypatch.context() as patch:
        patch.setattr(store, "remove", _refuse)
        with pytest.raises(OSError, match=r"the ban of .* is lifted, but its rule stays"):
            api.remove({"source": "198.18.1.1"})
    assert api.remove({"source": "198.18.1.1"})["removed"] == ["block:198.18.1.1"]


@pytest.mark.parametrize("what", ["fifo", "device", "directory"])
def test_nobody_waits_for_what_lies_in_place_of_a_file(tmp_path: Path, what: str) -> None:
    paths = [tmp_path / name for name in ("bans", "journal")]
    for path in paths:
        if what == "fifo":
            os.mkfifo(path)
        elif what == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
    local = LocalStore()
    local.remember_in(tmp_path)
    assert local.restore_bans() == 0
    with pytest.raises(OSError, match="bans"):
        local.ban(ip_address("198.18.1.1"))
    local.add(block("198.18.1.2"))
    local.sync()
    with pytest.raises(OSError, match="journal"):
        local.journal()


def test_a_change_whose_revision_cannot_be_read_is_said_to_be_in_force(
    kernel_store: KernelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, source = ControlApi(kernel_store), {"source": "198.18.1.1", "action": "drop"}
    seen = type(kernel_store).revision
    with monkeypatch.context() as patch:
        patch.setattr(type(kernel_store), "revision", property(_refuse))
        with pytest.raises(InForce, match="in force"):
            api.add(source)
    assert type(kernel_store).revision is seen
    assert kernel_store.verdict(ip_address("198.18.1.1"), 1080).action is Action.DROP


def test_what_is_no_entry_of_the_journal_is_left_out(tmp_path: Path) -> None:
    local = LocalStore()
    local.remember_in(tmp_path)
    local.add(block("198.18.1.1"))
    with (tmp_path / "journal").open("ab") as file:
        file.write(b'{"address": 7}\n[]\n' + b"[" * 100_000 + b'\n{"time": 1, "what": "add"}\n')
    local.add(block("198.18.1.2"))
    assert [entry["what"] for entry in local.journal()] == ["add", "add"]
