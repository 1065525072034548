"""SYN cookies from XDP, on real wires: who is answered, by whom, what it is charged to, and what a flood fills."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from rama_ebpf.kernel import netdev

from ..conftest import StartProxy
from ..lab import Host, Lab, set_ethtool, wait_for
from ..policy.frames import VLAN, checksum, ethernet, ipv4, tcp
from ..proxy import ProxyProcess
from .test_gate import FAMILIES, PORT, Scene
from .test_xdp import interface, listen

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

FLOOD = IPv4Network("198.19.0.0/16")
ACK = 0x10
SET_FLAGS = 0x26  # ETHTOOL_SFLAGS: ETH_FLAG_RXVLAN, ETH_FLAG_TXVLAN
SOL_PACKET, PACKET_AUXDATA, TP_STATUS_VLAN_VALID = 263, 8, 1 << 4


def sysctl(host: Host, value: int) -> None:
    host.run("sh", "-c", f"echo {value} > /proc/sys/net/ipv4/tcp_syncookies")


@dataclass
class Counted:
    """How many SYNs each hook has let in and turned away, and what the stack says of cookies."""

    xdp: int
    xdp_denied: int
    cgroup: int
    sent: int
    received: int
    failed: int

    def __sub__(self, other: Counted) -> Counted:
        return Counted(*(a - b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def counted(proxy: ProxyProcess, host: Host) -> Counted:
    names, values = host.run("sh", "-c", "grep ^TcpExt: /proc/net/netstat").stdout.splitlines()
    stack = dict(zip(names.split(), values.split(), strict=True))
    rows = proxy.json("status")["verdicts"]

    def total(hook: str, *actions: str) -> int:
        return sum(row["count"] for row in rows if row["hook"] == hook and row["action"] in actions)

    cookies = (int(stack[f"Syncookies{name}"]) for name in ("Sent", "Recv", "Failed"))
    return Counted(total("xdp", "allow"), total("xdp", "drop", "reject"), total("cgroup", "allow"), *cookies)


def connects(scene: Scene, family: int, source: str | None = None) -> bool:
    with contextlib.suppress(OSError):
        return scene.greet(family, source) == b"\x05\x00"
    return False


def begin(lab: Lab, start: StartProxy) -> Scene:
    server, client = lab.host("proxy", takes_xdp=True), lab.host("client")
    sysctl(server, 2)
    proxy = start(server, *listen(server, "--xdp", "eth0", "--syn-cookies", "--allow-egress", f"{client.ipv4}/32"))
    return Scene(proxy, server, client)


@pytest.fixture(scope="module")
def shared(shared_lab: Lab, start_shared: StartProxy) -> Scene:
    return begin(shared_lab, start_shared)


@pytest.fixture
def scene(shared: Scene) -> Scene:
    """A server that always answers with cookies, where no queue is needed to be full; without rules and bans."""
    shared.proxy.forget_rules()
    sysctl(shared.server, 2)
    return shared


@contextlib.contextmanager
def echo(host: Host) -> Iterator[int]:
    """A server that sends back what it gets from one client; yields its port."""
    with host.socket() as sock:
        sock.bind((host.ipv4, 0))
        sock.listen()

        def serve() -> None:
            peer, _ = sock.accept()
            with peer:
                while data := peer.recv(1 << 16):
                    peer.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield sock.getsockname()[1]
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("family", FAMILIES)
def test_client_gets_in_by_the_cookie_of_xdp_and_data_flows_both_ways(scene: Scene, family: int) -> None:
    before = counted(scene.proxy, scene.server)
    sent = random.Random(1).randbytes(3_000_000)
    with echo(scene.client) as port, scene.client.connect(scene.address(family), PORT) as sock:
        sock.sendall(
            b"\x05\x01\x00" + b"\x05\x01\x00\x01" + socket.inet_aton(scene.client.ipv4) + port.to_bytes(2, "big")
        )
        answer = b""
        while len(answer) < 12:
            answer += sock.recv(12 - len(answer))
        assert answer[:4] == b"\x05\x00\x05\x00"
        options = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)
        mss = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
        writer = threading.Thread(target=lambda: (sock.sendall(sent), sock.shutdown(socket.SHUT_WR)))
        writer.start()
        found = bytearray()
        while data := sock.recv(1 << 20):
            found += data
        writer.join()
    assert bytes(found) == sent
    assert options[5] & 7 == 0, "an answer of XDP offers no timestamps, no SACK and no window scaling"
    assert mss == (1460 if family == socket.AF_INET else 1440)
    difference = counted(scene.proxy, scene.server) - before
    assert difference == Counted(xdp=1, xdp_denied=0, cgroup=0, sent=0, received=1, failed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_syn_ack_is_on_the_wire_and_none_is_the_stack_s(scene: Scene, family: int) -> None:
    before = counted(scene.proxy, scene.server)
    segments = scene.attempt(family)
    assert [segment.flags for segment in segments if "S" in segment.flags] == ["SA"]
    wait_for(lambda: (counted(scene.proxy, scene.server) - before).received == 1)
    assert (counted(scene.proxy, scene.server) - before).sent == 0


def test_in_a_vlan_the_answer_keeps_the_tag(lab: Lab, start_proxy: StartProxy) -> None:
    """With frames made by hand: a kernel without VLAN interfaces carries tags all the same."""
    scene = begin(lab, start_proxy)
    lab.ethtool(scene.server, SET_FLAGS, 0)  # no TXVLAN: the switch puts the tag into the frame and not beside it
    own, peer = hardware(scene.server), hardware(scene.client)
    with scene.client.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as tap:
        tap.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        tap.bind(("eth0", 0))
        spoof(scene, [forged(scene, IPv4Address(scene.client.ipv4), 40007)], tags=(VLAN,))
        while True:
            frame, extra, _, _ = tap.recvmsg(2048, 256)
            if frame[6:12] == own and frame[14 + 9] == 6:
                break
    assert (frame[:6], frame[14 + 33]) == (peer, 0x12)
    status, _, _, _, _, tci, protocol = struct.unpack("=IIIHHHH", extra[0][2])
    assert status & TP_STATUS_VLAN_VALID
    assert (tci, protocol) == (7, VLAN)


def test_it_is_known_whether_vlan_tags_reach_xdp(lab: Lab, tmp_path: Path) -> None:
    host = lab.host("proxy")
    assert host.call(lambda: netdev.strips_vlan_tags("eth0"))
    host.call(lambda: set_ethtool("eth0", SET_FLAGS, 0))
    assert not host.call(lambda: netdev.strips_vlan_tags("eth0"))
    config = tmp_path / "config"  # as /proc/net/vlan/config
    assert not netdev.has_vlans(config)
    config.write_text("VLAN Dev name\t | VLAN ID\nName-Type: VLAN_NAME_TYPE_RAW_PLUS_VID_NO_PAD\n")
    assert not netdev.has_vlans(config)
    with config.open("a") as file:
        file.write("eth0.7         | 7  | eth0\n")
    assert netdev.has_vlans(config)


def test_veth_whose_peer_takes_nothing_from_xdp_leaves_answers_to_the_stack(lab: Lab, start_proxy: StartProxy) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    sysctl(server, 2)
    scene = Scene(start_proxy(server, *listen(server, "--xdp", "eth0", "--syn-cookies")), server, client)
    silent = "XDP on eth0 answers nothing, the stack does: the other end of this veth takes no frames from XDP"
    assert silent in scene.proxy.command("status").stdout
    assert scene.proxy.logged(silent)
    before = counted(scene.proxy, server)
    assert connects(scene, socket.AF_INET)
    assert (counted(scene.proxy, server) - before).sent == 1
    scene.proxy.command("block", client.ipv4, "--reject")
    assert {segment.flags for segment in scene.attempt()} == {"RA"}


def in_state(host: Host, state: str, *of: str) -> int:
    return len(host.run("ss", "-Htn", "state", state, *of).stdout.splitlines())


def hardware(host: Host) -> bytes:
    return bytes.fromhex(interface(host)["address"].replace(":", ""))


def spoof(scene: Scene, packets: list[bytes], *, tags: tuple[int, ...] = ()) -> None:
    """Put packets on the client's wire, to the server."""
    head = hardware(scene.server) + hardware(scene.client)
    with scene.client.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("eth0", 0))
        for packet in packets:
            sock.send(head + ethernet(packet, tags=tags)[12:])


