"""The backstop of the egress policy: what a worker dials without asking the connector, the kernel refuses."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path

import pytest

from rama_ebpf.core.address import IPAddress
from rama_ebpf.core.errors import PolicyDenied
from rama_ebpf.kernel import abi, bpf
from rama_ebpf.kernel.gate_maps import GateMaps
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.egress import DENIED_BY_DEFAULT, EgressPolicy
from rama_ebpf.policy.egress_map import decisions, nameservers

from ..conftest import StartProxy
from ..lab import Host, Lab, wait_for

PORT = 1080

# What a service does that bypasses the connector: whatever address it is told, it dials, and says how that went.
APPLICATION = """
import asyncio, errno, json, os, socket

def dial(family, kind, address, port):
    with socket.socket(family, kind | socket.SOCK_NONBLOCK) as sock:
        return sock.connect_ex((address, port))

async def service(stream):
    request = bytearray()
    while not request.endswith(b"\\n"):
        received = await stream.read()
        if not received:
            return
        request += received
    answer = {"pid": os.getpid(), "errors": [dial(*wanted) for wanted in json.loads(request)]}
    await stream.write(json.dumps(answer).encode())
    await stream.close()
"""

Wanted = tuple[int, int, str, int]


def ask(client: Host, server: Host, wanted: list[Wanted]) -> tuple[int, list[int]]:
    """Have a worker dial; return its process id and the error numbers."""
    with client.connect(server.ipv4, PORT, timeout=60) as sock, sock.makefile("rb") as lines:
        sock.sendall(json.dumps(wanted).encode() + b"\n")
        answer = json.loads(lines.read())
    return answer["pid"], answer["errors"]


def stream_to(*addresses: str, port: int = 80) -> list[Wanted]:
    families = (socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses)
    return [(family, socket.SOCK_STREAM, address, port) for family, address in zip(families, addresses, strict=True)]


def is_denied(policy: EgressPolicy, address: IPAddress) -> bool:
    try:
        policy.check(address)
    except PolicyDenied:
        return True
    return False


def addresses_around(policy: EgressPolicy, pick: random.Random, count: int) -> list[IPAddress]:
    """Addresses at and beside the edges of all networks, in the forms that embed IPv4, and anywhere."""
    networks = [*policy.allow, *policy.deny, *(network for network, _ in DENIED_BY_DEFAULT)]
    found: list[IPAddress] = []
    while len(found) < count:
        network = pick.choice(networks)
        first, last = int(network.network_address), int(network.broadcast_address)
        near = pick.choice((first - 1, first, pick.randint(first, last), last, last + 1))
        near = min(max(near, 0), (1 << network.max_prefixlen) - 1)
        if network.version == 6:
            found.append(pick.choice((IPv6Address(near), IPv6Address(pick.getrandbits(128)))))
            continue
        v4 = pick.choice((near, pick.getrandbits(32)))
        mapped, nat64, six_to_four = 0xFFFF << 32 | v4, 0x64FF9B << 96 | v4, 0x2002 << 112 | v4 << 80
        found += [IPv4Address(v4), *map(IPv6Address, (mapped, nat64, six_to_four))]
    return found


@pytest.mark.root
@pytest.mark.ebpf
def test_a_worker_cannot_dial_what_the_policy_denies_whatever_its_service_does(
    lab: Lab, start_proxy: StartProxy, tmp_path: Path
) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    (tmp_path / "bypass.py").write_text(APPLICATION)
    policy = EgressPolicy.of(
        allow=("198.18.0.0/16", "10.1.0.0/16", "fd00:1::/32", "2001:db8:5::/48", "127.0.0.9/32"),
        deny=("198.18.7.0/24", "10.1.1.0/24", "10.1.1.0/25", "203.0.0.0/8", "2600::/12", "10.1.0.0/30"),
    )
    options = [f"--allow-egress={network}" for network in policy.allow]
    options += [f"--deny-egress={network}" for network in policy.deny]
    proxy = start_proxy(
        server, "bypass:service", "--listen", f"{server.ipv4}:{PORT}", "--workers", "2", *options, cwd=tmp_path
    )
    assert proxy.json("status")["egress"] == "services and kernel"

    pick = random.Random(4)
    addresses = addresses_around(policy, pick, 3000)
    for at in range(0, len(addresses), 500):
        some = addresses[at : at + 500]
        _, errors = ask(client, server, stream_to(*map(str, some)))
        for address, error in zip(some, errors, strict=True):
            assert (error == errno.EPERM) == is_denied(policy, address), f"{address}: {os.strerror(error)}"

    # A datagram socket is not judged: DNS is asked, and clients are answered, wherever they are.
    pid, errors = ask(client, server, [(socket.AF_INET, socket.SOCK_DGRAM, "10.1.1.1", 53)])
    assert errors[0] != errno.EPERM

    # A worker's replacement stands under the policy as well.
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: pid not in proxy.workers() and len(proxy.workers()) >= 2, what="the replacement")
    for _ in range(8):
        assert ask(client, server, stream_to("127.0.0.1", "::ffff:127.0.0.1", "::1"))[1] == [errno.EPERM] * 3


@pytest.mark.root
@pytest.mark.ebpf
def test_a_reload_changes_what_the_kernel_refuses(lab: Lab, start_proxy: StartProxy, tmp_path: Path) -> None:
    server = lab.host("proxy")
    config = tmp_path / "rama.toml"

    def write(deny: str) -> None:
        config.write_text(
            f'listeners.main = {{ address = "{server.ipv4}:{PORT}", stack = "main" }}\n'
            "stacks.main.service.echo = {}\n"
            f'egress = {{ allow = ["198.18.0.0/16"], deny = [{deny}] }}\nserver.workers = 1\n'
        )

    write("")
    proxy = start_proxy(server, "--config", str(config))
    shown = proxy.json("status")["egress"]
    assert shown == "services and kernel"
    maps = GateMaps.open(Instance(proxy.instance).pin_dir)

    def denies(network: str) -> bool:
        key = ip_network(network)
        mapped = ip_address(f"::ffff:{key.network_address}").packed
        value = bpf.map_lookup(maps["egress"], abi.FAILSAFE_KEY.pack(32 + 96 + key.prefixlen, 1, mapped), 4)
        return value == b"\1\0\0\0"

    assert not denies("198.18.9.0/24")
    write('"198.18.9.0/24"')
    proxy.signal(signal.SIGHUP)
    wait_for(lambda: denies("198.18.9.0/24"), what="the new policy")
    write("")
    proxy.signal(signal.SIGHUP)
    wait_for(lambda: not denies("198.18.9.0/24"), what="the old policy")
    maps.close()


def test_the_longest_prefix_of_one_list_says_what_the_policy_says() -> None:
    pick = random.Random(7)
    pool = [network for network, _ in DENIED_BY_DEFAULT]
    for _ in range(200):
        networks = []
        for _ in range(6):
            base = pick.choice(pool)
            length = pick.randint(max(1, base.prefixlen - 2), min(base.max_prefixlen, base.prefixlen + 12))
            networks.append(ip_network((int(base.network_address), length), strict=False))
        policy = EgressPolicy(tuple(networks[:3]), tuple(networks[2:]))
        decided = decisions(policy)
        for address in addresses_around(policy, pick, 40):
            if address.version == 6 and (
                address.ipv4_mapped or address.sixtofour or int(address) >> 32 == 0x64FF9B << 64
            ):
                continue  # judged as two addresses
            longest = max(
                (network for network in decided if address in network), key=lambda n: n.prefixlen, default=None
            )
            assert (longest is not None and decided[longest]) == is_denied(policy, address), f"{policy} {address}"


def test_nameservers_are_read_as_the_resolver_reads_them() -> None:
    text = "# comment\nnameserver 10.0.0.2\nsearch x\nnameserver fe80::1%eth0\nnameserver nonsense\n nameserver ::1\n"
    assert nameservers(text) == [ip_address("10.0.0.2"), ip_address("fe80::1"), ip_address("::1")]
