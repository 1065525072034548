"""The relays beside HAProxy and SOCKS5 servers: ``python -m bench.relay NAME [ROUNDS] [SECONDS]``.

Names are ``bulk``, ``ping``, ``nic``, ``one-cpu``, ``veth-bulk``, ``veth-ping``, ``idle``, ``dial`` and ``setup``.
All contestants run at once and take turns, in another order each round; printed are medians, the lowest and the highest
round, and the median of each round's ratio to the reference (HAProxy in TCP mode with splice-auto and one thread; of
``dial`` microsocks) and to ``direct``, a connection without a proxy. On loopback that is one within the host; with
``veth-`` load and server are hosts of their own, and this one routes between them. At the end each aim for the wire
relay (docs/wire.md) is compared with what was measured. ``setup`` is how long SOCKS5 clients wait for their tunnels,
one after the other, with ``wire`` and without. The load (``load.c``) and its server have one CPU, the proxy has the
other; ``nic`` is ``ping`` with the kernel's receive work on the proxy's CPU too, where a network card's interrupts
would put it, and not on that of whoever sends, as loopback does; ``one-cpu`` has all of them on one; in ``dial`` nobody
is pinned, and ours has as many workers as CPUs. CPU time is that of the proxy, the load, the server and all kernel
threads: the kernel's relay works in those. Needs root, gcc, and from Debian haproxy, microsocks and dante-server.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rama_ebpf.core.socket_stream import reset_on_close

from .tls_servers import free_port, wait_for_port

_HERE: Final = Path(__file__).parent
_OURS: Final = ("sockmap", "splice", "copy", "auto")
_LOAD_CPU, _PROXY_CPU = 0, 1
_IDLE_TUNNELS: Final = 5000
_DIALLERS: Final = 16
_INSIDE: Final = "BENCH_RELAY_INSIDE"  # set in the network namespace

_HAPROXY = """
global
    nbthread 1
    maxconn 6000
defaults
    mode tcp
    option splice-auto
    timeout connect 5s
    timeout client 600s
    timeout server 600s
frontend f
    bind {host}:{port}
    default_backend b
backend b
    server one {target}
