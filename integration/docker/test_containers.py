"""Ten client containers around a proxy, in a container and on the host: some are shut out, the others lose no byte.

The container is started with the line that docs/install.md gives to operators.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from docker.models.containers import Container
from docker.models.networks import Network
from docker.types import IPAMConfig, IPAMPool

from rama_ebpf.kernel import bpffs, cgroup
from tests.lab import wait_for
from tests.proxy import ProxyProcess

from .daemon import DockerDaemon
from .images import BASE, PROXY

# Making the base image the first time fetches and unpacks some 100 packages.
pytestmark = [pytest.mark.root, pytest.mark.ebpf, pytest.mark.docker, pytest.mark.timeout(600)]

CLIENTS, TARGETS = "198.19.5", "198.19.6"
PROXY_PORT, ECHO_PORT = 1080, 7
BY_ADDRESS, BY_PREFIX, PREFIX = f"{CLIENTS}.30", f"{CLIENTS}.200", f"{CLIENTS}.128/25"
ALLOWED = [f"{CLIENTS}.{number}" for number in range(21, 29)]
_INSTALL = Path(__file__).resolve().parent.parent.parent / "docs/install.md"
_PEER = Path(__file__).with_name("peer.py")


@dataclass
class Town:
    """Clients on one network, a target on another that they cannot reach."""

    daemon: DockerDaemon
    client_network: Network
    target_network: Network
    clients: dict[str, Container]
    target: str

    def peer(self, address: str, *args: object) -> str:
        """Run peer.py in a client and return what it prints."""
        return _execute(self.clients[address], "python3", "/peer.py", *map(str, args))

    def exchange(self, address: str, proxy: str, size: int, *signal: str) -> Any:
        """Send random bytes through the proxy to the target and back; ``signal`` is as in peer.py."""
        seed = address.rpartition(".")[2]
        return json.loads(
            self.peer(address, "exchange", proxy, PROXY_PORT, self.target, ECHO_PORT, size, seed, *signal)
        )

    def attempt(self, address: str, proxy: str) -> str:
        """Try to connect to the proxy for two seconds."""
        return self.peer(address, "attempt", proxy, PROXY_PORT, 2).strip()


def _execute(container: Container, *command: str) -> str:
    code, output = container.exec_run(list(command))
    text = output.decode(errors="replace")
    assert code == 0, f"{container.name}: {shlex.join(command)}: exit {code}\n{text}"
    return text


def _network(daemon: DockerDaemon, name: str, prefix: str) -> Network:
    pool = IPAMPool(subnet=f"{prefix}.0/24", gateway=f"{prefix}.1")
    return daemon.client.networks.create(name, driver="bridge", ipam=IPAMConfig(pool_configs=[pool]))


def _peer(daemon: DockerDaemon, network: Network, address: str, *command: str) -> Container:
    container = daemon.client.containers.create(
        BASE,
        list(command),
        name=f"peer-{address}",
        init=True,
        volumes={str(_PEER): {"bind": "/peer.py", "mode": "ro"}},
        network_mode="none",
    )
    daemon.client.networks.get("none").disconnect(container)
    network.connect(container, ipv4_address=address)
    container.start()
    return container


@pytest.fixture(scope="module")
def town(daemon: DockerDaemon) -> Iterator[Town]:
    with ExitStack() as stack:
        networks = [_network(daemon, name, prefix) for name, prefix in (("clients", CLIENTS), ("targets", TARGETS))]
        for network in networks:
            stack.callback(network.remove)
        target = f"{TARGETS}.7"
        containers = [_peer(daemon, networks[1], target, "python3", "/peer.py", "echo", str(ECHO_PORT))]
        stack.callback(containers[0].remove, force=True)
        clients = {}
        for address in (*ALLOWED, BY_ADDRESS, BY_PREFIX):
            clients[address] = _peer(daemon, networks[0], address, "sleep", "infinity")
            stack.callback(clients[address].remove, force=True)
        assert len(clients) == 10
        yield Town(daemon, *networks, clients, target)


def documented_run_line() -> list[str]:
    """The ``docker run`` line of docs/install.md, with its words for hybrid cgroup hosts if this is one."""
    blocks = re.findall(r"```sh\n(.*?)```", _INSTALL.read_text(encoding="utf-8"), flags=re.S)
    line = next(block for block in blocks if block.startswith("docker run")).replace("\\\n", " ").splitlines()[0]
    extra = next(block for block in blocks if block.startswith("--cgroupns")) if _hybrid() else ""
    words = shlex.split(line)
    return [*words[:-1], *shlex.split(extra), words[-1]]


def _hybrid() -> bool:
    return cgroup.cgroup2_mount() != Path("/sys/fs/cgroup")


class ProxyContainer:
    """The proxy in a container, on both networks."""

    address = f"{CLIENTS}.2"

    def __init__(self, town: Town) -> None:
        self._town = town
        pins = f"rama-ebpf-test-{os.getpid()}"
        self.pins = bpffs.BPFFS / pins
        words = [word.replace("/sys/fs/bpf/rama-ebpf-container", str(self.pins)) for word in documented_run_line()]
        assert str(self.pins) in " ".join(words)
        assert words[-1] == PROXY
        run = ("run", "--listen", f"0.0.0.0:{PROXY_PORT}", "--require-kernel", "--persist")
        command = [*words[:-1], "--network", "clients", "--ip", self.address, PROXY, *run]
        subprocess.run(
            [*command, "--allow-egress", f"{TARGETS}.0/24"],
            env={**os.environ, "DOCKER_HOST": town.daemon.url},
            check=True,
            capture_output=True,
        )
        self.container = town.daemon.client.containers.get("rama-ebpf")
        town.target_network.connect(self.container)
        self.wait_ready(1)

    def wait_ready(self, starts: int) -> None:
        """Wait until the server has become ready for the ``starts``-th time."""

        def ready() -> bool:
            self.container.reload()
            assert self.container.status == "running", self.log()
            return self.log().count("ready after") == starts

        wait_for(ready, timeout=90, what="the proxy's readiness")

    def log(self) -> str:
        return self.container.logs().decode()

    def command(self, *args: str) -> str:
        return _execute(self.container, "rama-ebpf", *args)

    def json(self, command: str) -> Any:
        return json.loads(self.command(command, "--json"))

    def kill_and_start(self) -> None:
        """``docker kill`` (SIGKILL), ``docker start``."""
        starts = self.log().count("ready after")
        self.container.kill()
        self.container.wait()
        self.container.start()
        self.wait_ready(starts + 1)

    def remove(self) -> None:
        self.container.remove(force=True)
        bpffs.remove_tree(self.pins)


@pytest.fixture
def proxy(town: Town) -> Iterator[ProxyContainer]:
    made = ProxyContainer(town)
    try:
        yield made
    finally:
        made.remove()


class Capture:
    """tcpdump in the network namespace of a client."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._file = f"/tmp/{os.urandom(4).hex()}"
        command = f"tcpdump -i eth0 -Z root -n -l --immediate-mode tcp port {PROXY_PORT}"
        container.exec_run(["sh", "-c", f"exec {command} >{self._file} 2>{self._file}.err"], detach=True)
        wait_for(lambda: "listening on" in self._read(".err"), what="tcpdump")

    def _read(self, suffix: str = "") -> str:
        code, output = self._container.exec_run(["cat", self._file + suffix])
        return output.decode() if code == 0 else ""

    def segments(self) -> list[tuple[str, str]]:
        """Sender's port and flags of each segment so far, as tcpdump writes them: S, S., ., P., R, F."""
        return re.findall(r"IP \S+\.(\d+) > \S+: Flags \[([^]]+)\]", self._read())


