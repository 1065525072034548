"""``why`` names the true cause of every kind of refusal: where it would be turned away, or what it was refused."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rama_ebpf.control import socket as control
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.layers.hashes import hash_password
from rama_ebpf.policy.kernel_store import KernelStore

from ..conftest import StartProxy
from ..lab import Host, lab_of, temporary_directory, wait_for
from ..proxy import ProxyProcess

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

HTTP, SOCKS, LOCKED, SLOW = 3128, 1080, 1081, 1082

CONFIG = """
[server]
workers = 1

[listeners.http]
address = "{server}:3128"
stack = "http"

[listeners.socks]
address = "{server}:1080"
stack = "socks"

[listeners.locked]
address = "{server}:1081"
stack = "locked"

[listeners.slow]
address = "{server}:1082"
stack = "slow"

[stacks.http]
service = {{ http = {{ users = "users", connect_ports = [443, 1080, 8080] }} }}
connect = {{ targets = {{ deny_hosts = ["*.bad.example"], deny_ports = [25] }} }}

[stacks.socks]
service = "socks5"
layers = [{{ strikes = {{ strikes = 3, window = "5m", ban = "1h" }} }}, {{ sources = {{ allow = ["198.18.0.0/15"] }} }}]

[stacks.locked]
service = {{ socks5 = {{ users = "users" }} }}

[stacks.slow]
service = "socks5"
layers = [{{ rate = {{ rate = "4/h", burst = 1, per = "source" }} }}]

[resolver]
timeout = "200ms"
attempts = 1

[egress]
allow = ["198.18.0.0/16", "{server}"]
deny = ["198.18.200.0/24"]

[limits]
connections_per_source = 12

[policy]
default = "allow"

[[policy.rules]]
name = "listed"
action = "drop"
sources = ["198.18.60.0/24", "198.18.61.0/24"]

[[policy.rules]]
name = "closed-door"
action = "reject"
sources = ["198.18.62.0/24"]
reason = "a door"

[[policy.rules]]
name = "from-feed"
action = "drop"
feed = {{ file = "feed.txt" }}

[[policy.rules]]
name = "one-port"
action = "drop"
sources = ["198.18.64.0/24"]
port = 1081

