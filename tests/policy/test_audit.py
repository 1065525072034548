"""The audit: what is planted in the kernel's tables behind the policy's back is found, put in order, and told."""

from __future__ import annotations

import contextlib
import mmap
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address

import pytest

from rama_ebpf.control.audit import Audit
from rama_ebpf.control.enforced import KernelJudge
from rama_ebpf.core.address import SocketAddress, mapped
from rama_ebpf.kernel import abi, bpf
from rama_ebpf.kernel.feed_cgroup import Grants
from rama_ebpf.kernel.gate_maps import set_pages
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.kernel.witness import WITNESS_PROGRAM, Witness
from rama_ebpf.policy.ban_record import ban_key
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.policy.egress_map import EgressTable
from rama_ebpf.policy.integrity import EgressCheck, Integrity
from rama_ebpf.policy.kernel_store import KernelStore
from rama_ebpf.policy.rule import Action, Rule, RuleSet, Settings, Stage, SynLimit, Verdict, parse_network

from ..conftest import StartProxy
from ..lab import Lab, wait_for
from .probe import Probe
from .test_server import answered, shut_out

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

SET = (
    Rule("listed", (parse_network("198.18.3.0/24"), parse_network("2001:db8:3::/48")), Action.DROP, origin="file"),
    Rule("office", (parse_network("198.18.4.0/24"),), Action.ALLOW, origin="file"),
    Rule("slow", (parse_network("198.18.5.0/24"),), Action.LIMIT, limit=SynLimit(1, 5), port=443, origin="file"),
)
EXPECTED = {
    ("198.18.1.1", 1080): (Action.DROP, Stage.RULE),
    ("198.18.2.9", 443): (Action.DROP, Stage.RULE),
    ("198.18.2.9", 1080): (Action.ALLOW, Stage.DEFAULT),
    ("2001:db8:1::1", 1080): (Action.REJECT, Stage.RULE),
    ("198.18.3.3", 1080): (Action.DROP, Stage.RULE),
    ("2001:db8:3::3", 1080): (Action.DROP, Stage.RULE),
    ("198.18.6.6", 1080): (Action.DROP, Stage.BAN),
    ("198.18.99.1", 1080): (Action.ALLOW, Stage.FAILSAFE),
    ("198.18.7.7", 1080): (Action.ALLOW, Stage.DEFAULT),
}


class Scene:
    """A policy of all kinds in a kernel, and its audit."""

    def __init__(self, probe: Probe) -> None:
        self.store, self.maps, self.instance = probe.store, probe.maps, probe.instance
        self.witness = Witness(probe.programs["witness"])
        self.judge = KernelJudge(self.store, lambda: contextlib.nullcontext(self.witness))
        self.store.set_failsafe([parse_network("198.18.99.0/24")], (9,))
        self.store.replace(RuleSet(SET, Settings(Action.ALLOW, SynLimit(100, 100))))
        self.store.add(block("198.18.1.0/24"))
        self.store.add(block("198.18.2.9/32", port=443))
        self.store.add(block("2001:db8:1::/48", Action.REJECT))
        self.store.add(block("198.18.7.0/24"))
        self.store.remove(parse_network("198.18.7.0/24"))
        self.store.ban(ip_address("198.18.6.6"))
        self.integrity = Integrity(self.store, self.witness)
        self.egress, self.grants = EgressTable(self.maps), Grants(self.maps)
        self.egress.put(EgressPolicy(allow=(parse_network("10.1.0.0/16"),)), [ip_address("192.0.2.53")])
        check = EgressCheck(self.egress, self.grants)
        self.audit = Audit(self.store, self.judge, self.integrity, lambda: None, check)
        self.audit.look()  # it remembers the revision

    def decided(self) -> dict[tuple[str, int], tuple[Action, Stage]]:
        """What the programs decide."""
        asked = [(ip_address(source), SocketAddress(ip_address("0.0.0.0"), port)) for source, port in EXPECTED]
        verdicts: list[Verdict] = [decision.verdict for decision in self.judge.decide(asked)]
        return {key: (verdict.action, verdict.stage) for key, verdict in zip(EXPECTED, verdicts, strict=True)}

    def change_gate(self, **members: object) -> None:
        self.store.tables.put_gate(replace(self.store.tables.gate(), **members))  # type: ignore[arg-type]

    def id_of(self, name: str) -> bytes:
        (found,) = (record.rule.id for record in self.store.records() if record.rule.name == name)
        return found.to_bytes(4, sys.byteorder)

    def change_row(self, name: str, **members: int) -> None:
        names = ("action", "flags", "expires", "emission", "tolerance", "port", "order", "pad")
        raw = bpf.map_lookup(self.maps["rules"], self.id_of(name), abi.RULE.size)
        assert raw is not None
        row = dict(zip(names, abi.RULE.unpack(raw), strict=True)) | members
        bpf.map_update(self.maps["rules"], self.id_of(name), abi.RULE.pack(*row.values()))


