"""The gate at the interface: what XDP drops on real wires, what it leaves alone, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest

from rama_ebpf.kernel import bpf
from rama_ebpf.kernel.bpf import AttachType
from rama_ebpf.kernel.bytecode import Program
from rama_ebpf.kernel.compile import Unit
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.kernel.programs import load_programs
from rama_ebpf.kernel.xdp import XdpError, attach
from rama_ebpf.loader import unload

from ..conftest import StartProxy
from ..lab import Host, Lab, wait_for
from ..policy.frames import (
    DST_OPTIONS,
    FRAGMENT,
    HOP_BY_HOP,
    QINQ,
    VLAN,
    checksum,
    ethernet,
    extension,
    ipv4,
    ipv6,
    tcp,
)
from ..proxy import ProxyProcess
from .test_gate import FAMILIES, PORT, Scene

XDP_FLAGS_SKB_MODE = 2

pytestmark = [pytest.mark.root, pytest.mark.ebpf]


def listen(server: Host, *extra: str) -> tuple[str, ...]:
    return ("--listen", f"{server.ipv4}:{PORT}", "--listen", f"[{server.ipv6}]:{PORT}", *extra)


@pytest.fixture(scope="module")
def shared() -> Iterator[Scene]:
    """A server with XDP on two interfaces. It is started once: the verifier takes its time."""
    instance = Instance(f"test-xdp-{os.getpid()}")
    with Lab() as lab:
        server, client = lab.host("proxy"), lab.host("client")
        server.ip("link", "add", "veth8", "type", "veth", "peer", "name", "veth9")
        server.ip("link", "set", "veth8", "up")
        proxy = ProxyProcess(server, instance.name, *listen(server, "--xdp", "eth0", "--xdp", "veth8"))
        try:
            yield Scene(proxy.start(), server, client)
            proxy.signal(signal.SIGTERM)
            assert proxy.wait() == 0
            assert "xdp" not in interface(server), "a clean stop left the program on the interface"
        finally:
            proxy.end()
            unload(instance)


@pytest.fixture
def scene(shared: Scene) -> Scene:
    shared.proxy.forget_rules()
    return shared


def dropped(proxy: ProxyProcess, hook: str = "xdp") -> int:
    """How many SYNs a hook has dropped."""
    rows = proxy.json("status")["verdicts"]
    return sum(row["count"] for row in rows if row["hook"] == hook and row["action"] == "drop")


@contextmanager
def drops(proxy: ProxyProcess, *, xdp: int = 0, cgroup: int = 0) -> Iterator[None]:
    """Expect so many drops by each hook, no more and no less."""
    before = dropped(proxy), dropped(proxy, "cgroup")
    wanted = before[0] + xdp, before[1] + cgroup
    yield
    deadline = time.monotonic() + 10
    while (found := (dropped(proxy), dropped(proxy, "cgroup"))) != wanted:
        assert time.monotonic() < deadline, f"drops by (xdp, cgroup) went from {before} to {found}, not to {wanted}"


def mode(proxy: ProxyProcess) -> dict[str, str]:
    return {row["interface"]: row["mode"] for row in proxy.json("status")["xdp"]}


def interface(host: Host, name: str = "eth0") -> dict[str, Any]:
    row: dict[str, Any] = json.loads(host.run("ip", "-json", "-details", "link", "show", "dev", name).stdout)[0]
    return row


@pytest.mark.parametrize("family", FAMILIES)
def test_denied_syn_is_dropped_at_the_interface_until_it_is_allowed_again(scene: Scene, family: int) -> None:
    assert mode(scene.proxy)["eth0"] == "native"
    assert scene.greet(family) == b"\x05\x00"
    scene.proxy.command("block", scene.source(family))
    with drops(scene.proxy, xdp=1):
        assert scene.attempt(family) == []
    scene.proxy.command("unblock", scene.source(family))
    assert scene.greet(family) == b"\x05\x00"


def test_rejected_source_gets_its_rst_from_the_stack(scene: Scene) -> None:
    scene.proxy.command("block", scene.client.ipv4, "--reject")
    with drops(scene.proxy):
        assert {segment.flags for segment in scene.attempt()} == {"RA"}


def test_generic_mode_is_the_fall_back_and_is_reported(lab: Lab, start_proxy: StartProxy) -> None:
    """A bridge has no XDP of its own."""
    server, client = lab.host("proxy"), lab.host("client")
    server.ip("link", "add", "bridge", "type", "bridge")
    server.ip("link", "set", "eth0", "master", "bridge")
    server.ip("link", "set", "bridge", "up")
    server.ip("address", "flush", "dev", "eth0")
    server.add_address(f"{server.ipv4}/16", "bridge")
    proxy = start_proxy(server, "--listen", f"{server.ipv4}:{PORT}", "--xdp", "bridge")
    assert mode(proxy) == {"bridge": "generic"}
    assert proxy.logged("XDP on bridge is generic.*native was refused")
    assert "XDP on bridge: generic (native: " in proxy.command("status").stdout
    scene = Scene(proxy, server, client)
    assert scene.greet() == b"\x05\x00"
    proxy.command("block", client.ipv4)
    with drops(proxy, xdp=1):
        assert scene.attempt() == []


@pytest.fixture
def foreign() -> Iterator[int]:
    """Somebody else's XDP program."""
    program = Program("foreign", 6, AttachType.XDP)
    loaded = load_programs(Unit("int foreign(struct xdp_md *ctx) { return 2; }", (program,)), {})
    yield loaded["foreign"]
    os.close(loaded["foreign"])


