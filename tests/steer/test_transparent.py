"""A router takes connections that go through it: they are judged, proxied to where they were meant, and its rules and
routes are gone with the server."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from rama_ebpf.kernel.instance import Instance

from ..conftest import StartProxy
from ..lab import Host, Lab, wait_for
from ..proxy import rama_ebpf

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

TARGET = "198.19.0.9"
RAMA = """
[listeners.through]
listen = ["198.19.0.0/16:80-90"]
transparent = true
stack = "transparent"
[stacks.transparent]
service = "transparent"
[egress]
allow = ["198.19.0.0/16"]
[server]
workers = 1
drain = "1s"
"""


def _rules(host: Host) -> list[str]:
    """Rules and routes, but for those that the kernel makes by itself."""
    shown = (["rule"], ["-6", "rule"], ["route", "show", "table", "all"], ["-6", "route", "show", "table", "all"])
    lines = [line for words in shown for line in host.run("ip", *words).stdout.splitlines()]
    return [line for line in lines if "proto kernel" not in line]


def test_routed_connections_are_taken_judged_and_reach_their_targets(
    lab: Lab, instance: str, start_proxy: StartProxy, tmp_path: Path
) -> None:
    proxy, client, target = lab.host("proxy"), lab.host("client"), lab.host("target")
    target.ip("address", "add", f"{TARGET}/32", "dev", "lo")
    proxy.ip("route", "add", "198.19.0.0/16", "via", target.ipv4)
    client.ip("route", "add", "198.19.0.0/16", "via", proxy.ipv4)
    file, before = tmp_path / "rama.toml", _rules(proxy)
    file.write_text(RAMA)
    with target.socket() as server:
        server.bind((TARGET, 80))
        server.listen()
        running = start_proxy(proxy, "--config", str(file))
        with client.connect(TARGET, 80) as sock:
            accepted, (source, _) = server.accept()
            with accepted:
                assert source == proxy.ipv4
                sock.sendall(b"question")
                assert accepted.recv(8) == b"question"
                accepted.sendall(b"answer")
                assert sock.recv(6) == b"answer"
        wait_for(lambda: running.logged(rf"target={TARGET}:80"), what="the line of the access log")
        rama_ebpf("block", "--instance", instance, client.ipv4)
        with pytest.raises(TimeoutError):
            client.connect(TARGET, 80, timeout=0.3)
    running.signal(signal.SIGKILL)
    running.wait()
    wait_for(lambda: Instance(instance).serving_pid() is None, what="the end of its workers")
    assert _rules(proxy) != before
    proxy.run(running.COMMAND, "unload", "--instance", instance)
    assert _rules(proxy) == before
    running.start()
    assert _rules(proxy) != before
    running.signal(signal.SIGTERM)
    assert running.wait() == 0
    assert _rules(proxy) == before