def block(source: str, action: Action = Action.DROP, port: int | None = None) -> Rule:
    network = parse_network(source)
    return Rule(f"{action.name.lower()}:{network}", (network,), action, port)


@pytest.fixture
def scene(instance: str) -> Iterator[Scene]:
    with Probe(Instance(instance), None, WITNESS_PROGRAM) as probe:
        made = Scene(probe)
        yield made
        made.integrity.close()


def _without_length(scene: Scene) -> None:
    ipv4, ipv6 = scene.store.tables.gate().runtime
    scene.change_gate(runtime=(ipv4 & ~(1 << 96 + 24), ipv6))


def _without_ports(scene: Scene) -> None:
    scene.change_gate(flags=scene.store.tables.gate().flags & ~abi.constants()["GATE_RUNTIME_PORTS"])


def _without_bans(scene: Scene) -> None:
    scene.change_gate(flags=scene.store.tables.gate().flags & ~abi.constants()["GATE_BANS"])


def _without_ban_lengths(scene: Scene) -> None:
    scene.change_gate(ban_lengths=((), ()))


def _without_failsafe(scene: Scene) -> None:
    scene.change_gate(flags=scene.store.tables.gate().flags & ~abi.constants()["GATE_FAILSAFE"])


def _other_default(scene: Scene) -> None:
    sets = scene.store.tables.gate().sets
    active = scene.store.tables.gate().active
    changed = [replace(head, default=int(Action.DROP)) if at == active else head for at, head in enumerate(sets)]
    scene.change_gate(sets=tuple(changed))


def _without_limits(scene: Scene) -> None:
    active = scene.store.tables.gate().active
    sets = scene.store.tables.gate().sets
    scene.change_gate(sets=tuple(replace(h, per_source=(0, 0)) if at == active else h for at, h in enumerate(sets)))


def _other_failsafe(scene: Scene) -> None:
    which = scene.store.tables.gate().failsafe_list
    scene.store.tables.failsafe.fill(which, [parse_network("198.18.0.0/16")])


def _row_of_runtime_gone(scene: Scene) -> None:
    bpf.map_update(scene.maps["rules"], scene.id_of("drop:198.18.1.0/24"), bytes(abi.RULE.size))


def _row_of_set_gone(scene: Scene) -> None:
    bpf.map_update(scene.maps["rules"], scene.id_of("listed"), bytes(abi.RULE.size))


def _action_of_set(scene: Scene) -> None:
    scene.change_row("listed", action=int(Action.ALLOW))


def _end_of_set(scene: Scene) -> None:
    scene.change_row("listed", flags=0, expires=1)


def _port_of_runtime(scene: Scene) -> None:
    scene.change_row("drop:198.18.1.0/24", flags=0, port=9)


def _rule_of_runtime_gone(scene: Scene) -> None:
    scene.store.tables.runtime.drop((parse_network("198.18.1.0/24"), 0))


def _action_of_runtime(scene: Scene) -> None:
    certain = abi.constants()["RULE_CERTAIN"]
    scene.change_row("drop:198.18.1.0/24", action=int(Action.ALLOW), order=2 * 0 + 1, flags=certain)


def _taken_back_and_there(scene: Scene) -> None:
    place = parse_network("198.18.7.0/24"), 0
    rule_id = int.from_bytes(scene.id_of("drop:198.18.1.0/24"), sys.byteorder)
    scene.store.tables.runtime.put(place, rule_id)


