"""What a load would do to those who came: counted as a brute-force oracle counts it, told before, and held up."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest

from rama_ebpf.control.api import ControlApi
from rama_ebpf.core.address import IPAddress
from rama_ebpf.kernel import abi, bpf
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.client_file import ClientFile, merged
from rama_ebpf.policy.clients import Client
from rama_ebpf.policy.kernel_store import KernelStore
from rama_ebpf.policy.local import LocalStore
from rama_ebpf.policy.matcher import Policy, match
from rama_ebpf.policy.replay import replay
from rama_ebpf.policy.rule import Action, PolicyError, Rule, RuleSet, Settings, boottime_ns, parse_network
from rama_ebpf.policy.store import PolicyStore

DAY = 86400.0
PORTS = (1080, 3128)


def _clients(pick: random.Random, count: int) -> list[Client]:
    """A day: some came once, some often; IPv4 in a few networks, IPv6, some before the day."""
    now, found = time.time(), {}
    while len(found) < count:
        source: IPAddress = (
            IPv4Address(0xC6120000 | pick.getrandbits(12) << pick.choice((0, 4)))
            if pick.random() < 0.8
            else IPv6Address((0x20010DB8 << 96) | pick.getrandbits(8) << 64 | pick.getrandbits(4))
        )
        port = pick.choice(PORTS)
        let_in, denied = pick.choice(((1, 0), (40, 0), (3, 2), (0, 7)))
        last = now - pick.uniform(0, 1.3 * DAY)
        found[source, port] = Client(source, port, let_in, last if let_in else 0.0, denied, last - 5 if denied else 0.0)
    return list(found.values())


def _rules(pick: random.Random, count: int) -> tuple[Rule, ...]:
    rules = []
    for number in range(count):
        length = pick.choice((20, 24, 26, 28, 32))
        sources = [f"{IPv4Address((0xC6120000 | pick.getrandbits(16)) >> (32 - length) << (32 - length))}/{length}"]
        if pick.random() < 0.3:
            sources.append(f"2001:db8:0:{pick.getrandbits(8):x}::/{pick.choice((64, 60, 126))}".replace("/60", "/64"))
        rules.append(
            Rule(
                f"r{number}",
                [parse_network(text) for text in sources],
                pick.choice((Action.DROP, Action.REJECT, Action.ALLOW)),
                port=pick.choice((None, None, 1080)),
                dry_run=pick.random() < 0.1,
                origin="file",
            )
        )
    return tuple(rules)


@pytest.mark.parametrize("seed", range(5))
def test_a_day_against_five_lists_counts_as_the_oracle_does(seed: int) -> None:
    pick = random.Random(seed)
    record, since = _clients(pick, 1000), time.time() - DAY
    old, new = (
        RuleSet(_rules(pick, 60), Settings(pick.choice((Action.ALLOW, Action.DROP)))),
        RuleSet(_rules(pick, 60), Settings(Action.ALLOW)),
    )
    failsafe, blocked = parse_network("198.18.1.0/24"), parse_network("198.18.2.0/26")
    store = LocalStore(max_entries=256)
    store.replace(old)
    store.set_failsafe([failsafe])
    store.add(Rule("now", (blocked,), Action.DROP))
    store.ban(ip_address("198.18.3.7"))
    replayed = replay(
        record,
        since,
        lambda asked: [store.verdict(source, port) for source, port in asked],
        store.judgement_of(store.compile(new)).verdict,
    )

    def oracle(ruleset: RuleSet) -> Callable[[Client], bool]:
        rules = (*ruleset.rules, Rule("now", (blocked,), Action.DROP))
        bans = {parse_network("198.18.3.7"): (Action.DROP, None)}
        policy = Policy(rules, (failsafe,), bans=dict(bans), default=ruleset.settings.default)
        now = boottime_ns()
        return lambda client: match(policy, client.source, client.port, now).allowed

    was, will = oracle(old), oracle(new)
    cut = {c.source for c in record if c.let_in_last >= since and was(c) and not will(c)}
    let_in = {c.source for c in record if c.denied_last >= since and not was(c) and will(c)}
    assert cut
    assert let_in
    assert replayed.count(replayed.cut) == len(cut)
    assert replayed.count(replayed.let_in) == len(let_in)
    assert replayed.connected == len({c.source for c in record if c.let_in_last >= since})
    assert replayed.clients == len({c.source for c in record if c.last >= since})
    assert [c.let_in for c, _ in replayed.cut] == sorted((c.let_in for c, _ in replayed.cut), reverse=True)
    assert sum(replayed.rules().values()) >= len(cut)


def test_lines_of_an_access_log_replay_as_the_record_does() -> None:
    """One real log format: what our own access log says of a day."""
    lines = [
        f"client=198.18.0.{n % 50}:4{n:04} listener=198.18.0.1:1080 reason=done received=1 sent=2 age=0.1"
        for n in range(500)
    ]
    counted: dict[IPAddress, int] = {}
    for line in lines:
        source = ip_address(line.partition("client=")[2].partition(":")[0])
        counted[source] = counted.get(source, 0) + 1
    now = time.time()
    record = [Client(source, 1080, count, now) for source, count in counted.items()]
    store = LocalStore(max_entries=16)
    new = RuleSet((Rule("some", [parse_network("198.18.0.0/28")], Action.DROP, origin="file"),))
    replayed = replay(
        record,
        now - DAY,
        lambda asked: [store.verdict(source, port) for source, port in asked],
        store.judgement_of(store.compile(new)).verdict,
    )
    assert (replayed.count(replayed.cut), replayed.connected, replayed.rules()) == (16, 50, {"some": 16})
    assert all(client.let_in == 10 for client, _ in replayed.cut)


# -- loads that are held up -----------------------------------------------------------------------------------------


def _came(store: PolicyStore, count: int) -> None:
    """Have clients 198.18.0.0 and on be in the record as let in."""
    assert isinstance(store, KernelStore)
    for number in range(count):
        key = abi.CLIENT_KEY.pack(bytes(10) + b"\xff\xff" + IPv4Address(0xC6120000 + number).packed, 1080, 0)
        value = abi.CLIENT.pack(number + 1, boottime_ns(), 0, 0, 0, 0, 0, 0, 0)
        bpf.map_update(store.tables.maps["clients"], key, value)


@pytest.fixture
def store(pinned: Instance) -> Iterator[KernelStore]:
    with KernelStore(pinned) as opened:
        yield opened


def _file(directory: Path, more: str = "", sources: str = '"198.18.0.0/27"') -> str:
    path = directory / "policy.toml"
    path.write_text(f'{more}\n[[rules]]\nname = "new"\naction = "drop"\nsources = [{sources}]\n')
    return str(path)


pytestmark = [pytest.mark.root, pytest.mark.ebpf]


def test_a_load_that_cuts_many_is_refused_without_yes_and_changes_nothing(store: KernelStore, tmp_path: Path) -> None:
    _came(store, 100)
    api, revision = ControlApi(store), store.revision
    with pytest.raises(PolicyError, match=r"would cut 32 of 100 clients .*198\.18\.0\.31 \(32\)"):
        api.call("load", {"path": _file(tmp_path)})
    assert store.revision == revision
    result: Any = api.call("load", {"path": _file(tmp_path), "yes": True})
    assert (result["replay"]["cut"], result["replay"]["cut_by"]) == (32, {"new": 32})
    assert result["replay"]["cut_top"][0] | {"last": 0} == {
        "source": "198.18.0.31",
        "port": 1080,
        "let_in": 32,
        "denied": 0,
        "last": 0,
        "rule": "new",
    }


@pytest.mark.parametrize(
    ("cut", "trial"),
    [
        ("cut = { share = 0.4 }", None),
        ("cut = { least = 33 }", None),
        ('cut = { then = "trial" }', 120.0),
    ],
)
def test_the_file_says_what_is_too_much_and_what_becomes_of_it(
    store: KernelStore, tmp_path: Path, cut: str, trial: float | None
) -> None:
    _came(store, 100)
    result = ControlApi(store).call("load", {"path": _file(tmp_path, cut)})
    assert result["confirm_within"] == trial
    assert (store.pending is not None) == (trial is not None)


def test_a_load_that_is_on_trial_anyway_is_not_held_up(store: KernelStore, tmp_path: Path) -> None:
    _came(store, 100)
    ControlApi(store).call("load", {"path": _file(tmp_path), "confirm_within": 60})
    assert store.pending is not None


def test_the_operator_s_own_session_is_not_cut_without_yes(store: KernelStore, tmp_path: Path) -> None:
    api, path = ControlApi(store), _file(tmp_path)
    with pytest.raises(PolicyError, match=r"would shut out 198\.18\.0\.9, where you are logged in from \(by new\)"):
        api.call("load", {"path": path, "operators": ["198.18.0.9"]})
    assert not store.ruleset().rules
    api.call("load", {"path": path, "operators": ["198.18.0.99"]})
    api.call("load", {"path": _file(tmp_path, sources='"198.18.0.0/16"'), "operators": ["198.18.0.99"], "yes": True})


def test_the_operator_is_found_where_ssh_says_it_also_behind_sudo() -> None:
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:  # a login shell that has it; its child, as sudo's is, has it not
        code = (
            f"import os; from rama_ebpf.cli.ruleset import logged_in_from as f; os.write({writer}, str(f()).encode())"
        )
        shell = f'env -u SSH_CONNECTION -u SSH_CLIENT {sys.executable} -c "{code}"; true'
        os.set_inheritable(writer, True)
        os.execve(
            "/bin/sh", ["sh", "-c", shell], {"SSH_CONNECTION": "198.18.7.7 1 198.18.0.1 22", "PATH": os.environ["PATH"]}
        )
    os.close(writer)
    with open(reader, "rb") as said:
        assert said.read() == b"['198.18.7.7']"
    os.waitpid(child, 0)


def test_diff_replays_also_an_earlier_revision(store: KernelStore, tmp_path: Path) -> None:
    _came(store, 100)
    api = ControlApi(store)
    first: Any = api.call("load", {"path": _file(tmp_path), "yes": True})
    api.call("load", {"path": _file(tmp_path, sources='"198.18.0.64/28"'), "yes": True})
    sets: Any = api.call("history", {})["sets"]
    assert [row["revision"] for row in sets] == [first["revision"]]
    result: Any = api.call("diff", {"revision": first["revision"], "replay": "24h"})
    assert (result["replay"]["cut"], result["replay"]["connected"], result["same"]) == (32, 100, False)
    result = api.call("diff", {"path": _file(tmp_path, sources='"198.18.0.64/28"'), "replay": "24h"})
    assert (result["replay"]["cut"], result["same"]) == (0, True)
    with pytest.raises(PolicyError, match="no set of revision 99 is kept"):
        api.call("diff", {"revision": 99})


def test_a_set_that_is_written_again_is_not_kept_twice(store: KernelStore, tmp_path: Path) -> None:
    api = ControlApi(store)
    for _ in range(3):
        api.call("load", {"path": _file(tmp_path)})
        store.set_failsafe([parse_network("198.18.9.0/24")])
        store.sync()
    assert store.past_sets() == []


# -- on disk --------------------------------------------------------------------------------------------------------


def test_the_record_on_disk_outlives_the_maps_and_forgets_what_is_old(tmp_path: Path) -> None:
    file, now = ClientFile(tmp_path / "clients"), time.time()
    one, two = ip_address("198.18.0.1"), ip_address("2001:db8::2")
    file.write(7, [Client(one, 1080, 3, now - 50), Client(two, 1080, 1, now - 5000)], keep=1000)
    assert file.write(7, [Client(one, 1080, 4, now - 10)], keep=1000) == 1
    present = [Client(one, 1080, 2, now), Client(two, 3128, 1, now)]
    rows = {(row.source, row.port): row for row in merged(file.read(), 8, present)}
    assert (rows[one, 1080].let_in, rows[one, 1080].let_in_last) == (6, now)
    assert rows[two, 3128].let_in == 1
    assert {(row.source, row.let_in) for row in merged(file.read(), 7, [Client(one, 1080, 5, now)])} == {(one, 5)}


@pytest.mark.parametrize("damage", ["torn", "garbage", "empty", "a directory of zeros"])
def test_a_record_that_is_torn_is_said_to_be_and_begun_anew(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file, now = ClientFile(tmp_path / "clients"), time.time()
    file.write(7, [Client(ip_address(f"198.18.0.{n}"), 1080, 3, now) for n in range(9)], keep=1000)
    whole = file.path.read_bytes()
    file.path.write_bytes({"torn": whole[:-7], "garbage": b"\xff" * 99, "empty": b""}.get(damage, bytes(4096)))
    assert file.read() == []
    assert "is damaged and begun anew" in caplog.text
    assert file.write(7, [Client(ip_address("198.18.0.1"), 1080, 1, now)], keep=1000) == 1


def test_a_disk_that_is_full_costs_the_record_on_disk_alone(tmp_path: Path) -> None:
    file = ClientFile(tmp_path / "file" / "clients")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="Not a directory"):
        file.write(7, [], keep=1000)


def test_the_command_says_whom_a_load_would_cut(store: KernelStore, pinned: Instance, tmp_path: Path) -> None:
    from rama_ebpf.cli import main

    _came(store, 100)
    path = _file(tmp_path)

    def said(*args: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([*args, "--instance", pinned.name])
        return code, out.getvalue(), err.getvalue()

    code, out, _ = said("policy", "diff", path, "--replay", "24h")
    assert code == 1
    assert (
        "would cut 32 of 100 clients that connected in the last 1d:\n    198.18.0.31 to port 1080, 32 times, by new"
        in out
    )
    code, _, err = said("policy", "load", path)
    assert (code, "this would cut 32 of 100 clients" in err) == (2, True)
    code, out, _ = said("policy", "load", path, "--yes")
    assert code == 0
    assert "turns away 32 of 100 clients" in out
    assert said("policy", "history")[1] == "no earlier set is kept\n"
    said("policy", "load", _file(tmp_path, sources='"198.18.0.64/28"'))
    assert "REVISION" in said("policy", "history")[1]
    assert json.loads(said("policy", "diff", "--revision", "1", "--replay", "1h", "--json")[1])["replay"]["cut"] >= 0
    assert said("policy", "diff")[0] == 2
