"""What a gate does, whichever way it reaches the policy."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

import rama_ebpf
from rama_ebpf import Gate, SyncGate
from rama_ebpf.gate import GateRefused, GateUnavailable
from rama_ebpf.policy.local import LocalStore

RULES = """
[[policy.rules]]
name = "scanners"
action = "drop"
sources = ["198.51.100.0/24"]
"""


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(RULES)
    return path


def test_block_allow_and_unblock_decide_from_the_moment_they_return(gate: SyncGate) -> None:
    change = gate.block("198.18.0.0/16", ttl=timedelta(hours=1), reason="scans")
    assert (change.sources, change.enforced) == (1, None)
    assert "no server runs" in change.why
    gate.allow(ip_network("198.18.7.0/24"), ttl="15m")
    assert not gate.verdict("198.18.8.1").allowed
    assert gate.verdict(ip_address("198.18.7.1")).rule == "allow:198.18.7.0/24"
    assert [(rule.name, rule.reason) for rule in gate.rules()] == [
        ("drop:198.18.0.0/16", "scans"),
        ("allow:198.18.7.0/24", ""),
    ]
    assert gate.rules()[0].expires_in == pytest.approx(3600, abs=60)
    gate.block("198.18.0.0/16", port=443, reject=True)
    assert gate.verdict("198.18.8.1", port=443).action == "reject"
    assert gate.unblock("198.18.0.0/16").sources == 1
    assert gate.unblock("198.18.0.0/16").sources == 0
    assert gate.verdict("198.18.8.1").allowed


def test_dry_run_only_counts(gate: SyncGate) -> None:
    gate.block("198.18.0.1", dry_run=True)
    decision = gate.verdict("198.18.0.1")
    assert decision.allowed
    assert decision.dry_run == "drop:198.18.0.1/32"


def test_ban_comes_before_all_rules_and_is_lifted_by_unblock(gate: SyncGate) -> None:
    gate.allow("198.18.0.1")
    gate.ban("198.18.0.1", ttl=60, reason="too curious")
    assert gate.verdict("198.18.0.1").stage == "ban"
    assert [(ban.source, ban.reason) for ban in gate.bans()] == [("198.18.0.1", "too curious")]
    assert gate.unblock("198.18.0.1").sources == 2
    assert gate.verdict("198.18.0.1").stage == "default"


def test_many_sources_are_one_change(gate: SyncGate) -> None:
    many = [f"198.18.{n >> 8}.{n & 255}" for n in range(3000)]
    first = gate.block(many, ttl=60)
    assert (first.sources, first.revision) == (3000, 1)
    assert not gate.verdict("198.18.3.3").allowed
    assert gate.allow({"198.18.3.3", "2001:db8::/32"}, port=443).sources == 2
    assert gate.verdict("198.18.3.3", port=443).allowed
    assert gate.ban(ip_address(text) for text in many[:100]).sources == 100
    assert gate.unblock(many).sources == 3100
    assert gate.verdict("198.18.3.3", port=80).allowed
    assert gate.bans() == []


def test_one_bad_source_among_many_changes_nothing(gate: SyncGate) -> None:
    for bad in ("198.18.0.1/24", "nobody", "", "198.18.0.9 # comment", "198.18.0.1\n198.18.0.2"):
        with pytest.raises(GateRefused):
            gate.block(["198.18.0.7", bad])
    assert gate.rules() == []


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda gate: gate.block(7), TypeError, "write for example '192.0.2.7'"),
        (lambda gate: gate.block(b"198.18.0.1"), TypeError, "not bytes"),
        (lambda gate: gate.block(["198.18.0.1", None]), TypeError, "not NoneType"),
        (lambda gate: gate.block("198.18.0.1", ttl=True), TypeError, "ttl is seconds"),
        (lambda gate: gate.block("198.18.0.1", ttl=float("nan")), ValueError, "1 second to 10 years"),
        (lambda gate: gate.block("198.18.0.1", ttl=-1), ValueError, "1 second to 10 years"),
        (lambda gate: gate.block("198.18.0.1", ttl="soon"), ValueError, "write for example 90s"),
        (lambda gate: gate.block("198.18.0.1", port="443"), TypeError, "write for example port=443"),
        (lambda gate: gate.block("198.18.0.1", port=0), ValueError, "use 1 to 65535"),
        (lambda gate: gate.block("198.18.0.1", reason=3), TypeError, "reason is text"),
        (lambda gate: gate.block("198.18.0.1/24"), GateRefused, "write 198.18.0.0/24"),
        (lambda gate: gate.block(["198.18.0.1"], dry_run=True), ValueError, "of one source"),
        (lambda gate: gate.ban("198.18.0.0/24"), GateRefused, "rama-ebpf block"),
        (lambda gate: gate.verdict(["198.18.0.1"]), TypeError, "one address"),
        (lambda gate: gate.load(7), TypeError, "named by its path"),
        (lambda gate: gate.load("/nowhere/policy.toml"), GateRefused, "/nowhere/policy.toml"),
        (lambda gate: gate.confirm(), GateRefused, "nothing waits"),
        (lambda gate: gate.guard(), ValueError, "nothing to guard"),
        (lambda gate: gate.guard("22"), TypeError, "write for example guard"),
        (lambda gate: gate.guard(70000), ValueError, "use 1 to 65535"),
        (lambda gate: gate.guard(22, failsafe="192.0.2.0/24"), TypeError, "a list of networks"),
    ],
)
def test_what_is_wrong_is_refused_with_what_to_write(
    gate: SyncGate, call: Callable[[SyncGate], object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as refused:
        call(gate)
    assert says in str(refused.value)
    assert gate.rules() == []


def test_sets_are_compared_loaded_and_exported(gate: SyncGate, rules: Path) -> None:
    assert gate.diff(rules).added == ("scanners",)
    loaded = gate.load(rules)
    assert (loaded.rules, loaded.prefixes) == (1, 1)
    assert gate.diff(rules).same
    assert "scanners" in gate.export()
    assert gate.verdict("198.51.100.9").rule == "scanners"


def test_trial_is_kept_when_its_block_ends_well_and_undone_when_it_raises(gate: SyncGate, rules: Path) -> None:
    def fail() -> None:
        with gate.trial(rules, within=60):
            assert not gate.verdict("198.51.100.9").allowed
            raise RuntimeError("my check found it to be bad")

    with pytest.raises(RuntimeError, match="my check"):
        fail()
    assert gate.verdict("198.51.100.9").allowed
    with gate.trial(rules, within=60):
        pass
    assert not gate.verdict("198.51.100.9").allowed
    with pytest.raises(GateRefused, match="nothing"):
        gate.rollback()


@pytest.mark.root
@pytest.mark.ebpf
def test_counters_are_those_of_the_kernel(pinned: object, instance: str) -> None:
    with SyncGate(instance) as gate:
        counters = gate.counters()
    assert (counters.allowed, counters.denied, counters.silent_rejects) == (0, 0, 0)


def test_counters_of_a_policy_that_is_not_in_the_kernel_say_so(instance: str) -> None:
    with SyncGate(instance, store=LocalStore()) as gate, pytest.raises(GateRefused, match="counts by rule alone"):
        gate.counters()


def test_instance_that_is_not_loaded_is_told_with_the_remedy(instance: str) -> None:
    with SyncGate(instance) as gate:
        for call in (lambda: gate.block("198.18.0.1"), gate.rules, gate.events, lambda: gate.ban(["198.18.0.1"])):
            with pytest.raises(GateUnavailable, match="rama-ebpf run"):
                call()
    with pytest.raises(ValueError, match="use 1 to 32 characters"):
        SyncGate("No Such Name")
    with pytest.raises(TypeError, match=r"write Gate\('default'\)"):
        SyncGate(7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="KernelStore or a LocalStore"):
        SyncGate(store={})  # type: ignore[arg-type]


async def test_asynchronous_gate_does_the_same_and_does_not_hold_up_the_loop(instance: str, rules: Path) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    async with Gate(instance, store=LocalStore()) as gate:
        await gate.block([f"198.18.{n >> 8}.{n & 255}" for n in range(2000)])
        assert ticks > 1
        assert (await gate.verdict("198.18.1.1")).action == "drop"
        await gate.allow("198.18.1.1", port=443)
        assert (await gate.verdicts("198.18.1.1", port=443))[0].allowed
        await gate.ban("192.0.2.9")
        assert len(await gate.bans()) == 1
        assert len(await gate.rules()) == 2001
        assert await gate.failsafe() == []
        async with gate.trial(rules) as loaded:
            assert loaded.confirm_within == 60
        assert (await gate.diff(rules)).same
        assert "scanners" in await gate.export()
        with pytest.raises(GateRefused):
            await gate.rollback()
        assert (await gate.unblock("192.0.2.9")).sources == 1
    ticking.cancel()


def test_gate_is_imported_when_it_is_asked_for_and_not_before() -> None:
    script = "import sys, rama_ebpf, rama_ebpf.cli; assert 'rama_ebpf.gate' not in sys.modules; rama_ebpf.Gate"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'Gates'"):
        rama_ebpf.Gates  # type: ignore[attr-defined]  # noqa: B018