def _ban_gone(scene: Scene) -> None:
    key = bpf.map_next_key(scene.maps["bans"], None, abi.BAN_KEY.size)
    assert key is not None
    bpf.map_delete(scene.maps["bans"], key)


def _described_no_more(scene: Scene) -> None:
    bpf.map_delete(scene.maps["rule_info"], scene.id_of("reject:2001:db8:1::/48"))


def _other_set(scene: Scene) -> None:
    fd = set_pages(1).create("set")
    active = scene.store.tables.gate().active
    bpf.map_update(scene.maps["sets"], active.to_bytes(4, sys.byteorder), fd.to_bytes(4, sys.byteorder))
    bpf.close(fd)


def _without_chains(scene: Scene) -> None:
    active, most = scene.store.tables.gate().active, abi.constants()["MAX_CHAIN_ITEMS"]
    for index in range(16):
        at = active * most + index
        bpf.map_update(scene.maps["chains"], at.to_bytes(4, sys.byteorder), abi.CHAIN_ITEM.pack(0, 0, 1))


def _raw_gate(scene: Scene, at: int, value: bytes) -> None:
    """As another program would: it knows of no seal."""
    raw = bpf.map_lookup(scene.maps["gate"], bytes(4), abi.GATE.size)
    assert raw is not None
    bpf.map_update(scene.maps["gate"], bytes(4), raw[:at] + value + raw[at + len(value) :])


def _default_at(scene: Scene) -> int:
    heads = abi.GATE.size - 8 - 160 - 2 * abi.SET_HEAD.size
    at = heads + scene.store.tables.gate().active * abi.SET_HEAD.size
    raw = bpf.map_lookup(scene.maps["gate"], bytes(4), abi.GATE.size)
    assert raw is not None
    assert raw[at : at + 4] == int(scene.store.settings().default).to_bytes(4, sys.byteorder)
    return at


def _settings_beside_a_change_of_ours(scene: Scene) -> None:
    scene.store.add(block("198.18.8.0/24"))
    _raw_gate(scene, _default_at(scene), int(Action.DROP).to_bytes(4, sys.byteorder))
    scene.store.add(block("198.18.9.0/24"))
    scene.store.ban(ip_address("198.18.8.8"))


def _settings_before_a_change_by_a_command(scene: Scene) -> None:
    scene.store.sync()
    _raw_gate(scene, _default_at(scene), int(Action.DROP).to_bytes(4, sys.byteorder))
    with KernelStore(scene.instance, scene.maps) as command:
        command.add(block("198.18.8.0/24"))


def _record_shot_to_pieces(scene: Scene) -> None:
    scene.store.sync()
    gate = bytes(range(256)) * 3
    bpf.map_update(scene.maps["gate"], bytes(4), gate[: abi.GATE.size])


def _revision_from_the_future(scene: Scene) -> None:
    scene.store.sync()
    _raw_gate(scene, 0, (2**63).to_bytes(8, sys.byteorder))


def _rule_of_another_program(scene: Scene) -> None:
    raw = scene.id_of("drop:198.18.1.0/24")
    scene.store.tables.runtime.put((parse_network("198.18.7.7/32"), 0), int.from_bytes(raw, sys.byteorder))


def _ban_of_another_program(scene: Scene) -> None:
    key, value = (abi.BAN_KEY.size, abi.BAN.size)
    present = bpf.map_next_key(scene.maps["bans"], None, key)
    assert present is not None
    row = bpf.map_lookup(scene.maps["bans"], present, value)
    assert row is not None
    bpf.map_update(scene.maps["bans"], ban_key(parse_network("198.18.7.7/32")), row)


def _failsafe_of_another_program(scene: Scene) -> None:
    key = abi.FAILSAFE_KEY.pack(32 + 96 + 24, 1, mapped(ip_address("198.18.1.0")))
    bpf.map_update(scene.maps["failsafe"], key, (3).to_bytes(4, sys.byteorder))


def _failsafe_named_by_another_program(scene: Scene) -> None:
    key = abi.FAILSAFE_KEY.pack(32 + 96 + 24, 1, mapped(ip_address("198.18.1.0")))
    bpf.map_update(scene.maps["failsafe"], key, (15).to_bytes(4, sys.byteorder))


