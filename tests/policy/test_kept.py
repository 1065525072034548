"""The policy on disk: it is what was in force, whoever tampered with it, and a disk that refuses changes nothing."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from rama_ebpf.control.host_policy import GateUnavailable, HostPolicy
from rama_ebpf.kernel import bpffs
from rama_ebpf.kernel.gate_maps import GateMaps, MapSizes
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy import ban_book, ban_log, ban_rows, ban_snapshot, keeping, kept, lifetime
from rama_ebpf.policy.kept import KeptPolicy, PolicyDamaged
from rama_ebpf.policy.kernel_store import KernelStore
from rama_ebpf.policy.local import LocalStore
from rama_ebpf.policy.rule import Action, Rule, RuleSet, Settings, SynLimit, boottime_ns
from rama_ebpf.policy.store import PolicyStore

HOUR = 3600 * 10**9


@pytest.fixture(params=["kernel", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PolicyStore]:
    if request.param == "local":
        local = LocalStore(max_entries=4095)
        local.remember_in(tmp_path)
        yield local
        return
    with KernelStore(request.getfixturevalue("pinned")) as kernel:
        kernel.remember_in(tmp_path)
        yield kernel


def block(source: str, **more: object) -> Rule:
    return Rule(f"block:{source}", (ip_network(source),), Action.DROP, **more)  # type: ignore[arg-type]


def loaded(name: str, *sources: str, **more: object) -> Rule:
    return Rule(name, tuple(map(ip_network, sources)), Action.REJECT, origin="file", **more)  # type: ignore[arg-type]


def fill(store: PolicyStore) -> None:
    """A policy that has everything."""
    slow = Rule("slow", (ip_network("198.18.8.0/24"),), Action.LIMIT, limit=SynLimit(0.5, 3), reason="häufig")
    store.set_failsafe([ip_network("198.18.9.0/24"), ip_network("2001:db8:9::/48")], [2222])
    store.replace(
        RuleSet(
            (
                loaded("listed", "198.18.1.0/24", "2001:db8::/48"),
                loaded("soon", "198.18.2.0/24", expires=boottime_ns() + HOUR),
            ),
            Settings(Action.DROP, SynLimit(10, 5), SynLimit(1000, 100)),
        )
    )
    store.add(block("198.18.5.0/24"))
    store.add(Rule("allow:198.18.5.1", (ip_network("198.18.5.1"),), Action.ALLOW, port=443), ttl=HOUR)
    store.add(slow)
    store.add(block("2001:db8:5::/64", dry_run=True))
    store.add(block("198.18.6.0/24"))
    store.remove(ip_network("198.18.6.0/24"))
    store.sync()


def test_what_is_read_back_is_what_was_in_force(store: PolicyStore, tmp_path: Path) -> None:
    fill(store)
    image = KeptPolicy(tmp_path).read()
    assert image is not None
    by_place = lambda one: str(one.place)  # noqa: E731
    assert replace(image, runtime=()) == replace(store.image(), runtime=())
    assert sorted(image.runtime, key=by_place) == sorted(store.image().runtime, key=by_place)
    again = LocalStore()
    again.put_image(image)
    assert again.revision == store.revision
    for source in (
        "198.18.1.1",
        "198.18.5.1",
        "198.18.5.2",
        "198.18.9.9",
        "198.18.7.7",
        "2001:db8::1",
        "2001:db8:5::1",
    ):
        for port in (1080, 443, 2222):
            assert again.verdict(ip_address(source), port) == store.verdict(ip_address(source), port), source
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_a_set_on_trial_is_not_what_lasts_until_it_is_confirmed(store: PolicyStore, tmp_path: Path) -> None:
    fill(store)
    store.replace(RuleSet((loaded("trial", "0.0.0.0/0"),)), confirm_within=600)
    store.keep()
    store.sync()
    on_disk = KeptPolicy(tmp_path)

    def names() -> list[str]:
        image = on_disk.read()
        assert image is not None
        return [rule.name for rule in image.ruleset.rules]

    assert names() == ["listed", "soon"]
    store.confirm()
    assert names() == ["trial"]
    store.replace(RuleSet(), confirm_within=600)
    store.roll_back()
    store.sync()
    assert names() == ["trial"]


CHANGES: dict[str, Callable[[PolicyStore], object]] = {
    "block": lambda store: store.add(block("198.18.77.0/24")),
    "another rule in its place": lambda store: store.add(Rule("other", (ip_network("198.18.5.0/24"),), Action.ALLOW)),
    "unblock": lambda store: store.remove(ip_network("198.18.5.0/24")),
    "load": lambda store: store.replace(RuleSet((loaded("new", "198.18.44.0/24"),))),
    "ban": lambda store: store.ban(ip_address("198.18.66.1")),
    "unban": lambda store: store.unban(ip_address("198.18.67.1")),
}
ASKED = ("198.18.77.1", "198.18.5.2", "198.18.1.1", "198.18.44.4", "198.18.66.1", "198.18.67.1", "198.18.2.1")


@pytest.mark.parametrize("change", CHANGES)
def test_where_the_disk_refuses_a_command_fails_and_nothing_is_changed(
    store: PolicyStore, tmp_path: Path, change: str
) -> None:
    fill(store)
    store.ban(ip_address("198.18.67.1"))
    verdicts = [store.verdict(ip_address(source), 1080) for source in ASKED]
    records = [(record.rule.name, record.sources) for record in store.records()]
    (tmp_path / "taken").write_text("no directory")
    store.remember_in(tmp_path / "taken")
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/taken/"):
        CHANGES[change](store)
    assert [store.verdict(ip_address(source), 1080) for source in ASKED] == verdicts
    assert [(record.rule.name, record.sources) for record in store.records()] == records
    store.remember_in(tmp_path)
    CHANGES[change](store)
    assert [store.verdict(ip_address(source), 1080) for source in ASKED] != verdicts


def test_a_trial_that_cannot_be_written_down_is_not_confirmed(store: PolicyStore, tmp_path: Path) -> None:
    fill(store)
    store.replace(RuleSet((loaded("trial", "0.0.0.0/0"),)), confirm_within=600)
    (tmp_path / "taken").write_text("no directory")
    store.remember_in(tmp_path / "taken")
    with pytest.raises(OSError, match="cannot write"):
        store.confirm()
    assert store.pending is not None
    store.roll_back()
    assert store.verdict(ip_address("198.18.1.1"), 1080).rule == "listed"


class Killed(BaseException):
    """The writer's end."""


