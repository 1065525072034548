"""The wire relay as a server has it: packets are translated, the sockets are parked in a process of their own."""

from __future__ import annotations

import os
import re
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
from rama_ebpf.kernel.raw_packets import checksum

from ..conftest import StartProxy
from ..lab import Host, Lab, wait_for
from ..proxy import ProxyProcess
from .scripts import Stage, both_ways, comes_out_of_order

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

PORT = 1080
CONNECT_PORT = 1090
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

[listeners.connect]
address = "0.0.0.0:1090"
stack = "mixed"
relay = "wire"

[stacks.mixed]
service = { mixed = {} }

[stacks.socks]
service = { socks5 = {} }
"""


class Scene:
    """A client, the proxy and a target, each a host."""

    config = CONFIG

    def __init__(self, lab: Lab, start: StartProxy, path: Path) -> None:
        self.proxy_host, self.client, self.target = lab.host("proxy"), lab.host("client"), lab.host("target")
        self.ends = ExitStack()
        path.write_text(self.config)
        self.proxy: ProxyProcess = start(self.proxy_host, "--config", str(path))
        self.wait()

    def wait(self) -> None:
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

    def dial(self, listener: socket.socket, port: int = PORT) -> tuple[socket.socket, socket.socket]:
        """A tunnel: the client's socket and the target's."""
        v6 = listener.family == socket.AF_INET6
        host, target = listener.getsockname()[:2]
        client = self.client.connect(self.proxy_host.ipv6 if v6 else self.proxy_host.ipv4, port)
        self.ends.enter_context(client)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if port == CONNECT_PORT:
            ask_by_connect(client, listener)
            return client, self._accepted(listener)
        kind = b"\4" if v6 else b"\1"
        client.sendall(
            b"\5\1\0" + b"\5\1\0" + kind + socket.inet_pton(listener.family, host) + struct.pack("!H", target)
        )
        answer = b""
        while len(answer) < 2 + 4 + (16 if v6 else 4) + 2:
            answer += client.recv(100)
        assert answer[3] == 0, answer
        return client, self._accepted(listener)

    def _accepted(self, listener: socket.socket) -> socket.socket:
        upstream, _ = listener.accept()
        self.ends.enter_context(upstream)
        upstream.settimeout(listener.gettimeout())
        upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return upstream

    def taken(self, listener: socket.socket, port: int = PORT) -> tuple[socket.socket, socket.socket]:
        """A tunnel that the relay has taken over."""

        def dialled() -> tuple[socket.socket, socket.socket] | None:
            ends = self.dial(listener, port)
            exchange(*ends)
            if (self.row(ends[0]) or {"relay": ""})["relay"] == "wire":
                return ends
            for sock in ends:
                sock.close()
            return None

        ends = wait_for(dialled, timeout=30, what="a tunnel that is taken over")  # new workers hear of it first
        assert ends is not None
        return ends

    def row(self, client: socket.socket) -> dict[str, Any] | None:
        name = client.getsockname()
        source = f"[{name[0]}]:{name[1]}" if client.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"
        return next((flow for flow in self.flows() if flow["source"] == source), None)


@pytest.fixture(scope="module")
def running(shared_lab: Lab, start_shared: StartProxy, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(shared_lab, start_shared, tmp_path_factory.mktemp("wire") / "rama.toml")


@pytest.fixture
def scene(running: Scene) -> Iterator[Scene]:
    """The one of this module; what a test opens is closed."""
    with running.ends:
        yield running


def ask_by_connect(client: socket.socket, listener: socket.socket) -> None:
    host, target = listener.getsockname()[:2]
    client.sendall(f"CONNECT {host}:{target} HTTP/1.1\r\nHost: {host}:{target}\r\n\r\n".encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += client.recv(1000)
    assert answer.startswith(b"HTTP/1.1 200 "), answer


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


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def at_rest(scene: Scene) -> int:
    """How many descriptors the holder has when it has begun, and has heard of all workers."""
    wait_for(lambda: scene.proxy.logged("the wire relay is ready"), timeout=60, what="the relay")
    seen: list[int] = []

    def settled() -> bool:
        seen.append(descriptors(scene.holder()))
        return len(seen) > 20 and len(set(seen[-20:])) == 1

    wait_for(settled, timeout=30, what="an end of the beginning")
    return seen[-1]


@pytest.mark.parametrize("v6", [False, True], ids=["IPv4", "IPv6"])
def test_bulk_goes_through_both_ways_and_each_end_half_closes(scene: Scene, v6: bool) -> None:
    before = at_rest(scene)
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
        line = f"reason=eof received={len(blob) + 11 + (25 if v6 else 13)} .*relay=wire"
        wait_for(lambda: scene.proxy.logged(line), what="the line in the access log")
        scene.ends.close()
    wait_for(lambda: descriptors(scene.holder()) <= before, what="the end of the linger")


def send_all(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def read_all(sock: socket.socket, into: bytearray) -> None:
    while data := sock.recv(1 << 20):
        into += data


def test_tunnel_by_connect_is_taken_over(scene: Scene) -> None:
    with scene.listening() as listener:
        exchange(*scene.taken(listener, CONNECT_PORT))


def test_segments_written_by_hand_are_answered_as_by_the_target_itself(scene: Scene) -> None:
    """Out of order, repeated, with gaps: `python -m tests.relay.scripts` plays all there are."""
    stage = Stage(scene.client, scene.proxy_host, scene.target, PORT)

    def taken(source: str) -> bool:
        return any(flow["source"] == source and flow["relay"] == "wire" for flow in scene.flows())

    direct, relayed = both_ways(stage, comes_out_of_order, taken)
    assert direct == relayed
    assert len(direct) == 8


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
        assert scene.proxy.json("block", scene.client.ipv4, "--kill")["killed"] >= 1  # earlier ones may be closing
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


def nft(host: Host, rules: str) -> None:
    host.run("nft", rules)


def test_addresses_that_are_rewritten_are_refused(scene: Scene) -> None:
    nft(
        scene.proxy_host,
        "table ip nat { chain in { type nat hook prerouting priority dstnat; tcp dport 1085 redirect to :1080; }; }",
    )
    try:
        with scene.listening() as listener:
            client, upstream = scene.dial(listener, port=1085)
            exchange(client, upstream)
            assert (scene.row(client) or {})["why"] == "no wire: addresses are rewritten (NAT)"
            assert scene.refused()["no wire: addresses are rewritten (NAT)"] == 1
            said = scene.proxy.command("doctor", check=False).stdout
            assert "1 addresses are rewritten (NAT)" in said
            client.close()
            upstream.close()
            line = r'relay=\w+ why="no wire: addresses are rewritten \(NAT\)"'
            wait_for(lambda: scene.proxy.logged(line), what="its line in the access log")
    finally:
        scene.proxy_host.run("nft", "delete table ip nat")


def test_loss_on_both_legs_is_made_good_by_the_ends(scene: Scene) -> None:
    """With SACK, retransmissions and time-outs, none of which the proxy has a part in."""
    rule = "type filter hook input priority 0; meta l4proto tcp numgen random mod 40 0 drop;"
    with scene.listening() as listener, scene.listening(v6=True) as six:
        pairs = [scene.taken(each) for each in (listener, six)]
        for host in (scene.client, scene.target):
            nft(host, f"table inet lossy {{ chain in {{ {rule} }}; }}")
        try:
            blobs = [os.urandom(400_000) for _ in range(4)]
            got = [bytearray() for _ in range(4)]
            ways = [
                (pairs[0][0], pairs[0][1]),
                (pairs[0][1], pairs[0][0]),
                (pairs[1][0], pairs[1][1]),
                (pairs[1][1], pairs[1][0]),
            ]
            threads = [
                threading.Thread(target=send_all, args=(way[0], blob)) for way, blob in zip(ways, blobs, strict=True)
            ]
            threads += [
                threading.Thread(target=read_all, args=(way[1], into)) for way, into in zip(ways, got, strict=True)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [bytes(each) for each in got] == blobs
        finally:
            for host in (scene.client, scene.target):
                host.run("nft", "delete table inet lossy")


@contextmanager
def second_wire(scene: Scene) -> Iterator[None]:
    """Another wire between proxy and target, 198.19.0.1 and 198.19.0.2."""
    proxy, target = scene.proxy_host, scene.target
    proxy.ip("link", "add", "mid", "type", "veth", "peer", "name", "mid", "netns", target.netns)
    try:
        for host, address in ((proxy, "198.19.0.1"), (target, "198.19.0.2")):
            host.ip("link", "set", "mid", "up")
            host.add_address(f"{address}/24", "mid")
        yield
    finally:
        proxy.ip("link", "del", "mid")
        scene.client.ip("route", "flush", "cache")  # what was learned of the path


def by_wire(scene: Scene) -> list[dict[str, Any]]:
    return [flow for flow in scene.flows() if flow["relay"] == "wire"]


def path_mtu(host: Host, to: str) -> int:
    found = re.search(r"mtu (\d+)", host.run("ip", "route", "get", to).stdout)
    return int(found[1]) if found else 1500


def test_smaller_path_is_told_to_the_sender_and_the_transfer_goes_on(scene: Scene) -> None:
    with second_wire(scene), scene.target.socket() as listener:
        listener.bind(("198.19.0.2", 0))
        listener.listen()
        wait_for(lambda: exchanged(scene, listener), what="the program there")
        client, upstream = scene.taken(listener)
        other = scene.taken(listener)
        # An error from the path behind: a router quotes the packet as it was translated.
        forge_too_big(scene.target, other[1], 1400)
        wait_for(lambda: path_mtu(scene.client, scene.proxy_host.ipv4) == 1400, what="the smaller path")
        exchange(*other)
        for host in (scene.proxy_host, scene.target):
            host.ip("link", "set", "mid", "mtu", "1300")
        blob, got = os.urandom(1_000_000), bytearray()
        reader = threading.Thread(target=read_all, args=(upstream, got))
        reader.start()
        send_all(client, blob)
        reader.join()
        assert bytes(got) == blob
        assert path_mtu(scene.client, scene.proxy_host.ipv4) == 1300
    wait_for(lambda: not by_wire(scene), what="the end of what went by an interface that is gone")


def forge_too_big(host: Host, upstream: socket.socket, mtu: int) -> None:
    """Say, as a router, that what came to ``upstream`` last was too big."""
    local, peer = upstream.getsockname(), upstream.getpeername()
    seq = received_up_to(upstream)
    quoted = struct.pack("!BBHHHBBH", 0x45, 0, 1300, 0, 0x4000, 64, 6, 0)
    quoted += socket.inet_aton(peer[0]) + socket.inet_aton(local[0]) + struct.pack("!HHI", peer[1], local[1], seq)
    icmp = struct.pack("!BBHHH", 3, 4, 0, 0, mtu) + quoted
    icmp = icmp[:2] + struct.pack("!H", checksum(icmp)) + icmp[4:]
    with host.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.sendto(icmp, (peer[0], 0))


def received_up_to(sock: socket.socket) -> int:
    """The next sequence number that a socket expects: that of its receive queue, in repair mode for a moment."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, 19, 1)
        sock.setsockopt(socket.IPPROTO_TCP, 20, 1)
        return sock.getsockopt(socket.IPPROTO_TCP, 21) & 0xFFFFFFFF
    finally:
        sock.setsockopt(socket.IPPROTO_TCP, 19, -1)  # off, and no window probe


def test_killed_server_leaves_no_tunnel_and_the_next_one_drains_its_own(scene: Scene) -> None:
    with scene.listening() as listener:
        ends = scene.taken(listener)
        holder = scene.holder()
        os.kill(scene.proxy.pid, signal.SIGKILL)
        assert [is_reset(sock) for sock in ends] == [True, True]
        wait_for(lambda: has_ended(holder), what="the end of the process that holds the relay")
        wait_for(
            lambda: not scene.proxy_host.run("ss", "-Htn", "state", "established").stdout,
            what="the end of all connections",
        )

        scene.proxy.start()
        scene.wait()
        ends = scene.taken(listener)
        scene.proxy.signal(signal.SIGTERM)
        wait_for(lambda: scene.proxy.json("status")["stopping"], what="the stop")
        exchange(*ends)
        scene.proxy.signal(signal.SIGTERM)
        assert [is_reset(sock) for sock in ends] == [True, True]
        assert scene.proxy.wait() == 0