def _interval_of_another_program(scene: Scene) -> None:
    """The set's slots lead to other intervals: sources that it does not name would be let in, or shut out."""
    active, most = scene.store.tables.gate().active, abi.constants()["MAX_SLOTS"]
    info = bpf.map_info(scene.maps["slots"])
    with mmap.mmap(scene.maps["slots"], info.max_entries * info.value_size) as memory:
        at = 2 * active * most * abi.SLOT.size
        first, count = abi.SLOT.unpack_from(memory, at)
        abi.SLOT.pack_into(memory, at, first + 1, count)


def _page_of_another_program(scene: Scene) -> None:
    with (
        contextlib.closing(scene.store.tables.sets.open(scene.store.tables.gate().active)) as opened,
        mmap.mmap(opened.fileno(), opened.pages * abi.constants()["PAGE_BYTES"]) as memory,
    ):
        memory[0:4] = bytes(b ^ 0xFF for b in memory[0:4])


PLANTED = [
    _settings_beside_a_change_of_ours,
    _settings_before_a_change_by_a_command,
    _record_shot_to_pieces,
    _revision_from_the_future,
    _rule_of_another_program,
    _ban_of_another_program,
    _failsafe_of_another_program,
    _failsafe_named_by_another_program,
    _interval_of_another_program,
    _page_of_another_program,
    _without_length,
    _without_ports,
    _without_bans,
    _without_ban_lengths,
    _without_failsafe,
    _other_default,
    _without_limits,
    _other_failsafe,
    _row_of_runtime_gone,
    _row_of_set_gone,
    _action_of_set,
    _end_of_set,
    _port_of_runtime,
    _rule_of_runtime_gone,
    _action_of_runtime,
    _taken_back_and_there,
    _ban_gone,
    _described_no_more,
    _other_set,
    _without_chains,
]


def test_an_audit_of_what_is_in_order_finds_nothing(scene: Scene) -> None:
    assert scene.decided() == EXPECTED
    for _ in range(20):
        scene.audit.look()
    assert (scene.audit.disagreements, scene.audit.problems) == (0, {})


def test_changes_by_commands_are_no_disagreements(scene: Scene) -> None:
    for number in range(8):
        scene.store.add(block(f"198.18.1.{number}/32"))
        scene.store.ban(ip_address(f"198.18.8.{number}"), ttl=3600)
        scene.audit.look()
        scene.store.remove(parse_network(f"198.18.1.{number}/32"))
        scene.store.set_settings(Settings(Action.REJECT if number % 2 else Action.ALLOW))
        scene.audit.look()
        scene.store.replace(RuleSet(SET[: number % 3], Settings()), confirm_within=3600)
        scene.audit.look()
        scene.store.roll_back()
        scene.store.set_failsafe([parse_network("198.18.99.0/24")], (9,) * (number % 2))
        scene.audit.look()
    assert (scene.audit.disagreements, scene.audit.problems) == (0, {})


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__.strip("_"))
def test_a_planted_difference_is_found_put_in_order_and_told(
    scene: Scene, plant: Callable[[Scene], None], caplog: pytest.LogCaptureFixture
) -> None:
    settings = scene.store.settings()
    plant(scene)
    for _ in range(6):  # a minute
        scene.audit.look()
    assert scene.audit.disagreements >= 1
    assert "the policy in the kernel was not what it is to be, and is again" in caplog.text
    assert "policy" in scene.audit.problems
    assert scene.decided() == EXPECTED
    assert (scene.store.settings(), scene.store.failsafe()) == (settings, [parse_network("198.18.99.0/24")])
    assert {str(record.sources[0]) for record in scene.store.records()} >= {"198.18.1.0/24", "2001:db8:1::/48"}
    seen = scene.audit.disagreements
    scene.audit.look()
    assert scene.audit.disagreements == seen


def _egress_key(network: str) -> bytes:
    parsed = parse_network(network)
    length = 32 + parsed.prefixlen + (96 if parsed.version == 4 else 0)
    return abi.FAILSAFE_KEY.pack(length, parsed.version == 4, mapped(parsed.network_address))


