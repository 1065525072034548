"""UDP through the command as it is served without a configuration, behind the gate."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from tests.conftest import StartProxy
from tests.lab import Host, Lab
from tests.socks5.peers import address

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

PORT = 1080
ECHO_PORT = 5353


@pytest.fixture
def target(lab: Lab) -> Iterator[Host]:
    """A host that answers datagrams in capital letters."""
    host = lab.host("target")
    sock = host.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.bind(("::", ECHO_PORT))
    sock.settimeout(None)

    def echo() -> None:
        while (received := sock.recvfrom(65535))[0] != b"stop":
            sock.sendto(received[0].upper(), received[1])

    thread = threading.Thread(target=echo)
    thread.start()
    yield host
    stopper = host.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    stopper.sendto(b"stop", ("::1", ECHO_PORT))
    thread.join()
    stopper.close()
    sock.close()


def ask(client: Host, proxy: str, target: str, payload: bytes = b"hello", timeout: float = 20) -> bytes:
    """Send ``payload`` to ``target`` through an association, and return what comes back."""
    with client.connect(proxy, PORT) as control, client.socket(control.family, socket.SOCK_DGRAM) as udp:
        control.sendall(b"\x05\x01\x00\x05\x03\x00\x01" + bytes(6))
        with control.makefile("rb") as answers:
            answer = answers.read(6)
            assert answer[:5] == b"\x05\x00\x05\x00\x00"
            bound = ip_address(answers.read(4 if answer[5] == 1 else 16))
            port = int.from_bytes(answers.read(2), "big")
        assert str(bound) == proxy
        header = b"\0\0\0" + address(target, ECHO_PORT)
        udp.sendto(header + payload, (str(bound), port))
        udp.settimeout(timeout)
        data = udp.recv(65535)
        assert data.startswith(header)
        return data[len(header) :]


def test_datagrams_go_through_the_command_and_policy_judges_their_targets(
    lab: Lab, target: Host, start_proxy: StartProxy
) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    start_proxy(
        server,
        *("--listen", f"{server.ipv4}:{PORT}", "--listen", f"[{server.ipv6}]:{PORT}"),
        *("--allow-egress", "198.18.0.0/15", "--allow-egress", "2001:db8::/32"),
    )
    for proxy in (server.ipv4, server.ipv6):
        for address_of_target in (target.ipv4, target.ipv6):
            assert ask(client, proxy, address_of_target) == b"HELLO"
        with server.socket(socket.AF_INET, socket.SOCK_DGRAM) as inside:
            inside.bind(("127.0.0.1", ECHO_PORT))
            inside.setblocking(False)
            with pytest.raises(TimeoutError):
                ask(client, proxy, "127.0.0.1", timeout=2)
            with pytest.raises(BlockingIOError):
                inside.recv(1)


def test_clients_on_networks_that_policy_denies_and_on_this_host_get_their_answers(
    lab: Lab, target: Host, start_proxy: StartProxy
) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    for host, number in ((server, 1), (target, 2)):
        host.add_address(f"198.19.0.{number}/16", "eth0")
        host.add_address(f"2001:db8:1::{number}/64", "eth0")
    loopback = ("127.0.0.1", "::1")
    start_proxy(
        server,
        *("--listen", f"{server.ipv4}:{PORT}", "--listen", f"[{server.ipv6}]:{PORT}"),
        *("--listen", f"127.0.0.1:{PORT}", "--listen", f"[::1]:{PORT}"),
        *("--allow-egress", "198.19.0.0/16", "--allow-egress", "2001:db8:1::/48"),
    )
    with pytest.raises(TimeoutError):
        ask(client, server.ipv4, target.ipv4, timeout=2)  # the clients' own network
    for host, proxies in ((client, (server.ipv4, server.ipv6)), (server, loopback)):
        for proxy in proxies:
            for address_of_target in ("198.19.0.2", "2001:db8:1::2"):
                assert ask(host, proxy, address_of_target) == b"HELLO"
                # More than a frame holds: each half of the way is made of fragments.
                assert ask(host, proxy, address_of_target, b"a" * 9000) == b"A" * 9000
