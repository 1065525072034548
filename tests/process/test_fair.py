"""The real server beside garbage and guessers: a well-behaved client is served, and never banned or refused."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rama_ebpf.layers.auth import hash_password

from ..conftest import StartProxy
from ..lab import Host, Lab, wait_for
from ..proxy import ProxyProcess, rama_ebpf

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

CONFIG = """
[listeners.main]
address = "127.0.0.1:1080"
stack = "s"
[stacks.s]
service = {service}
layers = [{layers}]
[server]
workers = 1
metrics = "127.0.0.1:9464"
[egress]
allow = ["127.0.0.0/8"]
"""
GARBAGE = b"\xff\xfe\xfd\xfc garbage\r\n"
EXCHANGES = 20


@pytest.fixture
def host(lab: Lab) -> Host:
    return lab.host("proxy")


@pytest.fixture
def echo(host: Host) -> Iterator[int]:
    listener = host.socket(socket.AF_INET)
    listener.bind(("127.0.0.1", 0))
    listener.listen(100)
    listener.settimeout(None)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                client.settimeout(10)
                with client, contextlib.suppress(OSError):
                    client.sendall(client.recv(100))

    thread = threading.Thread(target=serve)
    thread.start()
    yield int(listener.getsockname()[1])
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


@contextlib.contextmanager
def beside(host: Host, count: int, once: Callable[[str], None]) -> Iterator[list[int]]:
    """Run ``once`` again and again in ``count`` threads, each with a source of its own; yields how often."""
    stopping = threading.Event()
    done = [0] * count

    def run(number: int) -> None:
        while not stopping.is_set():
            with contextlib.suppress(OSError):
                once(f"127.0.1.{1 + number}")
            done[number] += 1

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        stopping.set()
        for thread in threads:
            thread.join()


def granted(host: Host, echo: int, login: bytes = b"") -> bool:
    """Whether a well-behaved client is served, to the last byte."""
    with host.connect("127.0.0.1", 1080, source="127.0.0.2") as client:
        client.sendall(b"\x05\x01\x02" if login else b"\x05\x01\x00")
        if client.recv(2)[1:] == b"\xff":
            return False
        if login:
            client.sendall(login)
            if client.recv(2) != b"\x01\x00":
                return False
        client.sendall(b"\x05\x01\x00\x01\x7f\x00\x00\x01" + echo.to_bytes(2, "big"))
        if client.recv(10)[1:2] != b"\x00":
            return False
        client.sendall(b"x")
        return client.recv(1) == b"x"


def serve(start_proxy: StartProxy, host: Host, directory: Path, service: str, layers: str) -> ProxyProcess:
    file = directory / "rama.toml"
    file.write_text(CONFIG.format(service=service, layers=layers))
    return start_proxy(host, "--config", str(file))


@pytest.mark.parametrize("layers", ["", "{ strikes = { strikes = 5 } }"], ids=["no strikes", "strikes"])
def test_garbage_from_many_sources_costs_a_client_nothing_but_time(
    host: Host, start_proxy: StartProxy, echo: int, tmp_path: Path, layers: str
) -> None:
    proxy = serve(start_proxy, host, tmp_path, '"mixed"', layers)

    def garbage(source: str) -> None:
        with host.connect("127.0.0.1", 1080, source=source, timeout=0.3) as client:
            client.sendall(GARBAGE)
            client.recv(1)

    with beside(host, 16, garbage) as sent:
        assert all(granted(host, echo) for _ in range(EXCHANGES))
        wait_for(lambda: min(sent) >= 5, what="garbage of each source", timeout=60)

    def scrape() -> str:
        with urllib.request.urlopen("http://127.0.0.1:9464/metrics", timeout=30) as response:
            return str(response.read().decode())

    counted = r'rama_errors_total\{kind="protocol",listener="main"\} [1-9]'
    wait_for(lambda: re.search(counted, host.call(scrape)), what="the count of garbage", timeout=30)
    lines = [line for line in proxy.log if "connection refused: the first bytes are of no protocol" in line]
    assert len(lines) == 1, lines  # it is counted, and logged once a minute
    assert not proxy.logged("reason=protocol")
    bans = rama_ebpf("list", "--instance", proxy.instance, "--json").stdout
    assert "127.0.0.2" not in bans
    assert ("127.0.1.1" in bans) is bool(layers)


def test_guessers_neither_ban_nor_lock_out_who_has_the_password(
    host: Host, start_proxy: StartProxy, echo: int, tmp_path: Path
) -> None:
    users = tmp_path / "users"
    users.write_text(f"tom:{hash_password('right')}\n")
    users.chmod(0o600)
    tmp_path.chmod(0o755)
    service = f"{{ socks5 = {{ users = {json.dumps(str(users))} }} }}"
    proxy = serve(start_proxy, host, tmp_path, service, "{ strikes = { strikes = 50 } }")

    def guess(source: str) -> None:
        with host.connect("127.0.0.1", 1080, source=source, timeout=10) as client:
            client.sendall(b"\x05\x01\x02\x01\x03tom\x05wrong")
            client.recv(4)

    with beside(host, 20, guess) as guesses:
        assert all(granted(host, echo, b"\x01\x03tom\x05right") for _ in range(EXCHANGES))
        assert sum(guesses) >= 0
    assert "127.0.0.2" not in rama_ebpf("list", "--instance", proxy.instance, "--json").stdout
