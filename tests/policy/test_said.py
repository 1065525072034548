"""Said = enforced: a command says what the kernel answers, and who decides where that is somebody else."""

from __future__ import annotations

import contextlib
import errno
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

from rama_ebpf.cli import main
from rama_ebpf.cli.said import outcome
from rama_ebpf.control.enforced import Decision, _unguarded, sample
from rama_ebpf.core.address import SocketAddress
from rama_ebpf.kernel import bpffs
from rama_ebpf.kernel.gate_maps import GateMaps, MapSizes
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.changes import Changes
from rama_ebpf.policy.derived import DerivedState
from rama_ebpf.policy.rule import Action, Stage, Verdict, parse_network
from rama_ebpf.policy.stored import StoredRule

from ..conftest import StartProxy
from ..lab import Host, lab_of
from ..proxy import ProxyProcess
from .test_server import answered, shut_out

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

SAFE = "198.18.99.0/24"


@dataclass
class Scene:
    proxy: ProxyProcess
    server: Host
    client: Host

    def said(self, *args: str) -> tuple[int, str]:
        """Exit code and words of a command."""
        done = self.proxy.command(*args, check=False)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout.rstrip("\n")


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with lab_of("proxy", "client") as (server, client):
        yield server, client


@pytest.fixture
def scene(hosts: tuple[Host, Host], start_proxy: StartProxy) -> Scene:
    server, client = hosts
    listen = ["--listen", f"{server.ipv4}:1080", "--listen", f"{server.ipv4}:443"]
    proxy = start_proxy(server, *listen, "--failsafe", SAFE, "--workers", "1")
    return Scene(proxy, server, client)


def test_the_first_the_middle_and_the_last_address_stand_for_a_network() -> None:
    assert [str(one) for one in sample(parse_network("198.18.0.0/24"))] == [
        "198.18.0.0",
        "198.18.0.127",
        "198.18.0.255",
    ]
    assert [str(one) for one in sample(parse_network("198.18.0.1"))] == ["198.18.0.1"]
    assert [str(one) for one in sample(parse_network("2001:db8::/127"))] == ["2001:db8::", "2001:db8::1"]
    assert str(sample(parse_network("2001:db8::/32"))[1]) == "2001:db8:7fff:ffff:ffff:ffff:ffff:ffff"


def test_a_command_says_who_comes_first_instead_of_what_was_asked_for(scene: Scene) -> None:
    server, source = scene.server.ipv4, scene.client.ipv4
    assert scene.said("block", "198.18.99.7") == (
        3,
        f"recorded, not enforced: the failsafe comes first (198.18.99.7 to {server}:443)",
    )
    assert scene.said("ban", "198.18.99.7")[0] == 3
    assert scene.said("block", source) == (0, f"blocked {source}/32")
    assert shut_out(scene.client, server)
    assert scene.said("allow", source, "--port", "443") == (0, f"allowed {source}/32")
    words = f'recorded, but "allow {source}/32 --port 443" comes first ({source} to {server}:443)'
    words += f"; elsewhere blocked {source}/32"
    assert scene.said("block", source) == (0, words)
    assert scene.said("ban", source, "--ttl", "1h") == (0, f"banned {source} for 1h")
    code, words = scene.said("allow", source)
    assert (code, words.partition(" (")[0]) == (3, "recorded, not enforced: a ban comes first")
    assert scene.said("block", source) == (0, f"blocked {source}/32 (a ban comes first, and does the same)")
    assert scene.said("unblock", source) == (0, f"unblocked {source}")
    assert answered(scene.client, server)
    assert scene.said("block", source, "--port", "9") == (0, f"blocked {source}/32 (no listener has port 9)")


def test_unblock_says_who_turns_the_source_away_all_the_same(scene: Scene, tmp_path: Path) -> None:
    source = scene.client.ipv4
    path = tmp_path / "set.toml"
    path.write_text(f'[[rules]]\nname = "listed"\naction = "drop"\nsources = ["{source}/32"]\n')
    assert scene.said("policy", "load", str(path))[0] == 0
    scene.proxy.command("block", source)
    assert scene.said("unblock", source) == (0, "recorded, but still turned away: rule listed")
    assert scene.said("allow", "198.18.0.0/16")[1].startswith("allowed 198.18.0.0/16")
    assert scene.said("unblock", "198.18.0.0/16") == (0, "unblocked 198.18.0.0/16")


def test_an_allow_behind_a_limit_is_not_called_allowed(scene: Scene, tmp_path: Path) -> None:
    source = scene.client.ipv4
    path = tmp_path / "set.toml"
    limit = 'action = "limit"\nrate = "10/s"\nburst = 10\n'
    path.write_text(
        "".join(f'[[rules]]\nname = "slow{p}"\n{limit}port = {p}\nsources = ["{source}/32"]\n' for p in (443, 1080))
    )
    assert scene.said("policy", "load", str(path))[0] == 0
    code, words = scene.said("allow", source)
    assert (code, words.partition(" comes")[0]) == (3, "recorded, not enforced: rule slow443, port 443 (limit)")
    assert answered(scene.client, scene.server.ipv4)


