"""The relays beside HAProxy and SOCKS5 servers: ``python -m bench.relay NAME [ROUNDS] [SECONDS]``.

Names are ``bulk``, ``ping``, ``nic``, ``one-cpu``, ``idle`` and ``dial``.
All contestants run at once and take turns, in another order each round; printed are medians, the lowest and the highest
round, and the median of each round's ratio to the reference (HAProxy in TCP mode with splice-auto and one thread; of
``dial`` microsocks). The load (``load.c``) and its server have one CPU, the proxy has the other; ``nic`` is
``ping`` with the kernel's receive work on the proxy's CPU too, where a network card's interrupts would put it, and not
on that of whoever sends, as loopback does; ``one-cpu`` has all of them on one; in ``dial`` nobody is pinned, and ours
has as many workers as CPUs. CPU time is that of the proxy, the load, the server and all kernel threads: the kernel's
relay works in those. Needs root, gcc, and from Debian haproxy, microsocks and dante-server.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

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
    bind 127.0.0.1:{port}
    default_backend b
backend b
    server one 127.0.0.1:{target}
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
allow = ["127.0.0.0/8"]
[listeners.main]
address = "127.0.0.1:{port}"
stack = "socks"
relay = "{relay}"
[stacks.socks]
service = {{ socks5 = {{}} }}
"""


