"""The kernel's own word, which commands pass on: it is what the hooks would decide, and asking changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from rama_ebpf.core.address import SocketAddress, unmap
from rama_ebpf.kernel import abi, bpf
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.kernel.witness import WITNESS_PROGRAM, Answer, Question, Witness
from rama_ebpf.policy.matcher import match
from rama_ebpf.policy.prefixes import unmap_network
from rama_ebpf.policy.rule import Action, Rule, RuleSet, Settings, Stage, SynLimit, boottime_ns, parse_network

from .probe import Probe, listen
from .scenario import PORTS, Scenario

SCENARIOS, PER_SCENARIO = 20, 150
TARGET = SocketAddress(ip_address("198.18.0.1"), 1080)


@pytest.fixture
def probe(instance: str) -> Iterator[Probe]:
    with Probe(Instance(instance), None, WITNESS_PROGRAM) as made:
        yield made


def ask(probe: Probe, source: str, port: int = 1080) -> Answer:
    target = SocketAddress(TARGET.ip, port)
    (answer,) = Witness(probe.programs["witness"]).ask([Question(ip_address(source), target)])
    return answer


def drop(source: str, **more: object) -> Rule:
    return Rule("no", (parse_network(source),), Action.DROP, **more)  # type: ignore[arg-type]


@pytest.mark.timeout(300)
def test_the_witness_says_what_the_matcher_defines(probe: Probe) -> None:
    witness = Witness(probe.programs["witness"])
    for seed in range(SCENARIOS):
        scenario = Scenario(seed, boottime_ns())
        scenario.put_into(probe.store)
        asked = [(scenario.source(), scenario.random.choice(PORTS)) for _ in range(PER_SCENARIO)]
        answers = witness.ask(Question(source, SocketAddress(TARGET.ip, port)) for source, port in asked)
        for (source, port), answer in zip(asked, answers, strict=True):
            expected = match(scenario.policy, source, port, boottime_ns())
            told = (answer.action, answer.stage, answer.dry_action)
            context = f"seed {seed}: {source} to port {port}"
            assert told == (expected.action, expected.stage, expected.dry_action), context
            if expected.stage is Stage.RULE:
                assert probe.store.rule_name(answer.rule) == expected.rule, context
                lengths = {
                    network.prefixlen + (97 if network.version == 4 else 1)
                    for rule in scenario.policy.rules
                    for network in map(unmap_network, rule.sources)
                    if rule.name == expected.rule and unmap(source) in network
                }
                assert answer.rank >> 4 in lengths, context


def test_asking_counts_charges_and_tells_nothing(probe: Probe) -> None:
    limit = SynLimit(1 / 60, 1)
    office = Rule("office", (parse_network("198.18.1.0/24"),), Action.ALLOW, origin="file")
    slow = Rule("slow", (parse_network("198.18.2.0/24"),), Action.LIMIT, limit=limit, origin="file")
    rst = Rule("rst", (parse_network("198.18.3.0/24"),), Action.REJECT, origin="file")
    probe.store.replace(RuleSet((office, slow, rst), Settings(Action.ALLOW, limit, limit)))
    probe.store.ban(ip_address("198.18.4.1"))
    bpf.map_update(probe.maps["event_rate"], bytes(4), abi.LIMIT.pack(1, 1 << 40))
    kept = ("gate", "bans", "rules", "reject_meter")

    def state() -> list[object]:
        rows = [bpf.map_lookup(probe.maps[name], bytes(4), probe.maps.specs[name].value_size) for name in kept[:1]]
        spec = probe.maps.specs["buckets"]
        buckets = bpf.map_lookup_batch(probe.maps["buckets"], spec.key_size, spec.value_size)
        meter = bpf.map_lookup(probe.maps["event_meter"], bytes(4), abi.EVENT_METER.size * abi.possible_cpus())
        rejects = bpf.map_lookup(probe.maps["reject_meter"], bytes(4), abi.REJECT_METER.size)
        hits = [(record.hits, record.dry_hits) for record in probe.store.records()]
        return [rows, buckets, meter, rejects, probe.store.counters.totals(), hits, probe.store.bans()]

    before = state()
    for _ in range(20):
        for number, action in ((1, Action.ALLOW), (2, Action.ALLOW), (3, Action.REJECT), (9, Action.ALLOW)):
            assert ask(probe, f"198.18.{number}.1").action == action, number
        assert ask(probe, "198.18.4.1").stage == Stage.BAN
    assert state() == before


def test_the_witness_knows_which_targets_are_guarded(probe: Probe) -> None:
    assert ask(probe, "198.18.1.1").open is None
    with listen(probe, 1080):
        assert ask(probe, "198.18.1.1").open is True
        key = abi.LISTENER_KEY.pack(ip_address("::ffff:0.0.0.0").packed, 1080, 0)
        bpf.map_update(probe.maps["listeners"], key, abi.LISTENER.pack(0, 0, abi.constants()["LISTENER_CLOSED"]))
        assert ask(probe, "198.18.1.1").open is False
        assert ask(probe, "198.18.1.1", 1081).open is None


def test_a_command_finds_the_witness_of_the_server_that_uses_its_maps(probe: Probe) -> None:
    identity = Witness(probe.programs["witness"]).identity
    ours = bpf.map_info(probe.maps["gate"]).id
    with Witness.of_server(identity, ours) as witness:
        (before,) = witness.ask([Question(ip_address("198.18.1.1"), TARGET)])
        probe.store.add(drop("198.18.1.1/32"))
        (after,) = witness.ask([Question(ip_address("198.18.1.1"), TARGET)])
    assert (before.action, after.action) == (Action.ALLOW, Action.DROP)
    with pytest.raises(OSError, match="other maps"), Witness.of_server(identity, 2**31 - 1):
        pass
    with pytest.raises(FileNotFoundError), Witness.of_server(2**31, ours):
        pass


def test_witnesses_that_are_asked_at_once_do_not_mix_their_answers(probe: Probe) -> None:
    probe.store.add(drop("198.18.1.1/32"))
    wrong: list[str] = []

    def work(source: str, expected: Action) -> None:
        witness = Witness(probe.programs["witness"])
        for _ in range(200):
            answers = witness.ask([Question(ip_address(source), TARGET)] * 64)
            wrong.extend(source for answer in answers if answer.action != expected)

    threads = [
        threading.Thread(target=work, args=(f"198.18.1.{number}", Action.DROP if number == 1 else Action.ALLOW))
        for number in (1, 2, 1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
