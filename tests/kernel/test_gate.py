"""The gate, seen from the wire: who gets a SYN-ACK, who gets silence, who gets RST."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from rama_ebpf.kernel import abi
from rama_ebpf.kernel.instance import Instance

from ..conftest import StartProxy
from ..lab import PATIENCE, Host, Lab, Segment, temporary_directory, wait_for
from ..proxy import ProxyProcess, rama_ebpf

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

PORT = 1080


@dataclass
class Scene:
    proxy: ProxyProcess
    server: Host
    client: Host

    def address(self, family: int) -> str:
        return self.server.ipv4 if family == socket.AF_INET else self.server.ipv6

    def source(self, family: int) -> str:
        return self.client.ipv4 if family == socket.AF_INET else self.client.ipv6

    def greet(self, family: int = socket.AF_INET, source: str | None = None) -> bytes:
        """Connect, send a SOCKS5 greeting, return the answer."""
        with self.client.connect(self.address(family), PORT, source=source, timeout=5) as sock:
            sock.sendall(b"\x05\x01\x00")
            return sock.recv(2)

    def attempt(self, family: int = socket.AF_INET, source: str | None = None) -> list[Segment]:
        """Try to connect for a moment; return what came back from the proxy's port."""
        with self.client.capture("eth0") as capture, self.client.socket(family) as sock:
            sock.bind((source or self.source(family), 0))
            port = sock.getsockname()[1]
            sock.settimeout(0.6)
            with contextlib.suppress(OSError):  # what the wire shows is what counts
                sock.connect((self.address(family), PORT))
            return [segment for segment in capture.read() if (segment.sport, segment.dport) == (PORT, port)]


def _begin(lab: Lab, start: StartProxy) -> Scene:
    server, client = lab.host("proxy"), lab.host("client")
    proxy = start(server, "--listen", f"{server.ipv4}:{PORT}", "--listen", f"[{server.ipv6}]:{PORT}")
    return Scene(proxy, server, client)


@pytest.fixture(scope="module")
def shared(shared_lab: Lab, start_shared: StartProxy) -> Scene:
    return _begin(shared_lab, start_shared)


@pytest.fixture
def scene(shared: Scene) -> Scene:
    """A server that the test only uses, without rules and bans."""
    shared.proxy.forget_rules()
    return shared


@pytest.fixture
def own(lab: Lab, start_proxy: StartProxy) -> Scene:
    """A server that the test may end."""
    return _begin(lab, start_proxy)