[[policy.rules]]
name = "limited"
action = "limit"
sources = ["198.18.65.0/24"]
rate = "4/h"
burst = 1
"""


@dataclass
class Scene:
    proxy: ProxyProcess
    server: Host
    client: Host
    file: Path

    def why(self, client: str, **params: object) -> Any:
        """What the server answers."""
        path = Instance(self.proxy.instance).control_socket
        return control.call(path, "why", {"client": client, **params}, timeout=30)

    def cause(self, client: str, port: int = SOCKS, **params: object) -> Mapping[str, str]:
        """Why a client would be turned away from the one listener on a port."""
        (walk,) = self.why(client, port=port, **params)["listeners"]
        assert walk["cause"] is not None, walk
        found: Mapping[str, str] = walk["cause"]
        return found

    def line(self, text: str) -> str:
        """File and line of the rule of a name."""
        number = self.file.read_text().splitlines().index(f'name = "{text}"')
        return f"{self.file}:{number}"  # counted from 1: [[policy.rules]] stands above

    def refused(self, kind: str, knocks: Callable[[Scene], str | None]) -> Mapping[str, Any]:
        """Have a client be refused; return the refusal of this kind that is found by its id, or else its address."""
        known = {row["when"] for row in self.why(self.client.ipv4)["refusals"]}
        refusal = knocks(self)

        def found() -> Mapping[str, Any] | None:
            rows = self.why(self.client.ipv4)["refusals"]
            return next((row for row in rows if row["kind"] == kind and row["when"] not in known), None)

        wait_for(lambda: found() is not None, what=f"a refusal {kind}")
        row = found()
        assert row is not None
        if refusal is not None:
            assert row["id"] == refusal
            assert self.why(refusal)["refusal"] == row
            assert self.why(refusal)["client"] == self.client.ipv4
        else:
            assert row["id"] == ""
        return row

    def http(self, request: str, *, user: str = "tom:secret") -> tuple[int, str | None]:
        """Ask the HTTP proxy; return the status, and the id of a refusal."""
        credentials = base64.b64encode(user.encode()).decode()
        fields = f"Proxy-Authorization: Basic {credentials}\r\n" if user else ""
        with self.client.connect(self.server.ipv4, HTTP, timeout=30) as sock:
            sock.sendall(f"{request} HTTP/1.1\r\nHost: x.example\r\n{fields}Connection: close\r\n\r\n".encode())
            head = _all(sock).partition(b"\r\n\r\n")[0].decode().split("\r\n")
        ids = [line.partition(": ")[2] for line in head if line.startswith("Refusal-Id: ")]
        return int(head[0].split()[1]), ids[0] if ids else None

    def socks(self, port: int, *parts: bytes) -> bytes:
        """Speak SOCKS5; return all that comes back."""
        with self.client.connect(self.server.ipv4, port, timeout=30) as sock:
            for part in parts:
                sock.sendall(part)
            return _all(sock)

    def load(self, text: str) -> None:
        """Put another set into force for a test."""
        path = self.file.with_name("other.toml")
        path.write_text(text)
        control.call(Instance(self.proxy.instance).control_socket, "load", {"path": str(path)}, timeout=30)

    def knocks_from(self, source: str, port: int = SOCKS) -> bool:
        """Connect from an address of the client; return whether it was let in."""
        try:
            self.client.connect(self.server.ipv4, port, timeout=1, source=source).close()
        except OSError:
            return False
        return True


def _all(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionError):
        while chunk := sock.recv(4096):
            data += chunk
    return data


@pytest.fixture(scope="module")
def scene(start_shared: StartProxy) -> Iterator[Scene]:
    with temporary_directory() as directory, lab_of("proxy", "client") as (server, client):
        (directory / "users").write_text(f"tom:{hash_password('secret', (4, 1))}\n")
        (directory / "users").chmod(0o644)
        (directory / "feed.txt").write_text("198.18.63.0/24\n")
        (directory / "rama.toml").write_text(CONFIG.format(server=server.ipv4))
        for extra in ("198.18.65.7/16", "198.18.66.7/16", "198.18.66.8/16"):
            client.add_address(extra, "eth0")
        proxy = start_shared(server, "--config", str(directory / "rama.toml"))
        yield Scene(proxy, server, client, directory / "rama.toml")


@pytest.fixture
def own_set(scene: Scene) -> Iterator[None]:
    """Have the set of the file again after a test that loads another one."""
    yield
    scene.proxy.forget_rules()
    control.call(Instance(scene.proxy.instance).control_socket, "load", {"path": str(scene.file)}, timeout=30)


# -- what would be turned away ---------------------------------------------------------------------------------------


def test_a_drop_of_a_rule_names_rule_file_line_and_network(scene: Scene) -> None:
    cause = scene.cause("198.18.61.9")
    assert (cause["part"], cause["kind"], cause["rule"], cause["where"]) == (
        "gate",
        "rule",
        "listed",
        scene.line("listed"),
    )
    assert "drops its SYN: 198.18.61.0/24 of it covers the client" in cause["text"]


def test_a_reject_of_a_rule_names_its_reason(scene: Scene) -> None:
    cause = scene.cause("198.18.62.1")
    assert (cause["rule"], cause["where"]) == ("closed-door", scene.line("closed-door"))
    assert "answers RST" in cause["text"]
    assert cause["text"].endswith("(a door)")


def test_a_network_of_a_feed_names_the_feed(scene: Scene) -> None:
    cause = scene.cause("198.18.63.1")
    assert (cause["kind"], cause["rule"], cause["where"]) == ("feed", "from-feed", scene.line("from-feed"))
    assert f"from {scene.file.with_name('feed.txt')}" in cause["text"]


def test_a_rule_of_one_port_turns_away_from_that_listener_alone(scene: Scene) -> None:
    answer = scene.why("198.18.64.1")
    assert {walk["name"]: walk["let_in"] for walk in answer["listeners"]} == {
        "http": True,
        "socks": True,
        "locked": False,
        "slow": True,
    }
    assert scene.cause("198.18.64.1", listener="locked", port=LOCKED)["rule"] == "one-port"


def test_a_block_at_run_time_names_when_and_by_whom(scene: Scene) -> None:
    scene.proxy.command("block", "198.18.67.0/24", "--reason", "too loud")
    try:
        cause = scene.cause("198.18.67.9")
        assert (cause["kind"], cause["rule"]) == ("runtime_rule", "drop:198.18.67.0/24")
        assert "made at run time" in cause["text"]
        assert cause["text"].endswith(": too loud)")
    finally:
        scene.proxy.command("unblock", "198.18.67.0/24")


def test_a_ban_of_an_operator_names_its_reason(scene: Scene) -> None:
    scene.proxy.command("ban", "198.18.68.1", "--reason", "scans", "--ttl", "1h")
    try:
        cause = scene.cause("198.18.68.1")
        assert (cause["kind"], "an operator made it" in cause["text"]) == ("ban", True)
        assert cause["text"].endswith("more: scans)")
    finally:
        scene.proxy.command("unblock", "198.18.68.1")


def test_a_ban_for_strikes_names_the_last_strike(scene: Scene) -> None:
    for _ in range(3):
        scene.socks(SOCKS, b"\x05\x01\x00", b"\x05\x09\x00\x01" + bytes(6))
    try:
        wait_for(lambda: scene.proxy.json("bans")["bans"], what="the ban")
        cause = scene.cause(scene.client.ipv4)
        assert (cause["kind"], "a service made it" in cause["text"]) == ("ban", True)
        assert "3 strikes, the last: protocol" in cause["text"]
    finally:
        scene.proxy.command("unblock", scene.client.ipv4)


@pytest.mark.usefixtures("own_set")
def test_a_default_that_drops_is_named(scene: Scene) -> None:
    scene.load('default = "drop"\nrules = []\n')
    cause = scene.cause("198.18.70.1")
    assert (cause["part"], cause["kind"], cause["text"]) == (
        "gate",
        "default",
        "no rule matches: the default drops its SYN",
    )


def test_a_limit_of_a_rule_that_is_used_up_is_named(scene: Scene) -> None:
    assert scene.knocks_from("198.18.65.7")
    cause = scene.cause("198.18.65.7")
    assert (cause["part"], cause["kind"], cause["rule"], cause["where"]) == (
        "limits",
        "limit",
        "limited",
        scene.line("limited"),
    )
    assert "it is used up" in cause["text"]


@pytest.mark.usefixtures("own_set")
@pytest.mark.parametrize(("setting", "source"), [("per_source", "198.18.66.7"), ("overall", "198.18.66.8")])
def test_a_syn_limit_that_is_used_up_is_named(scene: Scene, setting: str, source: str) -> None:
    scene.load(f'rules = []\n{setting} = {{ rate = "4/h", burst = 1 }}\n')
    try:
        assert scene.knocks_from(source)
        cause = scene.cause(source)
        assert (cause["part"], cause["kind"]) == ("limits", setting)
    finally:  # a limit outlives the load that says nothing of it
        scene.load(f'rules = []\n{setting} = {{ rate = "1000000/s", burst = 1000000 }}\n')


def test_a_layer_that_takes_other_sources_is_named(scene: Scene) -> None:
    cause = scene.cause("203.0.113.1")
    assert (cause["part"], cause["kind"], cause["where"]) == ("stack", "sources", "stacks.socks.layers")


def test_a_user_who_is_not_there_is_named_with_the_file(scene: Scene) -> None:
    cause = scene.cause("198.18.70.1", LOCKED, user="eve")
    assert (cause["part"], cause["text"]) == ("auth", f"there is no user eve in {scene.file.with_name('users')}")
    (walk,) = scene.why("198.18.70.1", port=LOCKED, user="tom")["listeners"]
    assert walk["let_in"]


@pytest.mark.parametrize(
    ("target", "addresses", "rule", "words"),
    [
        ("10.1.2.3:80", ["10.1.2.3"], "egress-default:private", "egress to 10.1.2.3 is denied (private, 10.0.0.0/8)"),
        ("198.18.200.9:80", ["198.18.200.9"], "egress", "egress to 198.18.200.9 is denied"),
        ("[::1]:80", ["::1"], "egress-default:loopback", "egress to ::1 is denied (loopback, ::1/128)"),
        ("inside.example:80", ["10.9.9.9", "127.0.0.1"], "egress-default:private", "egress to 10.9.9.9 is denied"),
    ],
)
def test_a_target_that_egress_denies_is_named_with_the_network(
    scene: Scene, target: str, addresses: list[str], rule: str, words: str
) -> None:
    cause = scene.cause("198.18.70.1", target=target, addresses=addresses)
    assert (cause["part"], cause["rule"]) == ("egress", rule)
    assert words in cause["text"]


def test_this_very_proxy_as_a_target_is_named(scene: Scene) -> None:
    at = f"{scene.server.ipv4}:{SOCKS}"
    cause = scene.cause("198.18.70.1", target=at, addresses=[scene.server.ipv4])
    assert (cause["rule"], "this proxy itself listens there" in cause["text"]) == ("egress-default:this-proxy", True)


@pytest.mark.parametrize(
    ("target", "where"),
    [
        ("www.bad.example:443", "stacks.http.connect.targets.deny_hosts"),
        ("good.example:22", "stacks.http.service"),
    ],
)
def test_a_target_that_the_stack_refuses_is_named_with_the_setting(scene: Scene, target: str, where: str) -> None:
    cause = scene.cause("198.18.70.1", HTTP, target=target, addresses=["198.18.0.77"])
    assert (cause["part"], cause["where"]) == ("stack", where)


def test_a_target_without_an_address_is_named(scene: Scene) -> None:
    cause = scene.cause("198.18.70.1", target="nothing.example:80")
    assert (cause["part"], cause["kind"]) == ("egress", "resolve")


# -- what was refused ------------------------------------------------------------------------------------------------


def _asks(status: int, request: str, user: str = "tom:secret") -> Callable[[Scene], str | None]:
    def knock(scene: Scene) -> str | None:
        found, refusal = scene.http(request.format(server=scene.server.ipv4, client=scene.client.ipv4), user=user)
        assert found == status
        assert refusal is not None, "a refusal has an id"
        return refusal

    return knock


def _socks(port: int, *parts: bytes) -> Callable[[Scene], str | None]:
    def knock(scene: Scene) -> None:
        scene.socks(port, *parts)

    return knock


def _raw(*parts: bytes) -> Callable[[Scene], str | None]:
    return _socks(HTTP, *parts)


def _twice(scene: Scene) -> None:
    for _ in range(2):
        scene.socks(SLOW, b"\x05\x01\x00", b"\x05\x01\x00\x01\x0a\x00\x00\x01\x00\x50")


def _many(scene: Scene) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(12):
            held.enter_context(scene.client.connect(scene.server.ipv4, LOCKED, timeout=30)).sendall(b"\x05\x01\x02")
        with scene.client.connect(scene.server.ipv4, LOCKED, timeout=30) as more:
            more.sendall(b"\x05\x01\x02")
            _all(more)


_TEN = b"\x05\x01\x00\x01\x0a\x01\x02\x03\x00\x50"


@pytest.mark.parametrize(
    ("kind", "knock", "facts"),
    [
        ("auth_absent", _asks(407, "GET http://x.example/", ""), {"blame": "client"}),
        ("auth_failed", _asks(407, "GET http://x.example/", "tom:guess"), {"blame": "abuse", "status": 407}),
        ("policy_denied", _asks(403, "GET http://10.1.2.3/"), {"rule": "egress-default:private", "user": "tom"}),
        ("policy_denied", _asks(403, "GET http://www.bad.example/"), {"rule": "targets"}),
        ("policy_denied", _asks(403, "CONNECT {server}:1080"), {"rule": "egress-default:this-proxy"}),
        ("connect", _asks(502, "CONNECT {client}:8080"), {"blame": "upstream"}),
        ("http_403", _asks(403, "CONNECT {client}:22"), {"target": "{client}:22"}),
        ("http_malformed", _raw(b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"), {}),
        ("http_malformed", _raw(b"\xff\xfe\xfd\xfc\r\n\r\n"), {"listener": "http"}),
        (
            "policy_denied",
            _socks(SOCKS, b"\x05\x01\x00", _TEN),
            {"target": "10.1.2.3:80"},
        ),
        ("auth_failed", _socks(LOCKED, b"\x05\x01\x02", b"\x01\x03tom\x05guess"), {"listener": "{server}:1081"}),
        ("auth_absent", _socks(LOCKED, b"\x05\x01\x00"), {"blame": "client"}),
        ("rate_limit", _twice, {"blame": "ours"}),
        ("source_connections", _many, {"text": "this source has 12 connections, the limit"}),
    ],
)
def test_a_refusal_of_a_service_is_found_with_its_cause(
    scene: Scene, kind: str, knock: Callable[[Scene], str | None], facts: Mapping[str, object]
) -> None:
    row = scene.refused(kind, knock)
    for name, value in facts.items():
        wanted = value.format(server=scene.server.ipv4, client=scene.client.ipv4) if isinstance(value, str) else value
        assert row[name] == wanted, row


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_shows_the_walk_the_record_and_what_was_refused(scene: Scene) -> None:
    _, refusal = scene.http("GET http://10.1.2.3/")
    assert refusal is not None
    wait_for(lambda: any(row["id"] == refusal for row in scene.why(scene.client.ipv4)["refusals"]))
    done = scene.proxy.command("why", refusal, check=False)
    assert done.returncode == 0
    assert f"refusal {refusal}: " in done.stdout
    assert "policy_denied (403): egress to 10.1.2.3 is denied (private, 10.0.0.0/8)" in done.stdout
    done = scene.proxy.command("why", f"198.18.61.9:{SOCKS}", "--target", "10.1.2.3:80", check=False)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == f"198.18.61.9 to socks ({scene.server.ipv4}:{SOCKS}): turned away (gate: rule)"
    assert f"[{scene.line('listed')}]" in lines[1]
    assert any(line.startswith("  egress   no   egress to 10.1.2.3 is denied") for line in lines)
    (walk,) = json.loads(scene.proxy.command("why", f"{scene.client.ipv4}:{SOCKS}", "--json", check=False).stdout)[
        "listeners"
    ]
    assert walk["let_in"]
    for bad in ("nonsense", "01234567"):
        done = scene.proxy.command("why", bad, check=False)
        assert (done.returncode, done.stdout) == (2, "")


def test_without_a_server_the_gate_s_part_is_told(scene: Scene, tmp_path: Path) -> None:
    with KernelStore(Instance(scene.proxy.instance)) as store:
        from rama_ebpf.control.enforced import StoreJudge
        from rama_ebpf.control.why import Why

        answer: Any = Why(store, StoreJudge(store, serving=False)).call({"client": "198.18.61.9"})
    assert not answer["serving"]
    (walk,) = answer["listeners"]
    assert walk["cause"]["rule"] == "listed"
