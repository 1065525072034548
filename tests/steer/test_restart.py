"""A service manager with a descriptor store restarts the server: nobody is refused, and nobody gets in who may not."""

from __future__ import annotations

import array
import os
import signal
import socket
import threading
from pathlib import Path

import pytest

from ..conftest import StartProxy
from ..hammer import Denied, Served, echoed
from ..lab import Host, Lab, wait_for
from ..proxy import ProxyProcess

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

TARGET = ("127.0.0.1", 1080)
ALLOWED, DENIED = ["127.0.0.5", "127.0.0.6"], "127.0.0.9"
RAMA = """
[listeners.main]
address = "127.0.0.1:1080"
stack = "echo"
[stacks.echo]
service = "echo"
[server]
workers = 2
drain = "1s"
[policy]
default = "allow"
[[policy.rules]]
name = "denied"
action = "drop"
sources = ["127.0.0.9/32"]
"""


class Manager:
    """What systemd does for a service with FileDescriptorStoreMax: it keeps what FDSTORE sends, until FDSTOREREMOVE."""

    def __init__(self, host: Host) -> None:
        self.path = f"@rama-ebpf-manager-{os.getpid()}-{id(self)}"
        self.store: list[int] = []
        self.told: list[str] = []
        self._sock = host.call(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self._sock.bind("\0" + self.path[1:])
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            data, control, _, _ = self._sock.recvmsg(4096, socket.CMSG_SPACE(64 * 4), socket.MSG_CMSG_CLOEXEC)
            words = data.decode().split("\n")
            if words == ["end"]:
                return
            fds = array.array("i")
            for _, _, packed in control:
                fds.frombytes(packed[: len(packed) - len(packed) % fds.itemsize])
            if "FDSTORE=1" in words:
                assert "FDNAME=rama-ebpf" in words
                self.store += fds
            if "FDSTOREREMOVE=1" in words:
                self.forget()
            self.told += words

    def forget(self) -> None:
        while self.store:
            os.close(self.store.pop())

    def launches(self, proxy: ProxyProcess) -> None:
        """Have a server be started as by this manager, with what it has stored."""
        moves = "".join(f"exec {3 + n}<&{fd};" for n, fd in enumerate(self.store))
        names = ":".join(["rama-ebpf"] * len(self.store))
        given = f"LISTEN_FDS={len(self.store)} LISTEN_FDNAMES={names} LISTEN_PID=$$"
        proxy.under = ("bash", "-c", f'{moves} export {given}; exec "$0" "$@"')
        proxy.passed = tuple(self.store)
        proxy.environment["NOTIFY_SOCKET"] = self.path

    def close(self, host: Host) -> None:
        with host.call(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as end:
            end.sendto(b"end", "\0" + self.path[1:])
        self._thread.join(10)
        self._sock.close()
        self.forget()


def test_restart_with_a_descriptor_store_refuses_nobody(
    lab: Lab, instance: str, start_proxy: StartProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = lab.host("proxy")
    file = tmp_path / "rama.toml"
    file.write_text(RAMA)
    manager = Manager(host)
    monkeypatch.setenv("NOTIFY_SOCKET", manager.path)
    try:
        proxy = start_proxy(host, "--config", str(file))
        with Served(host, ALLOWED, TARGET, timeout=60) as served, Denied(host, [DENIED], [TARGET]) as denied:
            wait_for(lambda: served.served > 20, what="clients before the restart")
            proxy.signal(signal.SIGTERM)
            assert proxy.wait() == 0
            wait_for(lambda: len(manager.store) == 1, what="what the manager has heard")
            tries = denied.tries
            wait_for(lambda: denied.tries > tries + 5, what="tries while no server runs")
            manager.launches(proxy)
            proxy.start()
            before = served.served
            # A SYN comes again after 1, 3, 7, 15 s.
            wait_for(lambda: served.served > before + 20, timeout=60, what="clients after the restart")
        assert served.failures == []
        assert denied.got_in == []
        wait_for(lambda: "FDSTOREREMOVE=1" in manager.told, what="the end of what was held")
        assert manager.store == []
        proxy.signal(signal.SIGTERM)
        assert proxy.wait() == 0
        manager.forget()  # the unit was stopped for good
        assert "ConnectionRefusedError" in host.call(lambda: echoed(host, ALLOWED[0], TARGET))
    finally:
        manager.close(host)
