"""What commands say while a server starts or stops: neither that none runs, nor what is true of the one before."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rama_ebpf.cli.lifecycle import _confined, status
from rama_ebpf.kernel.instance import Instance, ServerLock

COMMAND = Path(sys.executable).with_name("rama-ebpf")


@pytest.fixture
def starting() -> Iterator[Instance]:
    """An instance whose server has its lock, and has said nothing yet."""
    instance = Instance("just-starting")
    with ServerLock(instance, create=True):
        instance.write_state({"pid": os.getpid() + 1, "listeners": [{"address": "192.0.2.1:1", "guarded": True}]})
        yield instance
    for path in instance.run_dir.iterdir():
        path.unlink()
    instance.run_dir.rmdir()


def run(instance: Instance, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *args, "--instance", instance.name], capture_output=True, text=True, timeout=120, check=False
    )


def test_status_says_that_it_starts_and_nothing_of_the_server_before(starting: Instance) -> None:
    assert run(starting, "status").stdout == (
        f"instance just-starting is being started by process {os.getpid()}: nobody gets in yet\n"
    )
    told = status(starting)
    assert (told["running"], told["starting"], told["ready"], told["listeners"]) == (True, True, False, [])


def test_other_commands_do_not_ask_for_a_second_server(starting: Instance) -> None:
    done = run(starting, "list")
    assert done.returncode == 2
    assert done.stderr == (
        f"rama-ebpf list: instance 'just-starting' is being started by process {os.getpid()}: try again soon\n"
    )


def test_workers_that_do_not_serve_yet_are_not_said_to_be_unconfined() -> None:
    nobody = {"user": "nobody", "wanted": True, "seccomp": False, "landlock": 0}
    assert "NOT" not in _confined(nobody, 0)
    assert "NOT FILTERED" in _confined(nobody, 2)


def test_status_says_that_a_server_drains(starting: Instance) -> None:
    workers = {"expected": 2, "serving": 1, "since": None}
    starting.write_state(
        {"pid": os.getpid(), "policy": "kernel", "starting": False, "stopping": True, "workers": workers}
    )
    assert run(starting, "status").stdout == (
        f"instance just-starting is stopping: process {os.getpid()} waits for its connections to end\n"
    )