def test_a_dry_run_never_takes_the_place_of_a_rule_in_force(scene: Scene) -> None:
    source = scene.client.ipv4
    scene.proxy.command("block", source)
    refused = scene.proxy.command("block", source, "--dry-run", check=False)
    assert refused.returncode == 2
    assert f"drop:{source}/32 (drop), and a dry run would take its place: nothing is changed" in refused.stderr
    assert shut_out(scene.client, scene.server.ipv4)
    assert scene.said("block", "198.18.0.0/16", "--dry-run")[0] == 0
    assert scene.said("block", "198.18.0.0/16", "--dry-run") == (0, "blocked 198.18.0.0/16 (dry run)")
    assert scene.said("block", "198.18.0.0/16")[0] == 0


def test_test_without_a_port_answers_for_each_listener(scene: Scene) -> None:
    server, source = scene.server.ipv4, scene.client.ipv4
    scene.proxy.command("block", source, "--port", "443")
    denied = f"{source} to {server}:443: drop (rule by drop:{source}/32)"
    let_in = f"{source} to {server}:1080: allow (default by default)"
    code, words = scene.said("test", source)
    assert (code, words.splitlines()[:2]) == (1, [denied, let_in])
    code, words = scene.said("test", f"{source}:1080")
    assert (code, words.splitlines()[0]) == (0, f"{source} to port 1080: allow (default by default)")
    assert scene.said("test", f"{source}:443")[0] == 1
    assert scene.proxy.json("test", source, check=False)["action"] == "drop"


def test_a_killed_server_s_listeners_are_not_asked_about_and_the_command_says_that_nobody_serves(scene: Scene) -> None:
    scene.proxy.end()
    done = scene.proxy.command("block", scene.client.ipv4)
    assert done.stdout == f"blocked {scene.client.ipv4}/32\n"
    assert done.stderr == "no server runs: it will be in force when one starts\n"
    failsafe = scene.proxy.command("block", "198.18.99.7", check=False)
    assert (failsafe.returncode, failsafe.stdout.partition(" (")[0]) == (
        3,
        "recorded, not enforced: the failsafe comes first",
    )


def test_commands_change_what_the_server_uses_though_the_pins_are_of_others(scene: Scene) -> None:
    place = Instance(scene.proxy.instance)
    aside = Path(tempfile.mkdtemp(prefix="new-", dir=place.pin_root))
    GateMaps.create(aside, MapSizes(rules=4096, bans=64, buckets=64)).close()
    bpffs.remove_tree(place.pin_dir)
    aside.rename(place.pin_dir)
    assert scene.said("block", scene.client.ipv4) == (0, f"blocked {scene.client.ipv4}/32")
    assert shut_out(scene.client, scene.server.ipv4)
    assert scene.said("test", f"{scene.client.ipv4}:1080")[0] == 1
    assert scene.said("unblock", scene.client.ipv4)[0] == 0
    assert answered(scene.client, scene.server.ipv4)


def in_this_process(scene: Scene, *args: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*args, "--instance", scene.proxy.instance])
    return code, out.getvalue(), err.getvalue()


def test_what_the_programs_do_not_find_is_never_called_blocked(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DerivedState, "expect_rule", lambda *_: None)  # a writer that forgets to tell the programs
    code, out, _ = in_this_process(scene, "block", scene.client.ipv4)
    assert answered(scene.client, scene.server.ipv4)
    assert (code, out.partition(" (")[0]) == (3, "recorded, not enforced: the default")


def test_a_failure_after_the_change_is_in_force_says_so(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_told: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(Changes, "note", full)
    code, out, err = in_this_process(scene, "block", scene.client.ipv4)
    assert (code, out) == (3, "")
    assert "in force, but" in err
    assert shut_out(scene.client, scene.server.ipv4)
    code, out, err = in_this_process(scene, "ban", scene.client.ipv4)
    assert (code, out, "in force, but" in err) == (3, "", True)
    code, out, err = in_this_process(scene, "unblock", scene.client.ipv4)
    assert (code, out, "in force, but" in err) == (3, "", True)


def test_what_a_decision_is_called() -> None:
    at = SocketAddress(ip_address("198.18.0.1"), 443)
    rule = StoredRule(1, "office", Action.DROP, 443, None, False, None, "", "file", 0, 0)
    decision = Decision(at.ip, at, Verdict(Action.DROP, Stage.RULE, "office"), rule)
    assert decision.by == "rule office, port 443"
    assert Decision(at.ip, at, Verdict(Action.DROP, Stage.DEFAULT, "default")).by == "the default (drop)"


def test_a_block_does_not_hold_where_the_gate_does_not_guard() -> None:
    row = {"name": "a", "address": "[2001:db8::1]:80", "guarded": False, "guard": "NOT GUARDED: why", "open": True}
    at = SocketAddress(ip_address("2001:db8::1"), 80)
    assert _unguarded([row]) == {at: "NOT GUARDED: why"}
    assert _unguarded([{**row, "open": False}, {**row, "guarded": True}, {"name": "unix", "address": "/run/x"}]) == {}
    enforced = {"state": "all", "serving": True, "listening": True, "otherwise": [], "before": []}
    some = {"enforced": {**enforced, "unguarded": ["[2001:db8::1]:80 is NOT GUARDED: why"], "guarded": 1}}
    assert outcome("blocked X", some) == ("recorded, but [2001:db8::1]:80 is NOT GUARDED: why; elsewhere blocked X", 0)
    some["enforced"]["guarded"] = 0
    assert outcome("blocked X", some) == ("recorded, not enforced: [2001:db8::1]:80 is NOT GUARDED: why", 3)
