from __future__ import annotations

from ..lab import Host, wait_for
from .conftest import RunExample, dropped


def test_asking_for_a_scanners_port_bans_in_the_kernel(run_example: RunExample, host: Host, web: str, curl) -> None:
    proxy = run_example("banning_layer:proxy", "--allow-egress", "127.0.0.1")
    through = ("--socks5-hostname", "127.0.0.1:1080")
    assert curl(*through, "--interface", "127.0.5.5", "http://127.0.0.1:8080/").stdout == web
    curl(*through, "--interface", "127.0.5.5", "telnet://127.0.0.1:23")
    bans = wait_for(lambda: proxy.json("list")["bans"], what="the ban")
    assert [(ban["address"], ban["reason"]) for ban in bans] == [("127.0.5.5", "asked for port 23")]
    assert dropped(host, 1080, "127.0.5.5")
    assert curl(*through, "http://127.0.0.1:8080/").stdout == web
