"""Sets that are swapped while SYNs pour in: each packet is judged by one of the two, at whatever hook it is judged."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from ..conftest import StartProxy
from ..lab import Host, Lab
from ..policy.frames import ethernet, syn_over_ipv4
from .test_gate import PORT

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

SWAPS = 6
FILLERS = 200_000
"""Prefixes that each set holds besides, so that a swap takes its time."""
FLOOD = int(IPv4Address("198.19.0.0"))


def policy(directory: Path, name: str, seed: int) -> Path:
    """A file of rules that drops each half of the flood by a rule of its own; the default lets everybody in."""
    pick = random.Random(seed)
    feed = directory / f"{name}.txt"
    feed.write_text("".join(f"{IPv4Address(pick.randrange(1 << 22, 1 << 29) << 2)}/30\n" for _ in range(FILLERS)))
    text = 'default = "allow"\n'
    for rule, whom in (
        ("low", 'sources = ["198.19.0.0/17"]'),
        ("high", 'sources = ["198.19.128.0/17"]'),
        ("filler", f'feed = {{ file = "{feed}" }}'),
    ):
        text += f'[[rules]]\nname = "{name}-{rule}"\naction = "drop"\n{whom}\n'
    path = directory / f"{name}.toml"
    path.write_text(text)
    return path


def hardware_address(host: Host) -> bytes:
    words = host.run("ip", "-brief", "link", "show", "dev", "eth0").stdout.split()
    return bytes.fromhex(words[2].replace(":", ""))


class Flood(threading.Thread):
    """SYNs to the proxy from all of 198.19.0.0/16, until it is told to end; a context manager."""

    def __init__(self, client: Host, server: Host) -> None:
        super().__init__(daemon=True)
        self.sent = 0
        self._ending = threading.Event()
        self._sock = client.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self._sock.bind(("eth0", 0))
        head = hardware_address(server) + hardware_address(client)  # a bridge drops frames from nobody
        pick = random.Random(7)
        self._frames = []
        for _ in range(4096):
            source = IPv4Address(FLOOD + pick.randrange(1 << 16))
            packet = syn_over_ipv4(source, IPv4Address(server.ipv4), PORT, pick.randrange(1024, 65_536))
            self._frames.append(head + ethernet(packet)[12:])

    def run(self) -> None:
        while not self._ending.is_set():
            for frame in self._frames:
                with contextlib.suppress(OSError):  # ENOBUFS: the queue is full
                    self._sock.send(frame)
                    self.sent += 1

    def __enter__(self) -> Flood:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._ending.set()
        self.join()
        self._sock.close()


@pytest.mark.parametrize("hook", ["xdp", "cgroup"])
def test_no_syn_is_judged_by_a_mix_of_two_sets_that_are_swapped_under_a_flood(
    lab: Lab, start_proxy: StartProxy, tmp_path: Path, hook: str
) -> None:
    """Both sets deny every source of the flood, each by its own rules: whoever got through met with neither."""
    server, client = lab.host("proxy"), lab.host("client")
    server.ip("route", "add", "198.19.0.0/16", "via", client.ipv4)  # so an answer would be seen
    options = ("--xdp", "eth0") if hook == "xdp" else ()
    proxy = start_proxy(server, "--listen", f"{server.ipv4}:{PORT}", *options)
    sets = policy(tmp_path, "one", 1), policy(tmp_path, "two", 2)
    proxy.command("policy", "load", str(sets[0]))
    decided: dict[str, int] = {}
    with client.capture("eth0") as capture, Flood(client, server) as flood:
        for swap in range(SWAPS):
            proxy.command("policy", "load", str(sets[(swap + 1) % 2]))
            for row in proxy.json("list")["rules"]:
                decided[row["name"]] = decided.get(row["name"], 0) + row["hits"]
            answers = [segment for segment in capture.read(0.05) if segment.sport == PORT]
            assert answers == []
    counted = {(row["hook"], row["stage"], row["action"]): row["count"] for row in proxy.json("status")["verdicts"]}
    assert set(counted) == {(hook, "rule", "drop")}, counted
    assert 10_000 < counted[hook, "rule", "drop"] <= flood.sent
    assert all(decided[f"{name}-{half}"] > 100 for name in ("one", "two") for half in ("low", "high")), decided
    assert proxy.accepted() == 0
