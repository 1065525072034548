"""Each example runs as its docstring says, in a directory of its own, in a network namespace, behind the real gate."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..lab import Host, Lab, temporary_directory
from ..proxy import ProxyProcess
from ..tls.pki import Authority

EXAMPLES = Path(__file__).parents[2] / "examples"

RunExample = Callable[..., ProxyProcess]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that unprivileged workers can reach, which tmp_path is not."""
    with temporary_directory() as made:
        yield made


@pytest.fixture
def host(lab: Lab) -> Host:
    return lab.host("proxy")


@pytest.fixture
def run_example(host: Host, instance: str, directory: Path) -> Iterator[RunExample]:
    """Run ``rama-ebpf run NAME:TARGET …`` in a copy of the examples."""
    with contextlib.ExitStack() as cleanup:

        def run(name: str, *args: str, listen: str = "127.0.0.1:1080") -> ProxyProcess:
            shutil.copytree(EXAMPLES, directory, dirs_exist_ok=True)
            arguments = ("--config", name) if name.endswith(".toml") else (name, "--listen", listen)
            proxy = ProxyProcess(host, instance, *arguments, *args, cwd=directory)
            cleanup.callback(proxy.end)
            return proxy.start()

        yield run


@pytest.fixture
def certificate(directory: Path, tmp_path: Path) -> Path:
    """``server.crt`` and ``server.key`` for proxy.example; returns the authority that vouches for them."""
    pki = tmp_path / "pki"
    pki.mkdir()
    authority = Authority(pki)
    leaf = authority.issue("proxy.example")
    shutil.copy(leaf.chain, directory / "server.crt")
    shutil.copy(leaf.key, directory / "server.key")
    return authority.certificate


@pytest.fixture
def web(host: Host, tmp_path: Path) -> str:
    """A web server of Python's in the namespace, on 127.0.0.1 port 8080; returns what its page says."""
    root = tmp_path / "www"
    root.mkdir()
    (root / "index.html").write_text("the page\n")
    host.popen(
        *("python3", "-m", "http.server", "8080", "--bind", "127.0.0.1", "--directory", str(root)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(200):
        with contextlib.suppress(ConnectionRefusedError):
            host.connect("127.0.0.1", 8080).close()
            return "the page\n"
        threading.Event().wait(0.05)
    raise AssertionError("the web server does not come up")


@pytest.fixture
def curl(host: Host) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run curl in the namespace."""

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return host.run("curl", "--silent", "--show-error", "--max-time", "20", *args, check=False, timeout=60)

    return run


def dropped(host: Host, port: int, source: str) -> bool:
    """Whether a SYN of ``source`` gets no answer."""
    try:
        host.connect("127.0.0.1", port, source=source, timeout=0.7).close()
    except TimeoutError:
        return True
    return False


def exchange(sock: socket.socket, data: bytes, count: int) -> bytes:
    """Send ``data`` and return ``count`` bytes."""
    sock.sendall(data)
    return sock.recv(count, socket.MSG_WAITALL)
