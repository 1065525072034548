"""A name server, a feed's server and an upstream that take what they are sent and never answer."""

from __future__ import annotations

import signal
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ..conftest import StartProxy
from ..hammer import Denied
from ..lab import Host, wait_for
from ..proxy import rama_ebpf
from .conftest import ALLOWED, DENIED, TARGET

pytestmark = [pytest.mark.root, pytest.mark.ebpf, pytest.mark.timeout(300)]

SILENT = "198.18.1.4"
CONFIG = """
[server]
workers = 1
drain = "1s"
[resolver]
servers = ["{silent}"]
[egress]
allow = ["{silent}", "198.18.1.2"]
[listeners.main]
address = "{listen}"
stack = "proxy"
[stacks.proxy]
service = {{ socks5 = {{}} }}
[policy]
default = "allow"
[[policy.rules]]
name = "denied"
action = "drop"
sources = ["198.18.66.0/24"]
[[policy.rules]]
name = "listed"
action = "drop"
feed = {{ url = "http://{silent}:8000/list", timeout = "5m" }}
"""


@pytest.fixture
def silent(host: Host) -> Iterator[None]:
    """Port 53 over UDP, and 8000 and 9000 over TCP, where somebody takes all and says nothing."""
    with ExitStack() as held:
        names = held.enter_context(host.socket(kind=socket.SOCK_DGRAM))
        names.bind((SILENT, 53))
        for port in (8000, 9000):
            listener = held.enter_context(host.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((SILENT, port))
            listener.listen(64)
        yield


@pytest.fixture
def echo(host: Host) -> Iterator[None]:
    """Port 7 of an address that clients may have reached."""
    with host.socket() as listener:
        listener.bind((ALLOWED[1], 7))
        listener.listen(64)
        listener.settimeout(None)

        def serve() -> None:
            while True:
                try:
                    taken, _ = listener.accept()
                except OSError:
                    return
                with taken:
                    taken.sendall(taken.recv(100))

        threading.Thread(target=serve, daemon=True).start()
        yield
        listener.shutdown(socket.SHUT_RDWR)


def asked(host: Host, target: bytes, port: int) -> socket.socket:
    """A client that has sent CONNECT, and has not been answered yet."""
    sock = host.connect(*TARGET, source=ALLOWED[0])
    sock.sendall(b"\x05\x01\x00" + b"\x05\x01\x00" + target + struct.pack(">H", port))
    assert sock.recv(2) == b"\x05\x00"
    return sock


def by_name(name: str) -> bytes:
    return b"\x03" + bytes([len(name)]) + name.encode()


def by_address(address: str) -> bytes:
    return b"\x01" + socket.inet_aton(address)


def echoed(host: Host) -> bool:
    with asked(host, by_address(ALLOWED[1]), 7) as sock:
        assert sock.recv(10)[1] == 0
        sock.sendall(b"hello")
        return sock.recv(100) == b"hello"


def test_whoever_hangs_holds_up_who_asked_for_it_and_neither_others_nor_reloads_nor_the_stop(
    silent: None, echo: None, host: Host, start_proxy: StartProxy, tmp_path: Path
) -> None:
    file = tmp_path / "rama.toml"
    file.write_text(CONFIG.format(listen=f"{TARGET[0]}:{TARGET[1]}", silent=SILENT))
    proxy = start_proxy(host, "--config", str(file))
    with ExitStack() as held, Denied(host, DENIED, [TARGET]) as denied:
        for _ in range(20):
            held.enter_context(asked(host, by_name("name.example"), 80))
            tunnel = held.enter_context(asked(host, by_address(SILENT), 9000))
            assert tunnel.recv(10)[1] == 0
            tunnel.sendall(b"is anybody there?")
        for _ in range(5):
            assert echoed(host)
        assert proxy.json("status")["workers"]["serving"] == 1
        rama_ebpf("block", "198.18.5.5", "--instance", proxy.instance)
        proxy.signal(signal.SIGHUP)
        wait_for(lambda: proxy.logged(": reloaded$"), timeout=60, what="the reload")
        assert echoed(host)
        proxy.signal(signal.SIGTERM)
        assert proxy.wait() == 0
    assert denied.got_in == []
    assert not proxy.logged("Traceback|holds the server up"), proxy.log
