"""The backstop of the egress policy: what a worker dials without asking the connector, the kernel refuses."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from rama_ebpf.core.address import IPAddress
from rama_ebpf.core.errors import PolicyDenied
from rama_ebpf.kernel import abi, bpf
from rama_ebpf.kernel.gate_maps import GateMaps
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.egress import DENIED_BY_DEFAULT, EgressPolicy, embedded
from rama_ebpf.policy.egress_map import decisions, nameservers

from ..conftest import StartProxy
from ..lab import Host, Lab, wait_for
from ..proxy import ProxyProcess

PORT = 1080

# What a service does that bypasses connector and associator: it does what it is told, one JSON list a line, and says
# how that went. A socket that it opened stays for the lines that follow.
APPLICATION = """
import asyncio, ctypes, json, os, socket

libc = ctypes.CDLL(None, use_errno=True)
sockets = {}

def way(how, sock, target):
    if how == "connect":
        sock.connect(target)
    elif how == "connect and send":
        sock.connect(target)
        sock.send(b"datagram")
    elif how == "sendto":
        sock.sendto(b"datagram", target)
    elif how == "sendmsg":
        sock.sendmsg([b"datagram"], [], 0, target)
    elif how == "fast open":
        sock.sendto(b"stream", socket.MSG_FASTOPEN, target)
    elif how == "as of any family":  # for a sendto() on IPv4, AF_UNSPEC is AF_INET
        name = bytes(2) + target[1].to_bytes(2, "big") + socket.inet_aton(target[0]) + bytes(8)
        if libc.sendto(sock.fileno(), b"datagram", 8, 0, name, len(name)) < 0:
            raise OSError(ctypes.get_errno(), "sendto")
    elif how == "again":  # a socket that was connected, or listens, is made a new one
        if libc.connect(sock.fileno(), bytes(16), 16) < 0:
            raise AssertionError("cannot disconnect")
        sock.connect(target)

def go(how, sock, target):
    try:
        way(how, sock, tuple(target))
    except OSError as error:
        return error.errno
    return 0

def do(stream, what, *rest):
    if what == "pid":
        return os.getpid()
    if what == "try":
        how, family, kind, protocol, target = rest
        with socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol) as sock:
            return go(how, sock, target)
    if what == "open":
        family, host, options = rest
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.settimeout(20)
        for option in options:
            sock.setsockopt(*option)
        sock.bind((host, 0))
        sockets[sock.fileno()] = sock
        return sock.fileno(), sock.getsockname()[1]
    if what == "receive":
        data, source = sockets[rest[0]].recvfrom(65535)
        return data.decode(), source[:2]
    if what == "with":
        how, number, target = rest
        return go(how, sockets[number], target)
    if what == "accepted":
        with socket.socket(fileno=os.dup(stream.socket.fileno())) as sock:
            return go("again", sock, rest[0])
    if what == "listener":
        found = []
        for number in os.listdir("/proc/self/fd"):
            try:
                sock = socket.socket(fileno=os.dup(int(number)))
            except OSError:
                continue
            with sock:
                listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if listens and sock.family == socket.AF_INET:
                    found.append(go("again", sock, rest[0]))
        return found

async def service(stream):
    buffer = bytearray()
    while True:
        while b"\\n" not in buffer:
            received = await stream.read()
            if not received:
                for sock in sockets.values():
                    sock.close()
                sockets.clear()
                return
            buffer += received
        line, _, rest = buffer.partition(b"\\n")
        buffer[:] = rest
        answers = []
        for wanted in json.loads(line):
            try:
                answers.append(do(stream, *wanted))
            except OSError as error:
                answers.append(error.errno)
        await stream.write(json.dumps(answers).encode() + b"\\n")