def _denial_gone(scene: Scene) -> None:
    bpf.map_delete(scene.maps["egress"], _egress_key("10.0.0.0/8"))


def _denial_allowed(scene: Scene) -> None:
    bpf.map_update(scene.maps["egress"], _egress_key("127.0.0.0/8"), bytes(4))


def _way_within_a_denial(scene: Scene) -> None:
    bpf.map_update(scene.maps["egress"], _egress_key("169.254.169.254/32"), bytes(4))


def _denial_of_everything(scene: Scene) -> None:
    deny = abi.constants()["EGRESS_DENY"].to_bytes(4, sys.byteorder)
    bpf.map_update(scene.maps["egress"], _egress_key("0.0.0.0/1"), deny)


def _name_server_of_another_program(scene: Scene) -> None:
    flag = abi.constants()["EGRESS_NAMESERVER"].to_bytes(4, sys.byteorder)
    bpf.map_update(scene.maps["egress"], _egress_key("192.0.2.54/32"), flag)


def _grant_of_another_program(scene: Scene) -> None:
    bpf.map_update(scene.maps["grants"], abi.GRANT_KEY.pack(4711, mapped(ip_address("10.0.0.1")), 22), bytes(4))


def _confinement_gone(scene: Scene) -> None:
    key = abi.GRANT_KEY.pack(815, bytes(16), 0)
    scene.grants.put(key)
    bpf.map_delete(scene.maps["grants"], key)


EGRESS_PLANTED = [
    _denial_gone,
    _denial_allowed,
    _way_within_a_denial,
    _denial_of_everything,
    _name_server_of_another_program,
    _grant_of_another_program,
    _confinement_gone,
]


@pytest.mark.parametrize("plant", EGRESS_PLANTED, ids=lambda plant: plant.__name__.strip("_"))
def test_what_another_program_writes_about_egress_is_found_put_in_order_and_told(
    scene: Scene, plant: Callable[[Scene], None], caplog: pytest.LogCaptureFixture
) -> None:
    def rows() -> tuple[dict[bytes, int], set[bytes]]:
        grants = bpf.map_lookup_batch(scene.maps["grants"], abi.GRANT_KEY.size, 4)
        return scene.egress.present(), {key for key, _ in grants}

    if plant is _confinement_gone:
        scene.grants.put(abi.GRANT_KEY.pack(815, bytes(16), 0))
    before = rows()
    plant(scene)
    assert rows() != before
    scene.audit.look()
    assert scene.audit.disagreements == 1
    assert re.search("is again: (the egress policy|another program wrote where children)", caplog.text)
    assert "policy" in scene.audit.problems
    assert rows() == before
    scene.audit.look()
    assert scene.audit.disagreements == 1


def test_another_egress_policy_is_no_disagreement_and_neither_are_grants_that_come_and_go(scene: Scene) -> None:
    for number in range(6):
        scene.egress.put(EgressPolicy(deny=(parse_network(f"198.18.{number}.0/24"),)), [])
        scene.grants.put(abi.GRANT_KEY.pack(number, bytes(16), 0))
        scene.audit.look()
        scene.grants.drop(abi.GRANT_KEY.pack(number, bytes(16), 0))
        scene.audit.look()
    assert (scene.audit.disagreements, scene.audit.problems) == (0, {})


