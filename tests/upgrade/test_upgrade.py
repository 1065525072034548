"""``rama-ebpf upgrade``: another process serves, and no client has noticed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from ..hammer import Denied, Served
from ..lab import Host, Lab, wait_for
from ..proxy import ProxyProcess, rama_ebpf
from .conftest import StartServer
from .releases import ALLOWED, DENIED, ONCE_ALLOWED, ONCE_DENIED, PORT, UpgradedServer, has_ended, is_live, xdp_link

pytestmark = [pytest.mark.root, pytest.mark.ebpf, pytest.mark.timeout(300)]

TARGET = ("127.0.0.1", PORT)


@pytest.fixture
def host(lab: Lab) -> Host:
    return lab.host("proxy")


def echoes(sock: socket.socket) -> bool:
    sock.sendall(b"again")
    return sock.recv(5, socket.MSG_WAITALL) == b"again"


def counters(server: UpgradedServer) -> list[int]:
    status = server.proxy.json("status")
    rows = [row for row in status["listeners"] if row["name"] == "main"]
    return [rows[0]["established"], rows[0]["accepted"], *(row["count"] for row in status["verdicts"])]


def test_no_client_is_refused_or_cut_by_upgrades_and_no_denied_one_gets_in(
    host: Host, instance: str, start_server: StartServer
) -> None:
    server = start_server(host, workers=2)
    server.file.write_text(server.file.read_text().replace("[policy]", '[policy]\nxdp = ["eth0"]'))
    # The first upgrade attaches XDP, and the others take it over.
    pids = [server.pid]
    with Denied(host, [DENIED], [TARGET]) as denied, Served(host, ALLOWED, TARGET) as served:
        with server.tunnels(1)[0] as before_all:
            for number in range(3):
                tunnel = server.tunnels(1)[0]
                before = counters(server)
                said = server.upgrade()
                blocked = f"127.0.7.{number}"
                rama_ebpf("block", "--instance", instance, blocked)
                assert said["pid"] == server.pid
                assert server.pid not in pids
                pids.append(server.pid)
                assert all(now >= then for now, then in zip(counters(server), before, strict=True))
                if number == 0:
                    link = xdp_link(server)
                assert xdp_link(server) == link
                assert is_live(link)
                assert server.silent(blocked)
                with tunnel:
                    assert echoes(tunnel)
            assert echoes(before_all)
        assert served.served > 10
    assert denied.got_in == []
    assert served.failures == []
    assert server.proxy.json("status")["problems"] == {}
    assert server.proxy.wait() == 0
    wait_for(lambda: all(map(has_ended, pids[1:-1])), what="the end of servers without connections")


def test_changed_configuration_comes_into_force_and_a_wrong_one_does_not(host: Host, start_server: StartServer) -> None:
    server = start_server(host, listeners='[listeners.old]\naddress = "127.0.0.1:1081"\nstack = "echo"')
    first = server.pid
    server.file.write_text("[server]\nworkers = true\n")
    said = server.upgrade(code=1)
    assert said["step"] == "configuration"
    assert server.pid == first
    assert server.served()
    assert server.served(port=1081)
    server.configure(second=True, workers=3, listeners='[listeners.new]\naddress = "127.0.0.1:1082"\nstack = "echo"')
    with Served(host, ALLOWED, TARGET) as served, Denied(host, [DENIED], [TARGET, ("127.0.0.1", 1082)]) as denied:
        server.upgrade()
        wait_for(lambda: denied.tries > 20, what="tries after the upgrade")
    assert served.failures == []
    assert denied.got_in == []
    assert server.served(port=1082)
    assert server.served(ONCE_DENIED)
    assert server.silent(ONCE_ALLOWED)
    with pytest.raises(ConnectionRefusedError):
        host.connect("127.0.0.1", 1081)
    assert server.proxy.json("status")["workers"]["serving"] == 3


def test_upgrade_during_an_upgrade_is_refused_and_harms_none(host: Host, start_server: StartServer) -> None:
    server = start_server(host)
    command = [ProxyProcess.COMMAND, "upgrade", "--instance", server.instance.name]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=90)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    assert "under way" in "".join(errors)
    assert server.pid != server.proxy.pid
    assert server.served()


def test_server_killed_while_it_is_followed_takes_the_new_one_along(host: Host, start_server: StartServer) -> None:
    server = start_server(host)
    command = [ProxyProcess.COMMAND, "upgrade", "--instance", server.instance.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as upgrade:
        assert upgrade.stdout is not None
        new = int(upgrade.stdout.readline().split()[1])
        server.proxy.signal(signal.SIGKILL)
        assert upgrade.wait(60) == 3
    wait_for(lambda: has_ended(new), timeout=30, what="the end of the new server")
    assert server.instance.serving_pid() is None
    with pytest.raises(ConnectionRefusedError):
        host.connect("127.0.0.1", PORT, source=ALLOWED[0])


def test_server_killed_after_it_was_followed_takes_nothing_along(host: Host, start_server: StartServer) -> None:
    server = start_server(host)
    command = [ProxyProcess.COMMAND, "upgrade", "--instance", server.instance.name]
    with (
        Denied(host, [DENIED], [TARGET]) as denied,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as upgrade,
    ):
        assert upgrade.stdout is not None
        new = int(upgrade.stdout.readline().split()[1])
        assert f"process {new} serves" in upgrade.stdout.readline()
        with Served(host, ALLOWED, TARGET) as served:  # by the new one: those of the killed one are lost with it
            server.proxy.signal(signal.SIGKILL)
            wait_for(lambda: served.served > 5, what="clients that are served after it")
    assert server.pid == new
    assert served.failures == []
    assert denied.got_in == []
    assert server.upgrade()["before"] == new, "what the killed one has left is in the way"


def test_oldest_of_too_many_servers_is_cut_as_was_said(host: Host, start_server: StartServer) -> None:
    server = start_server(host, server="max_generations = 2")
    with server.tunnels(1)[0] as oldest:
        server.upgrade()
        assert server.proxy.json("status")["draining"][0]["pid"] == server.proxy.pid
        with server.tunnels(1)[0] as newer:
            done = server.proxy.command("upgrade")
            assert f"process {server.proxy.pid} still drains and is cut" in done.stdout
            with pytest.raises(ConnectionResetError):
                oldest.recv(1)
            assert echoes(newer)
    assert server.proxy.wait() == 0


def test_stop_ends_servers_that_drain_and_leaves_nothing(
    host: Host, start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"@rama-ebpf-test-{os.getpid()}"
    told = host.call(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))  # abstract names are a namespace's
    told.bind("\0" + name[1:])
    told.settimeout(10)
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    server = start_server(host)
    with server.tunnels(1)[0] as tunnel:
        server.upgrade()
        followed = server.pid
        assert echoes(tunnel)
        cgroup = Path(str(server.instance.read_state()["cgroup"]))
        os.kill(server.pid, signal.SIGTERM)
        assert server.proxy.wait() == 0
        with pytest.raises(ConnectionResetError):
            tunnel.recv(1)
    wait_for(lambda: server.instance.serving_pid() is None, what="the end of the server")
    with told:
        assert [told.recv(64).decode() for _ in range(3)] == ["READY=1", f"MAINPID={followed}", "STOPPING=1"]
    assert not cgroup.exists()
    assert not server.instance.pin_dir.exists()
