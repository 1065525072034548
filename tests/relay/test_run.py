"""The relay as operators see it: configured by listener, loaded when it is wanted, in ``status`` and in ``flows``."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from rama_ebpf.cli.flows import live_flows
from rama_ebpf.kernel.instance import Instance

from ..conftest import StartProxy
from ..lab import Host, Lab, wait_for
from ..proxy import ProxyProcess, rama_ebpf

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

CONFIG = """
[server]
workers = 2
drain = "60s"

[egress]
allow = ["127.0.0.0/8"]

[listeners.kernel]
address = "127.0.0.1:1080"
stack = "socks"
relay = "{relay}"

[listeners.copying]
address = "127.0.0.1:1081"
stack = "socks"
relay = "copy"

[stacks.socks]
service = {{ socks5 = {{}} }}
"""


@pytest.fixture
def host(lab: Lab) -> Host:
    return lab.host("proxy")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "rama.toml"
    path.write_text(CONFIG.format(relay="sockmap"))
    return path


@contextmanager
def tunnel(host: Host, port: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client, and the target to which the proxy at ``port`` has connected it."""
    with host.socket() as listener:
        listener.settimeout(10)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        target = listener.getsockname()[1]
        with host.connect("127.0.0.1", port) as client:
            client.sendall(b"\5\1\0" + b"\5\1\0\1" + bytes((127, 0, 0, 1)) + target.to_bytes(2, "big"))
            answer = b""
            while len(answer) < 12:
                answer += client.recv(12 - len(answer))
            assert answer[3] == 0
            upstream, _ = listener.accept()
            upstream.settimeout(10)
            with upstream:
                yield client, upstream


def ping(ends: tuple[socket.socket, socket.socket], count: int = 3) -> None:
    client, upstream = ends
    for _ in range(count):
        client.sendall(b"ping")
        assert upstream.recv(100) == b"ping"
        upstream.sendall(b"pong")
        assert client.recv(100) == b"pong"


def sockmap_state(proxy: ProxyProcess) -> dict[str, str]:
    return cast("dict[str, str]", Instance(proxy.instance).read_state()["sockmap"])


def ready(proxy: ProxyProcess) -> bool:
    state = sockmap_state(proxy)
    assert state["state"] != "refused", state
    return state["state"] == "ready"


def flows(proxy: ProxyProcess) -> list[dict[str, Any]]:
    return list(live_flows(Instance(proxy.instance))["flows"])


@contextmanager
def tunnel_of(
    host: Host, proxy: ProxyProcess, relay: str, why: str, messages: int = 3
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A tunnel of that kind for that reason: others are opened before, until its worker has heard from the server."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with tunnel(host, 1080) as ends:
            ping(ends, messages)
            source = "{}:{}".format(*ends[0].getsockname())
            [flow] = [flow for flow in flows(proxy) if flow["source"] == source]
            if flow["relay"] == relay and why in flow["why"]:
                yield ends
                return
    raise AssertionError(f"no tunnel by {relay} because of {why!r}, the last one was {flow}")


def tunnel_in_the_kernel(
    host: Host, proxy: ProxyProcess
) -> AbstractContextManager[tuple[socket.socket, socket.socket]]:
    return tunnel_of(host, proxy, "sockmap", "configured")


def test_each_listener_has_its_relay_through_deaths_and_reloads(
    host: Host, start_proxy: StartProxy, config: Path
) -> None:
    """With unprivileged workers, who have nothing but descriptors."""
    proxy = start_proxy(host, "--config", str(config))
    wait_for(lambda: ready(proxy), timeout=60, what="the kernel's relay")
    with tunnel_in_the_kernel(host, proxy) as ends, tunnel(host, 1081) as others:
        ping(others, 5)
        rows = {flow["relay"]: flow for flow in flows(proxy)}
        source = "{}:{}".format(*ends[0].getsockname())
        target = "{}:{}".format(*ends[1].getsockname())
        assert (rows["sockmap"]["source"], rows["sockmap"]["target"]) == (source, target)
        assert (rows["sockmap"]["why"], rows["copy"]["why"]) == ("configured", "configured")
        assert (rows["sockmap"]["to_upstream"], rows["copy"]["to_client"]) == (12, 20)
        shown = proxy.command("flows").stdout
        assert "SPILLS" in shown
        assert target in shown
        assert "sockmap relay: ready" in proxy.command("status").stdout
        assert "passed the self-test" in rama_ebpf("doctor", check=False).stdout
    wait_for(lambda: not flows(proxy), timeout=60, what="the end of the tunnels")
    ended = {(row["relay"], row["reason"]): row["count"] for row in proxy.json("flows")["ended"]}
    assert ended["sockmap", "eof"] == 1

    # A worker that dies leaves its share to others, and one that drains keeps its own.
    with tunnel_in_the_kernel(host, proxy) as ends:
        for pid in proxy.workers():
            os.kill(pid, signal.SIGKILL)
        for sock in ends:
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
    wait_for(lambda: len(proxy.workers()) == 2, timeout=60, what="new workers")
    with tunnel_in_the_kernel(host, proxy) as ends:
        proxy.signal(signal.SIGHUP)
        wait_for(lambda: proxy.logged("reloaded"), timeout=60, what="the reload")
        ping(ends)
        with tunnel_in_the_kernel(host, proxy) as others:
            ping(others)
            ping(ends)
            assert [flow["relay"] for flow in flows(proxy)].count("sockmap") == 2


def test_auto_loads_the_kernels_relay_when_a_tunnel_has_talked(
    host: Host, start_proxy: StartProxy, config: Path
) -> None:
    config.write_text(CONFIG.format(relay="auto"))
    proxy = start_proxy(host, "--config", str(config))
    assert sockmap_state(proxy) == {"state": "unused", "why": ""}
    with tunnel(host, 1080) as ends:
        ping(ends)
        assert flows(proxy)[0]["why"] == "auto: both peers are on this host"
        assert sockmap_state(proxy)["state"] == "unused"
        ping(ends, 30)
        wait_for(lambda: ready(proxy), timeout=60, what="the kernel's relay")
    with tunnel_of(host, proxy, "sockmap", "auto: both peers are on this host", 30) as ends:
        ping(ends)


def test_refused_relay_is_said_and_tunnels_go_another_way(
    host: Host, start_proxy: StartProxy, config: Path, tmp_path: Path
) -> None:
    """A compiler that finds no headers stands for whatever the kernel may refuse."""
    config.write_text(
        re.sub(r"(\[listeners\.\w+\]\n)", r'\1gate = "optional"\n', config.read_text())
    )  # it lacks these, too
    proxy = start_proxy(host, "--config", str(config), "--kernel-headers", str(tmp_path / "none"))
    wait_for(lambda: sockmap_state(proxy)["state"] == "refused", timeout=60, what="the refusal")
    why = sockmap_state(proxy)["why"]
    assert "BCC failed" in why
    with tunnel_of(host, proxy, "copy", f"no sockmap: {why}") as ends:
        ping(ends)
    assert "sockmap relay: refused" in proxy.command("status").stdout


def test_record_of_another_kernel_or_program_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rama_ebpf.control.kernel_relay import passed_before

    record = Instance().relay_record
    assert passed_before(tmp_path / "none") is None
    torn = tmp_path / "torn"
    torn.write_text("{")
    assert passed_before(torn) is None
    if record.exists():
        assert passed_before(record) is not None
        monkeypatch.setattr("platform.release", lambda: "6.1.0-999")
        assert passed_before(record) is None