"""

Wanted = tuple[object, ...]


class Worker:
    """A worker that was taken over: it does what it is told. Sockets that it opens live as long as this connection."""

    def __init__(self, client: Host, server: Host) -> None:
        self._sock = client.connect(server.ipv4, PORT, timeout=60)
        self._lines = self._sock.makefile("rb")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._lines.close()
        self._sock.close()

    def do(self, *wanted: Wanted) -> list[Any]:
        """Do several things and return what came of each; a number is an errno, 0 for success."""
        self._sock.sendall(json.dumps(wanted).encode() + b"\n")
        return list(json.loads(self._lines.readline()))

    def open(self, family: int, host: str, *options: Wanted) -> tuple[int, int]:
        """Bind a datagram socket; return its number, to name it by, and its port."""
        (answer,) = self.do(("open", family, host, options))
        return answer[0], answer[1]

    def receive(self, number: int) -> tuple[str, tuple[str, int]]:
        """Wait for a datagram; return it and where it came from."""
        (answer,) = self.do(("receive", number))
        return answer[0], (answer[1][0], answer[1][1])

    def send(self, number: int, address: str, port: int, how: str = "sendto") -> int:
        """Send from a socket that is open; return the errno."""
        return int(self.do(("with", how, number, (address, port)))[0])


def attempts(
    *addresses: str, how: str = "connect", kind: int = socket.SOCK_STREAM, protocol: int = 0, port: int = 80
) -> list[Wanted]:
    families = (socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses)
    return [
        ("try", how, family, kind, protocol, (address, port))
        for family, address in zip(families, addresses, strict=True)
    ]


@pytest.fixture
def take_over(lab: Lab, start_proxy: StartProxy, tmp_path: Path) -> Callable[..., ProxyProcess]:
    """Start a proxy whose workers do as they are told."""

    def start(server: Host, *args: str) -> ProxyProcess:
        (tmp_path / "bypass.py").write_text(APPLICATION)
        proxy = start_proxy(server, "bypass:service", "--listen", f"{server.ipv4}:{PORT}", *args, cwd=tmp_path)
        assert proxy.json("status")["egress"] == "services and kernel"
        return proxy

    return start


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
        forms = (
            0xFFFF << 32 | v4,
            0xFFFF << 48 | v4,  # SIIT
            v4,
            0x64FF9B << 96 | v4,
            0x64FF9B0001 << 80 | v4,
            0x2002 << 112 | v4 << 80,
            0x20010000 << 96 | v4 ^ 0xFFFFFFFF,  # Teredo
            0x2A001450 << 96 | 0x5EFE << 32 | v4,  # ISATAP
            0x2A001450 << 96 | 0x02005EFE << 32 | v4,
        )
        found += [IPv4Address(v4), *map(IPv6Address, pick.sample(forms, 4))]
    return found


@pytest.mark.root
@pytest.mark.ebpf
def test_a_worker_cannot_dial_what_the_policy_denies_whatever_its_service_does(
    lab: Lab, take_over: Callable[..., ProxyProcess]
) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    policy = EgressPolicy.of(
        allow=(
            *("198.18.0.0/16", "10.1.0.0/16", "fd00:1::/32", "2001:db8:5::/48", "127.0.0.9/32"),
            *("2001::/32", "64:ff9b:1::/48", "::/96"),  # what they embed is still judged
        ),
        deny=("198.18.7.0/24", "10.1.1.0/24", "10.1.1.0/25", "203.0.0.0/8", "2600::/12", "10.1.0.0/30"),
    )
    options = [f"--allow-egress={network}" for network in policy.allow]
    options += [f"--deny-egress={network}" for network in policy.deny]
    proxy = take_over(server, "--workers", "2", *options)

    pick = random.Random(4)
    addresses = addresses_around(policy, pick, 3000)
    ways = (("connect", socket.SOCK_STREAM), ("connect", socket.SOCK_DGRAM), ("sendto", socket.SOCK_DGRAM))
    with Worker(client, server) as worker:
        for at in range(0, len(addresses), 500):
            some = addresses[at : at + 500]
            for how, kind in ways:
                errors = worker.do(*attempts(*map(str, some), how=how, kind=kind))
                for address, error in zip(some, errors, strict=True):
                    refused = error == errno.EPERM
                    assert refused == is_denied(policy, address), f"{how} {kind} {address}: {os.strerror(error)}"
        (pid,) = worker.do(("pid",))

    # A worker's replacement stands under the policy as well.
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: pid not in proxy.workers() and len(proxy.workers()) >= 2, what="the replacement")
    for _ in range(8):
        with Worker(client, server) as worker:
            assert worker.do(*attempts("127.0.0.1", "::ffff:127.0.0.1", "::1")) == [errno.EPERM] * 3


DENIED = ("127.0.0.1", "10.0.0.1", "::1", "fd00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::1", "fe80::1%lo")


@pytest.mark.root
@pytest.mark.ebpf
def test_a_worker_cannot_send_a_datagram_where_the_policy_lets_it_dial_nothing(
    lab: Lab, take_over: Callable[..., ProxyProcess]
) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    take_over(server, "--workers", "1", "--allow-egress", server.ipv4)
    with server.socket(socket.AF_INET6, socket.SOCK_DGRAM) as inside, Worker(client, server) as worker:
        inside.bind(("::", 80))
        inside.setblocking(False)
        for how in ("sendto", "sendmsg", "connect", "connect and send"):
            denied = attempts(*DENIED, "224.0.0.1", "ff02::1%lo", "255.255.255.255", how=how, kind=socket.SOCK_DGRAM)
            assert worker.do(*denied) == [errno.EPERM] * len(denied), how
        with pytest.raises(BlockingIOError):
            inside.recv(1)
        assert worker.do(*attempts(server.ipv4, how="sendto", kind=socket.SOCK_DGRAM)) == [0]
        assert inside.recv(16) == b"datagram"


@pytest.mark.root
@pytest.mark.ebpf
def test_no_form_of_a_call_and_no_socket_that_is_there_already_leads_past_the_policy(
    lab: Lab, take_over: Callable[..., ProxyProcess]
) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    take_over(server, "--workers", "1")
    target = ("127.0.0.1", 80)
    with Worker(client, server) as worker:
        forms = [
            *attempts("127.0.0.1", how="fast open"),
            *attempts("127.0.0.1", "::1", protocol=262),  # MPTCP
            *attempts("127.0.0.1", how="as of any family", kind=socket.SOCK_DGRAM),
        ]
        assert worker.do(*forms) == [errno.EPERM] * len(forms)
        # Protocols that no hook judges: ICMP, which the host may let anybody send, UDP-Lite, and SCTP.
        server.run("sysctl", "-w", "net.ipv4.ping_group_range=0 2147483647")
        others = [
            *attempts("127.0.0.1", how="sendto", kind=socket.SOCK_DGRAM, protocol=socket.IPPROTO_ICMP),
            *attempts("::1", how="sendto", kind=socket.SOCK_DGRAM, protocol=socket.IPPROTO_ICMPV6),
            *(
                attempt
                for how in ("connect", "sendto")
                for attempt in attempts("8.8.8.8", "2600::1", how=how, kind=socket.SOCK_DGRAM, protocol=136)
            ),  # UDP-Lite: also to where anybody may connect
        ]
        assert worker.do(*others) == [errno.EPERM] * len(others)
        (sctp,) = worker.do(*attempts("127.0.0.1", protocol=socket.IPPROTO_SCTP))
        assert sctp in {errno.EPERM, errno.EPROTONOSUPPORT}
    # What the server made, it made in a cgroup of its own: listeners, and with them all that they accept.
    with server.socket() as inside:
        inside.bind(target)
        inside.listen()
        inside.setblocking(False)
        with client.connect(server.ipv4, PORT) as sock:
            sock.sendall(json.dumps([("accepted", target)]).encode() + b"\n")
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        with pytest.raises(BlockingIOError):
            inside.accept()
    with Worker(client, server) as worker:
        assert worker.do(("listener", target)) == [[errno.EPERM]]


@pytest.mark.root
@pytest.mark.ebpf
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_worker_answers_who_has_sent_to_it_from_that_socket_and_nobody_else(
    lab: Lab, take_over: Callable[..., ProxyProcess], family: int
) -> None:
    """The client's half of UDP ASSOCIATE, where clients are on a private network, or on this host."""
    server, client = lab.host("proxy"), lab.host("client")
    take_over(server, "--workers", "1")
    loopback, any_address = ("127.0.0.1", "0.0.0.0") if family == socket.AF_INET else ("::1", "::")
    here, there = (server.ipv4, client.ipv4) if family == socket.AF_INET else (server.ipv6, client.ipv6)
    for host, address, ours in ((server, loopback, loopback), (client, there, here)):
        with (
            Worker(client, server) as worker,
            host.socket(family, socket.SOCK_DGRAM) as speaker,
            host.socket(family, socket.SOCK_DGRAM) as silent,
        ):
            speaker.bind((address, 0))
            silent.bind((address, 0))
            port, other_port = speaker.getsockname()[1], silent.getsockname()[1]
            spoken_to, number = worker.open(family, any_address)
            not_spoken_to, _ = worker.open(family, any_address)
            assert worker.send(spoken_to, address, port) == errno.EPERM
            speaker.sendto(b"hello", (ours, number))
            assert worker.receive(spoken_to) == ("hello", (address, port))
            assert worker.send(not_spoken_to, address, port) == errno.EPERM
            assert worker.send(spoken_to, address, other_port) == errno.EPERM
            assert worker.send(spoken_to, DENIED[1] if family == socket.AF_INET else DENIED[3], port) == errno.EPERM
            for how in ("sendto", "sendmsg", "connect and send"):
                assert worker.send(spoken_to, address, port, how) == 0
                assert speaker.recv(16) == b"datagram"
            silent.setblocking(False)
            with pytest.raises(BlockingIOError):
                silent.recv(1)


