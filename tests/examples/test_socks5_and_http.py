from __future__ import annotations

from .conftest import RunExample


def test_both_protocols_on_one_port_each_with_its_users(run_example: RunExample, web: str, curl) -> None:
    run_example("socks5_and_http:proxy", "--allow-egress", "127.0.0.1", listen="127.0.0.1:62023")
    target = "http://127.0.0.1:8080/"
    for proxy in ("http://tom:clancy@", "socks5h://john:secret@", "socks5://john:secret@"):
        page = curl("--proxy", f"{proxy}127.0.0.1:62023", target)
        assert page.stdout == web, page.stderr
    assert curl("--proxy", "http://tom:clancy@127.0.0.1:62023", "--proxytunnel", target).stdout == web
    for proxy in ("http://john:secret@", "socks5h://tom:clancy@", "socks5h://"):
        assert curl("--proxy", f"{proxy}127.0.0.1:62023", target).stdout != web
