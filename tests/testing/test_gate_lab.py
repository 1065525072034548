"""The gate that users' tests get: it is the kernel's, and nothing of it is left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rama_ebpf.kernel.instance import Instance
from rama_ebpf.testing import gate_lab

pytestmark = [pytest.mark.root, pytest.mark.ebpf]


def test_blocked_host_never_reaches_accept_others_do_and_nothing_is_left() -> None:
    with gate_lab() as place:
        place.gate.block(place.client.ipv4, reason="test")
        assert not place.admits(timeout=0.3)
        with pytest.raises(BlockingIOError):
            place.listener.accept()
        other = place.lab.host("other")
        assert place.admits(other)
        accepted, address = place.listener.accept()
        accepted.close()
        assert address[0] == other.ipv4
        place.gate.unblock(place.client.ipv4)
        assert place.admits()
        names = [place.server.netns, place.client.netns, other.netns]
        assert all(Path("/run/netns", name).exists() for name in names)
        instance: Instance = place.gate.instance
        assert instance.pin_dir.is_dir()
    assert not any(Path("/run/netns", name).exists() for name in names)
    assert not instance.pin_dir.exists()
    assert not instance.run_dir.exists()
    assert not instance.state_dir.exists()


def test_user_without_privileges_is_told_that_root_is_needed() -> None:
    # Imported as root: the interpreter may be where nobody else may look.
    program = "import os\nfrom rama_ebpf.testing import gate_lab\nos.setuid(65534)\nwith gate_lab(): pass"
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert "PermissionError" in done.stderr
    assert "run this test with sudo" in done.stderr