def test_foreign_program_is_never_replaced_also_where_it_is_generic_and_ours_would_be_native(
    lab: Lab, instance: str, foreign: int
) -> None:
    server = lab.host("proxy")
    index = server.call(lambda: socket.if_nametoindex("eth0"))
    link = server.call(lambda: bpf.link_create(foreign, index, AttachType.XDP, XDP_FLAGS_SKB_MODE))
    try:
        before = interface(server)["xdp"]
        result = server.run(
            ProxyProcess.COMMAND, "run", "--instance", instance, *listen(server, "--xdp", "eth0"), check=False
        )
        assert result.returncode == 3
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("rama-ebpf run: eth0 has an XDP program already, which stays")
        assert interface(server)["xdp"] == before
        assert before["prog"]["id"] == bpf.prog_info(foreign).id
    finally:
        os.close(link)


def test_interface_that_is_not_there_is_named(foreign: int) -> None:
    with pytest.raises(XdpError, match="there is no interface 'eth9'"):
        attach(foreign, "eth9")


# -- frames of all kinds, on the wire ---------------------------------------------------------------------------------


def send(scene: Scene, packet: bytes, *, tags: tuple[int, ...] = (), to: bytes | None = None) -> None:
    """Put one frame on the wire from the client, to the server's hardware address or another."""
    frame = bytearray(ethernet(packet, tags=tags))
    frame[:6] = to or bytes.fromhex(interface(scene.server)["address"].replace(":", ""))
    frame[6:12] = bytes.fromhex(interface(scene.client)["address"].replace(":", ""))
    with scene.client.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("eth0", 0))
        sock.send(frame)


def pair(scene: Scene) -> tuple[IPv4Address, IPv4Address, IPv6Address, IPv6Address]:
    client, server = scene.client, scene.server
    return IPv4Address(client.ipv4), IPv4Address(server.ipv4), IPv6Address(client.ipv6), IPv6Address(server.ipv6)


def test_tags_options_and_extension_headers_hide_nothing_and_fragments_go_to_the_stack(scene: Scene) -> None:
    a4, b4, a6, b6 = pair(scene)
    for source in (a4, a6):
        scene.proxy.command("block", str(source))
    syn = tcp(PORT)
    chain = extension(HOP_BY_HOP, DST_OPTIONS) + extension(DST_OPTIONS, 6, units=2) + syn
    with drops(scene.proxy, xdp=6):
        send(scene, ipv4(a4, b4, syn))
        send(scene, ipv4(a4, b4, syn), tags=(VLAN,))
        send(scene, ipv4(a4, b4, syn), tags=(QINQ, VLAN))
        send(scene, ipv4(a4, b4, syn, options=bytes((1,) * 40)))
        send(scene, ipv6(a6, b6, chain, next_header=HOP_BY_HOP))
        send(scene, ipv6(a6, b6, chain, next_header=HOP_BY_HOP), tags=(QINQ, VLAN))
    with drops(scene.proxy, xdp=1):
        # Three tags are one too many; a fourth, because the outermost may come beside the frame and not in it.
        send(scene, ipv4(a4, b4, syn), tags=(QINQ, VLAN, VLAN, VLAN))
        send(scene, ipv4(a4, b4, syn, fragment=0x2000))
        send(scene, ipv6(a6, b6, extension(FRAGMENT, 6, fragment=1) + syn, next_header=FRAGMENT))
        send(scene, ipv4(a4, b4, tcp(PORT + 1)))
        send(scene, ipv4(a4, b4, tcp(PORT, flags=0x10)))
        send(scene, ipv4(a4, b4, syn))  # the one that is dropped, and the last: those before it have been judged


