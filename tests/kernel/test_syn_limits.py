"""SYN limits on what the default lets in: for each source, /32 or /64, and for all together."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ..conftest import StartProxy
from ..lab import Lab
from .test_gate import PORT, Scene

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

NEIGHBOUR, ELSEWHERE, OTHER = "2001:db8::77", "2001:db8:1::1", "198.18.77.7"


def test_sources_and_all_together_get_in_up_to_their_limits_and_the_failsafe_beyond(
    lab: Lab, start_proxy: StartProxy, tmp_path: Path
) -> None:
    server, client = lab.host("proxy"), lab.host("client")
    for address in (f"{NEIGHBOUR}/64", f"{ELSEWHERE}/128", f"{OTHER}/16", "198.18.99.9/16"):
        client.add_address(address, "eth0")
    server.ip("-6", "route", "add", "2001:db8:1::/64", "dev", "eth0")
    config = tmp_path / "rama.toml"
    config.write_text(
        f'listeners.four = {{ address = "{server.ipv4}:{PORT}", stack = "main" }}\n'
        f'listeners.six = {{ address = "[{server.ipv6}]:{PORT}", stack = "main" }}\n'
        "stacks.main.service.socks5 = {}\n"
        '[policy]\nfailsafe = ["198.18.99.9/32"]\nxdp = ["eth0"]\n'
        'per_source = { rate = "4/h", burst = 2 }\noverall = { rate = "4/h", burst = 6 }\n'
    )
    proxy = start_proxy(server, "--config", str(config))
    scene = Scene(proxy, server, client)

    def gets_in(source: str) -> bool:
        family = socket.AF_INET6 if ":" in source else socket.AF_INET
        return bool(scene.attempt(family, source))

    assert gets_in(client.ipv4)
    assert gets_in(client.ipv4)
    assert not gets_in(client.ipv4)
    # Two addresses of one /64 are one source, another /64 is another.
    assert gets_in(client.ipv6)
    assert gets_in(NEIGHBOUR)
    assert not gets_in(NEIGHBOUR)
    assert not gets_in(client.ipv6)
    assert gets_in(ELSEWHERE)
    assert gets_in(ELSEWHERE)
    # That were six, which is what all may have together.
    assert not gets_in(OTHER)
    assert gets_in("198.18.99.9")
    # A rule that lets a source in is not under the limits of the default.
    proxy.command("allow", OTHER)
    assert gets_in(OTHER)
    rows = {(row["hook"], row["stage"], row["action"]) for row in proxy.json("status")["verdicts"]}
    assert ("xdp", "limit", "drop") in rows  # a SYN beyond the limit goes no further than the interface
