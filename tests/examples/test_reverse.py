from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import DEVNULL, Popen

import pytest

from ..lab import Host, wait_for
from .conftest import RunExample

StartBackend = Callable[[int, str], "Popen[str]"]


@pytest.fixture
def backend(host: Host, tmp_path: Path) -> StartBackend:
    """A web server of Python's on a port of 127.0.0.1, whose page says ``text``."""

    def start(port: int, text: str) -> Popen[str]:
        root = tmp_path / text
        (root / "private").mkdir(parents=True, exist_ok=True)
        (root / "index.html").write_text(text)
        (root / "private/index.html").write_text(f"private {text}")
        where = ("--bind", "127.0.0.1", "--directory", str(root))
        return host.popen("python3", "-m", "http.server", str(port), *where, stdout=DEVNULL, stderr=DEVNULL)

    return start


def test_two_backends_behind_https_of_which_one_dies_and_returns(
    run_example: RunExample, host: Host, certificate: Path, backend: StartBackend, curl
) -> None:
    backend(8080, "one")
    other = backend(8081, "two")
    proxy = run_example("reverse.toml")
    here = ("--cacert", str(certificate), "--resolve", "proxy.example:8443:127.0.0.1")

    def get(path: str = "/", *args: str) -> str:
        return str(curl(*here, *args, f"https://proxy.example:8443{path}").stdout)

    def pages() -> set[str]:
        return {get() for _ in range(6)}

    status = ("--output", "/dev/null", "--write-out", "%{http_code} %{http_version}")
    wait_for(lambda: pages() == {"one", "two"}, timeout=30, what="both backends")
    assert get("/", *status) == "200 2"
    assert get("/", "--http1.1", *status) == "200 1.1"
    assert get("/private/") == "private two"
    assert get("/private/", *status, "--data", "x") == "501 2"  # the other route's: Python's server knows no POST
    assert get("/a/../b", "--path-as-is", *status) == "400 2"
    large = ("--data-binary", "@-", "--header", "Content-Length: 20000000")
    assert get("/", "--http1.1", *status, *large).startswith("413")

    other.kill()
    other.wait()
    assert pages() == {"one"}  # a request whose backend is gone moves on to the other
    wait_for(lambda: proxy.logged("backend 127.0.0.1:8081 is down"), timeout=30, what="the check")
    assert get("/private/", *status) == "502 2"
    backend(8081, "two")
    wait_for(lambda: pages() == {"one", "two"}, timeout=30, what="the return of the backend")
