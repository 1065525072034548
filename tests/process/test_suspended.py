"""Ctrl-Z, and SIGSTOP: of the server in its terminal, of a command that changes the policy."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rama_ebpf.kernel.instance import Instance
from rama_ebpf.kernel.suspended import is_stopped

from ..conftest import StartProxy
from ..faults.conftest import CONFIG, DENIED, TARGET
from ..hammer import Denied, echoed
from ..lab import Host, Lab, wait_for
from ..proxy import ProxyProcess, rama_ebpf

pytestmark = [pytest.mark.root, pytest.mark.ebpf, pytest.mark.timeout(300)]

SOURCE = "198.18.1.1"


class Terminal:
    """A shell with job control, in a terminal of its own inside a lab host."""

    def __init__(self, host: Host) -> None:
        self.seen = ""
        self._ours, theirs = pty.openpty()
        self.shell = subprocess.Popen(
            host.command("bash", "--norc", "--noprofile", "-i"),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: all who had the other end have ended
            while data := os.read(self._ours, 65536):
                self.seen += data.decode(errors="replace")

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self._ours, text.encode())

    def wait_for(self, pattern: str) -> None:
        """Wait until this is on the screen."""
        wait_for(lambda: re.search(pattern, self.seen), timeout=60, what=f"{pattern!r} on the screen")

    def close(self) -> None:
        """Hang up."""
        self.shell.kill()
        self.shell.wait()
        self._reader.join(10)
        os.close(self._ours)


@pytest.fixture
def host(lab: Lab) -> Host:
    made = lab.host("proxy")
    for address in (TARGET[0], SOURCE, *DENIED):
        made.add_address(f"{address}/32", "lo")
    return made


@pytest.fixture
def terminal(host: Host) -> Iterator[Terminal]:
    made = Terminal(host)
    yield made
    made.close()


def test_ctrl_z_of_a_server_leaves_its_workers_serving_by_the_policy_and_fg_continues_it(
    host: Host, terminal: Terminal, instance: str, tmp_path: Path
) -> None:
    """Also where the terminal stops who writes to it from the background (stty tostop)."""
    file = tmp_path / "rama.toml"
    file.write_text(CONFIG.format(workers=2, server="", policy=""))
    terminal.type(f"stty tostop; {ProxyProcess.COMMAND} run --instance {instance} --config {file}\n")
    terminal.wait_for("ready after")
    pid = Instance(instance).serving_pid()
    assert pid
    try:
        with Denied(host, DENIED, [TARGET]) as denied:
            terminal.type("\x1a")
            wait_for(lambda: is_stopped(pid), what="the server's stop")
            for _ in range(8):
                assert not host.call(lambda: echoed(host, SOURCE, TARGET))
            said = rama_ebpf("status", "--instance", instance).stdout
            assert f"process {pid} IS STOPPED" in said
            assert f"kill -CONT {pid}, has it go on" in said
            doctor = json.loads(rama_ebpf("doctor", "--instance", instance, "--json", check=False).stdout)
            (gate,) = [row for row in doctor["findings"] if row["subject"].startswith("gate of")]
            assert (gate["ok"], gate["remedy"]) == (False, f"fg in its terminal, or kill -CONT {pid}")
            asked = rama_ebpf("flows", "--instance", instance, check=False)
            assert asked.returncode == 3
            assert "it is stopped" in asked.stderr
            second = rama_ebpf("run", "--instance", instance, "--listen", "127.0.0.1:0", check=False)
            assert f"already served by process {pid}; it is stopped: fg" in second.stderr
            # The gate is in the kernel, and nobody has its lock.
            rama_ebpf("block", SOURCE, "--instance", instance)
            with pytest.raises(TimeoutError):
                host.connect(*TARGET, source=SOURCE, timeout=0.3)
            rama_ebpf("unblock", SOURCE, "--instance", instance)
            terminal.type("fg\n")
            terminal.wait_for("going on after")
            wait_for(lambda: not is_stopped(pid), what="the server's going on")
            assert rama_ebpf("flows", "--instance", instance, "--json").stdout
        assert denied.got_in == []
    finally:
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: Instance(instance).serving_pid() is None, timeout=30, what="the server's end")
    assert "Traceback" not in terminal.seen


LOAD = """
import os, sys
from rama_ebpf.kernel.instance import Instance
with Instance(sys.argv[1]).policy_lock():
    print("has it", flush=True)
    sys.stdin.readline()
print("let go", flush=True)
sys.stdin.readline()
"""


def test_ctrl_z_of_a_command_takes_effect_when_it_has_let_go_of_the_policy(
    terminal: Terminal, instance: str, tmp_path: Path
) -> None:
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    terminal.type(f"{sys.executable} {script} {instance}\n")
    terminal.wait_for("has it")
    terminal.type("\x1a")
    terminal.type("\n")
    terminal.wait_for(r"\[1\]\+\s+Stopped")
    with Instance(instance).policy_lock(1):
        pass
    terminal.type("fg\n")
    terminal.wait_for("let go")
    terminal.type("\n")


def test_a_command_that_was_stopped_with_the_policy_is_named_with_how_to_continue_it(instance: str) -> None:
    command = [sys.executable, "-c", LOAD, instance]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "has it\n"
        holder.send_signal(signal.SIGSTOP)
        wait_for(lambda: is_stopped(holder.pid), what="its stop")
        hint = f"it is stopped: fg in its terminal, or kill -CONT {holder.pid}"
        with pytest.raises(TimeoutError, match=hint), Instance(instance).policy_lock(0.05):
            pass
        holder.kill()


def test_a_stopped_server_is_ended_by_unload(host: Host, start_proxy: StartProxy, instance: str) -> None:
    proxy = start_proxy(host, "--listen", f"{TARGET[0]}:{TARGET[1]}", "--workers", "1")
    proxy.signal(signal.SIGSTOP)
    wait_for(lambda: is_stopped(proxy.pid), what="its stop")
    rama_ebpf("unload", "--stop", "--instance", instance)
    assert proxy.wait() == 0
