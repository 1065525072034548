"""``rama-ebpf run`` as operators start it: a configuration file, an application of one's own, reload."""

from __future__ import annotations

import base64
import json
import signal
import socket
import urllib.request
from pathlib import Path

import pytest

from rama_ebpf.layers.auth import hash_password

from ..conftest import StartProxy
from ..lab import Host, Lab, wait_for
from ..proxy import rama_ebpf

CONFIG = """
[server]
workers = 2
drain = "60s"
metrics = "127.0.0.1:9464"

[listeners.{name}]
address = "{address}"
stack = "talk"

[listeners.local]
address = "unix:{directory}/proxy.sock"
stack = "talk"
mode = "666"

[stacks.talk]
service = {{ custom = {{ target = "{service}" }} }}
layers = [{{ timeout = {{ handshake = "off" }} }}, {{ custom = {{ target = "tests.process.applications:Refuse" }} }}]

[[policy.rules]]
name = "{rule}"
sources = ["127.0.9.0/24"]
action = "drop"
"""


class ConfigFile:
    """A configuration that a test changes bit by bit."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "rama.toml"
        self.values = {
            "name": "talk",
            "address": "127.0.0.1:1080",
            "directory": str(directory),
            "service": "tests.process.applications:talk",
            "rule": "first",
        }
        self.write()

    def write(self, **changes: str) -> None:
        self.values |= changes
        self.path.write_text(CONFIG.format(**self.values))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ConfigFile:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return ConfigFile(tmp_path)


@pytest.fixture
def host(lab: Lab) -> Host:
    return lab.host("proxy")


def ask(sock: socket.socket, line: str) -> object:
    sock.sendall(line.encode() + b"\n")
    return json.loads(sock.makefile().readline())


def test_a_configuration_file_is_served_judged_and_measured(
    host: Host, start_proxy: StartProxy, config: ConfigFile
) -> None:
    proxy = start_proxy(host, "--config", str(config.path))
    with host.connect("127.0.0.1", 1080) as client:
        assert isinstance(ask(client, "who"), dict)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(config.path.parent / "proxy.sock"))
        assert isinstance(ask(client, "who"), dict)
    with pytest.raises(TimeoutError):
        host.connect("127.0.0.1", 1080, source="127.0.9.1", timeout=0.5)
    with host.connect("127.0.0.1", 1080) as client:  # the layer of our own: see Refuse
        client.sendall(b"refuse me")
        with pytest.raises(ConnectionResetError):
            client.recv(100)

    def scrape() -> str:
        with urllib.request.urlopen("http://127.0.0.1:9464/metrics", timeout=10) as response:
            return str(response.read().decode())

    def counted() -> str | None:
        text = host.call(scrape)
        return text if 'rama_errors_total{kind="policy_denied",listener="talk"} 1.0' in text else None

    text = wait_for(counted, what="the refusal's count")
    assert 'rama_accepted_connections_total{listener="talk"} 2.0' in text
    assert 'rama_accepted_connections_total{listener="local"} 1.0' in text
    dropped = [line for line in text.splitlines() if 'rule="first"' in line]
    assert dropped
    assert not dropped[0].endswith(" 0.0")
    assert "127." not in text  # no label holds an address
    proxy.signal(signal.SIGTERM)
    assert proxy.wait() == 0
    assert not (config.path.parent / "proxy.sock").exists()


def test_nothing_is_imported_from_the_directory_in_which_the_server_was_started(
    host: Host, start_proxy: StartProxy, config: ConfigFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "of others"
    (place / "rama_ebpf").mkdir(parents=True)
    for name in ("rama_ebpf/__init__.py", "json.py", "uvloop.py", "prometheus_client.py"):
        (place / name).write_text(f"open({str(tmp_path / 'taken over')!r}, 'w')\n")
    monkeypatch.chdir(place)
    proxy = start_proxy(host, "--config", str(config.path))
    with host.connect("127.0.0.1", 1080) as client:
        assert isinstance(ask(client, "who"), dict)
    proxy.signal(signal.SIGTERM)
    assert proxy.wait() == 0
    assert not (tmp_path / "taken over").exists()


def test_reload_changes_addresses_rules_and_services_and_keeps_live_connections(
    host: Host, start_proxy: StartProxy, config: ConfigFile
) -> None:
    proxy = start_proxy(host, "--config", str(config.path))
    old = host.connect("127.0.0.1", 1080)
    assert ask(old, "hello") == "hello\n"
    config.write(address="127.0.0.1:1081", rule="second", name="renamed")
    proxy.signal(signal.SIGHUP)
    wait_for(lambda: proxy.logged("reloaded"), timeout=60, what="the reload")
    with host.connect("127.0.0.1", 1081) as new:
        assert ask(new, "hello") == "hello\n"
    with pytest.raises(ConnectionRefusedError):
        host.connect("127.0.0.1", 1080)
    assert ask(old, "still here") == "still here\n"
    assert [rule["name"] for rule in proxy.json("list")["rules"]] == ["second"]
    assert {row["name"] for row in proxy.json("status")["listeners"]} == {"renamed", "local"}
    with pytest.raises(TimeoutError):
        host.connect("127.0.0.1", 1081, source="127.0.9.1", timeout=0.5)
    old.close()
    wait_for(lambda: len(proxy.workers()) == 2, timeout=60, what="the end of the old workers")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"service": "tests.process.applications:broken"}, "no such setting"),
        ({"rule": "not a name"}, r"rama\.toml:\d+: policy\.rules\[0\]: rule name 'not a name'"),
        ({"address": "198.18.255.1:1080"}, "cannot listen on 198.18.255.1"),
    ],
)
def test_a_reload_that_fails_leaves_everything_as_it_was(
    host: Host, start_proxy: StartProxy, config: ConfigFile, changes: dict[str, str], message: str
) -> None:
    proxy = start_proxy(host, "--config", str(config.path))
    before, workers = proxy.json("status"), proxy.workers()
    config.write(**changes)
    proxy.signal(signal.SIGHUP)
    wait_for(lambda: proxy.logged("the old configuration stays"), timeout=60, what="the refusal")
    assert proxy.logged(message), "\n".join(proxy.log)
    wait_for(lambda: proxy.workers() == workers, timeout=60, what="the end of the new workers")
    assert proxy.json("status")["listeners"] == before["listeners"]
    assert [rule["name"] for rule in proxy.json("list")["rules"]] == ["first"]
    with host.connect("127.0.0.1", 1080) as client:
        assert ask(client, "hello") == "hello\n"


def test_an_application_of_ones_own_bans_in_the_kernel(
    host: Host, start_proxy: StartProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    proxy = start_proxy(host, "--listen", "127.0.0.1:1080", "tests.process.applications:strict")
    for _ in range(2):
        with host.connect("127.0.0.1", 1080, source="127.0.7.7") as client:
            client.sendall(b"nonsense")
            with pytest.raises(ConnectionResetError):
                client.recv(100)
    with pytest.raises(TimeoutError):
        host.connect("127.0.0.1", 1080, source="127.0.7.7", timeout=0.5)
    (ban,) = proxy.json("list")["bans"]
    assert (ban["address"], ban["reason"]) == ("127.0.7.7", "2 strikes, the last: protocol")
    with host.connect("127.0.0.1", 1080, source="127.0.7.8") as client:
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config", "{file}", "--listen", "127.0.0.1:1"), "--config and listen: put that into"),
        (("--config", "{file}", "app:main"), "--config and app: put that into"),
        (("--config", "nowhere.toml"), "nowhere.toml: cannot be read: No such file"),
        (("--metrics", "0.0.0.0:1"), "loopback only"),
        (
            ("app:main", "--connections-per-source", "9"),
            "--connections-per-source is for the proxy that is served without",
        ),
        (("--connections-per-source", "-1"), "use 0 to 10000000"),
        (("--listen", "here"), "--listen 'here': write for example"),
    ],
)
def test_what_does_not_go_together_is_refused(config: ConfigFile, arguments: tuple[str, ...], message: str) -> None:
    done = rama_ebpf("run", *(argument.format(file=config.path) for argument in arguments), check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_passwords_are_demanded_by_the_proxy_that_needs_no_configuration(
    host: Host, start_proxy: StartProxy, tmp_path: Path
) -> None:
    users = tmp_path / "users"
    users.write_text(f"tom:{hash_password('secret')}\n")
    start_proxy(host, "--workers", "1", "--users", str(users), "--allow-egress", "127.0.0.1")
    request = "GET http://127.0.0.1:9/ HTTP/1.1\r\nHost: a\r\n"
    credentials = base64.b64encode(b"tom:secret").decode()
    with host.connect("127.0.0.1", 1080) as client:
        answers = client.makefile("rb")

        def status(fields: str) -> str:
            client.sendall(f"{request}{fields}\r\n".encode())
            line, length = answers.readline().decode(), 0
            while (field := answers.readline().decode().strip().lower()) != "":
                length = int(field.partition(":")[2]) if field.startswith("content-length:") else length
            answers.read(length)
            return line.split()[1]

        assert status("") == "407"
        assert status("Proxy-Authorization: Basic eDp5\r\n") == "407"
        assert status(f"Proxy-Authorization: Basic {credentials}\r\n") == "502"  # nobody serves there
    users.write_text("tom\n")
    refused = rama_ebpf("run", "--users", str(users), check=False)
    assert refused.returncode == 2
    assert f"{users}:1: write name:hash" in refused.stderr


def test_one_source_has_its_share_without_a_configuration_file_as_well(host: Host, start_proxy: StartProxy) -> None:
    proxy = start_proxy(host, "--connections-per-source", "2", "--workers", "2", "--metrics", "127.0.0.1:9464")
    greeting = b"\x05\x01\x00"

    def hold(source: str) -> socket.socket:
        client = host.connect("127.0.0.1", 1080, source=source)
        client.sendall(greeting)
        assert client.recv(2) == b"\x05\x00"
        return client

    with hold("127.0.0.2"), hold("127.0.0.2"), hold("127.0.0.3"):
        with host.connect("127.0.0.1", 1080, source="127.0.0.2") as refused:
            refused.sendall(b"GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n")
            assert refused.recv(1000).startswith(b"HTTP/1.1 503 ")

        def scrape() -> str:
            with urllib.request.urlopen("http://127.0.0.1:9464/metrics", timeout=10) as response:
                return str(response.read().decode())

        wait_for(lambda: 'rama_source_refusals_total{held="connections"} 1.0' in host.call(scrape), what="the count")
    assert proxy.logged("reason=source_connections")


def test_a_dear_hash_is_warned_of_without_a_configuration_file_as_well(
    host: Host, start_proxy: StartProxy, tmp_path: Path
) -> None:
    users = tmp_path / "users"
    users.write_text("dear:$2b$16$" + "A" * 53 + "\n")
    proxy = start_proxy(host, "--users", str(users))
    assert proxy.logged("a check of dear's password costs")
