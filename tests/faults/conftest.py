"""An echo server behind the gate, with sources of both kinds in its namespace."""

from __future__ import annotations

import ctypes
import os
import statistics
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rama_ebpf.kernel import bpf
from rama_ebpf.kernel.instance import Instance

from ..conftest import StartProxy
from ..hammer import echoed
from ..lab import Host, Lab, wait_for
from ..proxy import ProxyProcess

ROUNDS = int(os.environ.get("RAMA_EBPF_FAULT_ROUNDS", "0"))
"""How many rounds of random faults; 0 for the short run."""

CONFIG = """
[server]
workers = {workers}
drain = "1s"
{server}
[listeners.main]
address = "198.18.0.80:1080"
stack = "echo"
[stacks.echo]
service = {{ echo = {{}} }}
[policy]
default = "allow"
{policy}
[[policy.rules]]
name = "denied"
action = "drop"
sources = ["198.18.66.0/24"]
"""
TARGET = ("198.18.0.80", 1080)
ALLOWED = ("198.18.1.1", "198.18.1.2", "198.18.1.3", "198.18.1.4")
DENIED = ("198.18.66.6", "198.18.66.7")


def met(host: Host, source: str) -> str:
    """How a connection of a source to the target is met: ``in`` or ``silence``. Raises what else connect(2) says."""
    try:
        host.connect(*TARGET, source=source, timeout=0.3).close()
    except TimeoutError:
        return "silence"
    return "in"


_times: dict[str, list[float]] = {}


def measured(what: str, since: float) -> None:
    """Keep how long it took since a moment of :func:`time.monotonic`: it is told at the end, and never asserted."""
    _times.setdefault(what, []).append(time.monotonic() - since)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was measured."""
    for what, seconds in sorted(_times.items()):
        line = f"{what}: p50 {statistics.median(seconds):.2f} s, max {max(seconds):.2f} s of {len(seconds)}"
        terminalreporter.write_line(line)


@dataclass
class EchoServer:
    """``rama-ebpf run`` with :data:`CONFIG`."""

    host: Host
    instance: Instance
    file: Path
    proxy: ProxyProcess

    def served(self, source: str = ALLOWED[0]) -> bool:
        """Whether an allowed source is served."""
        return not self.host.call(lambda: echoed(self.host, source, TARGET, timeout=1.0))

    def serves_by_all(self) -> bool:
        """Whether as many workers serve as are wanted."""
        state = self.instance.read_state().get("workers")
        return isinstance(state, dict) and state["serving"] == state["expected"]

    def wait_until_whole(self) -> None:
        """Wait until all workers serve, and a client is served."""
        wait_for(self.serves_by_all, timeout=60, what="all workers")
        wait_for(self.served, timeout=30, what="service")


@pytest.fixture
def host(lab: Lab) -> Host:
    made = lab.host("proxy")
    for address in (TARGET[0], *ALLOWED, *DENIED):
        made.add_address(f"{address}/32", "lo")
    return made


StartEcho = Callable[..., EchoServer]


@pytest.fixture
def start_echo(host: Host, instance: str, start_proxy: StartProxy, tmp_path: Path) -> StartEcho:
    """Start it: with so many workers, and more lines for ``[server]`` and ``[policy]``."""

    def start(workers: int = 2, server: str = "", policy: str = "") -> EchoServer:
        file = tmp_path / "rama.toml"
        file.write_text(CONFIG.format(workers=workers, server=server, policy=policy))
        proxy = start_proxy(host, "--config", str(file))
        return EchoServer(host, Instance(instance), file, proxy)

    return start


def attached_programs(host: Host) -> int:
    """How many programs look up sockets in the namespace of a host."""

    def ask() -> int:
        fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            attr = ctypes.create_string_buffer(struct.pack("=IIIIQI", fd, bpf.AttachType.SK_LOOKUP, 0, 0, 0, 0), 128)
            bpf._bpf_inout(16, attr)  # BPF_PROG_QUERY
            return int(struct.unpack_from("=I", attr.raw, 24)[0])
        finally:
            os.close(fd)

    return host.call(ask)
