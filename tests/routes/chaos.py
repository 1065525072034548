"""Twenty parents are killed, frozen, partitioned and revived under load: ``python -m tests.routes.chaos``.

Ten are real (squid, tinyproxy, microsocks, Dante where they are installed, and ours), ten misbehave. As long as one
good parent lives no client may fail, and nothing may reach the target but from a parent. Needs root.
Prints what was seen, and exits 1 if anything failed or leaked.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from rama_ebpf.kernel.instance import Instance
from rama_ebpf.loader import unload

from ..lab import Host, Lab, temporary_directory, wait_for
from ..proxy import ProxyProcess

ECHO = """
import socketserver
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(9999):
            self.request.sendall(data)
class Server(socketserver.ThreadingTCPServer):
    request_queue_size = 1024
    daemon_threads = True
Server(("", 80), Echo).serve_forever()
"""

OURS = """
import asyncio, sys
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.services.connect import Connector
from rama_ebpf.services.http import HttpProxy
from rama_ebpf.services.resolver import DnsResolver
from rama_ebpf.services.socks5 import Socks5Server
from rama_ebpf.services.tcp import TcpServer, bind_tcp
async def main():
    kind = Socks5Server if sys.argv[2] == "socks5" else HttpProxy
    connector = Connector(DnsResolver(), EgressPolicy.of(["198.18.0.0/15"]))
    TcpServer(bind_tcp("0.0.0.0", int(sys.argv[1])), kind(connector)).start()
    await asyncio.Event().wait()
asyncio.run(main())
"""

FAULTY = """
import socket, struct, sys, threading, time
port, kind = int(sys.argv[1]), sys.argv[2]
server = socket.create_server(("0.0.0.0", port), backlog=1024)
def serve(sock):
    try:
        if kind == "hang":
            time.sleep(60)
        first = sock.recv(4096)
        says = {"garbage": b"SSH-2.0-x\\r\\n", "407": b"HTTP/1.1 407 No\\r\\n\\r\\n",
                "429": b"HTTP/1.1 429 No\\r\\n\\r\\n",
                "500": b"HTTP/1.1 500 No\\r\\n\\r\\n", "auth": b"\\5\\xff", "half": b"HTTP/1.1 2"}
        if kind in says:
            sock.sendall(says[kind])
        if kind == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if kind == "half":
            time.sleep(60)
    except OSError:
        pass
    finally:
        sock.close()
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""

KINDS = ("hang", "close", "reset", "garbage", "407", "429", "500", "auth", "half", "refuse")


