"""What commands say while a server starts or stops: neither that none runs, nor what is true of the one before."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rama_ebpf.cli.lifecycle import _confined, status
from rama_ebpf.kernel.instance import Instance, ServerLock

from ..conftest import StartProxy
from ..lab import Lab, wait_for

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


def test_a_mistake_of_the_caller_is_told_before_it_is_told_that_no_server_runs() -> None:
    nowhere = Instance("nowhere")
    for arguments, said in (
        (("block", "198.18.0.300"), "198.18.0.300"),
        (("ban", "198.18.0.0/33"), "198.18.0.0/33"),
        (("block", "198.18.0.1", "--ttl", "soon"), "soon"),
        (("allow", "198.18.0.1", "--port", "70000"), "70000"),
        (("test", "198.18.0.1x"), "198.18.0.1x"),
        (("unblock", "here"), "here"),
    ):
        done = run(nowhere, *arguments)
        assert (done.returncode, said in done.stderr, "not loaded" in done.stderr) == (2, True, False), done.stderr
    assert "is not loaded: start it with rama-ebpf run" in run(nowhere, "block", "198.18.0.1").stderr


@pytest.mark.root
@pytest.mark.ebpf
def test_while_a_server_drains_others_are_told_so_and_for_how_long(lab: Lab, start_proxy: StartProxy) -> None:
    host = lab.host("proxy")
    proxy = start_proxy(
        host, "--workers", "1", "--listen", f"{host.ipv4}:1080", "--drain", "120", "--handshake-timeout", "300"
    )
    instance = Instance(proxy.instance)
    with host.connect(host.ipv4, 1080) as client:
        client.sendall(b"\x05\x01\x00")
        assert client.recv(2) == b"\x05\x00"
        proxy.signal(signal.SIGTERM)
        wait_for(lambda: proxy.json("status")["stopping"], what="the drain")
        second = run(instance, "run", "--listen", "127.0.0.1:0")
        assert re.search(
            rf"by process {proxy.pid}, which is stopping: its connections have up to \d+ s to end$", second.stderr
        )
        doctor = json.loads(run(instance, "doctor", "--json").stdout)
        (gate,) = [row for row in doctor["findings"] if row["subject"].startswith("gate of")]
        assert gate["ok"] is None
        assert "which is stopping" in gate["found"]
        assert re.search(r"waits up to \d+ s for its connections to end", run(instance, "status").stdout)
    assert proxy.wait() == 0


@pytest.mark.parametrize("what", ["a FIFO", "a directory", "a device", "deep", "huge", "no UTF-8", "torn", "a list"])
def test_whatever_lies_where_a_server_says_what_it_does_no_command_waits_for_it(starting: Instance, what: str) -> None:
    file = starting.run_dir / "state.json"
    file.unlink()
    if what == "a FIFO":
        os.mkfifo(file)
    elif what == "a directory":
        file.mkdir()
    elif what == "a device":
        file.symlink_to("/dev/zero")
    elif what == "huge":
        with file.open("wb") as opened:
            opened.truncate(3 << 30)
    else:
        file.write_bytes(
            {"deep": b"[" * 200_000, "no UTF-8": b"\xff\xfe{", "torn": b'{"pid": 1', "a list": b"[1]"}[what]
        )
    try:
        assert starting.read_state() == {}
        assert status(starting)["starting"]
    finally:
        if what == "a directory":
            file.rmdir()
