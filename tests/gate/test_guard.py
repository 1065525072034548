"""Listeners of other programs under the policy: denied SYNs get no answer, and nothing of a guard outlives it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rama_ebpf import Gate, SyncGate
from rama_ebpf.gate import Guard, GuardRefused
from rama_ebpf.gate.errors import GateUnavailable
from rama_ebpf.kernel import bpf, cgroup
from rama_ebpf.kernel.bpf import AttachType
from rama_ebpf.kernel.instance import Instance

from ..conftest import StartProxy
from ..lab import Host, Lab, wait_for
from ..proxy import ProxyProcess, rama_ebpf

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

PORT, OTHER = 2222, 2223
AIOHTTP = f"""
from aiohttp import web
async def hello(request): return web.Response(text="hello")
app = web.Application()
app.add_routes([web.get("/", hello)])
web.run_app(app, host=["0.0.0.0", "::"], port={OTHER}, print=None)
"""


@dataclass
class Scene:
    """A host with an SSH server and a server of aiohttp, and two clients of whom one is denied."""

    server: Host
    allowed: Host
    denied: Host
    instance: str

    def hears(self, client: Host, port: int = PORT, *, ipv6: bool = False, seconds: float = 20.0) -> bytes:
        """What a client is told first; nothing if it does not get in."""
        with (
            contextlib.suppress(OSError),
            client.connect(self.server.ipv6 if ipv6 else self.server.ipv4, port, timeout=seconds) as sock,
        ):
            if port == OTHER:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            return sock.recv(8)
        return b""

    def answers(self, client: Host, port: int = PORT) -> list[str]:
        """The flags of what the wire shows of an attempt to connect."""
        with client.capture("eth0") as capture, client.socket() as sock:
            sock.settimeout(0.4)
            with contextlib.suppress(OSError):
                sock.connect((self.server.ipv4, port))
            return [segment.flags for segment in capture.read() if segment.sport == port]

    def guard(self, *args: str, host: Host | None = None) -> subprocess.Popen[str]:
        """Start the command; it guards when this returns."""
        process = (host or self.server).popen(
            ProxyProcess.COMMAND, "guard", "--instance", self.instance, *args, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline().startswith("guarding port")
        return process

    def command(self, *args: str) -> None:
        rama_ebpf(args[0], "--instance", self.instance, *args[1:])


@pytest.fixture(scope="module")
def hosts(shared_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Host, Host, Host]:
    server, allowed, denied = (shared_lab.host(name) for name in ("guarded", "allowed", "denied"))
    key = tmp_path_factory.mktemp("keys") / "key"
    subprocess.run(["dropbearkey", "-t", "ed25519", "-f", str(key)], check=True, capture_output=True)
    server.popen("dropbear", "-F", "-E", "-r", str(key), "-p", str(PORT), stderr=subprocess.DEVNULL)
    server.popen(sys.executable, "-c", AIOHTTP)
    for port in (PORT, OTHER):
        wait_for(lambda port=port: _listens(server, port), timeout=30, what=f"a server on {port}")
    return server, allowed, denied


def _listens(host: Host, port: int) -> bool:
    return f":{port}" in host.run("ss", "-Hltn").stdout


@pytest.fixture
def scene(hosts: tuple[Host, Host, Host], instance: str) -> Iterator[Scene]:
    yield Scene(*hosts, instance)
    assert not _guards(), "a guard is still attached"
    assert not list(Path("/run/rama-ebpf").glob(".guards/*")), "a guard left its lock"


def _guards() -> list[int]:
    root = os.open(cgroup.cgroup2_mount(), os.O_RDONLY)
    try:
        found = []
        for identity in bpf.effective_programs(root, AttachType.CGROUP_INET_INGRESS):
            program = bpf.prog_by_id(identity)
            if bpf.prog_info(program).name == "gate_guard":
                found.append(identity)
            os.close(program)
        return found
    finally:
        os.close(root)


def test_denied_client_gets_no_answer_from_guarded_servers_until_the_guard_is_killed(scene: Scene) -> None:
    process = scene.guard("--port", str(PORT), "--port", str(OTHER))
    scene.command("block", scene.denied.ipv4)
    scene.command("block", f"{scene.denied.ipv6}/128")
    for port, greeting in ((PORT, b"SSH-2.0-"), (OTHER, b"HTTP/1.1")):
        assert scene.hears(scene.allowed, port) == greeting
        assert scene.answers(scene.denied, port) == []
    assert scene.hears(scene.allowed, OTHER, ipv6=True) == b"HTTP/1.1"
    assert scene.hears(scene.denied, OTHER, ipv6=True, seconds=1) == b""
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not _guards(), what="the end of the program")
    for port, greeting in ((PORT, b"SSH-2.0-"), (OTHER, b"HTTP/1.1")):
        assert scene.hears(scene.denied, port) == greeting
    rama_ebpf("unload", "--instance", scene.instance)


def test_commands_say_that_a_guard_enforces_what_no_server_does(scene: Scene) -> None:
    with _guarding(scene, PORT), SyncGate(scene.instance) as gate:
        done = rama_ebpf("block", scene.denied.ipv4, "--instance", scene.instance)
        assert done.stderr == (
            f"no server runs: in force where the guard of process {os.getpid()} is, and when a server starts\n"
        )
        assert scene.answers(scene.denied, PORT) == []
        assert gate.block("198.18.200.0/24").enforced is True
        status = rama_ebpf("status", "--instance", scene.instance, check=False)
        assert status.returncode == 1
        assert f"process {os.getpid()} guards listeners of other programs by its policy" in status.stdout


def test_what_is_not_named_is_not_touched(scene: Scene) -> None:
    with _guarding(scene, PORT) as guard:
        scene.command("block", "0.0.0.0/0")
        assert scene.answers(scene.denied, PORT) == []
        assert scene.hears(scene.denied, OTHER) == b"HTTP/1.1"
        listener = scene.allowed.call(lambda: socket.create_server(("0.0.0.0", PORT)))  # of another namespace
        with listener, scene.denied.connect(scene.allowed.ipv4, PORT, timeout=5):
            pass
        assert guard.active
    assert scene.hears(scene.denied) == b"SSH-2.0-"


@contextlib.contextmanager
def _guarding(scene: Scene, *listeners: int | tuple[str, int] | socket.socket, **named: list[str]) -> Iterator[Guard]:
    """A guard in this process, of the server's namespace."""
    with SyncGate(scene.instance) as gate, scene.server.call(lambda: gate.guard(*listeners, **named)) as guard:
        yield guard


