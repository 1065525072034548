"""What a denied SYN costs the host, by where it is turned away: ``python -m bench.flood`` (root, two CPUs).

Two network namespaces, joined by veth. Both ends process what they receive in NAPI threads of their own, so the cost
of a segment is what the server's thread ran on a CPU (``schedstat``), whatever else the machine does: the sender's cost
and the client's are in other threads. Accepting adds the server process's own time.

A flood is when packets come faster than they are handled: the next ones wait before the last are done, and the
receiver never sleeps (on hardware, NAPI polls with interrupts off, 64 at a time). Left to themselves on an idle
machine, sender and receiver are as fast as each other on two CPUs, and the receiver falls asleep and is woken for one
or two packets at a time: most of what is measured then is the scheduler. So the sender (or the connecting client) and
the NAPI threads of both ends share one CPU, where the threads are SCHED_BATCH: waking one does not interrupt the
sender, which hands the CPU over when it has sent a burst of 128, of which a poll takes 64. The server process, which
accepts, has the other CPU. All rows are measured so. Clients connect 64 at once, a whole poll. When more do, accepting
becomes dearer (no lock explains it; the process is woken more often), so a row shows 128, and both are compared with.

Everything is measured in turn, round by round, in one run. Each filter holds the same 10,000 prefixes, one of which is
the flood's. Rows of SYNs that are let in: their sources are forged, so nobody answers the SYN-ACK.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import random
import re
import select
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import uvloop

from rama_ebpf.core.stream import Stream
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.loader import Gate, load, unload
from rama_ebpf.policy.kernel_store import KernelStore
from rama_ebpf.policy.rule import Action, Rule, RuleSet
from rama_ebpf.services.tcp import TcpServer
from tests.lab import set_ethtool
from tests.policy.frames import ethernet, syn_over_ipv4

PORT = 1080
SERVER, CLIENT = IPv4Address("198.18.0.1"), IPv4Address("198.18.0.2")
FLOOD = IPv4Network("198.19.0.0/16")
PREFIXES = 10_000
FRAMES = 4096
BURST = 128  # of 256 that wait in a veth at most
AT_ONCE = 64  # connections
SENT = 200_000
CONNECTIONS = 4_000
ROUNDS = 7


# -- the two hosts ----------------------------------------------------------------------------------------------------


def _ip(*args: str) -> str:
    return subprocess.run(["ip", *args], check=True, capture_output=True, text=True).stdout


def _setns(name: str) -> None:
    with open(f"/run/netns/{name}", "rb") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0x40000000) != 0:
            raise OSError(ctypes.get_errno(), "setns")


def _use_napi_thread(netns: str, interface: str) -> None:
    """Have veth use NAPI, with or without XDP: GRO here, and no TSO at the other end (``veth_xmit``)."""
    for command, on in ((0x2C, 0), (0x2C, 1), (0x1F, 0)):  # ETHTOOL_SGRO, ETHTOOL_STSO; XDP's end turns GRO off
        set_ethtool(interface, command, on)
    script = f"echo 0 > /sys/class/net/{interface}/threaded; echo 1 > /sys/class/net/{interface}/threaded"
    subprocess.run(["ip", "netns", "exec", netns, "sh", "-c", script], check=True)


@contextlib.contextmanager
def _hosts() -> Iterator[tuple[str, str]]:
    """Make both namespaces, enter the server's, and yield their names."""
    server, client = (f"flood-{os.getpid()}-{side}" for side in ("server", "client"))
    with open("/proc/self/ns/net", "rb") as home, contextlib.ExitStack() as cleanup:
        for name in (server, client):
            _ip("netns", "add", name)
            cleanup.callback(_ip, "netns", "delete", name)
        _ip("link", "add", "fs0", "netns", server, "type", "veth", "peer", "name", "fc0", "netns", client)
        for name, interface, address in ((server, "fs0", SERVER), (client, "fc0", CLIENT)):
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", interface, "up")
            _ip("-n", name, "address", "add", f"{address}/16", "dev", interface)
        _ip("-n", server, "route", "add", str(FLOOD), "via", str(CLIENT))
        _ip("-n", client, "route", "add", "local", str(FLOOD), "dev", "lo")  # the client connects from all of it
        cleanup.callback(lambda: ctypes.CDLL(None).setns(home.fileno(), 0x40000000))
        for name, interface in ((client, "fc0"), (server, "fs0")):
            _setns(name)
            _use_napi_thread(name, interface)
            command = "echo 0 > /proc/sys/net/ipv4/tcp_syncookies"
            subprocess.run(["ip", "netns", "exec", name, "sh", "-c", command], check=True)
        yield server, client