def forged(
    scene: Scene, source: IPv4Address, port: int, *, flags: int = 0x02, sequence: int = 1, acknowledged: int = 0
) -> bytes:
    target = IPv4Address(scene.server.ipv4)
    segment = bytearray(tcp(PORT, flags=flags, source_port=port, sequence=sequence))
    struct.pack_into("!I", segment, 8, acknowledged)
    segment[16:18] = checksum(source.packed + target.packed + struct.pack("!HH", 6, len(segment)) + bytes(segment))
    return ipv4(source, target, bytes(segment))


def test_forged_ack_does_not_get_in(scene: Scene) -> None:
    accepted = scene.proxy.accepted()
    assert connects(scene, socket.AF_INET)  # the socket has sent a cookie: the stack looks at what comes back
    wait_for(lambda: scene.proxy.accepted() == accepted + 1)
    before = counted(scene.proxy, scene.server)
    pick = random.Random(4)
    source = IPv4Address(scene.client.ipv4)
    acks = [forged(scene, source, 40000, flags=ACK, acknowledged=pick.getrandbits(32)) for _ in range(500)]
    workers = len(scene.proxy.workers())
    spoof(scene, acks)
    wait_for(lambda: (counted(scene.proxy, scene.server) - before).failed == 500)
    assert (counted(scene.proxy, scene.server) - before).received == 0
    assert scene.proxy.accepted() == accepted + 1
    assert len(scene.proxy.workers()) == workers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("extra", "flags"), [((), set()), (("--reject",), {"RA"})], ids=["drop", "reject"])
