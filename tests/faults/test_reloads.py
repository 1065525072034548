"""Reloads in which processes die, and far too many of them."""

from __future__ import annotations

import os
import random
import signal

import pytest

from ..hammer import Denied
from ..lab import Host, wait_for
from ..proxy import ProxyProcess
from .conftest import DENIED, ROUNDS, TARGET, EchoServer, StartEcho

pytestmark = [pytest.mark.root, pytest.mark.ebpf, pytest.mark.timeout(240 if not ROUNDS else 20 + 20 * ROUNDS)]

NEW = "{ http = {} }"
"""What serves after a reload: it answers to what the echo service would give back."""


# When, and of which configuration the worker is that dies.
STEPS = (
    ("the first new worker is started", "new"),
    ("all new workers are started", "old"),
    ("all new workers could serve", "new"),
    ("the new configuration is in force", "old"),
    ("the new configuration is in force", "new"),
)


def _has_come(proxy: ProxyProcess, step: str, old: set[int]) -> bool:
    if proxy.logged("reload"):  # it is over
        return True
    new = set(proxy.workers()) - old
    if step == "the first new worker is started":
        return bool(new)
    if step == "all new workers are started":
        return len(new) == 2
    return "could" in step and sum("worker" in line and " serves (pid" in line for line in proxy.log) >= 2


def _configure(server: EchoServer, *, new: bool) -> None:
    text = server.file.read_text()
    server.file.write_text(text.replace(*(("{ echo = {} }", NEW) if new else (NEW, "{ echo = {} }"))))


def _served_by(host: Host) -> str:
    """Which configuration serves a client: the one that echoes, or the one that answers."""
    with host.connect(*TARGET, source="198.18.1.1") as sock:
        sock.sendall(b"nonsense\r\n\r\n")
        try:
            answer = sock.recv(100)
        except ConnectionResetError:
            return "reset"
    return "old" if answer.startswith(b"nonsense") else "new"


def test_a_worker_that_dies_at_any_step_of_a_reload_leaves_one_configuration(start_echo: StartEcho) -> None:
    """After "reloaded" all clients are served by the new configuration, after a refusal all by the old one."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    server = start_echo(server='[logging]\nlevel = "debug"')
    proxy, new = server.proxy, False
    with Denied(server.host, DENIED, [TARGET]) as denied:
        for number in range((ROUNDS + 4) // 5 or len(STEPS)):
            step, whose = STEPS[number % len(STEPS)]
            new = not new
            _configure(server, new=new)
            old_workers = set(proxy.workers())
            proxy.log.clear()
            proxy.signal(signal.SIGHUP)
            wait_for(lambda s=step, o=old_workers: _has_come(proxy, s, o), timeout=60, what=step)
            victims = [pid for pid in proxy.workers() if (pid in old_workers) == (whose == "old")]
            for pid in chance.sample(victims, min(len(victims), chance.choice((1, 1, 2)))):
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda: proxy.logged(": reloaded$|reload failed"), timeout=60, what="the reload's end")
            if not proxy.logged(": reloaded$"):
                new = not new
                _configure(server, new=new)
            wait_for(server.serves_by_all, timeout=60, what="all workers")
            found = {_served_by(server.host) for _ in range(24)} - {"reset"}
            assert found == {"new" if new else "old"}, proxy.log
    assert denied.got_in == []
    assert not proxy.logged("Traceback"), proxy.log


def test_150_requests_to_reload_are_a_few_reloads_and_cut_nobody(start_echo: StartEcho) -> None:
    server = start_echo(server="")
    server.file.write_text(server.file.read_text().replace('drain = "1s"', 'drain = "5m"'))
    server.proxy.signal(signal.SIGHUP)
    wait_for(lambda: server.proxy.logged(": reloaded$"), timeout=60, what="the first reload")
    server.wait_until_whole()
    with server.host.connect(*TARGET, source="198.18.1.1") as sock, Denied(server.host, DENIED, [TARGET]) as denied:
        server.proxy.log.clear()
        for _ in range(150):
            server.proxy.signal(signal.SIGHUP)
        wait_for(lambda: server.proxy.logged(": reloaded$"), timeout=60, what="a reload")
        server.wait_until_whole()
        sock.sendall(b"still here")
        assert sock.recv(100) == b"still here"
        count = sum(": reloaded" in line for line in server.proxy.log)
        assert count <= 4, f"{count} reloads"
    assert denied.got_in == []
    server.proxy.signal(signal.SIGTERM)
    server.proxy.signal(signal.SIGTERM)
    assert server.proxy.wait() == 0
