"""Tunnels that outlive their server: over its death, its stop, an upgrade, and never over ``unload``."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from rama_ebpf.kernel.instance import Instance

from ..conftest import StartProxy
from ..lab import Lab, wait_for
from ..proxy import rama_ebpf
from .test_wire import Scene, exchange, has_ended, is_reset

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

CONFIG = """
[server]
workers = 2
drain = "60s"

[egress]
allow = ["198.18.0.0/15", "2001:db8::/32"]

[logging]
access = true

[limits]
connections_per_source = 3

[listeners.four]
address = "0.0.0.0:1080"
stack = "socks"
relay = "wire"
survive = true

[listeners.mortal]
address = "0.0.0.0:1081"
stack = "socks"
relay = "wire"

[stacks.socks]
service = { socks5 = {} }
layers = [{ timeout = { idle = "1h", total = "1h" } }]
"""
MORTAL = 1081


class Survivors(Scene):
    config = CONFIG

    def elders(self) -> int:
        """How many tunnels of earlier servers go on."""
        state = Instance(self.proxy.instance).read_state()
        return sum(state["wire"]["elders"])  # type: ignore[index]

    def restarted(self) -> None:
        self.proxy.start()
        self.wait()

    def killed(self) -> None:
        """The server and its workers are no more."""
        workers = self.proxy.workers()
        os.kill(self.proxy.pid, signal.SIGKILL)
        self.proxy.wait()
        wait_for(lambda: all(map(has_ended, workers)), what="the end of the workers")


@pytest.fixture(scope="module")
def running(shared_lab: Lab, start_shared: StartProxy, tmp_path_factory: pytest.TempPathFactory) -> Survivors:
    return Survivors(shared_lab, start_shared, tmp_path_factory.mktemp("survive") / "rama.toml")


@pytest.fixture
def scene(running: Survivors) -> Iterator[Survivors]:
    """The server of the tests before, or another one where these have ended it."""
    if Instance(running.proxy.instance).serving_pid() is None:
        running.restarted()
    with running.ends:
        yield running
    if Instance(running.proxy.instance).serving_pid() is not None:  # they count in the limit of the next test
        wait_for(lambda: not running.flows(), what="the end of the tunnels")


def exactly(sock: socket.socket, count: int) -> bytes:
    """Read so many bytes. (MSG_WAITALL does not wait where a socket has a time-out.)"""
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise ConnectionResetError("the end of the stream")
        data += more
    return data


class Load(threading.Thread):
    """Says random bytes on one end of a tunnel, and compares what comes from the other with what was said."""

    def __init__(self, ends: tuple[socket.socket, socket.socket], seed: int) -> None:
        super().__init__(daemon=True)
        self._ends = ends
        self._seed = seed
        self.stop = threading.Event()
        self.moved = 0
        self.wrong = ""

    def run(self) -> None:
        said, heard = random.Random(self._seed), random.Random(self._seed)
        (source, sink), size = self._ends, 20_000
        try:
            while not self.stop.is_set():
                source.sendall(said.randbytes(size))
                if exactly(sink, size) != heard.randbytes(size):
                    self.wrong = f"other bytes after {self.moved}"
                    return
                self.moved += size
        except OSError as error:
            self.wrong = f"{error} after {self.moved} bytes"


@contextmanager
def under_load(*tunnels: tuple[socket.socket, socket.socket]) -> Iterator[list[Load]]:
    """Both directions of each tunnel are busy; at the end nothing was wrong."""
    loads = [
        Load(ends, 2 * number + back)
        for number, tunnel in enumerate(tunnels)
        for back, ends in enumerate((tunnel, tunnel[::-1]))
    ]
    for load in loads:
        load.start()
    try:
        yield loads
        more(loads)
    finally:
        for load in loads:
            load.stop.set()
        for load in loads:
            load.join()
    assert [load.wrong for load in loads if load.wrong] == []


def more(loads: list[Load]) -> None:
    """Wait until each has moved bytes once more."""
    before = [load.moved for load in loads]
    wait_for(
        lambda: (
            any(load.wrong for load in loads) or all(load.moved > was for load, was in zip(loads, before, strict=True))
        ),
        what="more bytes",
    )


def refused(scene: Survivors, listener: socket.socket) -> bool:
    """Whether one more connection of the client is above its share."""
    with ExitStack() as ends:
        client = ends.enter_context(scene.client.connect(scene.proxy_host.ipv4, 1080))
        host, port = listener.getsockname()
        client.sendall(b"\5\1\0\5\1\0\1" + socket.inet_aton(host) + port.to_bytes(2, "big"))
        return exactly(client, 4)[3:] != b"\0"


def test_tunnels_go_on_over_kill_and_restart_and_are_governed_by_the_next_server(scene: Survivors) -> None:
    """Exact under load; in flows, in limits, with their line at the end. What does not survive is reset."""
    with scene.listening() as listener:
        tunnels = [scene.taken(listener) for _ in range(2)]
        mortal = scene.taken(listener, MORTAL)
        with under_load(*tunnels) as loads:
            scene.killed()
            assert [is_reset(sock) for sock in mortal] == [True, True]
            more(loads)
            scene.restarted()
            wait_for(lambda: len([row for row in scene.flows() if row["relay"] == "wire"]) == 2, what="their adoption")
            assert scene.elders() == 2
            more(loads)
        # Two of three places are taken.
        third = scene.taken(listener)
        wait_for(lambda: refused(scene, listener), what="a refusal")
        for sock in third:
            sock.close()
        client, upstream = tunnels[0]
        port = client.getsockname()[1]
        client.shutdown(socket.SHUT_WR)
        upstream.shutdown(socket.SHUT_WR)
        wait_for(lambda: scene.proxy.logged(rf"client=\S+:{port} .*reason=eof .*relay=wire"), what="its line")
        assert scene.proxy.json("block", scene.client.ipv4, "--kill")["killed"] >= 1
        assert [is_reset(sock) for sock in tunnels[1]] == [True, True]
        scene.proxy.command("unblock", scene.client.ipv4)
        wait_for(lambda: scene.elders() == 0, what="the end of the earlier process")


def test_tunnel_goes_on_over_the_death_of_its_worker_and_a_reload(scene: Survivors) -> None:
    with scene.listening() as listener:
        tunnel = scene.taken(listener)
        with under_load(tunnel) as loads:
            for pid in scene.proxy.workers():
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda: scene.proxy.logged("goes on with a tunnel"), timeout=60, what="its adoption")
            more(loads)
            scene.proxy.log.clear()
            scene.proxy.signal(signal.SIGHUP)
            wait_for(lambda: scene.proxy.logged("goes on with a tunnel"), timeout=60, what="its adoption")
            wait_for(lambda: scene.row(tunnel[0]) is not None, what="its row")


def test_tunnel_goes_on_over_an_upgrade_a_stop_and_a_start(scene: Survivors) -> None:
    with scene.listening() as listener:
        tunnel = scene.taken(listener)
        old = scene.proxy.pid
        with under_load(tunnel) as loads:
            scene.proxy.command("upgrade")
            wait_for(lambda: scene.row(tunnel[0]) is not None, timeout=30, what="its row at the new server")
            more(loads)
            wait_for(lambda: has_ended(old), timeout=30, what="the end of the server before, which has nothing left")
            more(loads)
            # A stop does not wait for it.
            os.kill(int(scene.proxy.json("status")["pid"]), signal.SIGTERM)
            wait_for(lambda: Instance(scene.proxy.instance).serving_pid() is None, timeout=30, what="its end")
            more(loads)
            scene.restarted()
            wait_for(lambda: scene.row(tunnel[0]) is not None, what="its row at the next server")


def test_unload_resets_what_outlives_a_server_and_leaves_nothing(scene: Survivors) -> None:
    with scene.listening() as listener:
        tunnel, holder = scene.taken(listener), scene.holder()
        scene.killed()
        exchange(*tunnel)
        assert not has_ended(holder)
        rama_ebpf("unload", "--instance", scene.proxy.instance)
        assert [is_reset(sock) for sock in tunnel] == [True, True]
        wait_for(lambda: has_ended(holder), what="the end of the process that holds the relay")
        assert not Instance(scene.proxy.instance).run_dir.exists()
        left = scene.proxy_host.run("ss", "-Htan").stdout
        assert [line for line in left.splitlines() if "ESTAB" in line] == []


def test_death_of_server_and_holder_resets_each_end_at_its_next_packet(scene: Survivors) -> None:
    with scene.listening() as listener:
        tunnel, holder = scene.taken(listener), scene.holder()
        os.kill(holder, signal.SIGSTOP)
        scene.killed()
        os.kill(holder, signal.SIGKILL)
        wait_for(lambda: has_ended(holder), what="its end")
        assert [is_reset(sock, say=b"anybody") for sock in tunnel] == [True, True]


def test_idle_tunnel_without_a_server_ends_by_its_time_out(tmp_path: Path) -> None:
    """Whoever holds it keeps its time-outs: see the orphan."""
    from rama_ebpf.relay import CloseReason
    from rama_ebpf.relay.orphan import Orphan
    from rama_ebpf.relay.wire_story import Story

    orphan = Orphan(Story(began=10.0, idle=5.0, total=100.0).pack(), (0, 0))
    orphan._active_at = 10.0
    assert orphan.expired((0, 0), 14.9) is None
    assert orphan.expired((1, 0), 15.1) is None
    assert orphan.expired((1, 0), 20.0) is None
    assert orphan.expired((1, 0), 20.2) is CloseReason.IDLE_TIMEOUT
    assert orphan.expired((2, 0), 110.0) is CloseReason.TOTAL_TIMEOUT