def _hardware(interface: str) -> bytes:
    with socket.socket() as sock:
        return bytes(fcntl.ioctl(sock, 0x8927, struct.pack("16s24x", interface.encode()))[18:24])


def _napi_threads(interface: str) -> Iterator[Path]:
    """The receiving threads of an interface, in /proc."""
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):  # it has just ended
                if (directory / "comm").read_text().startswith(f"napi/{interface}-"):
                    yield directory


def _napi_nanoseconds() -> int:
    """How long the server's receiving threads have run on a CPU."""
    return sum(int((directory / "schedstat").read_text().split()[0]) for directory in _napi_threads("fs0"))


def _place_threads() -> None:
    """Put all receiving threads where the sender is. XDP and nftables come and go, and threads with them."""
    flooded, _ = _cpus()
    for interface in ("fs0", "fc0"):
        for directory in _napi_threads(interface):
            os.sched_setaffinity(int(directory.name), {flooded})
            os.sched_setscheduler(int(directory.name), os.SCHED_BATCH, os.sched_param(0))


def _cpus() -> tuple[int, int]:
    """The CPU of the flood, and that of the process that accepts."""
    cpus = sorted(os.sched_getaffinity(1))
    if len(cpus) < 2:
        raise SystemExit("two CPUs are needed: one for the flood, one for the server")
    return cpus[-1], cpus[0]


# -- the client's side: run as python -m bench.flood send|connect … ---------------------------------------------------


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):  # struct mmsghdr
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vector", ctypes.POINTER(_Iovec)),
        ("count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("pad", ctypes.c_int),
        ("sent", ctypes.c_uint32),
    )