"""

_DANTE = """
logoutput: /dev/null
internal: 127.0.0.1 port = {port}
external: lo
socksmethod: none
clientmethod: none
user.privileged: root
user.unprivileged: nobody
client pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}
socks pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}
"""

_RAMA = """
[server]
workers = {workers}
[logging]
level = "warning"
access = false
[egress]
allow = ["127.0.0.0/8", "198.18.0.0/15"]
[limits]
connections_per_source = 0
[listeners.main]
address = "{host}:{port}"
stack = "socks"
relay = "{relay}"
[stacks.socks]
service = {{ socks5 = {{}} }}
"""


@dataclass(frozen=True)
class Network:
    """Where load, proxies and servers are: the addresses of the last two, and what runs a command beside the others."""

    proxy: str = "127.0.0.1"
    target: str = "127.0.0.1"
    load: tuple[str, ...] = ()
    server: tuple[str, ...] = ()


@dataclass
class Proxy:
    """A contestant that runs, at ``at`` (address:port); ``pid`` is 0 where there is no process. ``socks`` if it has to
    be told the target."""

    name: str
    at: str
    pid: int
    socks: bool = False
    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **figures: float) -> None:
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(value)


class Lab:
    """The load, its servers, and the contestants; everything ends with it."""

    def __init__(self, network: Network | None = None) -> None:
        self.network = network or Network()
        self._cleanup = contextlib.ExitStack()
        self.directory = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory()))
        self.load = str(self.directory / "load")
        subprocess.run(["gcc", "-O2", "-pthread", "-o", self.load, _HERE / "load.c"], check=True)

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *exc: object) -> None:
        self._cleanup.close()

    def start(
        self, *command: object, cpu: int | None, port: int, beside: tuple[str, ...] = ()
    ) -> subprocess.Popen[bytes]:
        """Run ``command`` on a CPU and wait until it listens on ``port``; ``beside`` others, if it says so."""
        process = subprocess.Popen(
            [*_placed(cpu), *beside, *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if command[0] in ("microsocks", "haproxy") else None,  # a line a connection
            start_new_session=True,
        )
        self._cleanup.callback(process.wait)
        self._cleanup.callback(process.terminate)
        if self.network == Network():
            wait_for_port(port)
        else:
            _wait_for_listener(port, beside)
        return process

    def server(self, mode: str, cpu: int | None) -> tuple[str, subprocess.Popen[bytes]]:
        port, beside = free_port(), self.network.server
        process = self.start(self.load, mode, port, cpu=cpu, port=port, beside=beside)
        return f"{self.network.target}:{port}", process

    def _at(self, port: int) -> str:
        return f"{self.network.proxy}:{port}"

    def haproxy(self, target: str) -> Proxy:
        port = free_port()
        config = self.directory / "haproxy"
        config.write_text(_HAPROXY.format(host=self.network.proxy, port=port, target=target))
        process = self.start("haproxy", "-db", "-f", config, cpu=_PROXY_CPU, port=port)
        return Proxy("haproxy", self._at(port), process.pid)

    def ours(self, kind: str, target: str) -> Proxy:
        port = free_port()
        command = (sys.executable, "-m", "bench.forward", self._at(port), target, kind)
        return Proxy(kind, self._at(port), self.start(*command, cpu=_PROXY_CPU, port=port).pid)

    def microsocks(self, cpu: int | None = _PROXY_CPU) -> Proxy:
        port = free_port()
        process = self.start("microsocks", "-i", self.network.proxy, "-p", port, cpu=cpu, port=port)
        return Proxy("microsocks", self._at(port), process.pid, socks=True)

    def direct(self, target: str) -> Proxy:
        """No proxy: the load goes to the target itself."""
        return Proxy("direct", target, 0)

    def dante(self) -> Proxy:
        port = free_port()
        config = self.directory / "danted.conf"
        config.write_text(_DANTE.format(port=port))
        process = self.start("danted", "-f", config, cpu=None, port=port)
        return Proxy("dante", self._at(port), process.pid, socks=True)

    def rama(self, relay: str = "auto", workers: int | None = None, cpu: int | None = None) -> Proxy:
        port = free_port()
        config = self.directory / f"rama-{relay}.toml"
        config.write_text(
            _RAMA.format(host=self.network.proxy, port=port, workers=workers or os.cpu_count(), relay=relay)
        )
        instance = f"bench-{relay}-{os.getpid()}"
        command = (Path(sys.executable).with_name("rama-ebpf"), "run", "--instance", instance)
        self._cleanup.callback(subprocess.run, [command[0], "unload", "--purge", "--instance", command[3]], check=True)
        process = self.start(*command, "--config", config, cpu=cpu, port=port)
        return Proxy("rama-ebpf", self._at(port), process.pid, socks=True)

    def wire(self) -> Proxy:
        """The whole server, with one worker, once its wire relay is ready."""
        proxy = self.rama("wire", 1, _PROXY_CPU)
        state = Path(f"/run/rama-ebpf/bench-wire-{os.getpid()}/state.json")
        deadline = time.monotonic() + 60
        while json.loads(state.read_text())["wire"]["state"] != "ready":
            if time.monotonic() > deadline:
                raise RuntimeError("the wire relay does not come")
            time.sleep(0.1)
        time.sleep(0.5)  # its worker has to hear of it
        proxy.name = "wire"
        return proxy

    def contestants(self, target: str) -> list[Proxy]:
        """All that relay; the reference first."""
        ours = [self.ours(kind, target) for kind in _OURS]
        return [self.haproxy(target), *ours, self.wire(), self.microsocks(), self.direct(target)]

    def run(self, mode: str, proxy: Proxy, *args: object, target: str, pin: bool = True) -> dict[str, Any]:
        """Run the load against ``proxy`` and return what it prints."""
        command = [*_placed(_LOAD_CPU if pin else None), *self.network.load, self.load, mode, proxy.at]
        command += map(str, args)
        if proxy.socks:
            command.append(target)
        result = subprocess.run(command, stdout=subprocess.PIPE, check=False, start_new_session=True)
        if result.returncode:
            raise RuntimeError(f"the load through {proxy.name} failed")
        answer = json.loads(result.stdout)
        assert isinstance(answer, dict)
        return answer


def _placed(cpu: int | None) -> list[str]:
    """A command that runs another on one CPU, ahead of what else the machine does (sched(7), autogroup)."""
    ahead = 'echo -10 > /proc/self/autogroup; exec "$@"'
    return ["sh", "-c", ahead, "sh", *([] if cpu is None else ["taskset", "-c", str(cpu)])]


def _wait_for_listener(port: int, beside: tuple[str, ...]) -> None:
    for _ in range(400):
        found = subprocess.run(
            [*beside, "ss", "-Hltn", f"sport = :{port}"], check=True, capture_output=True, text=True
        ).stdout
        if found:
            return
        time.sleep(0.05)
    raise RuntimeError(f"nothing listens on port {port}")


def _cpu(pid: int) -> float:
    """Seconds that a process has run, with its threads; 0 where there is none."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        threads = Path(f"/proc/{pid}/task").iterdir()
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9
    return 0.0