SIZE = 3_000_000


def _transfers(town: Town, proxy: str, pool: ThreadPoolExecutor, *signal: str) -> Sequence[Future[Any]]:
    return [pool.submit(town.exchange, address, proxy, SIZE, *signal) for address in ALLOWED]


def _check(transfers: Sequence[Future[Any]]) -> None:
    expected = {"sent": SIZE, "received": SIZE, "exact": True}
    assert [transfer.result(120) for transfer in transfers] == [expected] * len(ALLOWED)


def _hits(listed: Any) -> dict[str, int]:
    return {rule["sources"][0]: rule["hits"] for rule in listed["rules"]}


def test_clients_blocked_at_run_time_get_no_syn_ack_and_the_others_every_byte(
    town: Town, proxy: ProxyContainer
) -> None:
    blocked = (BY_ADDRESS, BY_PREFIX)
    for address in blocked:  # so that it is the rule that shuts them out
        assert town.exchange(address, proxy.address, 10_000)["exact"]
    before = proxy.json("status")["listeners"][0]["accepted"]
    with ThreadPoolExecutor(len(ALLOWED)) as pool:
        transfers = _transfers(town, proxy.address, pool, "/tmp/go")
        try:
            wait_for(lambda: proxy.json("status")["listeners"][0]["accepted"] == before + len(ALLOWED))
            proxy.command("block", BY_ADDRESS)
            proxy.command("block", PREFIX)
            captures = {address: Capture(town.clients[address]) for address in (*blocked, ALLOWED[0])}
            assert [town.attempt(address, proxy.address) for address in blocked] == ["no answer", "no answer"]
        finally:  # until here, half of their bytes were held back
            for address in ALLOWED:
                _execute(town.clients[address], "touch", "/tmp/go")
        _check(transfers)
    for address in blocked:
        segments = captures[address].segments()
        assert segments, address
        assert {flags for _, flags in segments} == {"S"}, segments
        assert str(PROXY_PORT) not in {port for port, _ in segments}
    assert town.attempt(ALLOWED[0], proxy.address) == "connected"
    wait_for(lambda: (str(PROXY_PORT), "S.") in captures[ALLOWED[0]].segments(), what="a SYN-ACK in the capture")
    assert proxy.json("status")["listeners"][0]["accepted"] == before + len(ALLOWED) + 1
    hits = _hits(proxy.json("list"))
    assert hits[f"{BY_ADDRESS}/32"] >= 1
    assert hits[PREFIX] >= 1