@pytest.mark.root
@pytest.mark.ebpf
def test_a_socket_of_both_families_answers_an_ipv4_client(lab: Lab, take_over: Callable[..., ProxyProcess]) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    take_over(server, "--workers", "1")
    with Worker(client, server) as worker, client.socket(socket.AF_INET, socket.SOCK_DGRAM) as speaker:
        sock, number = worker.open(socket.AF_INET6, "::", (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0))
        speaker.bind((client.ipv4, 0))
        port = speaker.getsockname()[1]
        mapped = f"::ffff:{client.ipv4}"
        assert worker.send(sock, mapped, port) == errno.EPERM
        speaker.sendto(b"hello", (server.ipv4, number))
        assert worker.receive(sock) == ("hello", (mapped, port))
        for how in ("sendto", "sendmsg", "connect and send"):
            assert worker.send(sock, mapped, port, how) == 0
            assert speaker.recv(16) == b"datagram"
        assert worker.send(sock, mapped, port + 1) == errno.EPERM


@pytest.mark.root
@pytest.mark.ebpf
def test_a_worker_cannot_write_to_itself_in_the_name_of_another_host(
    lab: Lab, take_over: Callable[..., ProxyProcess]
) -> None:
    """It could then answer. IPv6 sends from any address that could be bound, and with IP_FREEBIND that is every one."""
    server, client = lab.host("proxy"), lab.host("client")
    take_over(server, "--workers", "1", "--allow-egress", "2001:db8::/32")
    with Worker(client, server) as worker:
        for option in ((socket.IPPROTO_IP, 15, 1), (socket.IPPROTO_IPV6, 78, 1)):  # IP_FREEBIND, IPV6_FREEBIND
            assert worker.do(("open", socket.AF_INET6, "fd00::5", [option])) == [errno.EPERM]
        assert worker.do(("open", socket.AF_INET6, "fd00::5", [])) == [errno.EADDRNOTAVAIL]
        # Other options are set as ever.
        options = [(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1), (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)]
        worker.open(socket.AF_INET6, "::", *options, (socket.SOL_SOCKET, socket.SO_RCVBUF, 65536))