def test_denied_source_gets_no_cookie(scene: Scene, family: int, extra: tuple[str, ...], flags: set[str]) -> None:
    scene.proxy.command("block", scene.source(family), *extra)
    before = counted(scene.proxy, scene.server)
    assert {segment.flags for segment in scene.attempt(family)} == flags
    difference = counted(scene.proxy, scene.server) - before
    assert difference.xdp_denied >= 1
    assert (difference.xdp, difference.cgroup, difference.sent) == (0, 0, 0)


def test_source_that_is_blocked_after_its_cookie_stays_out(scene: Scene) -> None:
    """The ACK is the first that the stack hears of it, and it is judged."""
    accepted = scene.proxy.accepted()
    assert connects(scene, socket.AF_INET)
    wait_for(lambda: scene.proxy.accepted() == accepted + 1)
    source = IPv4Address(scene.client.ipv4)
    with scene.client.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as tap:
        tap.bind(("eth0", 0))
        spoof(scene, [forged(scene, source, 40001)])
        while True:
            frame = tap.recv(2048)
            if frame[23] == 6 and frame[34:38] == struct.pack("!HH", PORT, 40001):
                break
    assert frame[47] == 0x12
    cookie = int.from_bytes(frame[38:42], "big")
    scene.proxy.command("block", scene.client.ipv4)
    before = counted(scene.proxy, scene.server)
    ack = forged(scene, source, 40001, flags=ACK, sequence=2, acknowledged=cookie + 1 & 0xFFFFFFFF)
    spoof(scene, [ack])
    scene.proxy.command("unblock", scene.client.ipv4)
    assert connects(scene, socket.AF_INET)  # after this, the ACK has been judged
    assert (counted(scene.proxy, scene.server) - before).received == 1, "the blocked ACK was taken"
    spoof(scene, [ack])
    wait_for(lambda: (counted(scene.proxy, scene.server) - before).received == 2, what="the same, from who may")


@pytest.mark.parametrize("family", FAMILIES)
def test_client_that_comes_back_from_the_same_port_at_once_gets_in(scene: Scene, family: int) -> None:
    """The server closes first, so its end waits in TIME-WAIT. A cookie's ACK would be taken for that connection's."""
    with scene.client.socket(family) as first:
        first.bind((scene.source(family), 0))
        port = first.getsockname()[1]
        first.connect((scene.address(family), PORT))
        first.sendall(b"\x05\x01\x02")  # password only: it is refused
        while first.recv(16):
            pass
    wait_for(lambda: in_state(scene.server, "time-wait", f"dport = :{port}") == 1)
    before = counted(scene.proxy, scene.server)
    with scene.client.socket(family) as second:
        second.bind((scene.source(family), port))
        second.connect((scene.address(family), PORT))
        second.sendall(b"\x05\x01\x00")
        assert second.recv(2) == b"\x05\x00"
    difference = counted(scene.proxy, scene.server) - before
    assert (difference.xdp, difference.cgroup) == (0, 1)


