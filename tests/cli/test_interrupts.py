"""Ctrl-C, at whichever moment."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from rama_ebpf.kernel.instance import Instance

from ..lab import wait_for
from ..proxy import ProxyProcess


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal (proc(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return bool(int(next(line for line in lines if line.startswith("SigCgt:")).split()[1], 16) >> (number - 1) & 1)


def catches_interrupts(pid: int) -> bool:
    """Whether it has one for SIGINT."""
    return catches(pid, signal.SIGINT)


@pytest.mark.root
@pytest.mark.parametrize("moment", ["its imports", "its work"])
def test_ctrl_c_during_a_start_ends_it_without_a_traceback(instance: str, moment: str) -> None:
    process = subprocess.Popen(
        [ProxyProcess.COMMAND, "run", "--instance", instance, "--listen", "127.0.0.1:0"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: catches_interrupts(process.pid), what="Python")
        wait_for(lambda: not catches_interrupts(process.pid), what="our main()")
        if moment == "its work":
            wait_for(lambda: catches_interrupts(process.pid), what="the command")
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode in (-signal.SIGINT, 130, 0)
    assert "Traceback" not in said


@pytest.mark.root
def test_sigterm_during_a_start_takes_back_what_was_made_and_says_so(instance: str) -> None:
    process = subprocess.Popen(
        [ProxyProcess.COMMAND, "run", "--instance", instance, "--listen", "127.0.0.1:0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: catches(process.pid, signal.SIGTERM), what="the start")
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGTERM
    assert "stopped while starting: nothing was served" in said
    assert "Traceback" not in said
    assert not Instance(instance).pinned