FAMILIES = [pytest.param(socket.AF_INET, id="ipv4"), pytest.param(socket.AF_INET6, id="ipv6")]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocked_source_gets_no_answer_until_it_is_unblocked(scene: Scene, family: int) -> None:
    source = scene.source(family)
    network = f"{source}/{32 if family == socket.AF_INET else 128}"
    before = scene.proxy.accepted()
    assert scene.greet(family) == b"\x05\x00"
    wait_for(lambda: scene.proxy.accepted() == before + 1)

    scene.proxy.command("block", source)
    assert scene.attempt(family) == []
    assert scene.proxy.accepted() == before + 1
    assert scene.proxy.hits(network) >= 1
    assert (
        scene.proxy.command("test", source if family == socket.AF_INET else f"[{source}]", check=False).returncode == 1
    )

    scene.proxy.command("unblock", source)
    assert scene.greet(family) == b"\x05\x00"
    wait_for(lambda: scene.proxy.accepted() == before + 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_rejected_source_gets_rst(scene: Scene, family: int) -> None:
    def rejected() -> int:
        rows = scene.proxy.json("status")["verdicts"]
        return sum(row["count"] for row in rows if (row["hook"], row["action"]) == ("lookup", "reject"))

    before = scene.proxy.accepted(), rejected()
    scene.proxy.command("block", scene.source(family), "--reject")
    flags = {segment.flags for segment in scene.attempt(family)}
    assert flags == {"RA"}
    assert scene.proxy.accepted() == before[0]
    assert rejected() > before[1]


@pytest.mark.parametrize(
    ("family", "wide", "inside", "outside"),
    [
        pytest.param(socket.AF_INET, "198.19.0.0/16", "198.19.7.0/24", "198.19.8.1", id="ipv4"),
        pytest.param(socket.AF_INET6, "2001:db8:1::/48", "2001:db8:1:7::/64", "2001:db8:1:8::1", id="ipv6"),
    ],
)
def test_longest_prefix_wins(scene: Scene, family: int, wide: str, inside: str, outside: str) -> None:
    excepted = inside.split("/")[0].removesuffix("0") + "1" if family == socket.AF_INET else inside.split("/")[0] + "1"
    length = 32 if family == socket.AF_INET else 128
    for address in (excepted, outside):
        scene.client.add_address(f"{address}/{length}", "eth0")
    scene.server.ip(*(["-6"] if family == socket.AF_INET6 else []), "route", "add", wide, "dev", "eth0")

    scene.proxy.command("block", wide)
    assert scene.attempt(family, excepted) == []
    scene.proxy.command("allow", inside)
    assert scene.greet(family, excepted) == b"\x05\x00"
    assert scene.attempt(family, outside) == []
    # And an exact address inside the exception inside the block.
    scene.proxy.command("block", excepted)
    assert scene.attempt(family, excepted) == []
    scene.proxy.command("unblock", excepted)
    assert scene.greet(family, excepted) == b"\x05\x00"


def test_ttl_runs_out_by_itself_and_the_wider_rule_decides_again(scene: Scene) -> None:
    source, ttl = scene.client.ipv4, round(12 * PATIENCE)  # commands take seconds on a busy machine
    scene.proxy.command("block", "198.18.0.0/16", "--reject")
    scene.proxy.command("block", source, "--ttl", f"{ttl}s", "--reason", "try again later")
    assert scene.attempt() == []
    rule = next(r for r in scene.proxy.json("list")["rules"] if r["sources"] == [f"{source}/32"])
    assert 0 < rule["expires_in"] <= ttl
    assert rule["reason"] == "try again later"
    wait_for(lambda: scene.proxy.json("test", source, check=False)["action"] == "reject", timeout=30)
    assert {segment.flags for segment in scene.attempt()} == {"RA"}
    assert all(r["sources"] != [f"{source}/32"] for r in scene.proxy.json("list")["rules"])


def test_dry_run_block_counts_but_lets_in(scene: Scene) -> None:
    scene.proxy.command("block", scene.client.ipv4, "--dry-run")
    assert scene.greet() == b"\x05\x00"
    rule = scene.proxy.json("list")["rules"][0]
    assert (rule["hits"], rule["dry_hits"]) == (0, 1)


def test_port_of_a_rule_is_the_listeners(scene: Scene) -> None:
    scene.proxy.command("block", scene.client.ipv4, "--port", "9999")
    assert scene.greet() == b"\x05\x00"
    scene.proxy.command("block", scene.client.ipv4, "--port", str(PORT))
    assert scene.attempt() == []
    scene.proxy.command("unblock", scene.client.ipv4, "--port", str(PORT))
    assert scene.greet() == b"\x05\x00"


def test_other_services_of_the_host_are_never_touched(scene: Scene) -> None:
    with scene.server.socket() as ssh:
        ssh.bind((scene.server.ipv4, 22))
        ssh.listen()
        with scene.server.socket() as same_port:
            # Even the proxy's own port number on another address of the host.
            scene.server.add_address("198.18.200.1/16", "eth0")
            same_port.bind(("198.18.200.1", PORT))
            same_port.listen()
            for source in ("0.0.0.0/0", "::/0"):
                scene.proxy.command("block", source)
            assert scene.attempt() == []
            scene.client.connect(scene.server.ipv4, 22).close()
            scene.client.connect("198.18.200.1", PORT).close()


@pytest.mark.parametrize("family", FAMILIES)
def test_wildcard_listeners_of_both_families_share_a_port(lab: Lab, start_proxy: StartProxy, family: int) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    proxy = start_proxy(server, "--listen", f"0.0.0.0:{PORT}", "--listen", f"[::]:{PORT}")
    scene = Scene(proxy, server, client)
    assert scene.greet(family) == b"\x05\x00"
    proxy.command("block", scene.source(family))
    assert scene.attempt(family) == []
    other = socket.AF_INET6 if family == socket.AF_INET else socket.AF_INET
    assert scene.greet(other) == b"\x05\x00"


def test_failsafe_source_gets_in_whatever_is_blocked(lab: Lab, start_proxy: StartProxy) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    proxy = start_proxy(server, "--listen", f"{server.ipv4}:{PORT}", "--default", "drop", "--failsafe", client.ipv4)
    scene = Scene(proxy, server, client)
    proxy.command("block", "0.0.0.0/0")
    recorded = proxy.command("block", client.ipv4, check=False)
    assert (recorded.returncode, "the failsafe comes first" in recorded.stdout) == (3, True)
    assert scene.greet() == b"\x05\x00"
    client.add_address("198.18.77.1/16", "eth0")
    assert scene.attempt(source="198.18.77.1") == []


def test_source_blocked_between_its_syn_and_its_ack_stays_out(scene: Scene) -> None:
    """The last segment of the handshake is judged too."""
    client = scene.client
    before = scene.proxy.accepted()
    # Hold back the final ACK: the client's own kernel drops what it would send after the SYN.
    client.run("nft", "add table inet hold")
    client.run("nft", "add chain inet hold out { type filter hook output priority 0; }")
    client.run("nft", "add rule inet hold out tcp flags & (syn|ack) == ack drop")
    with client.connect(scene.server.ipv4, PORT) as sock:  # SYN-ACK seen: connected, as far as the client knows
        scene.proxy.command("block", client.ipv4)
        client.run("nft", "delete table inet hold")
        sock.settimeout(0.8)
        sock.sendall(b"\x05\x01\x00")
        with pytest.raises(TimeoutError):
            sock.recv(2)
    assert scene.proxy.accepted() == before


def _bpf_programs() -> dict[int, str]:
    listed = subprocess.run(["bpftool", "prog", "list", "--json"], check=True, capture_output=True, text=True).stdout
    return {row["id"]: row.get("name", "") for row in json.loads(listed)}


def _cgroup_programs(cgroup: Path) -> str:
    return subprocess.run(["bpftool", "cgroup", "show", str(cgroup)], capture_output=True, text=True).stdout


def test_kill_9_leaves_no_program_and_the_next_start_keeps_the_policy(own: Scene, start_proxy: StartProxy) -> None:
    own.proxy.command("block", own.client.ipv4)
    ours = own.proxy.programs()
    assert ours <= set(_bpf_programs())
    assert len(ours) >= 3
    cgroup = Path(own.proxy.json("status")["cgroup"])
    assert "gate_cgroup" in _cgroup_programs(cgroup)

    own.proxy.signal(signal.SIGKILL)
    own.proxy.wait()
    # Programs are freed after a grace period.
    wait_for(lambda: not ours & set(_bpf_programs()), what="the end of the programs")
    assert "gate_" not in _cgroup_programs(cgroup)

    listen = ["--listen", f"{own.server.ipv4}:{PORT}"]
    again = start_proxy(own.server, *listen)
    assert again.logged("took over the policy")
    own = Scene(again, own.server, own.client)
    assert own.attempt() == []
    again.command("unblock", own.client.ipv4)
    assert own.greet() == b"\x05\x00"


@pytest.mark.parametrize("moment", [0.05, 0.3, 0.6, 0.9, 1.2])
def test_kill_9_at_any_moment_of_the_start_does_not_hinder_the_next(
    lab: Lab, instance: str, start_proxy: StartProxy, moment: float
) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    listen = ("--listen", f"{server.ipv4}:{PORT}")
    victim = server.popen(ProxyProcess.COMMAND, "run", "--instance", instance, *listen, stderr=subprocess.DEVNULL)
    time.sleep(moment)  # whatever the start has come to by then
    victim.kill()
    victim.wait()
    proxy = start_proxy(server, *listen)
    assert Scene(proxy, server, client).greet() == b"\x05\x00"
    ours = proxy.programs()
    proxy.signal(signal.SIGTERM)
    assert proxy.wait() == 0
    wait_for(lambda: not ours & set(_bpf_programs()), what="the end of the programs")


def test_clean_stop_and_unload_leave_nothing(own: Scene, instance: str) -> None:
    place = Instance(instance)
    cgroup = Path(own.proxy.json("status")["cgroup"])
    assert cgroup.is_dir()
    assert place.pin_dir.is_dir()
    refused = own.proxy.command("unload", check=False)
    assert refused.returncode == 2
    assert str(own.proxy.pid) in refused.stderr
    own.proxy.command("unload", "--stop")
    assert own.proxy.wait() == 0
    assert not cgroup.exists()
    assert not place.pin_root.exists()
    assert not place.run_dir.exists()


def test_persist_keeps_the_policy_over_a_clean_stop(lab: Lab, instance: str, start_proxy: StartProxy) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    listen = ("--listen", f"{server.ipv4}:{PORT}", "--persist")
    proxy = start_proxy(server, *listen)
    proxy.command("block", client.ipv4)
    proxy.signal(signal.SIGTERM)
    assert proxy.wait() == 0
    proxy = start_proxy(server, *listen)
    assert Scene(proxy, server, client).attempt() == []


def test_full_map_is_refused_with_the_remedy_and_changes_nothing(lab: Lab, start_proxy: StartProxy) -> None:
    server = lab.host("proxy")
    proxy = start_proxy(server, "--listen", f"{server.ipv4}:{PORT}", "--max-rules", "16")
    results = [proxy.command("block", f"198.19.0.{n}", check=False) for n in range(1, 40)]
    refused = [result for result in results if result.returncode != 0]
    assert refused, "a map of 16 took 39 rules"
    for result in refused:
        assert result.returncode == 2
        assert len(result.stderr.strip().splitlines()) == 1
        assert "--max-rules" in result.stderr
    assert len(proxy.json("list")["rules"]) == len(results) - len(refused)


def test_second_server_of_an_instance_is_refused(scene: Scene) -> None:
    listen = ("--listen", f"{scene.server.ipv4}:1081")
    other = scene.server.run(ProxyProcess.COMMAND, "run", "--instance", scene.proxy.instance, *listen, check=False)
    assert other.returncode == 2
    assert str(scene.proxy.pid) in other.stderr
    assert scene.greet() == b"\x05\x00"


def test_layouts_of_the_header_and_of_python_agree() -> None:
    header = (abi.source_dir() / "policy.h").read_text(encoding="utf-8")
    sizes = {name: int(size) for name, size in re.findall(r"sizeof\(struct (\w+)\) == (\d+)", header)}
    parts = {"ban_masks"}  # of another structure, and packed with it
    for name, size in sizes.items():
        assert name in parts or getattr(abi, name.upper()).size == size, name
    assert os.sysconf("SC_NPROCESSORS_CONF") <= abi.possible_cpus()


def test_commands_without_a_server_say_so() -> None:
    result = rama_ebpf("list", "--instance", "nobody-runs-this", check=False)
    assert result.returncode == 2
    assert result.stderr == "rama-ebpf list: instance 'nobody-runs-this' is not loaded: start it with rama-ebpf run\n"


def test_run_directory_that_somebody_else_made_is_refused(lab: Lab) -> None:
    # As without XDG_RUNTIME_DIR, below a directory that anybody can write to.
    with temporary_directory() as shared:
        shared.chmod(0o777)
        planted = shared / "rama-ebpf"
        planted.mkdir()
        planted.chmod(0o777)
        result = lab.host("proxy").run(
            *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", f"XDG_RUNTIME_DIR={shared}"),
            *(ProxyProcess.COMMAND, "run", "--listen", "127.0.0.1:1080"),
            check=False,
        )
    assert result.returncode == 3
    assert f"{planted} belongs to another user" in result.stderr
