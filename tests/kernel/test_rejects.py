"""A `reject`: who sends the RST, XDP or the stack, and that no more are sent than so many."""

from __future__ import annotations

import random
import time
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from ..conftest import StartProxy
from ..lab import Lab, wait_for
from ..proxy import ProxyProcess
from .test_gate import FAMILIES, PORT, Scene
from .test_syn_cookies import forged, spoof
from .test_xdp import listen

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

FLOOD = IPv4Network("198.19.0.0/16")
BY = pytest.mark.parametrize("by", ["xdp", "lookup"])


def rejected(proxy: ProxyProcess) -> dict[str, int]:
    """How many SYNs each hook has rejected."""
    found: dict[str, int] = {}
    for row in proxy.json("status")["verdicts"]:
        if row["action"] == "reject":
            found[row["hook"]] = found.get(row["hook"], 0) + row["count"]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_xdp_answers_a_rejected_client_at_once(lab: Lab, start_proxy: StartProxy, family: int) -> None:
    server, client = lab.host("proxy", takes_xdp=True), lab.host("client")
    scene = Scene(start_proxy(server, *listen(server, "--xdp", "eth0")), server, client)
    assert scene.greet(family) == b"\x05\x00"
    scene.proxy.command("block", scene.source(family), "--reject")
    with pytest.raises(ConnectionRefusedError):
        client.connect(scene.address(family), PORT, timeout=2)
    assert rejected(scene.proxy) == {"xdp": 1}
    scene.proxy.command("unblock", scene.source(family))
    assert scene.greet(family) == b"\x05\x00"


@BY
@pytest.mark.parametrize("family", FAMILIES)
def test_beyond_their_rate_rejects_are_silent_and_an_operator_sees_how_many(
    lab: Lab, start_proxy: StartProxy, tmp_path: Path, family: int, by: str
) -> None:
    server, client = lab.host("proxy", takes_xdp=True), lab.host("client")
    config = tmp_path / "rama.toml"
    config.write_text(
        f'listeners.four = {{ address = "{server.ipv4}:{PORT}", stack = "main" }}\n'
        f'listeners.six = {{ address = "[{server.ipv6}]:{PORT}", stack = "main" }}\n'
        'stacks.main.service.socks5 = {}\nserver.metrics = "127.0.0.1:9464"\n'
        f'[policy]\ndefault = "reject"\nrejects = {{ rate = "4/h", burst = 2 }}\n'
        f"xdp = {['eth0'] if by == 'xdp' else []}\n"
    )
    scene = Scene(start_proxy(server, "--config", str(config)), server, client)
    answers = [{segment.flags for segment in scene.attempt(family)} for _ in range(3)]
    assert answers == [{"RA"}, {"RA"}, set()]
    silent = scene.proxy.json("status")["silent_rejects"]
    assert silent >= 1
    assert rejected(scene.proxy) == ({"xdp": 2 + silent} if by == "xdp" else {"lookup": 2, "cgroup": silent})
    assert f"{silent} of those rejected got no RST" in scene.proxy.command("status").stdout
    with server.connect("127.0.0.1", 9464) as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        text = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
    assert f"\nrama_silent_rejects_total {silent}.0\n" in text
    assert scene.proxy.accepted() == 0


@BY
def test_flood_of_forged_sources_is_not_reflected(lab: Lab, start_proxy: StartProxy, by: str) -> None:
    server, client = lab.host("proxy", takes_xdp=True), lab.host("client")
    server.ip("route", "add", str(FLOOD), "via", client.ipv4)
    proxy = start_proxy(server, *listen(server, *(("--xdp", "eth0") if by == "xdp" else ())))
    scene = Scene(proxy, server, client)
    proxy.command("block", str(FLOOD), "--reject")
    pick = random.Random(6)
    packets = [forged(scene, FLOOD[pick.randrange(1, 65535)], pick.randrange(1024, 65535)) for _ in range(4000)]
    with client.capture("eth0") as capture:
        begun = time.monotonic()
        spoof(scene, packets)
        wait_for(lambda: sum(rejected(proxy).values()) == len(packets))
        seconds = time.monotonic() - begun
        resets = sum(segment.flags == "RA" for segment in capture.read(1.0))
    assert 50 <= resets <= 60 + 1000 * seconds
    assert resets < len(packets) // 2
    assert proxy.json("status")["silent_rejects"] == len(packets) - resets
