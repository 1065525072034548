"""One meaning, four implementations: the matcher that defines it, the BPF code, and both stores."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest

from rama_ebpf.core.address import IPAddress, unmap
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy import vectors
from rama_ebpf.policy.local import LocalStore
from rama_ebpf.policy.matcher import match
from rama_ebpf.policy.rule import boottime_ns

from .frames import DST_OPTIONS, HOP_BY_HOP, QINQ, VLAN, ethernet, extension, ipv4, ipv6, tcp
from .probe import Probe
from .scenario import PORTS, Scenario

PAIRS = int(os.environ.get("RAMA_EBPF_DIFFERENTIAL_PAIRS", "20000"))
PER_SCENARIO = 500
TARGETS = {4: IPv4Address("198.18.0.1"), 6: IPv6Address("2001:db8::1")}


@pytest.fixture
def probe(instance: str) -> Iterator[Probe]:
    with Probe(Instance(instance)) as made:
        yield made


def frame(source: IPAddress, port: int, pick: random.Random) -> bytes:
    """A SYN from ``source``, dressed at random in what the parser steps over."""
    tags = pick.choice(((), (), (), (VLAN,), (QINQ, VLAN)))
    if source.version == 4:
        options = bytes((1,)) * pick.choice((0, 0, 4, 40))
        return ethernet(ipv4(source, TARGETS[4], tcp(port), options=options), tags=tags)
    headers, next_header = tcp(port), 6
    for kind in pick.choice(((), (), (DST_OPTIONS,), (DST_OPTIONS, HOP_BY_HOP))):
        headers, next_header = extension(kind, next_header, units=pick.choice((0, 1, 3))) + headers, kind
    target = ip_address(f"::ffff:{TARGETS[4]}") if source.ipv4_mapped else TARGETS[6]
    return ethernet(ipv6(source, target, headers, next_header=next_header), tags=tags)


@pytest.mark.timeout(max(600, PAIRS // 20))
def test_matcher_kernel_and_both_stores_agree_on_random_rules_and_packets(
    probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each second set is compiled as large ones are; and whoever asks what a set would decide, before it is loaded, is
    told the same."""
    local = LocalStore()
    judged = stages = 0
    seen: set[tuple[object, ...]] = set()
    for seed in range(max(1, PAIRS // PER_SCENARIO)):
        scenario = Scenario(seed, boottime_ns())
        monkeypatch.setattr(vectors, "MANY", 1 if seed % 2 else 1 << 60)
        for store in (probe.store, local):
            scenario.put_into(store)
        beforehand = local.judgement_of(local.compile(local.ruleset()))
        probe.rules_changed()
        for _ in range(PER_SCENARIO):
            source, port = scenario.source(), scenario.random.choice(PORTS)
            expected = match(scenario.policy, source, port, boottime_ns())
            assert beforehand.verdict(source, port) == expected, f"seed {seed}: {source} to port {port}"
            context = f"seed {seed}: {source} to port {port}"
            parsed = probe.judge(frame(source, port, scenario.random))
            assert (parsed.kind, parsed.source, parsed.port, parsed.syn) == ("tcp", unmap(source), port, True), context
            assert parsed.verdict == expected, f"{context}: the kernel differs"
            assert probe.store.verdict(source, port) == expected, f"{context}: KernelStore differs"
            assert local.verdict(source, port) == expected, f"{context}: LocalStore differs"
            seen.add((expected.stage, expected.action, bool(expected.dry_rule)))
            judged += 1
    assert judged >= PAIRS
    if PAIRS >= 10_000:  # every kind of answer was given
        stages = {(stage.name, action.name) for stage, action, _ in seen}
        assert {"FAILSAFE", "BAN", "RULE", "DEFAULT"} == {stage for stage, _ in stages}
        assert {"ALLOW", "DROP", "REJECT"} == {action for _, action in stages}
        assert any(dry for _, _, dry in seen)