def test_two_guards_on_one_port_are_refused_with_the_remedy(scene: Scene) -> None:
    with _guarding(scene, PORT):
        process = scene.server.run(
            ProxyProcess.COMMAND, "guard", "--instance", scene.instance, "--port", str(PORT), check=False
        )
        assert process.returncode == 2
        assert f"port {PORT} is under the guard of process {os.getpid()}" in process.stderr
        assert "end that one first" in process.stderr
        with _guarding(scene, OTHER):  # another port is another affair
            scene.command("block", scene.denied.ipv4)
            assert scene.answers(scene.denied, OTHER) == []
    assert scene.hears(scene.denied, OTHER) == b"HTTP/1.1"


def test_listener_of_ones_own_is_guarded_as_a_socket(scene: Scene) -> None:
    listener = scene.server.call(
        lambda: socket.create_server(("::", 2224), family=socket.AF_INET6, dualstack_ipv6=True)
    )
    with listener, _guarding(scene, listener):
        scene.command("block", scene.denied.ipv4)
        assert scene.answers(scene.denied, 2224) == []
        scene.allowed.connect(scene.server.ipv4, 2224, timeout=20).close()


def test_guard_at_one_address_leaves_the_others(scene: Scene) -> None:
    with _guarding(scene, (scene.server.ipv6, OTHER)):
        scene.command("block", "0.0.0.0/0")
        scene.command("block", "::/0")
        assert scene.hears(scene.denied, OTHER) == b"HTTP/1.1"
        assert scene.hears(scene.denied, OTHER, ipv6=True, seconds=1) == b""