@dataclass
class Proxy:
    """A contestant that runs. ``socks`` if it has to be told the target."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    socks: bool = False
    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **figures: float) -> None:
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(value)


class Lab:
    """The load, its servers, and the contestants; everything ends with it."""

    def __init__(self) -> None:
        self._cleanup = contextlib.ExitStack()
        self.directory = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory()))
        self.load = str(self.directory / "load")
        subprocess.run(["gcc", "-O2", "-pthread", "-o", self.load, _HERE / "load.c"], check=True)

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *exc: object) -> None:
        self._cleanup.close()

    def start(self, *command: object, cpu: int | None, port: int) -> subprocess.Popen[bytes]:
        """Run ``command`` on a CPU and wait until it listens on ``port``."""
        process = subprocess.Popen(
            [*_placed(cpu), *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if command[0] in ("microsocks", "haproxy") else None,  # a line a connection
            start_new_session=True,
        )
        self._cleanup.callback(process.wait)
        self._cleanup.callback(process.terminate)
        wait_for_port(port)
        return process

    def server(self, mode: str, cpu: int | None) -> tuple[int, subprocess.Popen[bytes]]:
        port = free_port()
        return port, self.start(self.load, mode, port, cpu=cpu, port=port)

    def haproxy(self, target: int) -> Proxy:
        port = free_port()
        config = self.directory / f"haproxy-{target}"
        config.write_text(_HAPROXY.format(port=port, target=target))
        return Proxy("haproxy", port, self.start("haproxy", "-db", "-f", config, cpu=_PROXY_CPU, port=port))

    def ours(self, kind: str, target: int) -> Proxy:
        port = free_port()
        command = (sys.executable, "-m", "bench.forward", port, f"127.0.0.1:{target}", kind)
        return Proxy(kind, port, self.start(*command, cpu=_PROXY_CPU, port=port))

    def microsocks(self, cpu: int | None = _PROXY_CPU) -> Proxy:
        port = free_port()
        process = self.start("microsocks", "-i", "127.0.0.1", "-p", port, cpu=cpu, port=port)
        return Proxy("microsocks", port, process, socks=True)

    def dante(self) -> Proxy:
        port = free_port()
        config = self.directory / "danted.conf"
        config.write_text(_DANTE.format(port=port))
        return Proxy("dante", port, self.start("danted", "-f", config, cpu=None, port=port), socks=True)

    def rama(self, relay: str = "auto", workers: int | None = None, cpu: int | None = None) -> Proxy:
        port = free_port()
        config = self.directory / f"rama-{relay}.toml"
        config.write_text(_RAMA.format(port=port, workers=workers or os.cpu_count(), relay=relay))
        instance = f"bench-{relay}-{os.getpid()}"
        command = (Path(sys.executable).with_name("rama-ebpf"), "run", "--instance", instance)
        self._cleanup.callback(subprocess.run, [command[0], "unload", "--purge", "--instance", command[3]], check=True)
        process = self.start(*command, "--config", config, cpu=cpu, port=port)
        return Proxy("rama-ebpf", port, process, socks=True)

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

    def run(self, mode: str, proxy: Proxy, *args: object, target: int, pin: bool = True) -> dict[str, Any]:
        """Run the load against ``proxy`` and return what it prints."""
        command = [*_placed(_LOAD_CPU if pin else None), self.load, mode, f"127.0.0.1:{proxy.port}", *map(str, args)]
        if proxy.socks:
            command.append(f"127.0.0.1:{target}")
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


def _cpu(pid: int) -> float:
    """Seconds that a process has run, with its threads."""
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


def bulk(rounds: int, seconds: float) -> list[Proxy]:
    with Lab() as lab:
        target, server = lab.server("sink", _LOAD_CPU)
        proxies = [lab.haproxy(target), *(lab.ours(kind, target) for kind in _OURS), lab.wire(), lab.microsocks()]
        for proxy in _turns(proxies, rounds):
            pids = [*_kernel_threads(), server.pid, proxy.process.pid]
            before, own = {pid: _cpu(pid) for pid in pids}, _cpu(proxy.process.pid)
            answer = lab.run("pull", proxy, 4, seconds, target=target)
            time.sleep(0.05)
            gigabytes = answer["bytes"] / 1e9
            proxy.add(
                gbit_per_s=answer["gbit"],
                # A kernel thread may have ended meanwhile.
                cpu_s_per_gb=(sum(max(0.0, _cpu(pid) - before[pid]) for pid in pids) + answer["cpu"]) / gigabytes,
                proxy_cpu_s_per_gb=(_cpu(proxy.process.pid) - own) / gigabytes,
            )
        return proxies


def one_cpu(rounds: int, seconds: float) -> list[Proxy]:
    global _LOAD_CPU
    _LOAD_CPU = _PROXY_CPU
    return ping(rounds, seconds)


def ping(rounds: int, seconds: float) -> list[Proxy]:
    with Lab() as lab:
        target, _ = lab.server("echo", _LOAD_CPU)
        proxies = [lab.haproxy(target), *(lab.ours(kind, target) for kind in _OURS), lab.wire(), lab.microsocks()]
        for proxy in _turns(proxies, rounds):
            before = _user_cpu(proxy.process.pid)
            answer = lab.run("ping", proxy, 20, 64, seconds, target=target)
            proxy.add(
                p50_us=answer["p50_us"],
                p99_us=answer["p99_us"],
                per_s=answer["rate"],
                proxy_user_cpu=(_user_cpu(proxy.process.pid) - before) / seconds,
            )
        return proxies


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
            before = _resident(proxy.process.pid)
            holding = subprocess.Popen(
                [lab.load, "hold", f"127.0.0.1:{proxy.port}", str(_IDLE_TUNNELS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert holding.stdout is not None
            assert holding.stdout.readline() == b"ready\n"
            time.sleep(1)
            proxy.add(kib_per_tunnel=(_resident(proxy.process.pid) - before) / 1024 / _IDLE_TUNNELS)
            holding.communicate()
            proxies.append(proxy)
        return proxies


def dial(rounds: int, seconds: float) -> list[Proxy]:
    with Lab() as lab:
        target, _ = lab.server("echo", None)
        proxies = [lab.microsocks(None), lab.dante(), lab.rama()]
        for proxy in _turns(proxies, rounds):
            before = _tree_cpu(proxy.process.pid)
            answer = lab.run("dial", proxy, _DIALLERS, seconds, target=target, pin=False)
            used = _tree_cpu(proxy.process.pid) - before
            proxy.add(per_s=answer["rate"], proxy_cpu_ms_each=1000 * used / answer["connections"])
        return proxies


_RUNS: Final[dict[str, Callable[[int, float], list[Proxy]]]] = {
    "bulk": bulk,
    "ping": ping,
    "nic": nic,
    "one-cpu": one_cpu,
    "idle": idle,
    "dial": dial,
}


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
        sys.exit("usage: python -m bench.relay bulk|ping|nic|one-cpu|idle|dial [ROUNDS] [SECONDS]")
    _enter_namespace()
    proxies = _RUNS[name](int(numbers[0]) if numbers else 7, float(numbers[1]) if numbers[1:] else 1.0)
    reference = proxies[0]
    print(f"load {os.getloadavg()[0]:.1f}")
    for figure in reference.figures:
        print(f"\n{figure:20}{'median':>10}{'lowest':>10}{'highest':>10}{'ratio':>8}")
        for proxy in proxies:
            values = proxy.figures[figure]
            pairs = zip(values, reference.figures[figure], strict=True)
            ratio = statistics.median(value / other if other else float("nan") for value, other in pairs)
            print(
                f"{proxy.name:20}{statistics.median(values):10.3f}{min(values):10.3f}{max(values):10.3f}{ratio:8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
