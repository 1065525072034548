"""Routes in ``rama-ebpf run``: all workers know what one has met, commands explain and change, nothing leaks."""

from __future__ import annotations

import socket
import sys
import textwrap

import pytest

from ..lab import Lab, wait_for
from ..proxy import rama_ebpf

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

CONFIG = """
[server]
workers = 2

[listeners.front]
address = "0.0.0.0:1080"
stack = "proxy"

[stacks.proxy]
service = {{ socks5 = {{ udp = true }} }}

[stacks.proxy.connect]
timeout = "3s"

[egress]
allow = ["198.18.0.0/15"]

[[routes]]
name = "web"
ports = [80]
way = "exits"

[[routes]]
name = "near"
ports = [7]
way = "direct"

[ways.exits]
group = {{ members = ["paris"] }}

[ways.paris]
proxy = {{ url = "socks5://tom:s3cret@{parent}:1080", fall = 2, hold = "1m", trusted = true }}
"""

ECHO = """
import socketserver
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(9999):
            self.request.sendall(data)
socketserver.ThreadingTCPServer(("", {port}), Echo).serve_forever()
"""


def connect(client, proxy, target: str, port: int) -> tuple[int, socket.socket]:
    """Return REP and the socket."""
    sock = client.connect(proxy.ipv4, 1080)
    sock.sendall(b"\5\1\0" + b"\5\1\0\1" + socket.inet_aton(target) + port.to_bytes(2, "big"))
    data = b""
    while len(data) < 12 and (more := sock.recv(12 - len(data))):
        data += more
    return data[3], sock


def test_ways_of_a_running_server_are_explained_changed_and_never_leak(lab: Lab, start_proxy, tmp_path):
    proxy, client, parent, target = (lab.host(name) for name in ("proxy", "client", "parent", "target"))
    for port in (7, 80):
        target.popen(sys.executable, "-c", ECHO.format(port=port))
    path = tmp_path / "rama.toml"
    path.write_text(textwrap.dedent(CONFIG.format(parent=parent.ipv4)))
    path.chmod(0o600)
    tmp_path.chmod(0o755)
    wait_for(lambda: _listens(target, 80), what="the target")
    running = start_proxy(proxy, "--config", str(path))
    with target.capture("eth0") as capture:
        # The parent is not there: it falls, for both workers, and nobody goes out directly.
        replies = [_reply(client, proxy, target.ipv4, 80) for _ in range(6)]
        assert replies == [1] * 6
        rows = {row["name"]: row for row in running.json("route", "list")["ways"]}
        assert rows["paris"]["state"] == "down"
        assert rows["paris"]["attempts"] == rows["paris"]["failed"] >= 2
        assert "s3cret" not in str(rows)
        assert running.json("status")["ways"][0]["way"] == "paris"
        told = running.json("route", "test", f"{target.ipv4}:80", check=False)
        assert (told["route"], told["way"], told["refused"], told["line"]) == ("web", "exits", True, 18)
        assert told["left_out"][0]["way"] == "paris"
        assert running.json("route", "test", f"{target.ipv4}:7")["order"][0]["way"] == "direct"
        # Where egress policy lets nobody connect, the command says what the client is told.
        assert _reply(client, proxy, "127.0.0.1", 7) == 2
        told = running.json("route", "test", "127.0.0.1:7", check=False)
        assert (told["route"], told["refused"]) == ("near", True)
        assert told["why"].startswith("egress to 127.0.0.1 is denied")
        # No route, and datagrams for which there is none.
        assert _reply(client, proxy, target.ipv4, 443) == 2
        assert _reply(client, proxy, target.ipv4, 7) == 0
        seen = [one for one in capture.read() if one.source == proxy.ipv4]
    assert {one.dport for one in seen} == {7}
    # It comes up: an operator need not wait for it.
    parent.popen(sys.executable, "-c", _PARENT)
    wait_for(lambda: _listens(parent, 1080), what="the parent")
    rama_ebpf("route", "enable", "paris", "--instance", running.instance)
    with target.capture("eth0") as capture:
        assert [_reply(client, proxy, target.ipv4, 80) for _ in range(4)] == [0] * 4
        seen = [one for one in capture.read() if one.dport == 80]
    assert {one.source for one in seen} == {parent.ipv4}
    assert {row["name"]: row for row in running.json("route", "list")["ways"]}["paris"]["state"] == "up"
    # Led elsewhere at run time, and back; drained.
    rama_ebpf("route", "set", "web", "refuse", "--instance", running.instance)
    assert _reply(client, proxy, target.ipv4, 80) == 2
    rama_ebpf("route", "set", "web", "--as-written", "--instance", running.instance)
    assert _reply(client, proxy, target.ipv4, 80) == 0
    rama_ebpf("route", "drain", "exits", "--instance", running.instance)
    assert _reply(client, proxy, target.ipv4, 80) == 1
    rama_ebpf("route", "enable", "exits", "--instance", running.instance)
    assert _reply(client, proxy, target.ipv4, 80) == 0
    for mistake in (("set", "gone", "direct"), ("set", "web", "gone"), ("drain", "direct"), ("test", "nonsense")):
        failed = rama_ebpf("route", *mistake, "--instance", running.instance, check=False)
        assert failed.returncode == 2, mistake
    assert running.logged(r"way=paris")
    assert running.logged(r"route=web")
    assert not running.logged("s3cret")