@pytest.mark.root
@pytest.mark.ebpf
def test_the_server_reads_feeds_from_where_its_workers_may_not_connect(
    lab: Lab, start_proxy: StartProxy, tmp_path: Path
) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    (tmp_path / "listed").write_text("203.0.113.0/24\n")
    serve = client.popen(
        *(sys.executable, "-m", "http.server", "80", "--bind", client.ipv4, "--directory", str(tmp_path)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: serve.poll() is None and _listens(client, 80), what="the feed's server")
    config = tmp_path / "rama.toml"
    config.write_text(
        f'listeners.main = {{ address = "{server.ipv4}:{PORT}", stack = "main" }}\n'
        "stacks.main.service.echo = {}\nserver.workers = 1\n"
        f'[[policy.rules]]\nname = "listed"\naction = "drop"\nfeed = {{ url = "http://{client.ipv4}/listed" }}\n'
    )
    proxy = start_proxy(server, "--config", str(config))
    asked = f"203.0.113.7:{PORT}"
    wait_for(lambda: "drop" in proxy.command("policy", "test", asked, check=False).stdout, what="the feed's network")


def _listens(host: Host, port: int) -> bool:
    try:
        host.connect(host.ipv4, port).close()
    except ConnectionRefusedError:
        return False
    return True


@dataclass
class Resolving(Host):
    """A host whose programs find another resolv.conf."""

    resolv_conf: Path = Path()

    def command(self, *args: str) -> list[str]:
        script = 'mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'
        return super().command("unshare", "--mount", "sh", "-c", script, "sh", str(self.resolv_conf), *args)


@contextlib.contextmanager
def nameserver(host: Host, address: str, answers: str) -> Iterator[None]:
    """Answer every question for an IPv4 address on ``address`` with ``answers``, and that there is no IPv6 address."""
    with host.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((address, 53))
        sock.settimeout(None)

        def serve() -> None:
            while (received := sock.recvfrom(512))[0] != b"stop":
                query, asker = received
                end = query.index(b"\0", 12) + 5
                found = query[end - 4 : end - 2] == b"\0\1"
                head = query[:2] + b"\x81\x80\0\1" + bytes((0, found)) + bytes(4)
                record = b"\xc0\x0c\0\1\0\1" + bytes(4) + b"\0\4" + socket.inet_aton(answers)
                sock.sendto(head + query[12:end] + record * found, asker)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            with host.socket(socket.AF_INET, socket.SOCK_DGRAM) as stopper:
                stopper.sendto(b"stop", (address, 53))
            thread.join()


@pytest.mark.root
@pytest.mark.ebpf
def test_names_are_resolved_wherever_the_nameserver_is_and_only_its_port_53_is_open(
    lab: Lab, start_proxy: StartProxy, tmp_path: Path
) -> None:
    plain, client, target = lab.host("proxy"), lab.host("client"), lab.host("target")
    conf = tmp_path / "resolv.conf"
    conf.write_text("nameserver 127.0.0.53\n")
    server = Resolving(**vars(plain), resolv_conf=conf)
    (tmp_path / "bypass.py").write_text(APPLICATION)
    listen = ("--listen", f"{server.ipv4}:{PORT}", "--workers", "1")
    proxy = start_proxy(server, "bypass:service", *listen, cwd=tmp_path)
    with Worker(client, server) as worker:

        def may_send(address: str, port: int) -> bool:
            ways = attempts(address, how="sendto", kind=socket.SOCK_DGRAM, port=port)
            ways += attempts(address, how="connect", kind=socket.SOCK_DGRAM, port=port)
            refused = {error == errno.EPERM for error in worker.do(*ways)}
            assert len(refused) == 1
            return refused == {False}

        assert may_send("127.0.0.53", 53)
        assert not may_send("127.0.0.53", 54)
        assert not may_send("127.0.0.1", 53)
        conf.write_text("nameserver 198.18.0.3\n")  # as another network would have it
        wait_for(lambda: may_send("198.18.0.3", 53), what="the way to the new nameserver")
        assert not may_send("127.0.0.53", 53)
        conf.write_text("search example\n")
        wait_for(lambda: may_send("127.0.0.1", 53), what="the way to this host's own nameserver")
        assert not may_send("198.18.0.3", 53)
    proxy.end()

    with (
        nameserver(server, "127.0.0.53", target.ipv4),
        nameserver(client, client.ipv4, target.ipv4),
        target.socket() as listener,
    ):
        listener.bind((target.ipv4, 80))
        listener.listen()
        for asked in ("127.0.0.53", client.ipv4):
            conf.write_text(f"nameserver {asked}\n")
            proxy = start_proxy(server, *listen, "--allow-egress", f"{target.ipv4}/32")
            with client.connect(server.ipv4, PORT) as sock:
                name = b"target.example"
                sock.sendall(b"\5\1\0\5\1\0\3" + bytes((len(name),)) + name + b"\0\x50")
                answer = b""
                while len(answer) < 4:
                    answer += sock.recv(64)
                assert answer[:4] == b"\5\0\5\0", asked
                listener.accept()[0].close()
            proxy.end()


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
            if address.version == 6 and (address.ipv4_mapped or embedded(address) is not None):
                continue  # judged as two addresses
            longest = max(
                (network for network in decided if address in network), key=lambda n: n.prefixlen, default=None
            )
            assert (longest is not None and decided[longest]) == is_denied(policy, address), f"{policy} {address}"


def test_nameservers_are_read_as_the_resolver_reads_them() -> None:
    text = "# comment\nnameserver 10.0.0.2\nsearch x\nnameserver fe80::1%eth0\nnameserver nonsense\n nameserver ::1\n"
    assert nameservers(text) == [ip_address("10.0.0.2"), ip_address("fe80::1"), ip_address("::1")]
    assert nameservers("search x\n") == [ip_address("127.0.0.1")], "resolv.conf(5): then this host is asked"
