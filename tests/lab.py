"""A laboratory of network namespaces: real hosts on real (virtual) wires, made and removed by the test.

Addresses are from 198.18.0.0/15 (RFC 2544) and 2001:db8::/32 only. Names carry this process's id, so that runs beside
each other do not meet, and :mod:`.leftovers` removes what a killed run left behind.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import os
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

__all__ = [
    "PATIENCE",
    "PREFIX",
    "TEMPORARY",
    "Capture",
    "Host",
    "Lab",
    "Segment",
    "set_ethtool",
    "temporary_directory",
    "wait_for",
]

T = TypeVar("T")

PATIENCE = float(os.environ.get("RAMA_EBPF_PATIENCE", "1"))
"""How many times longer than on hardware things may take: emulated machines set it."""

PREFIX = "ramalab"
"""What the names of namespaces begin with; this process's id follows."""
TEMPORARY = "rama-ebpf-run-"
"""What the names of directories in /tmp begin with that are not pytest's."""
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()


def wait_for(condition: Callable[[], T], *, timeout: float = 10.0, what: str = "condition") -> T:
    """Poll until ``condition`` returns something true, and return it. Raises AssertionError after ``timeout``."""
    deadline = time.monotonic() + timeout * PATIENCE
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {timeout} s")
        time.sleep(0.02)


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """A directory that unprivileged workers can reach, which pytest's cannot. It is locked as long as its maker lives:
    its id would say nothing to a process of another PID namespace."""
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as made:
        held = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(held, fcntl.LOCK_SH)
            os.chmod(made, 0o755)
            yield Path(made)
        finally:
            os.close(held)


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@dataclass
class Host:
    """One network namespace with an address of each family."""

    name: str
    netns: str
    ipv4: str = ""
    ipv6: str = ""
    _stack: ExitStack = field(default_factory=ExitStack)

    def ip(self, *args: str) -> None:
        """Run ip(8) inside."""
        _ip("-n", self.netns, *args)

    def add_address(self, address: str, interface: str) -> None:
        """Add an address with its prefix length."""
        extra = ["nodad"] if ":" in address else []
        self.ip("address", "add", address, "dev", interface, *extra)

    def command(self, *args: str) -> list[str]:
        """Return the command line that runs ``args`` inside. (``ip netns exec`` would hide bpffs and cgroups.)"""
        return ["nsenter", f"--net=/run/netns/{self.netns}", *args]

    def run(self, *args: str, timeout: float = 30.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command inside to its end."""
        return subprocess.run(
            self.command(*args), check=check, capture_output=True, text=True, timeout=timeout * PATIENCE
        )

    def popen(self, *args: str, **options: object) -> subprocess.Popen[str]:
        """Start a command inside; it is killed when the lab ends."""
        process = subprocess.Popen(self.command(*args), text=True, **options)  # type: ignore[call-overload]
        self._stack.callback(_end, process)
        return process  # type: ignore[no-any-return]

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in a thread that lives inside; sockets that it makes stay inside."""
        results: list[T] = []
        errors: list[BaseException] = []

        def body() -> None:
            try:
                with open(f"/run/netns/{self.netns}", "rb") as namespace:
                    if _libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                        raise OSError(ctypes.get_errno(), "setns failed")
                results.append(function())
            except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
                errors.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, proto: int = 0) -> socket.socket:
        """Make a socket inside, with a time-out of 10 s (times :data:`PATIENCE`)."""
        sock = self.call(lambda: socket.socket(family, kind, proto))
        sock.settimeout(10.0 * PATIENCE)
        return sock

    def connect(self, address: str, port: int, *, source: str | None = None, timeout: float = 10.0) -> socket.socket:
        """Connect from inside. Raises what connect(2) says."""
        sock = self.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        try:
            sock.settimeout(timeout * PATIENCE)
            if source is not None:
                sock.bind((source, 0))
            sock.connect((address, port))
        except BaseException:
            sock.close()
            raise
        return sock

    def capture(self, interface: str) -> Capture:
        """Capture the TCP segments that cross an interface from now on; close it when done."""
        sock = self.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind((interface, 0))
        sock.settimeout(0.05)
        return Capture(sock)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


