"""The wire relay as a server has it: packets are translated, the sockets are parked in a process of their own."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from rama_ebpf.cli.flows import live_flows
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.loader import unload

from ..lab import Lab, wait_for
from ..proxy import ProxyProcess

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

PORT = 1080
CONFIG = """
[server]
workers = 2
drain = "60s"

[egress]
allow = ["198.18.0.0/15", "2001:db8::/32", "127.0.0.0/8"]

[logging]
access = true

[listeners.four]
address = "0.0.0.0:1080"
stack = "socks"
relay = "wire"

[listeners.six]
address = "[::]:1080"
stack = "socks"
relay = "wire"

[stacks.socks]
service = { socks5 = {} }
"""


class Scene:
    """A client, the proxy and a target, each a host."""

    def __init__(self, lab: Lab, instance: str, path: Path) -> None:
        self.proxy_host, self.client, self.target = lab.host("proxy"), lab.host("client"), lab.host("target")
        self.ends = ExitStack()
        path.write_text(CONFIG)
        self.proxy = ProxyProcess(self.proxy_host, instance, "--config", str(path))

    def start(self) -> None:
        self.proxy.start()
        wait_for(lambda: self.state()["state"] == "ready", timeout=60, what="the wire relay")

    def state(self) -> dict[str, str]:
        state: Any = Instance(self.proxy.instance).read_state()["wire"]
        return dict(state)

    def flows(self) -> list[dict[str, Any]]:
        return list(live_flows(Instance(self.proxy.instance))["flows"])

    def refused(self) -> dict[str, int]:
        return dict(live_flows(Instance(self.proxy.instance))["refused"])

    def holder(self) -> int:
        """The process that holds the relay."""
        [pid] = [
            int(pid)
            for pid in Path(f"/proc/{self.proxy.pid}/task/{self.proxy.pid}/children").read_text().split()
            if b"wire_child" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        return pid

    @contextmanager
    def listening(self, *, v6: bool = False) -> Iterator[socket.socket]:
        with self.target.socket(socket.AF_INET6 if v6 else socket.AF_INET) as listener:
            listener.bind((self.target.ipv6 if v6 else self.target.ipv4, 0))
            listener.listen()
            yield listener

    def dial(self, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
        """A tunnel: the client's socket and the target's."""
        v6 = listener.family == socket.AF_INET6
        host, port = listener.getsockname()[:2]
        client = self.client.connect(self.proxy_host.ipv6 if v6 else self.proxy_host.ipv4, PORT)
        self.ends.enter_context(client)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        kind = b"\4" if v6 else b"\1"
        client.sendall(b"\5\1\0" + b"\5\1\0" + kind + socket.inet_pton(listener.family, host) + struct.pack("!H", port))
        answer = b""
        while len(answer) < 2 + 4 + (16 if v6 else 4) + 2:
            answer += client.recv(100)
        assert answer[3] == 0, answer
        upstream, _ = listener.accept()
        self.ends.enter_context(upstream)
        upstream.settimeout(client.gettimeout())
        upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client, upstream

    def taken(self, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
        """A tunnel that the relay has taken over."""
        for _ in range(5):
            client, upstream = self.dial(listener)
            exchange(client, upstream)
            wait_for(lambda c=client: self.row(c) is not None, what="the tunnel in flows")  # type: ignore[misc]
            row = self.row(client)
            if row is not None and row["relay"] == "wire":
                return client, upstream
        raise AssertionError(f"not taken over: {row}, {self.refused()}\n" + "\n".join(self.proxy.log[-20:]))

    def row(self, client: socket.socket) -> dict[str, Any] | None:
        name = client.getsockname()
        source = f"[{name[0]}]:{name[1]}" if client.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"
        return next((flow for flow in self.flows() if flow["source"] == source), None)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    instance = f"test-{os.getpid()}-wire"
    with Lab() as lab:
        scene = Scene(lab, instance, tmp_path_factory.mktemp("wire") / "rama.toml")
        try:
            scene.start()
            yield scene
        finally:
            scene.proxy.end()
            unload(Instance(instance))


@pytest.fixture
def scene(running: Scene) -> Iterator[Scene]:
    """The one of this module; what a test opens is closed."""
    with running.ends:
        yield running


def exchange(client: socket.socket, upstream: socket.socket) -> None:
    for near, far in ((client, upstream), (upstream, client)):
        near.sendall(b"a few words")
        assert far.recv(100) == b"a few words"


def is_reset(sock: socket.socket, say: bytes = b"") -> bool:
    try:
        sock.sendall(say)
        return sock.recv(1) is None
    except ConnectionResetError:
        return True


def has_ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"  # its new parent may take its time


def idle_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize("v6", [False, True], ids=["IPv4", "IPv6"])
def test_bulk_goes_through_both_ways_and_each_end_half_closes(scene: Scene, v6: bool) -> None:
    before = idle_descriptors(scene.holder())
    with scene.listening(v6=v6) as listener:
        client, upstream = scene.taken(listener)
        blob, other = os.urandom(5_000_000), os.urandom(3_000_000)
        threads = [
            threading.Thread(target=send_all, args=(client, blob)),
            threading.Thread(target=send_all, args=(upstream, other)),
        ]
        got = {sock: bytearray() for sock in (client, upstream)}
        threads += [threading.Thread(target=read_all, args=(sock, got[sock])) for sock in (client, upstream)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (bytes(got[upstream]), bytes(got[client])) == (blob, other)
        wait_for(lambda: scene.proxy.logged(r"reason=eof.*relay=wire"), what="the line in the access log")
        assert scene.proxy.logged(f"received={len(blob) + 11 + (25 if v6 else 13)} ")
        scene.ends.close()
    wait_for(lambda: idle_descriptors(scene.holder()) == before, what="the end of the linger")


def send_all(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def read_all(sock: socket.socket, into: bytearray) -> None:
    while data := sock.recv(1 << 20):
        into += data


def test_resets_pass_and_are_told(scene: Scene) -> None:
    with scene.listening() as listener:
        for index, reason in enumerate(("client_reset", "upstream_reset")):
            ends = scene.taken(listener)
            ends[index].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            ends[index].close()
            assert is_reset(ends[not index])
            wait_for(lambda reason=reason: scene.proxy.logged(rf"reason={reason}.*relay=wire"), what=reason)  # type: ignore[misc]


def test_what_ends_a_tunnel_resets_both_ends(scene: Scene) -> None:
    """A block with --kill, the death of its worker, and the death of the process that holds the relay."""
    with scene.listening() as listener:
        ends = scene.taken(listener)
        assert scene.proxy.json("block", scene.client.ipv4, "--kill")["killed"] == 1
        assert [is_reset(sock) for sock in ends] == [True, True]
        wait_for(lambda: not scene.flows(), what="the end of the tunnel")
        scene.proxy.command("unblock", scene.client.ipv4)

        ends = scene.taken(listener)
        for pid in scene.proxy.workers():
            os.kill(pid, signal.SIGKILL)
        assert [is_reset(sock) for sock in ends] == [True, True]
        wait_for(lambda: len(scene.proxy.workers()) == 2, timeout=60, what="new workers")

        ends = scene.taken(listener)
        holder = scene.holder()
        os.kill(holder, signal.SIGKILL)
        wait_for(lambda: not scene.flows(), what="the end of the tunnel")
        assert [is_reset(sock, say=b"to the stack") for sock in ends] == [True, True]
        wait_for(lambda: scene.state()["state"] == "ready" and scene.holder() != holder, timeout=60, what="another")
        wait_for(lambda: exchanged(scene, listener), timeout=30, what="the relay again")


def exchanged(scene: Scene, listener: socket.socket) -> bool:
    client, upstream = scene.dial(listener)
    exchange(client, upstream)
    row = scene.row(client)
    return row is not None and row["relay"] == "wire"


def test_killed_server_leaves_no_tunnel_and_no_program(scene: Scene) -> None:
    with scene.listening() as listener:
        ends = scene.taken(listener)
        holder = scene.holder()
        os.kill(scene.proxy.pid, signal.SIGKILL)
        assert [is_reset(sock) for sock in ends] == [True, True]
        wait_for(lambda: has_ended(holder), what="the end of the process that holds the relay")
        assert not scene.proxy_host.run("ss", "-Htn", "state", "established").stdout
