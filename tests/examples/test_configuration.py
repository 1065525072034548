from __future__ import annotations

from pathlib import Path

from ..lab import Host
from .conftest import EXAMPLES, RunExample


def test_the_example_configuration_is_good_and_serves(
    run_example: RunExample, directory: Path, host: Host, web: str, curl
) -> None:
    proxy = run_example("rama.toml")
    checked = host.run(proxy.COMMAND, "check", str(EXAMPLES / "rama.toml"))
    assert "good: office on 127.0.0.1:1080, builds on 127.0.0.1:3128" in checked.stdout
    host.run("sh", "-c", f"cd {directory} && echo secret | {proxy.COMMAND} passwd tom >> users.txt")
    status = ("--output", "/dev/null", "--write-out", "%{http_code}")
    # Egress refuses loopback, where the tests' web server is: a clean refusal shows that all before it has passed.
    refused = curl(*status, "--proxy", "http://127.0.0.1:3128", "http://127.0.0.1:8080/")
    assert refused.stdout == "403"
    socks = curl("--proxy", "socks5h://tom:secret@127.0.0.1:1080", "http://127.0.0.1:8080/")
    assert "Can't complete SOCKS5 connection to 127.0.0.1. (2)" in socks.stderr  # not allowed by the rule set
    guessed = curl("--proxy", "socks5h://tom:guess@127.0.0.1:1080", "http://127.0.0.1:8080/")
    assert "User was rejected" in guessed.stderr
    assert {rule["name"] for rule in proxy.json("list")["rules"]} == {"abuse"}
