"""The daemon under the scenarios leaves the host as it was, also when the suite is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rama_ebpf.kernel import cgroup
from tests.lab import wait_for
from tests.leftovers import sweep

from ..require import SCRATCH, require
from .daemon import remove_stale

pytestmark = [pytest.mark.root, pytest.mark.docker]

_SUITE = """
import pathlib, sys, time
from tests.lab import Lab
from integration.docker.daemon import DockerDaemon
with Lab() as lab, DockerDaemon(lab.host("docker")) as daemon:
    daemon.client.networks.create("n", driver="bridge")
    unshare = daemon._process.pid
    print(pathlib.Path(f"/proc/{unshare}/task/{unshare}/children").read_text().strip(), flush=True)
    time.sleep(600)
"""


def _host_network() -> tuple[str, str]:
    rules = subprocess.run(["iptables-save"], check=True, capture_output=True, text=True).stdout
    rules = "\n".join(line for line in rules.splitlines() if not line.startswith("#"))
    return rules, Path("/proc/sys/net/ipv4/ip_forward").read_text(encoding="ascii")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_killed_suite_takes_its_daemon_along_and_the_host_stays_as_it_was() -> None:
    require("docker")
    before = _host_network()
    with subprocess.Popen([sys.executable, "-c", _SUITE], stdout=subprocess.PIPE, text=True) as suite:
        try:
            assert suite.stdout is not None
            dockerd = int(suite.stdout.readline())
            assert _alive(dockerd)
            assert _host_network() == before
        finally:
            suite.kill()
    try:
        wait_for(lambda: not _alive(dockerd), what="the end of dockerd")
    finally:
        if _alive(dockerd):
            os.kill(dockerd, signal.SIGKILL)

    name = f"rama-ebpf-docker-{suite.pid}"
    assert (SCRATCH / name).is_dir()
    sweep()
    remove_stale()
    assert not (SCRATCH / name).exists()
    assert not (cgroup.cgroup2_mount() / name).exists()
    namespaces = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    assert f"-{suite.pid}-" not in namespaces
    assert _host_network() == before


@pytest.mark.parametrize("gone", ["dockerd", "mmdebstrap"])
def test_missing_tool_is_named_with_its_package_and_exit_code_3(tmp_path: Path, gone: str) -> None:
    for directory in os.environ["PATH"].split(":"):
        for tool in Path(directory).glob("*"):
            if tool.name != gone and not (tmp_path / tool.name).exists():
                (tmp_path / tool.name).symlink_to(tool)
    command = [sys.executable, "-m", "integration.require", "docker"]
    result = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert result.returncode == 3
    assert f"{gone} is not installed: apt install" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 2