class GoodParent:
    """A real parent that can be ended, stopped, cut off and brought back."""

    def __init__(self, host: Host, number: int, directory: Path) -> None:
        self.host, self.port, self.number = host, 3100 + number, number
        self.directory = directory
        self.scheme, self._command = self._choose()
        self._process: subprocess.Popen[str] | None = None
        self.well = False

    def _choose(self) -> tuple[str, list[str]]:
        port, file = self.port, self.directory / f"parent-{self.number}"
        ours = [sys.executable, "-c", OURS, str(port)]
        if self.number == 0 and (squid := shutil.which("squid")):
            file.write_text(
                f"http_port {port}\nacl all src all\nhttp_access allow all\npid_filename none\ncache deny all\n"
                f"access_log none\ncache_log /dev/null\nshutdown_lifetime 0 seconds\ncoredump_dir none\n"
            )
            return "http", [squid, "-N", "-f", str(file)]
        if self.number == 1 and (tinyproxy := shutil.which("tinyproxy")):
            file.write_text(f"Port {port}\nListen 0.0.0.0\nMaxClients 500\nLogLevel Critical\nTimeout 600\n")
            return "http", [tinyproxy, "-d", "-c", str(file)]
        if self.number == 2 and (microsocks := shutil.which("microsocks")):
            return "socks5", [microsocks, "-p", str(port)]
        if self.number == 3 and (danted := shutil.which("danted")):
            file.write_text(
                f"internal: 0.0.0.0 port = {port}\nexternal: eth0\nsocksmethod: none\nclientmethod: none\n"
                "client pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }\nsocks pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }\n"
            )
            return "socks5", [danted, "-f", str(file)]
        return ("socks5", [*ours, "socks5"]) if self.number % 2 else ("http", [*ours, "http"])

    def start(self) -> None:
        if self._process is None or self._process.poll() is not None:
            self._process = self.host.popen(
                *self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            wait_for(self._listens, timeout=30, what=f"parent {self.number}")
        self.well = True

    def _listens(self) -> bool:
        return f":{self.port} " in self.host.run("ss", "-Hltn").stdout

    def kill(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def cut_off(self) -> None:
        self.host.ip("link", "set", "eth0", "down")

    def join(self) -> None:
        self.host.ip("link", "set", "eth0", "up")


def break_and_mend(parents: list[GoodParent], ends: float, rng: random.Random, done: Counter[str]) -> None:
    """Harm parents at random, and leave at least one alone at any time."""
    harms = {
        "killed": (GoodParent.kill, GoodParent.start),
        "frozen": (GoodParent.stop, GoodParent.go_on),
        "partitioned": (GoodParent.cut_off, GoodParent.join),
    }
    while time.monotonic() < ends:
        victims = rng.sample(parents, rng.randint(1, max(1, len(parents) // 2)))
        chosen = []
        for victim in victims:
            name = rng.choice(list(harms))
            harms[name][0](victim)
            done[name] += 1
            chosen.append((victim, name))
        time.sleep(rng.uniform(0.5, 4.0))
        for victim, name in chosen:
            harms[name][1](victim)
            done["revived"] += 1
        time.sleep(rng.uniform(0.2, 2.0))


def connect_for(
    client: Host, proxy: Host, target: Host, ends: float, pause: float, times: list[float], failures: list[str]
) -> None:
    """Connect again and again, and have two bytes echoed."""
    while time.monotonic() < ends:
        begun = time.monotonic()
        try:
            with client.connect(proxy.ipv4, 1080) as sock:
                sock.settimeout(30)
                sock.sendall(b"\5\1\0" + b"\5\1\0\1" + socket.inet_aton(target.ipv4) + b"\0\x50")
                reply = b""
                while len(reply) < 12 and (more := sock.recv(12 - len(reply))):
                    reply += more
                if len(reply) < 12 or reply[3]:
                    failures.append(f"REP {reply[3] if len(reply) > 3 else reply!r}")
                    continue
                times.append(time.monotonic() - begun)
                sock.sendall(b"ok")
                if sock.recv(2) != b"ok":
                    failures.append("no echo")  # a tunnel whose parent dies is gone; counted apart
        except OSError as error:
            failures.append("no echo" if "reply" in locals() and reply[3:4] == b"\0" else str(error))
        time.sleep(max(0.0, pause - (time.monotonic() - begun)))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--rate", type=float, default=300, help="connections a second")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng, name = random.Random(args.seed), "chaos-routes"
    with Lab() as lab, temporary_directory() as directory, tempfile.TemporaryDirectory():
        proxy, client, target, faulty = (lab.host(part) for part in ("proxy", "client", "target", "faulty"))
        hosts = [lab.host(f"parent{number}") for number in range(10)]
        parents = [GoodParent(host, number, directory) for number, host in enumerate(hosts)]
        target.popen(sys.executable, "-c", ECHO)
        ways, members = [], []
        for parent in parents:
            parent.start()
            members.append(f"good{parent.number}")
            url = f"{parent.scheme}://{parent.host.ipv4}:{parent.port}"
            ways.append(f'[ways.good{parent.number}]\nproxy = {{ url = "{url}", fall = 1, hold = "2s" }}\n')
        for number, kind in enumerate(KINDS):
            if kind != "refuse":
                faulty.popen(sys.executable, "-c", FAULTY, str(4000 + number), kind)
            scheme = "socks5" if kind in ("auth", "hang") else "http"
            url = f"{scheme}://u:p@{faulty.ipv4}:{4000 + number}"
            ways.append(f'[ways.bad-{kind}]\nproxy = {{ url = "{url}", fall = 1, hold = "2s" }}\n')
            members.append(f"bad-{kind}")
        rng.shuffle(members)
        path = directory / "rama.toml"
        path.write_text(
            '[server]\nworkers = 2\n[listeners.front]\naddress = "0.0.0.0:1080"\nstack = "p"\n'
            '[stacks.p]\nservice = "socks5"\n[stacks.p.connect]\ntimeout = "20s"\ntries = 32\nlate = "300ms"\n'
            "[limits]\nconnections_per_source = 0\n"
            '[egress]\nallow = ["198.18.0.0/15"]\n[[routes]]\nname = "all"\nway = "exits"\n'
            f'[ways.exits]\ngroup = {{ choose = "least", members = {members!r} }}\n'.replace("'", '"')
            + "".join(ways)
        )
        running = ProxyProcess(proxy, name, "--config", str(path)).start()
        try:
            return _run(args, lab, running, (proxy, client, target), parents, rng)
        finally:
            running.end()
            unload(Instance(name))


def _run(
    args: argparse.Namespace,
    lab: Lab,
    running: ProxyProcess,
    hosts: tuple[Host, Host, Host],
    parents: list[GoodParent],
    rng: random.Random,
) -> int:
    proxy, client, target = hosts
    ends, threads = time.monotonic() + args.seconds, 30
    times: list[float] = []
    failures: list[str] = []
    done: Counter[str] = Counter()
    with target.capture("eth0") as capture:
        work = [
            threading.Thread(
                target=connect_for, args=(client, proxy, target, ends, threads / args.rate, times, failures)
            )
            for _ in range(threads)
        ]
        for thread in work:
            thread.start()
        reading = threading.Thread(target=lambda: capture.read(args.seconds + 1))
        reading.start()
        break_and_mend(parents, ends, rng, done)
        for thread in (*work, reading):
            thread.join()
    # What the bridge floods while a parent is cut off is not for the target.
    leaked = [one for one in capture.segments if (one.source, one.target) == (proxy.ipv4, target.ipv4)]
    refused = [text for text in failures if text != "no echo"]
    times.sort()
    print(f"{len(times)} connections in {args.seconds:g} s: {len(times) / args.seconds:.0f}/s")
    print(f"time to the reply: median {times[len(times) // 2]:.3f} s, p99 {times[len(times) * 99 // 100]:.3f} s")
    print(f"harm done: {dict(done)}; tunnels that died with their parent: {failures.count('no echo')}")
    print(f"clients that failed: {Counter(refused) or 'none'}")
    print(f"segments to the target from the proxy itself: {len(leaked)}")
    for row in running.json("route", "list")["ways"]:
        if "attempts" in row:
            print(f"  {row['name']:12} {row['state']:12} attempts {row['attempts']:6} failed {row['failed']:6}")
    return 1 if refused or leaked else 0


if __name__ == "__main__":
    sys.exit(main())
