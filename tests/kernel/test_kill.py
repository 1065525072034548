"""Live connections of a blocked source: ended on request, or because the policy says so, and nobody else's."""

from __future__ import annotations

import resource
import socket
from pathlib import Path

import pytest

from ..conftest import StartProxy
from ..lab import Host, Lab, wait_for
from .test_gate import PORT

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

OTHER = "198.18.77.7"


def greet(sock: socket.socket) -> bytes:
    sock.sendall(b"\x05\x01\x00")
    return sock.recv(2)


def is_reset(sock: socket.socket) -> bool:
    sock.settimeout(20)
    try:
        sock.recv(1)
    except ConnectionResetError:
        return True
    return False


def is_alive(sock: socket.socket) -> bool:
    sock.settimeout(0.3)
    try:
        return sock.recv(1) != b""
    except TimeoutError:
        return True


def connected(client: Host, server: Host, source: str | None = None) -> socket.socket:
    address = server.ipv6 if source == client.ipv6 else server.ipv4
    sock = client.connect(address, PORT, source=source)
    assert greet(sock) == b"\x05\x00"
    return sock


def test_block_with_kill_ends_the_source_s_connections_and_no_others(lab: Lab, start_proxy: StartProxy) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    client.add_address(f"{OTHER}/16", "eth0")
    server.add_address("198.18.200.1/16", "eth0")
    listen = ("--listen", f"{server.ipv4}:{PORT}", "--listen", f"[::]:{PORT}", "--handshake-timeout", "600")
    proxy = start_proxy(server, *listen)
    with server.socket() as neighbour:  # another service of the host, of the same port on another address
        neighbour.bind(("198.18.200.1", PORT))
        neighbour.listen()
        beside = client.connect("198.18.200.1", PORT)
        blocked = [connected(client, server) for _ in range(3)]
        unread = client.connect(server.ipv4, PORT)  # it has not said anything yet
        six, other = connected(client, server, client.ipv6), connected(client, server, OTHER)
        wait_for(lambda: proxy.accepted() == 6)

        result = proxy.json("block", client.ipv4, "--kill")
        assert result["killed"] == 4
        assert all(is_reset(sock) for sock in (*blocked, unread))
        assert all(is_alive(sock) for sock in (beside, six, other))
        assert proxy.command("block", client.ipv4, "--kill").stdout.endswith(", 0 live connections ended\n")
        assert proxy.json("block", client.ipv6, "--kill", "--dry-run")["killed"] == 0
        assert proxy.json("block", client.ipv6, "--kill", "--port", "9")["killed"] == 0
        assert is_alive(six)
        assert proxy.json("block", client.ipv6, "--kill", "--port", str(PORT))["killed"] == 1
        assert is_reset(six)
        assert is_alive(other)
        for sock in (beside, *blocked, unread, six, other):
            sock.close()


def test_server_out_of_descriptors_kills_as_soon_as_it_has_some(lab: Lab, start_proxy: StartProxy) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    proxy = start_proxy(server, "--listen", f"{server.ipv4}:{PORT}", "--handshake-timeout", "600", "--kill")
    with connected(client, server) as live:
        soft, hard = resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE, (3, hard))
        proxy.command("block", client.ipv4)
        wait_for(lambda: proxy.logged("live connections cannot be listed: Too many open files"), what="the refusal")
        assert is_alive(live)
        resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert is_reset(live)
    assert not proxy.logged("CLOSED")


def test_policy_that_kills_ends_what_it_has_come_to_deny_but_not_the_failsafe(
    lab: Lab, start_proxy: StartProxy
) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    client.add_address(f"{OTHER}/16", "eth0")
    listen = ("--listen", f"{server.ipv4}:{PORT}", "--handshake-timeout", "600")
    proxy = start_proxy(server, *listen, "--kill", "--failsafe", f"{OTHER}/32")
    denied, safe = connected(client, server), connected(client, server, OTHER)
    proxy.command("block", "198.19.0.0/16")
    assert is_alive(denied)
    proxy.command("block", "198.18.0.0/16")
    assert is_reset(denied)
    wait_for(lambda: proxy.logged("ended 1 live connections"), what="the log line")
    assert is_alive(safe)
    for sock in (denied, safe):
        sock.close()


def test_policy_that_kills_sees_what_ends_by_itself(lab: Lab, start_proxy: StartProxy, tmp_path: Path) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    listen = ("--listen", f"{server.ipv4}:{PORT}", "--handshake-timeout", "600")
    proxy = start_proxy(server, *listen, "--kill", "--default", "drop")
    proxy.command("allow", client.ipv4, "--ttl", "3s")
    until_the_allow_ends = connected(client, server)
    assert is_reset(until_the_allow_ends)
    assert proxy.json("list")["default"] == "drop"

    (tmp_path / "open.toml").write_text('default = "allow"\n')
    proxy.command("policy", "load", str(tmp_path / "open.toml"), "--confirm-timeout", "3s")
    until_the_trial_ends = connected(client, server)
    assert is_reset(until_the_trial_ends)

    (tmp_path / "office.toml").write_text(
        f'default = "drop"\n[[rules]]\nname = "a"\naction = "allow"\nsources = ["{client.ipv4}"]\nttl = "3s"\n'
    )
    proxy.command("policy", "load", str(tmp_path / "office.toml"))
    until_the_rule_ends = connected(client, server)
    assert is_reset(until_the_rule_ends)
    for sock in (until_the_allow_ends, until_the_trial_ends, until_the_rule_ends):
        sock.close()