_PARENT = (
    "import asyncio\n"
    "from rama_ebpf.services.socks5 import Socks5Server\n"
    "from rama_ebpf.services.connect import Connector\n"
    "from rama_ebpf.services.resolver import DnsResolver\n"
    "from rama_ebpf.policy.egress import EgressPolicy\n"
    "from rama_ebpf.layers.auth import StaticUsers\n"
    "from rama_ebpf.services.tcp import TcpServer, bind_tcp\n"
    "async def main():\n"
    "    connector = Connector(DnsResolver(), EgressPolicy.of(['198.18.0.0/15']))\n"
    "    TcpServer(bind_tcp('0.0.0.0', 1080), Socks5Server(connector, auth=StaticUsers({'tom': 's3cret'}))).start()\n"
    "    await asyncio.Event().wait()\n"
    "asyncio.run(main())\n"
)


def _reply(client, proxy, target: str, port: int) -> int:
    rep, sock = connect(client, proxy, target, port)
    sock.close()
    return rep


def _listens(host, port: int) -> bool:
    return f":{port} " in host.run("ss", "-Hltn").stdout


def test_route_of_a_file_is_explained_without_a_server(tmp_path):
    path = tmp_path / "rama.toml"
    path.write_text(textwrap.dedent(CONFIG.format(parent="198.18.0.9")))
    done = rama_ebpf("route", "test", "a.example:80", "--config", str(path))
    assert f"route web ({path}:18)" in done.stdout
    assert "1. paris: socks5://***@198.18.0.9:1080" in done.stdout
    refused = rama_ebpf("route", "test", "a.example:443", "--config", str(path), check=False)
    assert refused.returncode == 1
    assert "no route matches" in refused.stdout


@pytest.mark.parametrize(
    ("target", "code"),
    [("198.18.0.7:7", 0), ("10.0.0.1:7", 1), ("127.1:7", 1), ("[::1]:80", 1), ("10.0.0.1:80", 0)],  # paris is trusted
)
def test_an_address_that_egress_policy_denies_is_refused_by_route_test(tmp_path, target, code):
    path = tmp_path / "rama.toml"
    path.write_text(textwrap.dedent(CONFIG.format(parent="198.18.0.9")))
    done = rama_ebpf("route", "test", target, "--config", str(path), check=False)
    assert (done.returncode, "refused: egress to" in done.stdout) == (code, bool(code)), done.stdout + done.stderr
