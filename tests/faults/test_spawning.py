"""Processes that cannot be started: out of descriptors, out of processes."""

from __future__ import annotations

import os
import resource
import signal

import pytest

from ..hammer import Denied, Served
from ..lab import wait_for
from .conftest import ALLOWED, DENIED, TARGET, StartEcho

pytestmark = [pytest.mark.root, pytest.mark.ebpf]


def test_a_worker_that_cannot_be_replaced_is_steered_around_and_replaced_when_it_can_be(start_echo: StartEcho) -> None:
    server = start_echo()
    pid = server.proxy.pid
    used = max(int(name) for name in os.listdir(f"/proc/{pid}/fd")) + 1
    low = sorted(set(range(used)) - {int(name) for name in os.listdir(f"/proc/{pid}/fd")})
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (low[0] if low else used, before[1]))
    with Denied(server.host, DENIED, [TARGET]) as denied, Served(server.host, ALLOWED, TARGET) as served:
        os.kill(server.proxy.workers()[0], signal.SIGKILL)
        wait_for(lambda: server.proxy.logged("cannot be started"), timeout=20, what="the failed start")
        count = served.served
        wait_for(lambda: served.served > count + 20, what="service by the other worker")
        assert server.proxy.json("status")["workers"]["serving"] == 1
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        server.wait_until_whole()
    assert denied.got_in == []
    # A client of the worker that died may have been cut; nobody else was harmed.
    assert len(served.failures) <= len(ALLOWED), served.failures


def test_a_reload_that_finds_no_descriptors_is_refused_and_leaves_all_as_it_was(start_echo: StartEcho) -> None:
    server = start_echo()
    pid = server.proxy.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
    for spare in range(1, 12, 3):
        server.proxy.log.clear()
        free = [fd for fd in range(used[-1] + 64) if fd not in used][:spare]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[-1] + 1, before[1]))
        with Denied(server.host, DENIED, [TARGET]) as denied:
            server.proxy.signal(signal.SIGHUP)
            wait_for(lambda: server.proxy.logged("reload failed|: reloaded$"), timeout=60, what="the reload's end")
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        assert denied.got_in == []
        server.wait_until_whole()
        assert not server.proxy.logged("Traceback"), server.proxy.log
    server.proxy.log.clear()
    server.proxy.signal(signal.SIGHUP)
    wait_for(lambda: server.proxy.logged(": reloaded$"), timeout=60, what="the reload")
    server.wait_until_whole()