SESSION = """
import socket, subprocess, sys
listener = socket.create_server(("0.0.0.0", int(sys.argv[1])))
print("ready", flush=True)
connection, _ = listener.accept()
for extra in ([], ["--failsafe", "192.0.2.0/24"], ["--failsafe", sys.argv[4]]):
    command = [sys.argv[2], "guard", "--instance", sys.argv[3], "--port", sys.argv[1], *extra]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    if line:
        connection.sendall(b"guarding\\n")
        connection.recv(1)
        process.terminate()
    print(process.wait(), (line or process.stderr.read()).strip(), flush=True)
"""


def test_guard_that_could_shut_its_callers_session_out_is_refused(scene: Scene) -> None:
    process = scene.server.popen(
        sys.executable,
        "-c",
        SESSION,
        "2225",
        ProxyProcess.COMMAND,
        scene.instance,
        f"{scene.allowed.ipv4}/32",
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with scene.allowed.connect(scene.server.ipv4, 2225) as session:
        for _ in range(2):
            code, _, said = process.stdout.readline().partition(" ")
            assert code == "2"
            assert f"your own session comes from {scene.allowed.ipv4}" in said
            assert f"--failsafe {scene.allowed.ipv4}/32" in said
        assert session.recv(64) == b"guarding\n"
        scene.command("block", "0.0.0.0/0")
        scene.allowed.connect(scene.server.ipv4, 2225, timeout=20).close()  # the failsafe holds
        assert scene.answers(scene.denied, 2225) == []
        session.sendall(b".")
        assert process.stdout.readline().startswith("0 guarding port 2225")


def test_policy_of_a_guard_is_kept_and_nothing_else_when_it_ends(scene: Scene) -> None:
    with _guarding(scene, PORT):
        scene.command("block", scene.denied.ipv4)
    assert not Instance(scene.instance).pinned
    with _guarding(scene, PORT):
        assert scene.answers(scene.denied) == []


def test_guard_ends_when_its_policy_is_unloaded(scene: Scene) -> None:
    with _guarding(scene, PORT) as guard:
        scene.command("block", scene.denied.ipv4)
        rama_ebpf("unload", "--instance", scene.instance)
        with pytest.raises(GateUnavailable, match="was unloaded"):
            guard.wait(60)
        assert not guard.active
        assert scene.hears(scene.denied) == b"SSH-2.0-"


def test_guard_and_server_judge_by_one_policy_and_the_guard_follows_it(scene: Scene, start_proxy: StartProxy) -> None:
    with _guarding(scene, PORT):
        scene.command("block", scene.denied.ipv4)
        proxy = start_proxy(scene.server, "--listen", "0.0.0.0:1080", "--max-rules", "1000")  # the maps are made anew
        assert scene.answers(scene.denied) == scene.answers(scene.denied, 1080) == []
        scene.command("unblock", scene.denied.ipv4)
        wait_for(lambda: scene.hears(scene.denied, seconds=1) == b"SSH-2.0-", timeout=60, what="the guard to follow")
        with pytest.raises(GuardRefused, match="has it under the gate already"), _guarding(scene, 1080):
            pass
        with pytest.raises(GuardRefused, match="start that with"), _guarding(scene, OTHER, failsafe=["192.0.2.0/24"]):
            pass
        proxy.end()


async def test_asynchronous_guard_ends_with_its_block(scene: Scene) -> None:
    async with Gate(scene.instance) as gate:
        listener = scene.server.call(lambda: socket.create_server(("0.0.0.0", 2226)))
        with listener:
            async with gate.guard(listener) as guard:
                await gate.block(scene.denied.ipv4)
                assert guard.ports == (2226,)
                assert scene.answers(scene.denied, 2226) == []
                assert (await gate.counters()).denied >= 1
            scene.denied.connect(scene.server.ipv4, 2226, timeout=20).close()
            held = await gate.guard(listener)
            await held.aclose()
            await held.aclose()
            assert held.wait(0)


def test_socket_that_is_none_of_tcp_is_refused(scene: Scene) -> None:
    makers: list[tuple[Callable[[], socket.socket], type[Exception], str]] = [
        (lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM), TypeError, "of TCP sockets"),
        (lambda: socket.socket(socket.AF_UNIX), TypeError, "of TCP sockets"),
        (socket.socket, ValueError, "bind it before"),
    ]
    with SyncGate(scene.instance) as gate:
        for make, error, says in makers:
            with make() as sock, pytest.raises(error, match=says):
                gate.guard(sock)
