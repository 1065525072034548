"""The gate with the least privileges that docs/install.md names, as in a container or a hardened unit."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass

import pytest

from rama_ebpf.kernel import cgroup
from tests.lab import Host, Lab, wait_for
from tests.proxy import ProxyProcess

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

PORT = 1080


@dataclass
class ConfinedHost(Host):
    """A host whose commands have two capabilities and cannot change cgroups."""

    def command(self, *args: str) -> list[str]:
        script = 'mount -o remount,ro,bind "$1" && shift && exec setpriv --bounding-set=-all,+net_admin,+sys_admin "$@"'
        return super().command("unshare", "--mount", "sh", "-c", script, "sh", str(cgroup.cgroup2_mount()), *args)


def _attached(instance_cgroup: str) -> str:
    return subprocess.run(["bpftool", "cgroup", "show", instance_cgroup], capture_output=True, text=True).stdout


def test_two_capabilities_and_read_only_cgroups_are_enough(lab: Lab, instance: str) -> None:
    plain, client = lab.host("proxy"), lab.host("client")
    server = ConfinedHost(**vars(plain))
    doctor = server.run(ProxyProcess.COMMAND, "doctor", check=False)
    assert doctor.returncode == 0, doctor.stdout
    assert "read-only: the gate attaches to it as a whole" in doctor.stdout

    proxy = ProxyProcess(server, instance, "--require-kernel", "--listen", f"{server.ipv4}:{PORT}")
    try:
        proxy.start()
        with client.connect(server.ipv4, PORT) as sock:
            sock.sendall(b"\x05\x01\x00")
            assert sock.recv(2) == b"\x05\x00"
        here = proxy.json("status")["cgroup"]
        assert here == str(cgroup.own_cgroup(os.getpid()))
        assert "gate_cgroup" in _attached(here)
        proxy.command("block", client.ipv4)
        with client.socket() as sock:
            sock.settimeout(0.6)
            with pytest.raises(TimeoutError):
                sock.connect((server.ipv4, PORT))
        proxy.signal(signal.SIGTERM)
        assert proxy.wait() == 0
        wait_for(lambda: "gate_cgroup" not in _attached(here), what="the end of the attachment")
    finally:
        proxy.end()