def _send(target: str, count: int) -> None:
    """Send SYNs from anywhere in the flood's network."""
    pick = random.Random(1)
    header = bytes.fromhex(target) + _hardware("fc0")
    packets = [
        syn_over_ipv4(FLOOD[pick.randrange(1, 65535)], SERVER, PORT, pick.randrange(1024, 65535)) for _ in range(FRAMES)
    ]
    frames = [header + ethernet(packet)[12:] for packet in packets]
    buffers = [ctypes.create_string_buffer(frame, len(frame)) for frame in frames]
    vectors = (_Iovec * FRAMES)(*(_Iovec(ctypes.addressof(buffer), len(buffer)) for buffer in buffers))
    messages = (_Message * FRAMES)()
    for index, message in enumerate(messages):
        message.vector, message.count = ctypes.pointer(vectors[index]), 1
    libc = ctypes.CDLL(None, use_errno=True)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("fc0", 0))
        for batch in range(count // BURST):
            at = ctypes.byref(messages, batch % (FRAMES // BURST) * BURST * ctypes.sizeof(_Message))
            if libc.sendmmsg(sock.fileno(), at, BURST, 0) < BURST:
                if ctypes.get_errno() not in (0, errno.ENOBUFS):
                    raise OSError(ctypes.get_errno(), "sendmmsg")
                time.sleep(0.001)  # the ring of the veth is full: it holds 256
            os.sched_yield()


def _connect(count: int, at_once: int) -> None:
    """Connect from anywhere in the flood's network, so many at once, and close."""
    pick = random.Random(2)
    for _ in range(count // at_once):
        socks = []
        for _ in range(at_once):
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            sock.bind((str(FLOOD[pick.randrange(1, 65535)]), 0))
            sock.connect_ex((str(SERVER), PORT))
            socks.append(sock)
        for sock in socks:
            select.select([], [sock], [], 5)
            sock.close()


# -- the server's side ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A way to turn SYNs away: ``handled`` says how many it has."""

    name: str
    handled: Callable[[], int]


def _run(client: str, *args: str) -> list[str]:
    return ["nsenter", f"--net=/run/netns/{client}", sys.executable, "-m", "bench.flood", *args]


def flood(client: str, method: Method) -> float:
    """Return the nanoseconds that a SYN cost."""
    _place_threads()
    handled, ran = method.handled(), _napi_nanoseconds()
    subprocess.run(_run(client, "send", _hardware("fs0").hex(), str(SENT)), check=True)
    time.sleep(0.2)
    handled, ran = method.handled() - handled, _napi_nanoseconds() - ran
    if handled < SENT // 10 or not ran:
        raise RuntimeError(f"{method.name}: only {handled} of {SENT} SYNs were turned away there, in {ran} ns")
    return ran / handled


def accept_then_close(
    client: str, serve: Callable[[socket.socket, subprocess.Popen[bytes]], int], at_once: int
) -> float:
    """Return the nanoseconds that a connection cost: its segments, and what ``serve`` did."""
    _place_threads()
    with _listener() as listener:
        connecting = subprocess.Popen(_run(client, "connect", str(CONNECTIONS), str(at_once)))
        ran, own = _napi_nanoseconds(), time.process_time_ns()
        accepted = serve(listener, connecting)
        own = time.process_time_ns() - own
        time.sleep(0.2)
        ran = _napi_nanoseconds() - ran
    if connecting.returncode or accepted < CONNECTIONS // 2 or not ran:
        raise RuntimeError(f"only {accepted} of {CONNECTIONS} connections were accepted")
    return (ran + own) / accepted


def bare_calls(listener: socket.socket, connecting: subprocess.Popen[bytes]) -> int:
    """poll(2), accept(2), close(2), and no object around a connection; return how many."""
    listener.setblocking(False)
    accepted = 0
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while connecting.poll() is None or poll.poll(0):
        if not poll.poll(100):
            continue
        with contextlib.suppress(BlockingIOError):
            while True:
                os.close(listener._accept()[0])  # type: ignore[attr-defined]
                accepted += 1
    return accepted


def tcp_server(listener: socket.socket, connecting: subprocess.Popen[bytes]) -> int:
    """Our own server on uvloop, with a service that returns at once: where a policy in userspace would say no."""
    listener.setblocking(False)
    accepted = 0

    def count() -> None:
        nonlocal accepted
        accepted += 1

    async def service(_: Stream) -> None:
        return

    async def run() -> None:
        server = TcpServer(listener, service, on_accept=count)
        server.start()
        while connecting.poll() is None:  # noqa: ASYNC110  a process, and no event of ours
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.1)
        await server.drain(1)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    return accepted


def _listener() -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((str(SERVER), PORT))
    sock.listen(4096)
    return sock


def _nft(text: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=text, check=True, text=True)


def _nft_counter() -> int:
    listed = subprocess.run(["nft", "list", "chain", *_CHAIN], check=True, capture_output=True, text=True).stdout
    return int(re.findall(r"packets (\d+)", listed)[0])


_CHAIN: list[str] = []
_EACH = (0, 0)  # no limit on RST


@contextlib.contextmanager
def nftables(where: str, networks: list[IPv4Network]) -> Iterator[Method]:
    family, hook = ("netdev", "ingress device fs0") if where == "ingress" else ("inet", "prerouting")
    priority = 0 if where == "ingress" else -300
    elements = ", ".join(map(str, networks))
    _nft(
        f"table {family} flood {{ set denied {{ type ipv4_addr; flags interval; elements = {{ {elements} }} }}\n"
        f"chain drops {{ type filter hook {hook} priority {priority};\n"
        f"tcp dport {PORT} tcp flags & (syn | ack) == syn ip saddr @denied counter drop\n}}\n}}\n"
    )
    _CHAIN[:] = [family, "flood", "drops"]
    try:
        yield Method(f"nftables, set of {len(networks)}, {where}", _nft_counter)
    finally:
        _nft(f"delete table {family} flood\n")


def main() -> None:
    os.sched_setaffinity(0, {_cpus()[1]})
    pick = random.Random(3)
    networks = [FLOOD] + [IPv4Network((0x0B000000 + (n << 8), 24)) for n in pick.sample(range(1 << 21), PREFIXES - 1)]
    found: dict[str, list[float]] = {}
    with _hosts() as (server, client), contextlib.ExitStack() as cleanup:
        gates = []
        for name, cookies in (("flood", False), ("cookies", True)):
            instance = Instance(f"{name}-{os.getpid()}")
            cleanup.callback(unload, instance)
            gates.append(load(instance, xdp=True, syn_cookies=cookies))
            cleanup.callback(gates[-1].close)
        for _ in range(ROUNDS):
            _use_napi_thread(server, "fs0")
            for name, serve, at_once in (
                ("accept, then close", bare_calls, AT_ONCE),
                ("the same, 128 at once", bare_calls, 128),
                ("the same by TcpServer", tcp_server, AT_ONCE),
            ):
                found.setdefault(name, []).append(accept_then_close(client, serve, at_once))
            with _listener():
                for where in ("prerouting", "ingress"):
                    with nftables(where, networks) as method:
                        found.setdefault(method.name, []).append(flood(client, method))
            _with_gate(gates[0], client, networks, found)
            with _no_answers(client), _syncookies(2):
                _with_cookies(gates[1], client, found)
    print(
        f"{'':<36} {'ns a SYN':>24}   {'cheaper than accept':>24}   {'than 128 at once':>24}   {'than TcpServer':>24}"
    )
    for name, costs in found.items():
        cells = [_spread(costs, 0)]
        for base in ("accept, then close", "the same, 128 at once", "the same by TcpServer"):
            cells.append(_spread([one / other for one, other in zip(found[base], costs, strict=True)], 1))
        print(f"{name:<36} " + "   ".join(f"{cell:>24}" for cell in cells))
    print(json.dumps(found))


def _spread(values: list[float], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} - {high})"


@contextlib.contextmanager
def _no_answers(client: str) -> Iterator[None]:
    """The client drops the SYN-ACKs: it never sent those SYNs."""
    text = (
        "table netdev forged { chain drops { type filter hook ingress device fc0 priority 0;\n"
        "tcp flags & (syn | ack) == (syn | ack) drop\n}\n}\n"
    )
    nft = ["nsenter", f"--net=/run/netns/{client}", "nft"]
    subprocess.run([*nft, "-f", "-"], input=text, check=True, text=True)
    try:
        yield
    finally:
        subprocess.run([*nft, "delete", "table", "netdev", "forged"], check=True)


@contextlib.contextmanager
def _syncookies(value: int) -> Iterator[None]:
    sysctl = Path("/proc/sys/net/ipv4/tcp_syncookies")
    before = sysctl.read_text()
    sysctl.write_text(str(value))
    try:
        yield
    finally:
        sysctl.write_text(before)


def _cookies_sent() -> int:
    names, values = [line.split() for line in Path("/proc/net/netstat").read_text().splitlines()[:2]]
    return int(values[names.index("SyncookiesSent")])


def _with_cookies(gate: Gate, client: str, found: dict[str, list[float]]) -> None:
    store = KernelStore(gate.instance, gate.maps)
    gate.attach()
    with _listener() as listener:
        address = gate.add_listener([listener])
        method = Method("let in, the stack's cookie", _cookies_sent)
        found.setdefault(method.name, []).append(flood(client, method))
        gate.attach_xdp("fs0")
        method = Method("let in, XDP's cookie", lambda: store.counters.totals().get(("xdp", "default", "allow"), 0))
        found.setdefault(method.name, []).append(flood(client, method))
        gate.remove_listener(address)
    gate.detach()


def _with_gate(gate: Gate, client: str, networks: list[IPv4Network], found: dict[str, list[float]]) -> None:
    store = KernelStore(gate.instance, gate.maps)

    def handled(hook: str, action: str) -> Callable[[], int]:
        return lambda: store.counters.totals().get((hook, "rule", action), 0)

    gate.attach()
    with _listener() as listener:
        address = gate.add_listener([listener])
        for name, hook, action, limit in (
            ("reject by sk_lookup, each with RST", "lookup", Action.REJECT, _EACH),
            ("reject beyond the rate, cgroup_skb", "cgroup", Action.REJECT, None),
            ("cgroup_skb", "cgroup", Action.DROP, None),
            ("XDP, native", "xdp", Action.DROP, None),
            ("reject by XDP, each with RST", "xdp", Action.REJECT, _EACH),
            ("reject beyond the rate, XDP", "xdp", Action.REJECT, None),
        ):
            store.replace(RuleSet((Rule("flood", tuple(networks), action, origin="file"),)))
            gate.limit_rejects(limit)
            if hook == "xdp" and not gate.xdp:
                gate.attach_xdp("fs0")
            method = Method(name, handled(hook, action.name.lower()))
            found.setdefault(name, []).append(flood(client, method))
        gate.remove_listener(address)
    gate.detach()


if __name__ == "__main__":
    if sys.argv[1:2] in (["send"], ["connect"]):
        os.sched_setaffinity(0, {_cpus()[0]})
    if sys.argv[1:2] == ["send"]:
        _send(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:2] == ["connect"]:
        _connect(int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