def test_an_egress_policy_that_is_just_put_is_no_disagreement(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are written one by one, on the event loop; the audit, in its thread, may come by between any two."""
    write, looks = bpf.map_update, []

    def look_before(fd: int, key: bytes, value: bytes, flags: int = 0) -> None:
        if fd == scene.maps["egress"]:
            scene.audit.look()
            looks.append(fd)
        write(fd, key, value, flags)

    monkeypatch.setattr(bpf, "map_update", look_before)
    scene.egress.put(EgressPolicy(deny=(parse_network("198.18.0.0/24"), parse_network("198.18.2.0/24"))), [])
    monkeypatch.undo()
    assert len(looks) > 5
    scene.audit.look()
    assert scene.audit.disagreements == 0


def test_a_row_that_is_lost_among_very_many_is_missed_within_a_minute(scene: Scene) -> None:
    scene.egress.put(
        EgressPolicy(deny=[parse_network(f"198.{18 + n // 65536}.{n // 256 % 256}.{n % 256}") for n in range(20_000)]),
        [],
    )
    scene.audit.look()
    bpf.map_delete(scene.maps["egress"], _egress_key("198.18.0.9/32"))
    for _ in range(6):  # a minute
        scene.audit.look()
    assert scene.audit.disagreements == 1
    assert scene.egress.present() == scene.egress.wanted


def test_a_lost_rule_comes_back_from_the_disk_and_without_it_nobody_gets_in_by_it(scene: Scene) -> None:
    allowed = parse_network("198.18.7.7/32")
    scene.store.add(block("198.18.7.7/32", Action.ALLOW))
    scene.store.add(block("198.18.7.8/32", Action.ALLOW))
    bpf.map_update(scene.maps["rules"], scene.id_of("allow:198.18.7.7/32"), bytes(abi.RULE.size))
    scene.audit.look()
    assert scene.store.rule_at(allowed) is not None

    scene.store.keep()  # the disk is behind now
    bpf.map_update(scene.maps["rules"], scene.id_of("allow:198.18.7.7/32"), bytes(abi.RULE.size))
    scene.audit.look()
    assert scene.store.rule_at(allowed) is None
    key = scene.id_of("allow:198.18.7.8/32")
    bpf.map_update(scene.maps["rules"], key, bytes(abi.RULE.size))
    bpf.map_delete(scene.maps["rule_info"], key)
    scene.audit.look()
    stored = scene.store.rule_at(parse_network("198.18.7.8/32"))
    assert stored is not None
    assert (stored.action, stored.name) == (Action.DROP, "drop:198.18.7.8/32")


def test_every_rule_is_looked_at_within_its_rounds(scene: Scene) -> None:
    for number in range(3000):
        scene.store.tables.runtime.put((parse_network(f"10.0.{number // 256}.{number % 256}"), 0), 1)
    looked: set[bytes] = set()
    rounds = 0
    while len(looked) < 3003:
        scene.integrity._runtime._walk.known = 3003
        looked.update(key for key, _ in scene.integrity._runtime._walk.next(100))
        rounds += 1
        assert rounds < 60


def test_a_server_finds_what_was_planted_and_says_so_everywhere(lab: Lab, start_proxy: StartProxy) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    proxy = start_proxy(server, "--listen", f"{server.ipv4}:1080", "--metrics", "127.0.0.1:9464", "--workers", "1")
    proxy.command("block", client.ipv4)
    assert shut_out(client, server.ipv4)
    assert proxy.json("status")["audit"] == {"disagreements": 0, "last": None, "when": None, "standing": []}
    with KernelStore(Instance(proxy.instance)) as store:
        gate = store.tables.gate()
        store.tables.put_gate(replace(gate, runtime=(0, 0)))
        bpf.map_delete(store.tables.maps["egress"], _egress_key("10.0.0.0/8"))
    assert answered(client, server.ipv4)
    wait_for(lambda: proxy.logged("was not what it is to be, and is again: the programs do not look for"), timeout=60)
    wait_for(lambda: proxy.logged("is again: the egress policy is not what was put: .* wrote 10.0.0.0/8"), timeout=60)
    assert shut_out(client, server.ipv4)
    metrics = server.run("curl", "-sS", "--max-time", "30", "http://127.0.0.1:9464/metrics").stdout
    assert re.search(r"^rama_ebpf_gate_disagreements_total 2\.0$", metrics, flags=re.M)
    ready = server.run("curl", "-sS", "--max-time", "30", "-w", " %{http_code}", "http://127.0.0.1:9464/ready").stdout
    assert ready.startswith("policy: the kernel did not have what was asked for until a moment ago: the egress")
    assert ready.endswith(" 503")
    wait_for(lambda: proxy.json("status")["audit"]["disagreements"] == 2, what="the state")
    assert "2 disagreements of kernel and policy" in proxy.command("status").stdout
    doctor = proxy.command("doctor", check=False)
    assert "another program wrote 10.0.0.0/8" in doctor.stdout
