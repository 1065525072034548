"""One listener serves sets of addresses, prefixes and port ranges, guarded as any other, and nobody else's traffic."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rama_ebpf.kernel.instance import Instance

from ..conftest import StartProxy
from ..lab import Host, Lab, temporary_directory, wait_for
from ..proxy import ProxyProcess, rama_ebpf

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

STACKS = """
[stacks.where]
service = {custom = {target = "where:service"}}
[stacks.echo]
service = "echo"
[server]
workers = 2
drain = "1s"
"""
WHERE = """
from rama_ebpf.core.client import ListenerName, local_address

async def service(stream):
    name = stream.extensions.get(ListenerName)
    await stream.write(f"{name.name} {local_address(stream)}\\n".encode())
"""
MANY = range(3000, 3070)


def listener(name: str, *words: str, stack: str = "where") -> str:
    return f'[listeners.{name}]\nlisten = {json.dumps(words)}\nstack = "{stack}"\n'


def usual(name: str, address: str) -> str:
    return f'[listeners.{name}]\naddress = "{address}"\nstack = "where"\n'


class Serve:
    """Write a configuration, start, reload, and ask who answers."""

    def __init__(self, lab: Lab, start: StartProxy, directory: Path) -> None:
        self.host: Host = lab.host("proxy")
        self.host.ip("route", "add", "local", "198.18.0.0/16", "dev", "lo")
        self.host.ip("-6", "route", "add", "local", "2001:db8:7::/48", "dev", "lo")
        self.start, self.file = start, directory / "rama.toml"
        (directory / "where.py").write_text(WHERE)
        self._proxy: ProxyProcess | None = None

    @property
    def proxy(self) -> ProxyProcess:
        assert self._proxy is not None
        return self._proxy

    @property
    def instance(self) -> str:
        return self.proxy.instance

    def run(self, *listeners: str) -> None:
        self.file.write_text("".join(listeners) + STACKS)
        self._proxy = self.start(self.host, "--config", str(self.file))

    def reload(self, *listeners: str) -> None:
        log = self.proxy.log
        self.file.write_text("".join(listeners) + STACKS)
        before = sum(line.endswith(": reloaded") for line in log)
        self.proxy.signal(signal.SIGHUP)
        wait_for(lambda: sum(line.endswith(": reloaded") for line in log) > before, timeout=30, what="the reload")

    def end_successor(self) -> None:
        """End the server that an upgrade has put in the place of the one that was started."""
        if self._proxy is None:
            return
        place, ours = Instance(self.instance), self._proxy.pid
        pid = place.serving_pid()
        if pid is not None and pid != ours:
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: place.serving_pid() is None, what="the end of the successor")

    def answer(self, address: str, port: int, source: str | None = None) -> str:
        with self.host.connect(address, port, source=source) as sock:
            return sock.makefile().readline().strip()


@pytest.fixture
def serve(lab: Lab, start_proxy: StartProxy) -> Iterator[Serve]:
    with temporary_directory() as directory:
        made = Serve(lab, start_proxy, directory)
        yield made
        made.end_successor()


@pytest.fixture(scope="module")
def shared(shared_lab: Lab, start_shared: StartProxy) -> Iterator[Serve]:
    """One server for all tests that only use it."""
    with temporary_directory() as directory:
        serve = Serve(shared_lab, start_shared, directory)
        serve.run(
            listener("all", "198.18.0.0/16:1-65535", "[2001:db8:7::]/48:1-65535"),
            listener("narrow", "198.18.9.0/24:400-500", "[2001:db8:7:1::]/64:443"),
            usual("usual", "198.18.9.9:443"),
            listener("dual", "[::]:1080"),
            listener("echo", "198.18.4.0/24:4000-4999", stack="echo"),
            *(usual(f"l{port}", f"127.0.0.1:{port}") for port in MANY),
        )
        yield serve


@pytest.mark.parametrize(
    ("address", "port", "name"),
    [
        ("198.18.0.9", 80, "all"),
        ("198.18.255.254", 1, "all"),
        ("198.18.1.1", 65535, "all"),
        ("198.18.9.1", 399, "all"),
        ("198.18.9.1", 400, "narrow"),
        ("198.18.9.9", 443, "usual"),
        ("198.18.9.9", 444, "narrow"),
        ("127.0.0.1", 1080, "dual"),
        ("2001:db8:7::9", 80, "all"),
        ("2001:db8:7:1::9", 443, "narrow"),
        ("2001:db8:7:1::9", 444, "all"),
        ("::1", 1080, "dual"),
    ],
)
def test_most_specific_binding_serves_and_knows_the_original_destination(
    shared: Serve, address: str, port: int, name: str
) -> None:
    where = f"[{address}]" if ":" in address else address
    assert shared.answer(address, port) == f"{name} {where}:{port}"


def test_ports_that_nothing_is_bound_to_are_refused(shared: Serve) -> None:
    for address in ("127.0.0.1", "::1"):
        with pytest.raises(ConnectionRefusedError):
            shared.host.connect(address, 1081)


def test_more_than_64_listeners_are_served(shared: Serve) -> None:
    for port in (MANY[0], MANY[64], MANY[-1]):
        assert shared.answer("127.0.0.1", port) == f"l{port} 127.0.0.1:{port}"


def test_status_and_test_speak_of_bindings(shared: Serve) -> None:
    def seen() -> dict[str, Any]:
        said = rama_ebpf("status", "--instance", shared.instance, "--json").stdout
        return {row["name"]: row for row in json.loads(said)["listeners"]}

    before = seen()["all"]
    shared.answer("198.18.0.9", 80)
    shared.answer("2001:db8:7::9", 80)
    rows = seen()
    assert rows["all"]["address"] == "198.18.0.0/16:1-65535, [2001:db8:7::]/48:1-65535"
    assert all(row["guarded"] and row["open"] for row in rows.values())
    assert rows["all"]["accepted"] == before["accepted"] + 2
    assert rows["all"]["established"] == before["established"] + 2
    rama_ebpf("block", "--instance", shared.instance, "127.0.0.7")
    said = rama_ebpf("test", "--instance", shared.instance, "127.0.0.7:30000", check=False)
    assert said.returncode == 1
    assert "drop" in said.stdout
    assert "198.18.0.0/16:1-65535" in said.stdout


def test_blocked_source_gets_in_at_no_port_of_a_binding(shared: Serve) -> None:
    rama_ebpf("block", "--instance", shared.instance, "127.0.0.9")
    for port in (1, 80, 65535):
        with pytest.raises(TimeoutError):
            shared.host.connect("198.18.3.4", port, source="127.0.0.9", timeout=0.2)
    said = rama_ebpf("block", "--instance", shared.instance, "127.0.0.8", "--port", "81").stdout
    assert "no listener" not in said
    assert shared.answer("198.18.3.4", 80, source="127.0.0.8") == "all 198.18.3.4:80"
    with pytest.raises(TimeoutError):
        shared.host.connect("198.18.3.4", 81, source="127.0.0.8", timeout=0.2)


def test_sockets_of_a_binding_are_reached_by_its_addresses_alone(shared: Serve) -> None:
    """Where they are bound nobody gets in."""
    listed = {word.rpartition(":")[::2] for word in shared.host.run("ss", "-Hltn").stdout.split() if ":" in word}
    homes = {(address.strip("[]"), int(port)) for address, port in listed if port.isdigit()}
    homes = {(address, port) for address, port in homes if address in ("127.0.0.1", "::1") and port not in MANY}
    assert len(homes) == 7, "all, narrow and dual have both families, echo has one"
    for address, port in homes:
        with pytest.raises(ConnectionRefusedError):
            shared.host.connect(address, port)


def test_kill_ends_connections_to_any_port_of_a_binding(shared: Serve) -> None:
    with shared.host.connect("198.18.4.4", 4444, source="127.0.0.6") as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        rama_ebpf("block", "--instance", shared.instance, "--kill", "127.0.0.6")
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_entry_that_somebody_removes_is_put_back(shared: Serve) -> None:
    pins = Instance(shared.instance).pin_dir
    key = (32 + 96 + 16).to_bytes(4, "little") + (1).to_bytes(4, "little") + bytes(10) + b"\xff\xff\xc6\x12\0\0"
    shared.host.run("bpftool", "map", "delete", "pinned", str(pins / "bindings"), "key", *map(str, key))
    with pytest.raises(ConnectionRefusedError):
        shared.host.connect("198.18.0.1", 80)
    rama_ebpf("status", "--instance", shared.instance)  # which has the server look
    assert shared.answer("198.18.0.1", 80) == "all 198.18.0.1:80"


def test_others_take_the_share_of_a_dead_worker(shared: Serve) -> None:
    os.kill(shared.proxy.workers()[0], signal.SIGKILL)
    for port in range(2000, 2024):
        assert shared.answer("198.18.0.1", port) == f"all 198.18.0.1:{port}"


def test_prefixes_change_hands_in_a_reload_and_outlive_an_upgrade(serve: Serve) -> None:
    serve.run(listener("one", "198.18.0.0/16:80"), listener("two", "198.18.1.0/24:80", "198.18.2.0/24:80"))
    assert serve.answer("198.18.1.1", 80) == "two 198.18.1.1:80"
    serve.reload(listener("one", "198.18.0.0/16:80", "198.18.2.0/24:80"), listener("three", "198.18.3.0/24:80-81"))
    assert serve.answer("198.18.1.1", 80) == "one 198.18.1.1:80"
    assert serve.answer("198.18.2.1", 80) == "one 198.18.2.1:80"
    assert serve.answer("198.18.3.1", 81) == "three 198.18.3.1:81"
    serve.file.write_text(listener("three", "198.18.3.0/24:80-81") + STACKS)
    rama_ebpf("upgrade", "--instance", serve.instance)
    with pytest.raises(ConnectionRefusedError):
        serve.host.connect("198.18.1.1", 80)
    assert serve.answer("198.18.3.1", 80) == "three 198.18.3.1:80"


def test_binding_that_would_take_somebodys_connections_is_refused(serve: Serve) -> None:
    """An operator's ssh, say, at an address that this host has: he would be locked out."""
    with serve.host.socket() as ssh:
        ssh.bind(("0.0.0.0", 22))
        ssh.listen()
        with pytest.raises(AssertionError, match=r"would take the connections to \S+:22 from process"):
            serve.run(listener("all", "0.0.0.0:1-65535"))
        serve.run(listener("all", "198.18.128.0/17:1-65535"))  # where ssh is at no address of this host
        assert serve.answer("198.18.128.1", 22) == "all 198.18.128.1:22"
        with serve.host.connect("127.0.0.1", 22):
            ssh.accept()[0].close()


def test_check_names_both_of_two_bindings_that_overlap(tmp_path: Path) -> None:
    file = tmp_path / "rama.toml"
    echo = '[stacks.where]\nservice = "echo"\n'
    file.write_text(listener("one", "198.18.0.0/16:1-100") + listener("two", "198.18.0.0/16:50-150") + echo)
    said = rama_ebpf("check", str(file), check=False)
    assert said.returncode == 2
    assert "listeners.two.listen: 198.18.0.0/16:50-150 overlaps: it is also that of listener one" in said.stderr
    file.write_text(listener("one", "198.18.0.0/16:1-100", "198.18.1.0/24:7") + echo)
    assert "one on 198.18.0.0/16:1-100, 198.18.1.0/24:7" in rama_ebpf("check", str(file)).stdout
