from __future__ import annotations

from pathlib import Path

from .conftest import RunExample


def test_an_http_proxy_is_reached_over_tls(run_example: RunExample, certificate: Path, web: str, curl) -> None:
    run_example("https_to_target:proxy", "--allow-egress", "127.0.0.1", listen="127.0.0.1:8443")
    here = ("--proxy-cacert", str(certificate), "--resolve", "proxy.example:8443:127.0.0.1")
    target = "http://127.0.0.1:8080/"
    for tunnel in ((), ("--proxytunnel",)):
        page = curl(*here, "--proxy", "https://tom:secret@proxy.example:8443", *tunnel, target)
        assert page.stdout == web, page.stderr
    status = ("--output", "/dev/null", "--write-out", "%{http_code}")
    assert curl(*here, "--proxy", "https://proxy.example:8443", *status, target).stdout == "407"
