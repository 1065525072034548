"""A run that is killed leaves nothing for long: the next one removes it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rama_ebpf.kernel.bpffs import BPFFS

from . import leftovers
from .lab import PREFIX, TEMPORARY, temporary_directory
from .leftovers import has_ended, left_of, sweep

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

RUN = """
import os, sys
from tests.lab import Lab
from tests.proxy import ProxyProcess

with Lab() as lab:
    proxy = ProxyProcess(lab.host("proxy"), f"test-{os.getpid()}-0", "--listen", "127.0.0.1:1080").start()
    print(proxy.pid, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_run_left_is_removed_and_nothing_of_one_that_lives() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", RUN],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout is not None
        server = int(run.stdout.readline())
        made = left_of(run.pid)
        assert {BPFFS / f"rama-ebpf/test-{run.pid}-0", Path(f"/run/rama-ebpf/test-{run.pid}-0")} <= set(made)
        assert sum(path.name.startswith(f"{PREFIX}-{run.pid}-") for path in made) == 2  # the switch and the host
        assert any(path.name == f"rama-ebpf-test-{run.pid}-0" for path in made)
        sweep()
        assert left_of(run.pid) == made
        assert not has_ended(server)
        run.kill()
        run.wait()
        assert left_of(run.pid) == made
        assert set(made) <= set(sweep())
        assert left_of(run.pid) == []
        assert has_ended(server)


def test_directory_in_tmp_is_removed_when_its_maker_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(leftovers, "_NEW", -1.0)
    forsaken = tmp_path / f"{TEMPORARY}x"
    (forsaken / "state").mkdir(parents=True)
    with temporary_directory() as used:
        assert sweep() == [forsaken]
        assert used.is_dir()