def test_syn_of_a_live_connection_gets_the_stack_s_answer_and_does_no_harm(scene: Scene) -> None:
    with scene.client.connect(scene.server.ipv4, PORT) as sock, scene.client.capture("eth0") as capture:
        before = counted(scene.proxy, scene.server)
        spoof(scene, [forged(scene, IPv4Address(scene.client.ipv4), sock.getsockname()[1])])
        back = [segment.flags for segment in capture.read() if segment.sport == PORT]
        assert back == ["A"], "RFC 5961: a challenge ACK"
        sock.sendall(b"\x05\x01\x00")
        assert sock.recv(2) == b"\x05\x00"
        assert (counted(scene.proxy, scene.server) - before).xdp == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_where_no_queue_is_full_nothing_changes(scene: Scene, family: int) -> None:
    sysctl(scene.server, 1)
    before = counted(scene.proxy, scene.server)
    with scene.client.connect(scene.address(family), PORT) as sock:
        options = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[5]
    assert options & 7 == 7, "the stack offers timestamps, SACK and window scaling"
    difference = counted(scene.proxy, scene.server) - before
    assert difference == Counted(xdp=0, xdp_denied=0, cgroup=1, sent=0, received=0, failed=0)


@pytest.mark.parametrize("setting", [1, 2], ids=["by the stack", "by XDP"])
def test_limit_is_charged_once_whoever_answers(lab: Lab, start_proxy: StartProxy, tmp_path: Path, setting: int) -> None:
    server, client = lab.host("proxy", takes_xdp=True), lab.host("client")
    sysctl(server, setting)
    config = tmp_path / "rama.toml"
    config.write_text(
        f'listeners.four = {{ address = "{server.ipv4}:{PORT}", stack = "main" }}\n'
        f'listeners.six = {{ address = "[{server.ipv6}]:{PORT}", stack = "main" }}\n'
        'stacks.main.service.socks5 = {}\n[policy]\nxdp = ["eth0"]\nsyn_cookies = true\n'
        'per_source = { rate = "4/h", burst = 3 }\noverall = { rate = "4/h", burst = 5 }\n'
    )
    scene = Scene(start_proxy(server, "--config", str(config)), server, client)
    assert [bool(scene.attempt(socket.AF_INET)) for _ in range(4)] == [True, True, True, False]
    assert [bool(scene.attempt(socket.AF_INET6)) for _ in range(3)] == [True, True, False]
    found = counted(scene.proxy, server)
    assert (found.xdp, found.cgroup) == ((0, 5) if setting == 1 else (5, 0))


@pytest.mark.parametrize("setting", [1, 2], ids=["a full queue", "always"])
def test_flood_that_is_let_in_fills_no_queue_and_a_client_gets_in(
    lab: Lab, start_proxy: StartProxy, setting: int
) -> None:
    server, client = lab.host("proxy", takes_xdp=True), lab.host("client")
    sysctl(server, setting)
    server.run("sh", "-c", "echo 64 > /proc/sys/net/core/somaxconn")
    server.ip("route", "add", str(FLOOD), "via", client.ipv4)
    proxy = start_proxy(server, *listen(server, "--xdp", "eth0", "--syn-cookies", "--workers", "1"))
    scene = Scene(proxy, server, client)
    assert connects(scene, socket.AF_INET)
    before = counted(proxy, server)
    pick = random.Random(5)
    packets = [forged(scene, FLOOD[pick.randrange(1, 65535)], pick.randrange(1024, 65535)) for _ in range(3000)]
    spoof(scene, packets)
    wait_for(lambda: (lambda found: found.xdp + found.cgroup >= len(packets))(counted(proxy, server) - before))
    difference = counted(proxy, server) - before
    assert difference.sent == 0, "the stack made cookies of its own"
    if setting == 2:
        assert (difference.xdp, in_state(server, "syn-recv")) == (len(packets), 0)
    else:  # XDP began when the queue was full
        assert difference.xdp >= len(packets) - 200
        assert 0 < in_state(server, "syn-recv") <= 66
    assert connects(scene, socket.AF_INET)
    assert (counted(proxy, server) - before).received == 1


def test_it_is_said_when_the_host_sends_no_cookies(scene: Scene) -> None:
    assert "SYN cookies by XDP: on" in scene.proxy.command("status").stdout
    sysctl(scene.server, 0)
    never = "no SYN cookies are sent: net.ipv4.tcp_syncookies is 0"
    wait_for(lambda: f"SYN cookies by XDP: {never}" in scene.proxy.command("status").stdout)
    assert scene.proxy.logged(never)
    assert f"SYN cookies: {never}" in scene.server.run(ProxyProcess.COMMAND, "doctor", check=False).stdout
    assert connects(scene, socket.AF_INET)


def test_cookies_are_no_option_without_xdp(lab: Lab, instance: str) -> None:
    server = lab.host("proxy")
    result = server.run(ProxyProcess.COMMAND, "run", "--instance", instance, "--syn-cookies", check=False)
    assert result.returncode == 2
    assert "--syn-cookies: XDP sends them, so name at least one interface with --xdp" in result.stderr