def _tree_cpu(pid: int) -> float:
    """Seconds of a process, its threads of earlier, and its children that live."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(_tree_cpu(int(child)) for child in children)


def _user_cpu(pid: int) -> float:
    if not pid:
        return 0.0
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11]) / os.sysconf("SC_CLK_TCK")


def _kernel_threads() -> list[int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if _parent(pid) == 2]


def _parent(pid: int) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _resident(pid: int) -> int:
    """Bytes of memory of a process that nobody shares."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Private_"))


def _turns(proxies: Sequence[Proxy], rounds: int) -> Iterator[Proxy]:
    for number in range(rounds):
        start = number % len(proxies)
        yield from (*proxies[start:], *proxies[:start])


def bulk(rounds: int, seconds: float, network: Network | None = None) -> list[Proxy]:
    with Lab(network) as lab:
        target, server = lab.server("sink", _LOAD_CPU)
        proxies = lab.contestants(target)
        for proxy in _turns(proxies, rounds):
            pids = [*_kernel_threads(), server.pid, proxy.pid]
            before, own = {pid: _cpu(pid) for pid in pids}, _cpu(proxy.pid)
            answer = lab.run("pull", proxy, 4, seconds, target=target)
            time.sleep(0.05)
            gigabytes = answer["bytes"] / 1e9
            proxy.add(
                gbit_per_s=answer["gbit"],
                # A kernel thread may have ended meanwhile.
                cpu_s_per_gb=(sum(max(0.0, _cpu(pid) - before[pid]) for pid in pids) + answer["cpu"]) / gigabytes,
                proxy_cpu_s_per_gb=(_cpu(proxy.pid) - own) / gigabytes,
            )
        return proxies


def one_cpu(rounds: int, seconds: float) -> list[Proxy]:
    global _LOAD_CPU
    _LOAD_CPU = _PROXY_CPU
    return ping(rounds, seconds)


def ping(rounds: int, seconds: float, network: Network | None = None) -> list[Proxy]:
    with Lab(network) as lab:
        target, server = lab.server("echo", _LOAD_CPU)
        proxies = lab.contestants(target)
        for proxy in _turns(proxies, rounds):
            pids = [*_kernel_threads(), server.pid, proxy.pid]
            before, user = {pid: _cpu(pid) for pid in pids}, _user_cpu(proxy.pid)
            answer = lab.run("ping", proxy, 20, 64, seconds, target=target)
            used = sum(max(0.0, _cpu(pid) - before[pid]) for pid in pids) + answer["cpu"]
            proxy.add(
                p50_us=answer["p50_us"],
                p99_us=answer["p99_us"],
                per_s=answer["rate"],
                cpu_us_each=1e6 * used / (answer["rate"] * seconds),
                proxy_user_cpu=(_user_cpu(proxy.pid) - user) / seconds,
            )
        return proxies


@contextlib.contextmanager
def _routed() -> Iterator[Network]:
    """Load and server are hosts of their own, between which this one routes."""
    with contextlib.ExitStack() as cleanup:
        names = [f"bench-{os.getpid()}-{side}" for side in ("load", "server")]
        for number, name in enumerate(names):
            _ip("netns", "add", name)
            cleanup.callback(_ip, "netns", "delete", name)
            device, net = f"to-{number}", f"198.18.{number}"
            _ip("link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("address", "add", f"{net}.1/24", "dev", device)
            _ip("link", "set", device, "up")
            _ip("-n", name, "address", "add", f"{net}.2/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", name, "link", "set", link, "up")
            _ip("-n", name, "route", "add", "default", "via", f"{net}.1")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        load, server = (("nsenter", f"--net=/run/netns/{name}") for name in names)
        yield Network("198.18.0.1", "198.18.1.2", load, server)


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True)


