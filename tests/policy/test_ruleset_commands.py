"""``rama-ebpf policy …`` as an operator uses it, on pinned maps and, without any, through the server's socket."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import uvloop

from rama_ebpf.cli import main
from rama_ebpf.config.policy import load_policy
from rama_ebpf.control.api import ControlApi
from rama_ebpf.control.socket import ControlServer
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.feed_store import FeedStore
from rama_ebpf.policy.kernel_store import KernelStore
from rama_ebpf.policy.local import LocalStore
from rama_ebpf.policy.rule import Action, Settings, SynLimit
from rama_ebpf.policy.store import PolicyStore

from ..lab import wait_for
from ..proxy import ProxyProcess, rama_ebpf
from .writers import address, block_at_once

FIRST = """
default = "drop"
per_source = { rate = "10/s", burst = 20 }

[[rules]]
name = "office"
action = "allow"
sources = ["198.18.1.0/24", "2001:db8:1::/48"]
reason = "those who pay"

[[rules]]
name = "slow"
action = "limit"
rate = "5/m"
burst = 3
sources = ["198.18.2.0/24"]

[[rules]]
name = "soon"
action = "reject"
sources = ["198.18.3.0/24"]
port = 1080
ttl = "1h"
dry_run = true
"""


class Policy:
    """The policy of one instance: where it lives, and the commands on it."""

    def __init__(self, instance: Instance, store: PolicyStore, directory: Path) -> None:
        self.instance = instance
        self.store = store
        self._directory = directory

    def file(self, text: str, name: str = "policy.toml") -> Path:
        path = self._directory / name
        path.write_text(text)
        return path

    def command(self, *args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in this process: starting Python 60 times is half a minute."""
        out, err = io.StringIO(), io.StringIO()
        words = [*map(str, args), "--instance", self.instance.name]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
        assert code == 0 or not check, f"{words}: exit {code}\n{out.getvalue()}{err.getvalue()}"
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

    def json(self, *args: object, check: bool = True) -> Any:
        return json.loads(self.command(*args, "--json", check=check).stdout)

    def refused(self, *args: object) -> str:
        """Run a command that must be refused in one line without a change; return the line."""
        before = self.store.revision, self.store.ruleset()
        result = self.command(*args, check=False)
        assert (result.returncode, result.stdout) == (2, "")
        assert (self.store.revision, self.store.ruleset()) == before
        assert "Traceback" not in result.stderr
        return result.stderr.rstrip("\n")


@pytest.fixture
def kernel_policy(pinned: Instance, tmp_path: Path) -> Iterator[Policy]:
    with KernelStore(pinned) as store:
        yield Policy(pinned, store, tmp_path)


