from __future__ import annotations

from pathlib import Path

from ..lab import Host, wait_for
from .conftest import EXAMPLES, RunExample, dropped


def test_newcomer_fits_on_a_page_and_does_what_it_says(
    run_example: RunExample, directory: Path, host: Host, web: str, curl
) -> None:
    text = (EXAMPLES / "newcomer.py").read_text()
    assert len(text.splitlines()) <= 25
    make_user, run = (line for line in text.splitlines() if line.startswith("rama-ebpf "))
    assert run == "rama-ebpf run newcomer:proxy --metrics 127.0.0.1:9464"

    proxy = run_example("newcomer:proxy", "--metrics", "127.0.0.1:9464", "--allow-egress", "127.0.0.1")
    command = make_user.replace("rama-ebpf", proxy.COMMAND)
    host.run("sh", "-c", f"cd {directory} && echo secret | {command}")

    def through(user: str, source: str = "127.0.3.1") -> str:
        proxied = ("--proxy", f"socks5h://{user}@127.0.0.1:1080", "--interface", source)
        return str(curl(*proxied, "http://127.0.0.1:8080/").stdout)

    assert through("tom:secret") == web
    for _ in range(3):
        assert through("tom:guess", "127.0.3.9") == ""
    # curl ends at the refusal; the ban is in force before the proxy ends its side.
    bans = wait_for(lambda: proxy.json("list")["bans"], what="the ban")
    assert [ban["address"] for ban in bans] == ["127.0.3.9"]
    assert dropped(host, 1080, "127.0.3.9")
    assert through("tom:secret") == web
    metrics = wait_for(lambda: str(curl("http://127.0.0.1:9464/metrics").stdout), what="metrics")
    assert 'rama_errors_total{kind="auth_failed",listener="main"} 3.0' in metrics
    assert 'rama_closed_tunnels_total{listener="main",reason="eof",relay=' in metrics
