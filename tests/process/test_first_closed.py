"""First closed, last open: through stops and reloads nobody gets in whom the policy keeps out."""

from __future__ import annotations

import os
import signal
import socket
import struct
from pathlib import Path

import pytest

from rama_ebpf.kernel.instance import Instance

from ..conftest import StartProxy
from ..hammer import Denied
from ..lab import Host, Lab, wait_for
from ..proxy import rama_ebpf

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

DENIED, ALLOWED = "127.0.0.9", "127.0.0.5"

LISTENER = '[listeners.main]\naddress = "127.0.0.1:1080"\nstack = "echo"\n'
ADMIN = '[listeners.admin]\naddress = "127.0.0.1:1081"\nstack = "echo"\n'
STACK = '[stacks.echo]\nservice = {echo = {}}\n[server]\nworkers = 2\ndrain = "1s"\n'
ADMIN_RULE = '[[policy.rules]]\nname = "admin"\naction = "drop"\nport = 1081\nsources = ["127.0.0.9/32"]\n'


@pytest.fixture
def host(lab: Lab) -> Host:
    return lab.host("proxy")


def configuration(path: Path, *, admin: bool, default: str = "allow") -> None:
    text = LISTENER + (ADMIN if admin else "") + STACK + f'[policy]\ndefault = "{default}"\n'
    path.write_text(text + (ADMIN_RULE if admin else ""))


def test_denied_source_gets_in_at_no_moment_of_a_stop(
    host: Host, instance: str, start_proxy: StartProxy, tmp_path: Path
) -> None:
    file = tmp_path / "rama.toml"
    configuration(file, admin=False)
    proxy = start_proxy(host, "--config", str(file))
    rama_ebpf("block", "--instance", instance, DENIED)
    with Denied(host, [DENIED], [("127.0.0.1", 1080)]) as hammer:
        wait_for(lambda: hammer.tries > 3, what="tries before the stop")
        workers = proxy.workers()
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)  # busy: their listening sockets stay open after the signal
        proxy.signal(signal.SIGTERM)
        before = hammer.tries
        wait_for(lambda: hammer.tries > before + 10, what="tries while workers are busy")
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        proxy.wait()
    assert hammer.got_in == []


def test_new_listener_is_under_its_new_rule_from_the_first_moment_of_a_reload(
    host: Host, start_proxy: StartProxy, tmp_path: Path
) -> None:
    file = tmp_path / "rama.toml"
    configuration(file, admin=False)
    proxy = start_proxy(host, "--config", str(file))
    configuration(file, admin=True)
    with Denied(host, [DENIED], [("127.0.0.1", 1081)]) as hammer:
        wait_for(lambda: hammer.tries > 3, what="tries before the reload")
        proxy.signal(signal.SIGHUP)
        wait_for(lambda: any(line.endswith(": reloaded") for line in proxy.log), timeout=30, what="the reload")
        before = hammer.tries
        wait_for(lambda: hammer.tries > before + 3, what="tries after the reload")
    assert hammer.got_in == []
    with host.connect("127.0.0.1", 1081, source=ALLOWED) as sock:
        sock.sendall(b"hello")
        assert sock.recv(5) == b"hello"


def test_who_waits_during_a_reload_is_judged_by_the_policy_of_the_stack_that_serves(
    host: Host, start_proxy: StartProxy, tmp_path: Path
) -> None:
    file = tmp_path / "rama.toml"
    configuration(file, admin=False)
    proxy = start_proxy(host, "--config", str(file))
    workers = proxy.workers()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    waiting = host.connect("127.0.0.1", 1080, source=ALLOWED)  # the old policy lets it into a queue
    configuration(file, admin=False, default="drop")
    proxy.signal(signal.SIGHUP)
    wait_for(lambda: len(proxy.workers()) == 4, timeout=30, what="the new workers")
    with waiting:
        wait_for(lambda: any(line.endswith(": reloaded") for line in proxy.log), timeout=60, what="the reload")
        with pytest.raises(ConnectionResetError):
            waiting.recv(1)


def test_whoever_changes_the_policy_for_long_holds_up_a_reload_and_no_client(
    host: Host, instance: str, start_proxy: StartProxy, tmp_path: Path
) -> None:
    file = tmp_path / "rama.toml"
    configuration(file, admin=False)
    proxy = start_proxy(host, "--config", str(file))
    configuration(file, admin=True)
    connected = 0
    with Instance(instance).policy_lock():
        proxy.signal(signal.SIGHUP)

        def refused() -> bool:
            nonlocal connected
            with host.connect("127.0.0.1", 1080, source=ALLOWED) as sock:
                # Behind a gate that is closed the first SYN gets no answer, and is sent again.
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
                assert struct.unpack_from("I", info, 100) == (0,), "a SYN was lost"  # tcpi_total_retrans
                connected += 1
            return proxy.logged("reload failed, .* is being changed by somebody else")

        wait_for(refused, timeout=30, what="the end of the server's patience")
    assert connected > 10
    proxy.signal(signal.SIGHUP)
    wait_for(lambda: proxy.logged(": reloaded$"), timeout=30, what="the reload")
