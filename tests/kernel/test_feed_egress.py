"""A child that reads a feed: where the kernel lets it go, and what a child that was taken over gets for asking."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from rama_ebpf.core.errors import PolicyDenied
from rama_ebpf.kernel import bpf
from rama_ebpf.kernel.denials import DenialCounts
from rama_ebpf.kernel.feed_cgroup import Grants, confined_to_grants
from rama_ebpf.kernel.gate_maps import GateMaps
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy import fetch
from rama_ebpf.policy.egress_map import system_nameservers
from rama_ebpf.policy.feed_room import Ask, judge
from rama_ebpf.policy.fetch import Fetcher, FetchError

from ..conftest import StartProxy
from ..lab import Lab

TRIES = """
import errno, json, socket, sys
for line in sys.stdin:
    kind, address, port, protocol = json.loads(line)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, getattr(socket, kind), protocol) as sock:
            sock.settimeout(0.2)
            if kind == "SOCK_DGRAM" and not protocol:
                sock.sendto(b"x", (address, port))
            sock.connect((address, port))
            said = "connected"
    except TimeoutError:
        said = "sent"
    except OSError as error:
        said = errno.errorcode[error.errno]
    print(said, flush=True)
"""


@pytest.fixture
def denials() -> Iterator[DenialCounts]:
    counts = DenialCounts()
    yield counts
    counts.close()


@pytest.mark.root
@pytest.mark.ebpf
def test_a_child_that_reads_a_feed_goes_where_it_was_granted_to_and_nowhere_else(
    lab: Lab, start_proxy: StartProxy, denials: DenialCounts
) -> None:
    host, other = lab.host("proxy"), lab.host("lists")
    proxy = start_proxy(host, "--workers", "1", "--listen", f"{host.ipv4}:1080", "--allow-egress", other.ipv4)
    workers = Path(proxy.json("status")["cgroup"]) / "workers"
    server = system_nameservers()[0]
    child = host.popen(sys.executable, "-c", TRIES, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None

    def met(address: str, port: int, kind: str = "SOCK_STREAM", protocol: int = 0) -> str:
        child.stdin.write(json.dumps([kind, address, port, protocol]) + "\n")
        child.stdin.flush()
        return child.stdout.readline().strip()

    assert met(other.ipv4, 9) == "ECONNREFUSED", "there is a way without confinement"
    with GateMaps.open(Instance(proxy.instance).pin_dir) as maps:
        with confined_to_grants(Grants(maps), workers, child.pid, denials) as grants:
            ways = [
                # What clients may reach is not a feed's: it has a policy of its own.
                *((other.ipv4, 9, kind) for kind in ("SOCK_STREAM", "SOCK_DGRAM")),
                *((address, 80) for address in ("127.0.0.1", "169.254.169.254", "1.1.1.1", "2606:4700::1", host.ipv4)),
                (host.ipv4, 1080),
                (str(server), 54, "SOCK_DGRAM"),
                (other.ipv4, 9, "SOCK_DGRAM", 136),  # UDP-Lite
            ]
            assert [met(*way) for way in ways] == ["EPERM"] * len(ways)
            assert met(str(server), 53, "SOCK_DGRAM") != "EPERM"
            grants.allow([ip_address(other.ipv4), ip_address(other.ipv6)], 9)
            assert [met(address, 9) for address in (other.ipv4, other.ipv6)] == ["ECONNREFUSED"] * 2
            assert met(f"::ffff:{other.ipv4}", 9) == "ECONNREFUSED"
            assert met(other.ipv4, 10) == "EPERM"
            child.kill()
            child.wait()
        spec = maps.specs["grants"]
        assert bpf.map_lookup_batch(maps["grants"], spec.key_size, spec.value_size) == []
    assert [path.name for path in workers.iterdir() if path.is_dir()] == []


def ask(host: str, port: int, *addresses: str) -> Ask:
    return Ask(host, port, list(addresses))


def test_the_server_that_was_named_may_be_anywhere_and_all_else_is_public_and_not_this_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = "http://lists.example/drop.txt"
    anywhere = ["10.1.2.3", "127.0.0.1", "fd00::1"]
    for port in (80, 443):  # a server that redirects to HTTPS is the same
        assert judge(ask("lists.example", port, *anywhere), url) == list(map(ip_address, anywhere))
    for host, port in (("lists.example", 8080), ("lists.example.", 80), ("other.example", 80), ("127.0.0.1", 80)):
        with pytest.raises(PolicyDenied):
            judge(ask(host, port, *anywhere), url)
    assert judge(ask("other.example", 443, "10.1.2.3", "8.8.8.8", "::ffff:1.1.1.1"), url) == [
        ip_address("8.8.8.8"),
        ip_address("1.1.1.1"),
    ]
    with pytest.raises(PolicyDenied):
        judge(ask("other.example", 443), url)
    with pytest.raises(PolicyDenied):
        judge(ask("proxy.example", 3128, "10.0.0.1"), url)
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128/")
    assert judge(ask("proxy.example", 3128, "10.0.0.1"), url) == [ip_address("10.0.0.1")]
    assert judge(ask("::1", 8000, "::1"), "http://[::1]:8000/list") == [ip_address("::1")]


HOSTILE = {
    "asks for ever": "while True: channel.send(json.dumps({'host': 'a', 'port': 1}).encode()); channel.recv(65536)",
    "asks nonsense": "channel.send(b'[' * 60000)",
    "asks with more": "channel.send(json.dumps({'host': 'a', 'port': 1, 'x': 1}).encode())",
    "asks too much": "channel.send(json.dumps({'addresses': ['1.1.1.1'] * 1000}).encode())",
    "offers what it has": "channel.send(json.dumps({'listener': 0}).encode()); channel.recv(65536)",
    "says nothing": "channel.close(); time.sleep(600)",
    "hangs": "time.sleep(600)",
    "dies": "os.abort()",
    "writes without end": "\nwhile True: os.write(1, bytes(1 << 20))",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_child_that_was_taken_over_costs_its_own_feed(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile.py").write_text(
        "import json, os, resource, socket, sys, time\n"
        "channel = socket.socket(fileno=int(sys.argv[1])); channel.recv(65536)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 22, 1 << 22))\n" + HOSTILE[what]
    )
    monkeypatch.setattr(fetch, "_CHILD", "hostile")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]))
    with pytest.raises(FetchError):
        Fetcher().get("http://127.0.0.1:9/", {}, timeout=2, max_size=1 << 20)