def test_syn_in_fragments_is_dropped_once_it_is_whole(scene: Scene) -> None:
    a4, b4, _, _ = pair(scene)
    scene.proxy.command("block", str(a4))
    segment = bytearray(tcp(PORT) + b"data in the SYN.")
    pseudo = a4.packed + b4.packed + bytes((0, 6)) + len(segment).to_bytes(2, "big")
    segment[16:18] = checksum(pseudo + bytes(segment))
    with drops(scene.proxy, cgroup=1):
        for at, more in ((0, 0x2000), (8, 0x2000), (16, 0)):
            part = bytes(segment[at : at + 8] if more else segment[at:])
            send(scene, ipv4(a4, b4, part, fragment=more | at // 8))


def test_removed_interface_is_reported_as_detached(scene: Scene) -> None:
    assert mode(scene.proxy) == {"eth0": "native", "veth8": "native"}
    scene.server.ip("link", "delete", "veth8")
    wait_for(lambda: mode(scene.proxy) == {"eth0": "native", "veth8": "detached"}, what="the detached link")


# -- listeners on any address -----------------------------------------------------------------------------------------


def test_listener_on_any_address_is_guarded_at_every_local_one_and_forwarded_traffic_is_not_judged(
    lab: Lab, start_proxy: StartProxy
) -> None:
    router, client, inner = lab.host("router"), lab.host("client"), lab.host("inner")
    router.ip("link", "add", "in0", "type", "veth", "peer", "name", "in1", "netns", inner.netns)
    for host, name, number in ((router, "in0", 1), (inner, "in1", 2)):
        host.ip("link", "set", name, "up")
        host.add_address(f"198.19.1.{number}/24", name)
        host.add_address(f"2001:db8:1::{number}/64", name)
    router.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding")
    client.ip("route", "add", "198.19.1.0/24", "via", router.ipv4)
    client.ip("route", "add", "2001:db8:1::/64", "via", router.ipv6)
    inner.ip("link", "delete", "eth0")
    inner.ip("route", "add", "default", "via", "198.19.1.1")
    inner.ip("-6", "route", "add", "default", "via", "2001:db8:1::1")
    router.add_address("198.18.200.1/16", "eth0")
    proxy = start_proxy(router, "--listen", f"0.0.0.0:{PORT}", "--listen", f"[::]:{PORT}", "--xdp", "eth0")
    scene = Scene(proxy, router, client)
    proxy.command("block", "0.0.0.0/0")
    proxy.command("block", "::/0")

    for family, target in ((socket.AF_INET, "198.19.1.2"), (socket.AF_INET6, "2001:db8:1::2")):
        with inner.socket(family) as server:
            server.bind((target, PORT))
            server.listen()
            with drops(proxy):
                client.connect(target, PORT).close()
    a4, b4, a6, b6 = pair(scene)
    with drops(proxy, xdp=4):
        send(scene, ipv4(a4, b4, tcp(PORT)))
        send(scene, ipv4(a4, IPv4Address("198.18.200.1"), tcp(PORT)))
        send(scene, ipv6(a6, b6, tcp(PORT)))
        # A frame to another hardware address is for somebody who is reached through this interface.
        send(scene, ipv4(a4, b4, tcp(PORT)), to=bytes.fromhex("020000000001"))
        send(scene, ipv4(a4, b4, tcp(PORT)))

    assert interface(router)["xdp"]["mode"] == 1  # native
    cgroup = Path(proxy.json("status")["cgroup"])
    proxy.signal(signal.SIGKILL)
    proxy.wait()
    proxy.command("unload")  # at once: its workers may still be dying
    assert not cgroup.exists()
    wait_for(lambda: "xdp" not in interface(router), what="the end of the program")