def test_killed_proxy_container_comes_back_with_its_policy_in_force(town: Town, proxy: ProxyContainer) -> None:
    blocked = (BY_ADDRESS, BY_PREFIX)
    proxy.command("block", BY_ADDRESS)
    proxy.command("block", PREFIX)
    proxy.kill_and_start()
    assert "took over the policy" in proxy.log()
    captures = {address: Capture(town.clients[address]) for address in blocked}
    assert [town.attempt(address, proxy.address) for address in blocked] == ["no answer", "no answer"]
    for address in blocked:
        assert {flags for _, flags in captures[address].segments()} == {"S"}
    with ThreadPoolExecutor(len(ALLOWED)) as pool:
        _check(_transfers(town, proxy.address, pool))
    proxy.command("unblock", PREFIX)
    assert town.exchange(BY_PREFIX, proxy.address, 10_000)["exact"]


def test_proxy_on_the_host_guards_against_containers(town: Town, instance: str) -> None:
    gateway = f"{CLIENTS}.1"
    arguments = ("--require-kernel", "--listen", f"{gateway}:{PROXY_PORT}", "--allow-egress", f"{TARGETS}.0/24")
    proxy = ProxyProcess(town.daemon.host, instance, *arguments).start()
    try:
        proxy.command("block", BY_ADDRESS)
        proxy.command("block", PREFIX)
        captures = {address: Capture(town.clients[address]) for address in (BY_ADDRESS, BY_PREFIX)}
        for address, capture in captures.items():
            assert town.attempt(address, gateway) == "no answer"
            assert {flags for _, flags in capture.segments()} == {"S"}
        with ThreadPoolExecutor(len(ALLOWED)) as pool:
            _check(_transfers(town, gateway, pool))
        assert proxy.accepted() == len(ALLOWED)
    finally:
        proxy.end()


def test_client_cannot_reach_the_target_but_through_the_proxy(town: Town) -> None:
    """What makes the other tests tests of the proxy."""
    assert town.peer(ALLOWED[0], "attempt", town.target, ECHO_PORT, 2).strip() == "no answer"