def veth_ping(rounds: int, seconds: float) -> list[Proxy]:
    with _routed() as network:
        return ping(rounds, seconds, network)


def veth_bulk(rounds: int, seconds: float) -> list[Proxy]:
    with _routed() as network:
        return bulk(rounds, seconds, network)


def setup(rounds: int, seconds: float) -> list[Proxy]:
    """What a client waits for: from connect(2) to the reply of SOCKS5, and to the first byte of the target's answer."""
    with Lab() as lab:
        target, _ = lab.server("echo", _LOAD_CPU)
        without = lab.rama("auto", 1, _PROXY_CPU)
        without.name = "auto"
        proxies = [without, lab.wire()]
        os.sched_setaffinity(0, {_LOAD_CPU})
        for proxy in _turns(proxies, rounds):
            replies, answers = _dialled(proxy.at, target, seconds)
            for name, waits in (("reply", replies), ("answer", answers)):
                waits.sort()
                for percent in (50, 99):
                    proxy.add(**{f"{name}_p{percent}_us": 1e6 * waits[len(waits) * percent // 100]})
        return proxies


def _dialled(at: str, target: str, seconds: float) -> tuple[list[float], list[float]]:
    """Seconds until the reply, and until the answer of the target, of one connection after the other."""
    host, _, port = target.rpartition(":")
    name, _, number = at.rpartition(":")
    ask = b"\5\1\0\1" + socket.inet_aton(host) + int(port).to_bytes(2, "big")
    replies, answers = [], []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        with socket.create_connection((name, int(number))) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(b"\5\1\0")
            if sock.recv(2, socket.MSG_WAITALL) != b"\5\0":
                raise RuntimeError("no method is accepted")
            sock.sendall(ask)
            if sock.recv(10, socket.MSG_WAITALL)[1:2] != b"\0":
                raise RuntimeError("the target is refused")
            replies.append(time.perf_counter() - began)
            sock.sendall(b"a word")
            if sock.recv(6, socket.MSG_WAITALL) != b"a word":
                raise RuntimeError("another answer")
            answers.append(time.perf_counter() - began)
            reset_on_close(sock)
    return replies, answers


def nic(rounds: int, seconds: float) -> list[Proxy]:
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["mount", "-t", "sysfs", "sysfs", directory], check=True)  # that of our network namespace
        try:
            (Path(directory) / "class/net/lo/queues/rx-0/rps_cpus").write_text(f"{1 << _PROXY_CPU:x}")
        finally:
            subprocess.run(["umount", directory], check=True)
    return ping(rounds, seconds)


def idle(_rounds: int, _seconds: float) -> list[Proxy]:
    with Lab() as lab:
        target, _ = lab.server("echo", _LOAD_CPU)
        proxies = []
        for make in (lab.haproxy, *(lambda target, kind=kind: lab.ours(kind, target) for kind in _OURS)):
            proxy = make(target)
            before = _resident(proxy.pid)
            holding = subprocess.Popen(
                [lab.load, "hold", proxy.at, str(_IDLE_TUNNELS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert holding.stdout is not None
            assert holding.stdout.readline() == b"ready\n"
            time.sleep(1)
            proxy.add(kib_per_tunnel=(_resident(proxy.pid) - before) / 1024 / _IDLE_TUNNELS)
            holding.communicate()
            proxies.append(proxy)
        return proxies


def dial(rounds: int, seconds: float) -> list[Proxy]:
    with Lab() as lab:
        target, _ = lab.server("echo", None)
        proxies = [lab.microsocks(None), lab.dante(), lab.rama()]
        for proxy in _turns(proxies, rounds):
            before = _tree_cpu(proxy.pid)
            answer = lab.run("dial", proxy, _DIALLERS, seconds, target=target, pin=False)
            used = _tree_cpu(proxy.pid) - before
            proxy.add(per_s=answer["rate"], proxy_cpu_ms_each=1000 * used / answer["connections"])
        return proxies


_RUNS: Final[dict[str, Callable[[int, float], list[Proxy]]]] = {
    "bulk": bulk,
    "ping": ping,
    "nic": nic,
    "one-cpu": one_cpu,
    "idle": idle,
    "dial": dial,
    "veth-ping": veth_ping,
    "veth-bulk": veth_bulk,
    "setup": setup,
}

_AIMS: Final[Mapping[str, tuple[tuple[str, str, float], ...]]] = {
    "ping": (("p50_us", "haproxy", 0.85), ("p99_us", "haproxy", 0.6), ("per_s", "haproxy", 1.25)),
    "nic": (("p50_us", "haproxy", 1.0), ("p99_us", "haproxy", 0.6), ("per_s", "haproxy", 1.25)),
    "one-cpu": (("p50_us", "haproxy", 0.85), ("p99_us", "haproxy", 0.6), ("per_s", "haproxy", 1.25)),
    "veth-ping": (("p50_us", "haproxy", 1.0), ("p99_us", "haproxy", 0.6), ("per_s", "haproxy", 1.25)),
    "bulk": (("gbit_per_s", "haproxy", 1.8), ("cpu_s_per_gb", "haproxy", 0.35), ("cpu_s_per_gb", "direct", 1.1)),
    "veth-bulk": (("gbit_per_s", "haproxy", 1.8), ("cpu_s_per_gb", "haproxy", 0.35), ("cpu_s_per_gb", "direct", 1.1)),
}
"""By bench: a figure of ``wire``, beside whom, and the ratio that is wanted: rates at least, all else at most."""
_BESIDE_DIRECT: Final = (("p50_us", "direct", 1.1), ("p99_us", "direct", 1.1), ("cpu_us_each", "direct", 1.1))


def _enter_namespace() -> None:
    """Go on in a network namespace of our own, so that thousands of connections in TIME-WAIT take no port of anybody,
    and with as many ports for clients as there are."""
    if os.environ.get(_INSIDE) != "1":
        command = ("unshare", "--net", sys.executable, "-m", "bench.relay", *sys.argv[1:])
        os.execvpe(command[0], command, {**os.environ, _INSIDE: "1"})
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("2048 65000")
    # Dante binds before it connects, and finds no port where all are in TIME-WAIT.
    Path("/proc/sys/net/ipv4/tcp_max_tw_buckets").write_text("4096")


def main() -> None:
    name, *numbers = sys.argv[1:] or [""]
    if name not in _RUNS:
        sys.exit(f"usage: python -m bench.relay {'|'.join(_RUNS)} [ROUNDS] [SECONDS]")
    _enter_namespace()
    proxies = _RUNS[name](int(numbers[0]) if numbers else 7, float(numbers[1]) if numbers[1:] else 1.0)
    reference, by_name = proxies[0], {proxy.name: proxy for proxy in proxies}
    direct = by_name.get("direct")
    print(f"load {os.getloadavg()[0]:.1f}")
    for figure in reference.figures:
        print(f"\n{figure:20}{'median':>10}{'lowest':>10}{'highest':>10}{'ratio':>8}{'direct' if direct else '':>8}")
        for proxy in proxies:
            values = proxy.figures[figure]
            beside = f"{_ratio(proxy, direct, figure):8.2f}" if direct else ""
            print(
                f"{proxy.name:20}{statistics.median(values):10.3f}{min(values):10.3f}{max(values):10.3f}"
                f"{_ratio(proxy, reference, figure):8.2f}{beside}",
                flush=True,
            )
    aims = _AIMS.get(name, ())
    for figure, other, aim in (*aims, *(_BESIDE_DIRECT if aims and "p50_us" in reference.figures else ())):
        ratio, least = _ratio(by_name["wire"], by_name[other], figure), figure in ("per_s", "gbit_per_s")
        met = ratio >= aim if least else ratio <= aim
        wanted = f"aim {'>=' if least else '<='} {aim}: {'met' if met else 'SHORT'}"
        print(f"wire {figure} beside {other}: {ratio:.2f}, {wanted}")


def _ratio(proxy: Proxy, other: Proxy, figure: str) -> float:
    """The median of the ratios of all rounds."""
    pairs = zip(proxy.figures[figure], other.figures[figure], strict=True)
    return statistics.median(value / beside if beside else float("nan") for value, beside in pairs)


if __name__ == "__main__":
    main()
