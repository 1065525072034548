"""``rama-ebpf run`` with TLS in its configuration: unprivileged workers, the real gate, real clients."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..conftest import StartProxy
from ..lab import Host, Lab, temporary_directory, wait_for
from ..proxy import ProxyProcess, rama_ebpf
from .pki import Authority

CONFIGURATION = """
[server]
workers = 1

[listeners.front]
address = "127.0.0.1:8443"
stack = "front"

[listeners.proxy]
address = "127.0.0.1:8444"
stack = "proxy"

[stacks.front]
layers = [{ strikes = { strikes = 1 } }]
[stacks.front.service.tls-passthrough]
targets = { "site.test" = "127.0.0.1:9443" }
rules = [{ name = "no-bad", sni = [".bad.test"], action = "strike" }]

[stacks.proxy]
service = "http"
[[stacks.proxy.layers]]
tls = { chain = "proxy.test.crt", key = "proxy.test.key", alpn = ["http/1.1"] }
[[stacks.proxy.layers]]
[stacks.proxy.layers.tls-tunnel]
rules = [{ name = "no-bad", sni = [".bad.test"], action = "close" }]
intercept = { ca = "ca.pem", ca_key = "ca.key", upstream_ca = "tests-CA.pem", bypass = ["bank.test"], learn = true }

[egress]
allow = ["127.0.0.1/32"]
"""

Curl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that unprivileged workers can reach, which tmp_path is not."""
    with temporary_directory() as made:
        yield made


@pytest.fixture
def host(lab: Lab) -> Host:
    return lab.host("proxy")


@pytest.fixture
def curl(host: Host) -> Curl:
    """Run curl in the namespace."""

    def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
        return host.run("curl", "-sS", "--max-time", "20", *map(str, args), check=False, timeout=60)

    return run


@pytest.fixture
def site(host: Host, directory: Path) -> Authority:
    """``openssl s_server`` on port 9443 with a certificate for site.test and bank.test; returns its authority."""
    authority = Authority(directory)
    leaf = authority.issue("site.test", "bank.test", "www.bad.test")
    root = directory / "www"
    root.mkdir()
    (root / "page").write_text("the page\n")
    host.popen(
        *("openssl", "s_server", "-accept", "127.0.0.1:9443", "-WWW", "-quiet"),
        *("-cert", str(leaf.chain), "-key", str(leaf.key)),
        cwd=root,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(200):
        with contextlib.suppress(ConnectionRefusedError):
            host.connect("127.0.0.1", 9443).close()
            return authority
        threading.Event().wait(0.05)
    raise AssertionError("openssl s_server does not come up")


@pytest.fixture
def proxy(start_proxy: StartProxy, host: Host, directory: Path, site: Authority) -> ProxyProcess:
    site.issue("proxy.test")
    rama_ebpf("ca", "create", "--cert", str(directory / "ca.pem"), "--key", str(directory / "ca.key"))
    (directory / "rama.toml").write_text(CONFIGURATION)
    return start_proxy(host, "--config", "rama.toml", cwd=directory)


def test_tunnels_of_an_https_proxy_are_judged_intercepted_and_passed_through(
    proxy: ProxyProcess, curl: Curl, directory: Path, site: Authority
) -> None:
    def fetch(name: str, ca: Path) -> tuple[int, str]:
        done = curl(
            *("--proxy", "https://proxy.test:8444", "--proxy-cacert", site.certificate),
            *("--resolve", "proxy.test:8444:127.0.0.1", "--connect-to", f"{name}:443:127.0.0.1:9443"),
            *("--cacert", ca, f"https://{name}/page"),
        )
        return done.returncode, done.stdout

    assert fetch("site.test", directory / "ca.pem") == (0, "the page\n")
    # curl refuses a certificate with 60, or inside TLS to the proxy with 35.
    assert fetch("bank.test", directory / "ca.pem")[0] in (35, 60)  # it sees the server's own
    assert fetch("bank.test", site.certificate) == (0, "the page\n")
    assert fetch("www.bad.test", site.certificate)[0] == 35
    wait_for(lambda: proxy.logged("TLS rule no-bad: server name www.bad.test"), what="its log line")
    # A client that does not trust our authority is intercepted once, and then no more.
    assert fetch("site.test", site.certificate)[0] in (35, 60)
    wait_for(lambda: proxy.logged("alert unknown ca"), what="its log line")
    assert fetch("site.test", site.certificate) == (0, "the page\n")


def test_a_strike_of_the_passthrough_listener_bans_in_the_kernel(
    proxy: ProxyProcess, curl: Curl, host: Host, site: Authority
) -> None:
    def fetch(name: str, source: str) -> tuple[int, str]:
        done = curl(
            *("--cacert", site.certificate, "--interface", source, "--connect-timeout", "2"),
            *("--connect-to", f"{name}:443:127.0.0.1:8443", f"https://{name}/page"),
        )
        return done.returncode, done.stdout

    assert fetch("site.test", "127.0.6.1") == (0, "the page\n")
    before = proxy.accepted()
    assert fetch("www.bad.test", "127.0.6.1")[0] == 35
    bans = wait_for(lambda: proxy.json("list")["bans"], what="the ban")
    assert [(ban["address"], ban["reason"]) for ban in bans] == [("127.0.6.1", "1 strikes, the last: tls_strike")]
    assert fetch("site.test", "127.0.6.1")[0] == 28  # no answer to its SYN
    assert proxy.accepted() == before + 1
    assert fetch("site.test", "127.0.6.2") == (0, "the page\n")