@dataclass(frozen=True)
class Segment:
    """A TCP segment on the wire."""

    source: str
    sport: int
    target: str
    dport: int
    flags: str
    """Letters of FSRPA that are set, in that order."""


class Capture:
    """What an AF_PACKET socket saw."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.segments: list[Segment] = []

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._sock.close()

    def read(self, seconds: float = 0.3) -> list[Segment]:
        """Collect for ``seconds`` and return everything seen since the start."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                frame = self._sock.recv(65535)
            except TimeoutError:
                continue
            segment = _segment(frame)
            if segment is not None:
                self.segments.append(segment)
        return self.segments


def _segment(frame: bytes) -> Segment | None:
    kind = struct.unpack_from("!H", frame, 12)[0]
    if kind == 0x0800 and frame[23] == 6:
        family, source, target, at = socket.AF_INET, frame[26:30], frame[30:34], 14 + (frame[14] & 15) * 4
    elif kind == 0x86DD and frame[20] == 6:
        family, source, target, at = socket.AF_INET6, frame[22:38], frame[38:54], 54
    else:
        return None
    sport, dport = struct.unpack_from("!HH", frame, at)
    bits = frame[at + 13]
    flags = "".join(letter for bit, letter in ((1, "F"), (2, "S"), (4, "R"), (8, "P"), (16, "A")) if bits & bit)
    return Segment(socket.inet_ntop(family, source), sport, socket.inet_ntop(family, target), dport, flags)


class Lab:
    """Hosts on one Ethernet segment (a bridge in a namespace of its own). A context manager."""

    def __init__(self) -> None:
        self._id = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
        self._stack = ExitStack()
        self._count = 0

    def __enter__(self) -> Lab:
        with ExitStack() as undo:
            self._switch = f"{self._id}-switch"
            _ip("netns", "add", self._switch)
            undo.callback(_ip, "netns", "delete", self._switch)
            _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "br0", "up")
            self._stack = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def host(self, name: str, *, takes_xdp: bool = False) -> Host:
        """Add a host: eth0 with 198.18.0.N/16 and 2001:db8::N/64, N counting from 1; loopback is up.

        ``takes_xdp``: its wire takes what XDP sends, as a real one does; a veth only with NAPI at the other end.
        """
        self._count += 1
        number = self._count
        host = Host(name, f"{self._id}-{name}", f"198.18.0.{number}", f"2001:db8::{number:x}")
        _ip("netns", "add", host.netns)
        self._stack.callback(_ip, "netns", "delete", host.netns)
        self._stack.callback(host._stack.close)
        port = f"p{number}"
        _ip("link", "add", port, "netns", self._switch, "type", "veth", "peer", "name", "eth0", "netns", host.netns)
        _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
        if takes_xdp:
            self.ethtool(host, 0x2C, 1)  # ETHTOOL_SGRO
        host.ip("link", "set", "lo", "up")
        host.ip("link", "set", "eth0", "up")
        host.add_address(f"{host.ipv4}/16", "eth0")
        host.add_address(f"{host.ipv6}/64", "eth0")
        return host

    def ethtool(self, host: Host, command: int, value: int) -> None:
        """Set something at the switch's end of a host's wire: ``struct ethtool_value`` of ``linux/ethtool.h``."""
        port = "p" + host.ipv4.rpartition(".")[2]
        Host("switch", self._switch).call(lambda: set_ethtool(port, command, value))


def set_ethtool(interface: str, command: int, value: int) -> None:
    """Set something of an interface of this thread's namespace."""
    data = ctypes.create_string_buffer(struct.pack("=II", command, value))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, 0x8946, struct.pack("16sQ16x", interface.encode(), ctypes.addressof(data)))  # SIOCETHTOOL


@contextmanager
def lab_of(*names: str) -> Iterator[Sequence[Host]]:
    """A lab with hosts of these names."""
    with Lab() as lab:
        yield [lab.host(name) for name in names]
