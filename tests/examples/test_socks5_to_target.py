from __future__ import annotations

from .conftest import RunExample


def test_socks5_reaches_its_target(run_example: RunExample, web: str, curl) -> None:
    run_example("socks5_to_target:proxy", "--allow-egress", "127.0.0.1")
    assert curl("--socks5-hostname", "127.0.0.1:1080", "http://127.0.0.1:8080/").stdout == web