@pytest.fixture
def local_policy(instance: str, tmp_path: Path) -> Iterator[Policy]:
    """A store in a process that answers on the control socket, as the server does."""
    place, local = Instance(instance), LocalStore(max_entries=4095)
    local.remember_in(place.state_dir)
    place.make_run_dir()
    loop = uvloop.new_event_loop()  # as the server's
    server = ControlServer(place.control_socket, ControlApi(local, FeedStore(place.feeds_dir)).call)
    loop.run_until_complete(server.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield Policy(place, local, tmp_path)
    asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


@pytest.fixture(params=["kernel", "local"])
def policy(request: pytest.FixtureRequest) -> Policy:
    made: Policy = request.getfixturevalue(f"{request.param}_policy")
    return made


def test_a_policy_file_is_in_force_when_load_returns_and_exported_as_it_is(policy: Policy) -> None:
    policy.command("block", "198.18.9.9")
    loaded = policy.json("policy", "load", policy.file(FIRST))
    assert (loaded["rules"], loaded["prefixes"], loaded["revision"]) == (3, 4, policy.store.revision)
    assert policy.json("policy", "test", "198.18.1.7")["rule"] == "office"
    assert policy.json("policy", "test", "[2001:db8:1::7]:443")["rule"] == "office"
    told = policy.json("policy", "test", "198.18.3.3:1080", check=False)
    assert (told["action"], told["dry_run"]) == ("drop", {"rule": "soon", "action": "reject"})
    assert policy.json("policy", "test", "198.18.9.9", check=False)["rule"] == "drop:198.18.9.9/32"

    exported = policy.command("policy", "export").stdout
    values = tomllib.loads(exported)
    assert values["default"] == "drop"
    assert [rule["name"] for rule in values["rules"]] == ["office", "slow", "soon"]
    assert 3500 < values["rules"][2]["ttl"] <= 3600
    before = policy.store.ruleset()
    again = policy.file(exported, "again.toml")
    assert policy.json("policy", "diff", again)["same"]
    policy.command("policy", "load", again)
    assert policy.store.ruleset().rules[:2] == before.rules[:2]
    assert policy.store.settings() == before.settings


def test_diff_says_what_a_load_would_change_and_changes_nothing(policy: Policy) -> None:
    policy.command("policy", "load", policy.file(FIRST))
    revision = policy.store.revision
    new = FIRST.replace('"drop"', '"reject"', 1).replace("198.18.2.0/24", "198.18.4.0/24").replace("5/m", "9/m")
    new = new.replace('name = "office"', 'name = "staff"')
    told = policy.json("policy", "diff", policy.file(new, "new.toml"), check=False)
    assert not told["same"]
    assert [rule["name"] for rule in told["added"]] == ["staff"]
    assert [rule["name"] for rule in told["removed"]] == ["office"]
    (slow,) = told["changed"]
    assert slow["sources"] == {"added": 1, "removed": 1, "examples": ["+198.18.4.0/24", "-198.18.2.0/24"]}
    assert "limit" in slow
    assert told["settings"] == {"default": ["drop", "reject"]}
    shown = policy.command("policy", "diff", policy.file(new, "new.toml"), check=False)
    assert shown.returncode == 1
    assert "+ staff: allow, 2 prefixes" in shown.stdout
    assert "~ default: drop -> reject" in shown.stdout
    assert policy.store.revision == revision
    assert policy.command("policy", "diff", policy.file(FIRST)).stdout == "nothing would change\n"


def test_a_stale_revision_is_refused_with_the_present_one(policy: Policy) -> None:
    seen = policy.json("policy", "load", policy.file(FIRST))["revision"]
    policy.command("block", "198.18.9.9")  # somebody else
    said = policy.refused("policy", "load", policy.file("rules = []"), "--revision", seen)
    assert f"the policy is at revision {seen + 1}, not {seen}" in said
    assert f"--revision {seen + 1}" in said
    policy.command("policy", "load", policy.file("rules = []"), "--revision", seen + 1)
    assert policy.store.ruleset().rules == ()


def test_of_loads_at_the_same_revision_one_wins(kernel_policy: Policy) -> None:
    seen = kernel_policy.json("policy", "load", kernel_policy.file(FIRST))["revision"]
    loads = []
    for n in range(3):
        rule = f'[[rules]]\nname = "load-{n}"\naction = "drop"\nsources = ["198.18.0.0/16"]'
        path = str(kernel_policy.file(rule, f"{n}.toml"))
        words = ("policy", "load", path, "--revision", str(seen), "--instance", kernel_policy.instance.name)
        loads.append(
            subprocess.Popen([ProxyProcess.COMMAND, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        )
    said = [load.communicate()[1].decode() for load in loads]
    codes = [load.returncode for load in loads]
    assert sorted(codes) == [0, 2, 2]
    assert all(f"at revision {seen + 1}, not {seen}" in said[n] for n, code in enumerate(codes) if code == 2)
    assert [rule.name for rule in kernel_policy.store.ruleset().rules] == [f"load-{codes.index(0)}"]
    assert kernel_policy.store.revision == seen + 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param(FIRST[: FIRST.index("2001:db8") + 3], "1: not TOML", id="torn"),
        pytest.param("", "cannot be read", id="missing"),
        pytest.param(FIRST.replace("198.18.2.0/24", "198.18.2.1/24"), "write 198.18.2.0/24", id="host-bits"),
        pytest.param(FIRST.replace('"limit"', '"limti"'), 'write one of "allow"', id="action"),
        pytest.param(FIRST.replace('"slow"', '"office"'), 'there are two rules "office"', id="twice"),
        pytest.param(FIRST.replace('sources = ["198.18.2.0/24"]', ""), "or a feed", id="no-sources"),
        pytest.param("[policy]\ndefalt = 1", 'did you mean "default"', id="setting"),
    ],
)
def test_a_bad_file_is_refused_and_the_old_policy_stays(local_policy: Policy, text: str, said: str) -> None:
    local_policy.command("policy", "load", local_policy.file(FIRST))
    path = local_policy.file(text, "bad.toml")
    if not text:
        path.unlink()
    for verb in ("load", "diff"):
        line = local_policy.refused("policy", verb, path)
        assert said.removeprefix("1: ") in line
        assert f"{path}:" in line


def test_more_rules_than_the_map_holds_are_refused_and_the_old_policy_stays(policy: Policy) -> None:
    policy.command("policy", "load", policy.file(FIRST))
    rows = [f'{{ name = "r{n}", action = "drop", sources = ["198.19.{n >> 8}.{n & 255}"] }}' for n in range(4097)]
    said = policy.refused("policy", "load", policy.file(f"rules = [{', '.join(rows)}]", "big.toml"))
    assert "the policy holds" in said
    assert ("--max-rules above 4096" in said) == (policy.store.kind == "kernel")
    assert policy.store.verdict(ip_address("198.18.1.1"), 1080).rule == "office"
    fits = policy.file(f"rules = [{', '.join(rows[:4000])}]", "fits.toml")
    assert policy.json("policy", "load", fits)["rules"] == 4000  # what was refused took no room


def test_a_set_on_trial_is_confirmed_or_undone(policy: Policy) -> None:
    policy.command("policy", "load", policy.file(FIRST))
    shut = policy.file('default = "drop"\n[[rules]]\nname = "all"\naction = "drop"\nsources = ["0.0.0.0/0", "::/0"]')
    said = policy.command("policy", "load", shut, "--confirm-timeout", "1h").stdout
    assert "ON TRIAL: undone in 1h" in said
    assert "ON TRIAL" in policy.command("list").stdout
    assert "policy confirm" in policy.refused("policy", "load", shut)
    policy.command("policy", "rollback")
    assert policy.json("policy", "test", "198.18.1.1")["rule"] == "office"
    assert "nothing to roll back" in policy.refused("policy", "rollback")

    policy.command("policy", "load", shut, "--confirm-timeout", "1h")
    policy.command("policy", "confirm")
    assert policy.json("policy", "test", "198.18.1.1", check=False)["rule"] == "all"
    assert "nothing waits to be confirmed" in policy.refused("policy", "confirm")

    policy.command("policy", "load", policy.file("rules = []"), "--confirm-timeout", "1s")
    wait_for(lambda: policy.json("policy", "test", "198.18.1.1", check=False)["rule"] == "all")
    assert policy.store.pending is None


def test_the_log_names_who_changed_what_and_survives(policy: Policy) -> None:
    path = policy.file(FIRST)
    commands = (("policy", "load", path), ("block", "198.18.9.9", "--reason", "noise"), ("unblock", "198.18.9.9"))
    for command in commands:
        rama_ebpf(*map(str, command), "--instance", policy.instance.name)
    entries = policy.json("policy", "log")["entries"]
    assert [entry["what"] for entry in entries] == ["load", "add", "remove"]
    assert [entry["revision"] for entry in entries] == [1, 2, 3]
    assert entries[0]["origin"] == str(path)
    assert entries[1]["reason"] == "noise"
    pids = [entry["who"]["pid"] for entry in entries]
    assert len(set(pids)) == 3, "each command was a process of its own"
    assert os.getpid() not in pids
    assert all(entry["who"]["uid"] == os.getuid() for entry in entries)
    with (policy.instance.state_dir / "journal").open("ab") as journal:
        journal.write(b'{"what": "torn by a power fail')
    policy.command("block", "198.18.9.10")
    assert [entry["what"] for entry in policy.json("policy", "log", "-n", 2)["entries"]] == ["remove", "add"]
    rows = policy.command("policy", "log").stdout.splitlines()
    assert len(rows) == 1 + 4
    assert "noise" in rows[2]


def test_bans_are_listed_and_lifted_and_in_force_after_a_restart(policy: Policy) -> None:
    policy.command("ban", "198.18.5.5", "--ttl", "1h", "--reason", "three strikes")
    policy.command("ban", "2001:db8::5", "--reject")
    rows = {row["address"]: row for row in policy.json("bans")["bans"]}
    assert rows["198.18.5.5"]["reason"] == "three strikes"
    assert 3500 < rows["198.18.5.5"]["expires_in"] <= 3600
    assert rows["2001:db8::5"]["action"] == "reject"
    assert policy.json("policy", "test", "198.18.5.5", check=False)["stage"] == "ban"
    policy.command("unblock", "2001:db8::5")
    assert policy.command("unblock", "2001:db8::5", check=False).returncode == 1
    assert [row["address"] for row in policy.json("bans")["bans"]] == ["198.18.5.5"]
    restarted = LocalStore()
    restarted.remember_in(policy.instance.state_dir)
    assert restarted.restore_bans() == 1
    (ban,) = restarted.bans()
    assert (ban.source, ban.reason) == ("198.18.5.5", "three strikes")


@pytest.mark.parametrize("args", [("ban", "198.18.5.0/24"), ("ban", "198.18.5.5", "--ttl", "0")])
def test_a_ban_of_what_is_no_address_or_time_is_refused(local_policy: Policy, args: tuple[str, ...]) -> None:
    assert "write for example" in local_policy.refused(*args) or "use 1 second" in local_policy.refused(*args)


def test_unload_keeps_bans_and_journal_until_they_are_purged(kernel_policy: Policy) -> None:
    kernel_policy.command("ban", "198.18.5.5")
    state = kernel_policy.instance.state_dir
    assert f"bans and journal in {state} (--purge forgets them)" in kernel_policy.command("unload").stdout
    assert (state / "bans").exists()
    assert not kernel_policy.instance.pinned
    assert kernel_policy.command("unload", "--purge").stdout.endswith(": nothing is left\n")
    assert not state.exists()


def test_a_user_without_a_home_has_a_place_for_bans() -> None:
    script = "from rama_ebpf.kernel.instance import Instance; print(Instance('a').state_dir)"
    become = ("setpriv", "--reuid=65533", "--regid=65533", "--clear-groups", "env", "-i", "XDG_RUNTIME_DIR=/run/user/x")
    said = subprocess.run([*become, sys.executable, "-c", script], cwd="/", check=True, capture_output=True, text=True)
    assert said.stdout == "/run/user/x/rama-ebpf/.state/a\n"


def test_no_block_is_lost_when_four_processes_block_at_once(policy: Policy) -> None:
    calls = 250
    before = policy.store.revision
    block_at_once(policy.instance.name, processes=4, calls=calls)
    wanted = {address(process, number) for process in range(4) for number in range(calls)}
    records = policy.store.records()
    assert {str(source.network_address) for record in records for source in record.sources} == wanted
    assert len({record.rule.id for record in records}) == 4 * calls
    assert policy.store.revision == before + 4 * calls
    assert all(policy.store.verdict(ip_address(source), 1080).rule == f"drop:{source}/32" for source in wanted)
    told = [entry for entry in policy.store.journal() if entry["what"] == "add"]
    assert sorted(str(entry["source"]) for entry in told) == sorted(f"{source}/32" for source in wanted)


def test_the_example_of_the_documentation_is_a_policy_file(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
    example, by_origin = re.findall(r"^```toml\n(.*?)^```", text, flags=re.M | re.S)
    (tmp_path / "policy.toml").write_text(example)
    ruleset = load_policy(tmp_path / "policy.toml").ruleset(Settings())
    assert [rule.name for rule in ruleset.rules] == ["office", "listed"]
    assert ruleset.settings == Settings(Action.DROP, SynLimit(10, 20))
    (tmp_path / "policy.toml").write_text(by_origin)
    assert [rule.feed is not None for rule in load_policy(tmp_path / "policy.toml").rules] == [True, True]


# -- feeds ------------------------------------------------------------------------------------------------------------


def with_feed(where: str, timeout: int = 60) -> str:
    return f'[[rules]]\nname = "listed"\naction = "drop"\nfeed = {{ {where}, max_bad = 0.01, timeout = {timeout} }}\n'


def test_a_feed_with_one_percent_of_bad_lines_is_loaded_and_they_are_named(policy: Policy) -> None:
    lines = [f"198.18.{n >> 8}.{n & 255}" for n in range(990)]
    lines[99:99] = ["not-a-network"] * 5
    lines[599:599] = ["198.18.0.0"] * 3  # listed before
    lines += ["198.19.0.1/24"] * 5
    path = policy.file(with_feed(f'file = "{policy.file(chr(10).join(lines), "list")}"'))
    said = policy.command("policy", "load", path).stdout
    assert "listed: 990 networks: 10 bad lines, 3 duplicates" in said
    assert "line 100: 'not-a-network' is not an address" in said
    assert "line 999: '198.19.0.1/24' has host bits set: write 198.19.0.0/24" in said
    assert policy.json("policy", "test", "198.18.3.200", check=False)["rule"] == "listed"
    policy.file(chr(10).join([*lines, "and-one-more"]), "list")
    said = policy.command("policy", "refresh", check=False)
    assert said.returncode == 1
    assert "11 of 1004 lines are no network, and more than 1% are not accepted" in said.stdout
    assert policy.json("policy", "test", "198.18.3.200", check=False)["rule"] == "listed"


def test_feeds_that_overlap_are_named(local_policy: Policy) -> None:
    local_policy.file("198.18.0.0/16\n198.19.1.0/24\n", "wide")
    local_policy.file("198.18.1.1\n198.18.1.2\n198.19.0.0/16\n", "narrow")
    rows = [f'{{ name = "{n}", action = "drop", feed = {{ file = "{n}" }} }}' for n in ("wide", "narrow")]
    said = local_policy.command("policy", "load", local_policy.file(f"rules = [{', '.join(rows)}]")).stdout
    assert "narrow: 2 networks are in wide too\n" in said
    assert "wide: 1 networks are in narrow too\n" in said


def test_a_feed_server_that_hangs_leaves_the_policy_as_it_was(policy: Policy) -> None:
    policy.command("policy", "load", policy.file(FIRST))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, nobody answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/list"
        said = policy.refused("policy", "load", policy.file(with_feed(f'url = "{url}"', 1), "new.toml"))
    assert said.endswith(f"feed {url}: not there within 1 s")


def test_an_exported_feed_is_the_feed_and_not_what_it_said(local_policy: Policy) -> None:
    local_policy.file("198.18.1.1\n", "list")
    local_policy.command("policy", "load", local_policy.file(with_feed('file = "list"')))
    (rule,) = tomllib.loads(local_policy.command("policy", "export").stdout)["rules"]
    assert rule["feed"]["file"].endswith("/list")
    assert rule["feed"]["max_bad"] == 0.01
    assert "sources" not in rule