def test_what_a_killed_command_has_put_into_force_is_written_down_by_a_sweep(
    store: PolicyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_args: object) -> None:
        raise Killed

    fill(store)
    with monkeypatch.context() as patch:
        patch.setattr(KeptPolicy, "write_set", die)
        with pytest.raises(Killed):
            store.replace(RuleSet((loaded("new", "198.18.44.0/24"),)))
    assert store.verdict(ip_address("198.18.44.1"), 1080).rule == "new"
    store.sweep()
    store.sync()
    image = KeptPolicy(tmp_path).read()
    assert image is not None
    assert ([rule.name for rule in image.ruleset.rules], image.revision) == (["new"], store.revision)
    assert KeptPolicy(tmp_path).revision() == store.revision
    store.remove(ip_network("198.18.5.0/24"))
    assert KeptPolicy(tmp_path).revision() == store.revision


def test_the_server_serves_on_a_disk_that_refuses_and_catches_up(
    store: PolicyStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("no directory")
    store.remember_in(tmp_path / "taken")
    store.replace(RuleSet((loaded("configured", "198.18.1.0/24"),)), must_be_kept=False)
    for _ in range(3):
        store.sync()
    assert caplog.text.count("the policy cannot be kept on disk, trying again") == 1
    assert store.verdict(ip_address("198.18.1.1"), 1080).rule == "configured"
    (tmp_path / "taken").unlink()
    store.sync()
    image = KeptPolicy(tmp_path / "taken").read()
    assert image is not None
    assert [rule.name for rule in image.ruleset.rules] == ["configured"]


def test_hostile_rows_of_rules_cost_only_themselves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = LocalStore()
    store.remember_in(tmp_path)
    store.add(block("198.18.5.0/24"))
    good = (tmp_path / "rules").read_text().strip()
    hostile = [
        good.replace("198.18.5.0/24", "198.18.7.0/23"),
        good.replace("drop", "dance"),
        good.replace('"revision": 1', '"revision": 1e999'),
        good.replace('"revision": 1', f'"revision": {1 << 63}'),
        good.replace('"port": 0', '"port": 65536'),
        good.replace('"limit": null', '"limit": [1]'),
        good.replace('"until": null', '"until": 1e999'),
        good.replace('"block:198.18.5.0/24"', '"two words"'),
        good.replace("false", "[" * 50_000),
        "[" * 100_000,
        "\0" * 200_000,
        '{"revision": 1, "source": 7}',
        "[]",
        "7",
        good[:-9],
    ]
    (tmp_path / "rules").write_text("\n".join([*hostile, good, *hostile]) + "\n")
    image = KeptPolicy(tmp_path).read()
    assert image is not None
    assert [one.rule.name for one in image.runtime] == ["block:198.18.5.0/24"]
    assert f"{2 * len(hostile)} lines of {tmp_path}/rules are damaged and left out" in caplog.text
    assert image.revision == 1


@pytest.mark.parametrize("how", ["a byte", "cut", "longer", "empty", "no JSON", "deep", "another format", "fifo"])
def test_a_damaged_set_lets_nothing_start_and_is_named(tmp_path: Path, instance: str, how: str) -> None:
    store = LocalStore()
    directory = Instance(instance).state_dir
    store.remember_in(directory)
    store.replace(RuleSet((loaded("listed", "198.18.1.0/24"),), Settings(Action.DROP)))
    path = directory / "policy"
    whole = path.read_bytes()
    spoilt = {
        "a byte": whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
        "cut": whole[:-1],
        "longer": whole + b"\0",
        "empty": b"",
        "no JSON": b"\xff" * 4096,
        "deep": b"[" * 100_000 + b"\n",
        "another format": whole.replace(b'"format": 1', b'"format": 2'),
    }
    path.unlink()
    if how == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(spoilt[how])
    with pytest.raises(PolicyDamaged, match=str(path)):
        KeptPolicy(directory).read()
    with pytest.raises(GateUnavailable, match=f"{path}.*rama-ebpf unload forgets it"):
        HostPolicy(Instance(instance)).restore(LocalStore())


# -- clocks -----------------------------------------------------------------------------------------------------------

YEAR = 365 * 86400.0
SOURCE = ip_address("198.18.5.1")
IN_1970 = 60.0 - time.time()
"""So much ahead is a clock that has just begun, as those do that have no battery."""
IN_2100 = 130 * YEAR + IN_1970


class Clock:
    """The wall clock as the store sees it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._real = time.time
        self.ahead = 0.0
        self.synchronized = False
        patch.setattr(lifetime.time, "time", lambda: self._real() + self.ahead)
        for module in (lifetime, keeping, ban_book):
            patch.setattr(module, "is_synchronized", lambda: self.synchronized)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def reboot(instance: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], LocalStore]:
    """Returns a store as a server has it that starts after a reboot."""
    place = Instance(instance)
    boots = itertools.count()

    def start() -> LocalStore:
        boot = f"boot {next(boots)}"
        monkeypatch.setattr(lifetime, "boot_id", lambda: boot)
        for module in (kept, ban_rows, ban_snapshot):
            monkeypatch.setattr(module, "boot_id", lambda: boot)
        store = LocalStore()
        store.remember_in(place.state_dir)
        HostPolicy(place).restore(store)
        store.restore_bans()
        store.keep()
        store.sync()
        return store

    return start


def left(store: LocalStore) -> float | None:
    """For how many seconds the rule still holds, None if it is not in force."""
    ends = [record.rule.expires for record in store.records()]
    return (ends[0] - boottime_ns()) / 1e9 if ends and ends[0] is not None else None


@pytest.mark.parametrize("ahead", [YEAR, IN_2100], ids=["a year", "in 2100"])
def test_a_clock_that_is_years_ahead_after_a_reboot_erases_nothing(
    clock: Clock, reboot: Callable[[], LocalStore], ahead: float
) -> None:
    before = reboot()
    before.add(block("198.18.5.0/24"), ttl=HOUR)
    before.add(block("198.18.6.0/24"))
    clock.ahead = ahead
    store = reboot()
    assert store.verdict(SOURCE, 1080).action is Action.ALLOW
    assert store.verdict(ip_address("198.18.6.1"), 1080).action is Action.DROP
    assert (store.judge_again(), store.sweep()) == (0, 0)
    store.add(block("198.18.7.0/24"))
    store = reboot()  # once more, and the clock is still wrong
    assert store.verdict(SOURCE, 1080).action is Action.ALLOW
    clock.ahead = 0
    assert store.judge_again() == 1
    assert store.verdict(SOURCE, 1080).action is Action.DROP
    assert (left(store) or 0) <= 3600
    clock.synchronized = True
    assert store.judge_again() == 0
    store.sync()
    assert {record.rule.name for record in reboot().records()} == {f"block:198.18.{n}.0/24" for n in (5, 6, 7)}


def test_what_has_ended_by_a_clock_that_is_right_is_forgotten(clock: Clock, reboot: Callable[[], LocalStore]) -> None:
    reboot().add(block("198.18.5.0/24"), ttl=HOUR)
    clock.ahead = 7200
    store = reboot()
    clock.synchronized = True
    assert store.judge_again() == 0
    store.sync()
    clock.ahead, clock.synchronized = 0, False
    assert reboot().records() == []


@pytest.mark.parametrize("ahead", [-20 * YEAR, IN_1970], ids=["20 years behind", "in 1970"])
def test_a_clock_that_begins_in_1970_prolongs_nothing(
    clock: Clock, reboot: Callable[[], LocalStore], ahead: float
) -> None:
    reboot().add(block("198.18.5.0/24"), ttl=HOUR)
    clock.ahead = ahead
    store = reboot()
    assert 0 < (left(store) or 0) <= 3600
    clock.ahead = 3000  # it was off for so long
    assert store.judge_again() == 1
    assert 0 < (left(store) or 0) <= 600
    clock.ahead, clock.synchronized = 4000, True
    assert store.judge_again() == 1
    assert store.records() == []


def test_a_rule_that_was_made_anew_or_taken_back_meanwhile_stays_so(
    clock: Clock, reboot: Callable[[], LocalStore]
) -> None:
    before = reboot()
    for n in (5, 6, 7):
        before.add(block(f"198.18.{n}.0/24"), ttl=HOUR)
    clock.ahead = -YEAR
    store = reboot()
    store.remove(ip_network("198.18.5.0/24"))
    store.add(Rule("mine", (ip_network("198.18.6.0/24"),), Action.ALLOW))
    clock.ahead, clock.synchronized = 0, True
    store.judge_again()
    assert {record.rule.name for record in store.records()} == {"mine", "block:198.18.7.0/24"}


@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize("wrong", [(YEAR, -20 * YEAR), (IN_2100, IN_1970)], ids=["years", "2100, 1970"])
def test_bans_are_judged_again_when_the_clock_is_set(
    clock: Clock,
    reboot: Callable[[], LocalStore],
    monkeypatch: pytest.MonkeyPatch,
    snapshot: bool,
    wrong: tuple[float, float],
) -> None:
    monkeypatch.setattr(ban_log, "_SMALL", 0 if snapshot else 1 << 30)
    before = reboot()
    before.ban(SOURCE, ttl=3600)
    before.ban(ip_address("198.18.6.1"))
    before.compact_bans()

    def banned(store: LocalStore) -> dict[str, float | None]:
        now = boottime_ns()
        ends = {ban.source: ban.expires for ban in store.bans()}
        return {
            source: None if end is None else (end - now) / 1e9 for source, end in ends.items() if (end or now + 1) > now
        }

    clock.ahead = wrong[0]
    store = reboot()
    assert set(banned(store)) == {"198.18.6.1"}
    store.ban(ip_address("198.18.7.1"))
    store.compact_bans()  # loses none of those that may not have ended
    store.sweep()
    clock.ahead = 3000
    assert store.judge_again() == 1
    assert 0 < (banned(store)[str(SOURCE)] or 0) <= 600
    clock.ahead = wrong[1]
    store = reboot()
    assert 0 < (banned(store)[str(SOURCE)] or 0) <= 3600
    clock.ahead, clock.synchronized = 3000, True
    assert store.judge_again() == 1
    assert 0 < (banned(store)[str(SOURCE)] or 0) <= 600
    clock.ahead = 7200
    assert set(banned(reboot())) == {"198.18.6.1", "198.18.7.1"}


# -- pins and disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def place(pinned: Instance) -> Instance:
    """An instance with pins, and with the policy of :func:`fill` on disk and in the pins."""
    with KernelStore(pinned) as store:
        fill(store)
    return pinned


def new_maps(place: Instance) -> GateMaps:
    aside = place.pin_root / "new-test"
    aside.mkdir()
    return GateMaps.create(aside, MapSizes(rules=8192, bans=64, buckets=4096))


def test_of_pins_and_disk_the_younger_wins(place: Instance, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    host, on_disk = HostPolicy(place), KeptPolicy(place.state_dir)
    with GateMaps.open(place.pin_dir) as pins:
        assert not host.supersedes(pins)
        assert caplog.text == ""
        with KernelStore(place) as store:
            store.ban(ip_address("198.18.66.1"))
            on_disk.write(replace(store.image(), revision=store.revision - 1))
            assert not host.supersedes(pins)
            assert f"the policy pinned at {place.pin_dir}" in caplog.text
            younger = replace(store.image(), revision=store.revision + 7, ruleset=RuleSet((loaded("younger", "::/0"),)))
        on_disk.write(younger)
        assert host.supersedes(pins)
        assert f"the policy in {place.state_dir} (revision {younger.revision}) is younger" in caplog.text
        with new_maps(place) as maps:
            host.fill(maps, pins, "")
            again = KernelStore(place, maps)
            assert [rule.name for rule in again.ruleset().rules] == ["younger"]
            assert [ban.source for ban in again.bans()] == ["198.18.66.1"]
            assert again.revision == younger.revision
    bpffs.remove_tree(place.pin_root / "new-test")


def test_a_policy_of_another_host_holds_and_is_said_to_be_of_another(
    place: Instance, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with KernelStore(place) as store, monkeypatch.context() as patch:
        patch.setattr(kept, "host_id", lambda: "0123456789abcdef")
        before = store.image()
        KeptPolicy(place.state_dir).write(before)
    with new_maps(place) as maps:
        HostPolicy(place).fill(maps, None, "")
        again = KernelStore(place, maps)
        assert again.ruleset() == before.ruleset
        assert "was written on another host (machine-id): what it says holds here, too" in caplog.text
        caplog.clear()
        again.keep()
        again.sync()
        assert not KeptPolicy(place.state_dir).is_of_another_host()
    bpffs.remove_tree(place.pin_root / "new-test")


@pytest.mark.parametrize("revision", [1 << 62, (1 << 62) + 1, 1 << 63, 1 << 64, -1])
def test_a_revision_from_the_future_is_taken_for_damage(place: Instance, revision: int) -> None:
    with KernelStore(place) as store:
        image = store.image()
    disk = KeptPolicy(place.state_dir)
    disk.write(replace(image, revision=revision))
    with GateMaps.open(place.pin_dir) as pins:
        with pytest.raises(PolicyDamaged):
            disk.read()
        assert not HostPolicy(place).supersedes(pins)  # the pinned one stays in force


def test_lost_pins_are_filled_from_disk_and_revisions_go_on(place: Instance, caplog: pytest.LogCaptureFixture) -> None:
    with KernelStore(place) as store:
        store.ban(ip_address("198.18.66.1"))
        before, revision = store.image(), store.revision
    with new_maps(place) as maps:
        HostPolicy(place).fill(maps, None, "no pin slots")
        again = KernelStore(place, maps)
        assert again.revision == revision
        assert replace(again.image(), runtime=()) == replace(before, runtime=())
        assert {one.rule.name for one in again.image().runtime} == {one.rule.name for one in before.runtime}
    assert "cannot be used and are replaced: no pin slots" in caplog.text
    assert (
        f"as it is kept in {place.state_dir}, revision {revision}: default drop, a set of 2 rules, 4 rules"
        in caplog.text
    )
    bpffs.remove_tree(place.pin_root / "new-test")
