"""An upgrade that fails, wherever it does: the old server serves on as if nothing had been tried."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rama_ebpf.kernel.instance import Instance
from rama_ebpf.loader import unload

from ..hammer import Denied, Served
from ..lab import Lab, wait_for
from .faults import FAULTS, Fault
from .releases import ALLOWED, DENIED, ONCE_ALLOWED, ONCE_DENIED, PORT, UpgradedServer, upgraded_server

pytestmark = [pytest.mark.root, pytest.mark.ebpf, pytest.mark.timeout(300)]

TARGET = ("127.0.0.1", PORT)
IN_THE_SUITE = (
    "broken release",
    "another layout",
    "half of the links: killed",
    "policy in force: killed",
    "steering: error",
    "after it serves",
)
"""The others are tried by ``python -m tests.upgrading --faults``."""


def fails_without_trace(server: UpgradedServer, fault: Fault) -> None:
    """Upgrade to a release with a fault, and with another policy; ask what is then."""
    first, links, processes = server.pid, server.links(), server.processes()
    server.releases.install(fault.edit)
    server.configure(second=True)
    with Served(server.host, ALLOWED, TARGET) as served, Denied(server.host, [DENIED], [TARGET]) as denied:
        said = server.upgrade(code=1)
        count = served.served
        wait_for(lambda: served.served > count + 5, what="clients that are served after it")
    assert said["step"] == fault.step, (fault.name, said)
    assert said["pid"] == first == server.pid, fault.name
    assert denied.got_in == [], fault.name
    if not fault.cuts:
        assert served.failures == [], fault.name
    assert server.silent(ONCE_DENIED), fault.name
    assert server.served(ONCE_ALLOWED), fault.name
    assert server.links() == links, fault.name
    wait_for(lambda: server.processes() == processes, what=f"the end of what {fault.name!r} has started")
    status = server.proxy.json("status")
    assert status["problems"] == {}, (fault.name, status["problems"])
    assert status["listeners"][0]["guarded"], fault.name
    assert not list(Path("/sys/fs/bpf").glob("rama-ebpf-compile-*"))


@pytest.fixture(scope="module")
def server() -> Iterator[UpgradedServer]:
    """One server for all tests: after each it is as it was."""
    name = f"test-{os.getpid()}-upgrade-failures"
    with Lab() as lab, tempfile.TemporaryDirectory(prefix="rama-ebpf-test-") as directory:
        os.chmod(directory, 0o755)
        try:
            with upgraded_server(lab.host("proxy"), name, Path(directory), {}) as running:
                yield running
        finally:
            unload(Instance(name))


@pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS if fault.name in IN_THE_SUITE], ids=lambda fault: fault.name
)
def test_step_that_fails_leaves_the_old_server_as_it_was(server: UpgradedServer, fault: Fault) -> None:
    fails_without_trace(server, fault)


def test_what_has_failed_is_not_in_the_way_of_what_does_not(server: UpgradedServer) -> None:
    server.releases.install()
    server.configure(second=True)
    assert server.upgrade()["pid"] != server.proxy.pid
    assert server.silent(ONCE_ALLOWED)
