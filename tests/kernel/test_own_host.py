"""The host itself is no target, and the proxy cannot be sent to itself: said by services and by the kernel."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import pytest

from rama_ebpf.kernel.own_addresses import local_networks

from ..conftest import StartProxy
from ..lab import Host, Lab, wait_for
from ..proxy import ProxyProcess
from .test_egress import PORT, Worker, attempts
from .test_egress import take_over as take_over  # a fixture

NOT_ALLOWED = 2  # RFC 1928 section 6: connection not allowed by ruleset
REFUSED = 5


def reply(client: Host, server: str, address: str, port: int, proxy_port: int = PORT) -> int:
    """Ask a SOCKS5 proxy for a connection; return the reply."""
    with client.connect(server, proxy_port) as sock:
        try:
            ip = ip_address(address)
            where = (b"\1" if ip.version == 4 else b"\4") + ip.packed
        except ValueError:
            where = b"\3" + bytes((len(address),)) + address.encode()
        sock.sendall(b"\5\1\0\5\1\0" + where + port.to_bytes(2, "big"))
        answer = b""
        while len(answer) < 4:
            received = sock.recv(64)
            assert received, "it hung up"
            answer += received
        return answer[3]


@pytest.mark.root
@pytest.mark.ebpf
def test_the_hosts_own_addresses_are_no_targets_as_they_come_and_go(
    lab: Lab, take_over: Callable[..., ProxyProcess]
) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    take_over(server, "--workers", "1", "--allow-egress", "198.18.0.0/15", "--allow-egress", "2001:db8::/32")
    later, later_v6, range_ = "198.19.7.7", "2001:db8:77::7", "198.19.200.9"

    with Worker(client, server) as worker:

        def refused(address: str, port: int = 80) -> bool:
            ways = attempts(address, port=port)
            ways += attempts(address, port=port, how="connect", kind=socket.SOCK_DGRAM)
            ways += attempts(address, port=port, how="sendto", kind=socket.SOCK_DGRAM)
            told = {error == errno.EPERM for error in worker.do(*ways)}
            assert len(told) == 1
            return told == {True}

        v4 = int.from_bytes(socket.inet_aton(server.ipv4), "big")
        for own in (server.ipv4, server.ipv6, f"::ffff:{server.ipv4}", f"64:ff9b::{server.ipv4}"):
            assert refused(own), own
        assert refused(f"2002:{v4 >> 16:x}:{v4 & 0xFFFF:x}::1")
        assert not refused(client.ipv4)
        assert not refused(later)
        server.add_address(f"{later}/32", "eth0")
        server.add_address(f"{later_v6}/128", "eth0")
        wait_for(lambda: refused(later) and refused(later_v6), what="the new addresses")
        server.ip("address", "del", f"{later}/32", "dev", "eth0")
        wait_for(lambda: not refused(later), what="the end of the old address")
        # What is delivered here by a route alone ("AnyIP") is this host as well.
        server.ip("route", "add", "local", "198.19.200.0/24", "dev", "lo")
        wait_for(lambda: refused(range_), timeout=30, what="the range of addresses")


@pytest.mark.root
@pytest.mark.ebpf
def test_an_own_address_can_be_allowed_and_the_proxys_listener_on_it_cannot(
    lab: Lab, take_over: Callable[..., ProxyProcess]
) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    take_over(server, "--workers", "1", *("--allow-egress", server.ipv4), *("--allow-egress", "127.0.0.0/8"))
    with Worker(client, server) as worker:
        for target in (server.ipv4, f"::ffff:{server.ipv4}", f"::ffff:0:{server.ipv4}"):
            allowed, looped = worker.do(*attempts(target), *attempts(target, port=PORT))
            assert allowed != errno.EPERM, target
            assert looped == errno.EPERM, target
        (elsewhere,) = worker.do(*attempts("127.0.0.1", port=PORT))
        assert elsewhere != errno.EPERM, "nothing of ours listens there"


@pytest.mark.root
@pytest.mark.ebpf
def test_a_proxy_on_all_addresses_cannot_be_sent_to_itself_by_any_of_them(
    lab: Lab, start_proxy: StartProxy, tmp_path: Path
) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    config = tmp_path / "rama.toml"
    config.write_text(
        f'listeners.a = {{ address = "0.0.0.0:{PORT}", stack = "s" }}\n'
        f'listeners.b = {{ address = "[::]:{PORT + 1}", stack = "s" }}\nstacks.s.service = "mixed"\n'
        'egress.allow = ["127.0.0.0/8", "198.18.0.0/15", "2001:db8::/32", "0.0.0.0/8", "::/128", "::1/128"]\n'
        "egress.own_addresses = true\nserver.workers = 1\n"
    )
    start_proxy(server, "--config", str(config))
    with server.socket() as other:
        other.bind((server.ipv4, 80))
        other.listen()
        assert reply(client, server.ipv4, server.ipv4, 80) == 0, "own_addresses says so"
    loops = [(target, PORT) for target in (server.ipv4, "127.0.0.1", "127.1.2.3", "0.0.0.0", f"::ffff:{server.ipv4}")]
    loops += [(target, PORT + 1) for target in (server.ipv6, "::1", "::")]
    loops += [("localhost", PORT)]
    for target, port in loops:
        assert reply(client, server.ipv4, target, port) == NOT_ALLOWED, target
    assert reply(client, server.ipv4, client.ipv4, PORT) == REFUSED, (
        "another host's port of that number is none of ours"
    )


@pytest.mark.root
@pytest.mark.ebpf
def test_services_refuse_the_hosts_address_by_its_name_and_say_so(lab: Lab, start_proxy: StartProxy) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    proxy = start_proxy(
        server, "--listen", f"{server.ipv4}:{PORT}", "--workers", "1", "--allow-egress", "198.18.0.0/15"
    )
    assert reply(client, server.ipv4, server.ipv4, 22) == NOT_ALLOWED
    wait_for(lambda: proxy.logged(f"{server.ipv4} .*this-host|this-host"), what="the access line")


@pytest.mark.root
def test_all_that_this_namespace_delivers_to_itself_is_found(lab: Lab) -> None:
    host = lab.host("one")
    host.add_address("198.18.99.1/24", "lo")
    host.ip("address", "add", "198.18.98.1", "peer", "198.18.98.2", "dev", "eth0")
    found = set(map(str, host.call(local_networks)))
    for own in ("127.0.0.0/8", "::1/128", "198.18.99.1/32", "198.18.98.1/32", f"{host.ipv4}/32", f"{host.ipv6}/128"):
        assert own in found, own
    assert "198.18.98.2/32" not in found
