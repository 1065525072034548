"""Pins on a bpffs that anybody may write to: the kernel mounts it like that, unless it is told another mode."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rama_ebpf.kernel.instance import Instance
from tests.proxy import ProxyProcess

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

NOBODY = "setpriv --reuid=65534 --regid=65534 --clear-groups env RAMA_EBPF_STATE_DIR=/mnt XDG_RUNTIME_DIR=/mnt"


def on_open_bpffs(script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script where /sys/fs/bpf is a new bpffs with the kernel's own mode. What it starts ends with it."""
    mounts = "mount -t bpf bpf /sys/fs/bpf -o mode=1777 && mount -t tmpfs tmpfs /mnt -o mode=1777"
    alone = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    command = [*alone, "sh", "-c", f"{mounts} && {script}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def pins(instance: str) -> Iterator[Path]:
    """Where the pins of an instance of our own are."""
    yield Instance(instance).pin_root
    assert not Instance(instance).pin_root.exists()


def run(pins: Path) -> str:
    return f"{ProxyProcess.COMMAND} run --require-kernel --listen 127.0.0.1:0 --instance {pins.name}"


def test_a_server_that_may_not_load_the_gate_leaves_no_directory_behind(pins: Path) -> None:
    result = on_open_bpffs(f"{NOBODY} {run(pins)}; echo $?; ls {pins.parent}")
    assert result.stdout == "3\n", result
    assert "bpf(0): Operation not permitted" in result.stderr
    assert f"cannot access '{pins.parent}'" in result.stderr


def test_maps_are_not_pinned_where_somebody_else_could_replace_them(pins: Path) -> None:
    for foreign in (pins, pins.parent):
        result = on_open_bpffs(f"{NOBODY} mkdir -p {foreign}/x && {run(pins)}; echo $?; ls {foreign}")
        assert result.stdout == "3\nx\n", result
        assert f"{foreign} belongs to another user: remove it" in result.stderr


def test_bpffs_that_is_unmounted_under_a_server_is_mounted_again_with_its_pins(pins: Path, tmp_path: Path) -> None:
    log, command = tmp_path / "log", f"{ProxyProcess.COMMAND} --instance {pins.name}".split()
    until_ready = f"until grep -q 'ready after' {log}; do kill -0 $! || exit 1; sleep 0.1; done"
    ask = " ".join((command[0], "{}", *command[1:]))
    again = f"umount /sys/fs/bpf; {ask.format('status')}; {ask.format('block 192.0.2.1')}; ls {pins}"
    result = on_open_bpffs(f"{run(pins)} 2>{log} & {until_ready}; {again}; kill $!; wait $!; echo $?")
    lines = result.stdout.splitlines()
    assert any(line.startswith("127.0.0.1:") and "guarded by cgroup, sk_lookup" in line for line in lines), result
    assert "blocked 192.0.2.1/32" in lines
    assert lines[-1] == "0"
    assert log.read_text().count("the policy was not pinned at") == 1


def test_an_empty_directory_that_somebody_else_left_is_taken_away(pins: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    until_ready = f"until grep -q 'ready after' {log}; do kill -0 $! || exit 1; sleep 0.1; done"
    serve = f"{run(pins)} 2>{log} & {until_ready}; stat -c %u {pins.parent} {pins}; kill $!; wait $!; echo $?"
    result = on_open_bpffs(f"{NOBODY} mkdir -p {pins} && {{ {serve}; ls /sys/fs/bpf; }}")
    assert result.stdout.split() == ["0", "0", "0", "maps.debug", "progs.debug"], (result, log.read_text())
