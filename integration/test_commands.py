"""The commands that need much of a machine say what it lacks and how to get it, exit 3, and leave nothing half done."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from .require import SUITES

pytestmark = pytest.mark.root

ROOT = Path(__file__).resolve().parent.parent
KERNELS = (sys.executable, "-m", "integration.kernels", "linux-image-amd64")
BOX = (sys.executable, "vagrant/build-box")
VAGRANT = ("vagrant/test",)
DOCKER = (sys.executable, "-m", "integration.require", "docker")

# An empty cache of 9 GiB, where nothing is remembered from earlier runs, and a scratch directory of 20.
_ELSEWHERE = (
    "mkdir -p .cache && mount -t tmpfs -o size=9g tmpfs .cache && mount -t tmpfs -o size=20g tmpfs /var/tmp && "
)
_DISTRIBUTION = platform.freedesktop_os_release()["ID"]
_LITTLE = "mkdir -p .cache && mount -t tmpfs -o size=8m tmpfs .cache && mount -t tmpfs -o size=8m tmpfs /var/tmp && "
# What a run may have begun: it shows in what is left of the cache. Kept out: empty directories.
_LEFT = "; status=$?; find .cache /var/tmp -type f -size +0 -printf 'left: %p\\n' >&2; exit $status"


def _run(
    command: Sequence[str], setting: str = "", *, network: bool = True, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a mount namespace with directories of its own."""
    unshare = ["unshare", "--mount", *([] if network else ["--net"])]
    shell = ["sh", "-c", f'{setting} "$@"{_LEFT if setting else ""}', "sh", *command]
    return subprocess.run(
        [*unshare, *shell], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=100
    )


def _lacking(tmp_path: Path, *gone: str) -> dict[str, str]:
    """An environment whose PATH has all commands but some."""
    for directory in os.environ["PATH"].split(":"):
        for tool in Path(directory).glob("*"):
            if tool.name not in gone and not (tmp_path / tool.name).exists():
                (tmp_path / tool.name).symlink_to(tool)
    return {**os.environ, "PATH": str(tmp_path)}


@pytest.mark.parametrize(
    ("command", "gone", "remedy"),
    [
        (DOCKER, "dockerd", "apt install docker.io"),
        (KERNELS, "qemu-system-x86_64", "apt install qemu-system-x86"),
        (KERNELS, "busybox", "apt install busybox-static"),
        (BOX, "mke2fs", "apt install e2fsprogs"),
        (VAGRANT, "libvirtd", "apt install libvirt-daemon-system"),
        (VAGRANT, "vagrant", "apt install vagrant"),
    ],
)
def test_missing_tool_is_named_with_its_package(tmp_path: Path, command: Sequence[str], gone: str, remedy: str) -> None:
    result = _run(command, environment=_lacking(tmp_path, gone))
    assert result.returncode == 3, result
    assert f"{gone} is not installed: {remedy}" in result.stderr
    assert "==" not in result.stdout


@pytest.mark.parametrize("command", [DOCKER, KERNELS, BOX, VAGRANT])
def test_little_disk_is_said_with_figures_before_anything_is_begun(command: Sequence[str]) -> None:
    result = _run(command, _LITTLE)
    assert result.returncode == 3, result
    assert "has 0.0 GiB free" in result.stderr
    assert "left:" not in result.stderr


@pytest.mark.parametrize("command", [DOCKER, KERNELS, BOX, VAGRANT])
def test_without_root_it_says_so(command: Sequence[str]) -> None:
    result = _run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command])
    assert result.returncode == 3, result
    assert "root is needed" in result.stderr


@pytest.mark.parametrize(
    ("command", "needs"),
    [
        pytest.param(KERNELS, "the kernel cannot be downloaded: Debian's mirror must be reachable", id="kernels"),
        pytest.param(
            BOX,
            "the box's packages cannot be fetched: Debian's mirror must be reachable",
            id="box",
            marks=pytest.mark.skipif(
                shutil.which("vagrant") is None and "debian" not in _DISTRIBUTION,
                reason="this distribution has no package of Vagrant, which the box needs first",
            ),
        ),
    ],
)
def test_without_network_it_says_what_must_be_reachable_and_leaves_nothing(command: Sequence[str], needs: str) -> None:
    result = _run(command, _ELSEWHERE, network=False)
    assert result.returncode == 3, result
    assert needs in result.stderr
    assert "left:" not in result.stderr


def test_hardware_virtualisation_that_is_asked_for_but_missing_is_explained() -> None:
    result = _run(["env", "RAMA_EBPF_EMULATE=0", *VAGRANT], "mount -t tmpfs tmpfs /dev &&")
    assert result.returncode == 3, result
    assert "/dev/kvm cannot be used: switch on (nested) virtualisation" in result.stderr
    assert "leave RAMA_EBPF_EMULATE unset" in result.stderr


def test_every_suite_says_how_to_get_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for suite, checks in SUITES.items():
        for text in filter(None, (check() for check in checks)):
            assert ": " in text, (suite, text)  # what is missing: what to do
