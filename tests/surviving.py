"""``python -m tests.surviving kill|upgrade|mortal [TUNNELS] [ROUNDS]``: tunnels of the wire relay, 1,000 by default, of
which three quarters are busy in both directions, while their server ends.

``kill`` and ``upgrade`` have listeners with ``survive``: the server is killed and started anew, or upgraded, 3 times by
default; no tunnel may be cut, and no byte wrong. ``mortal`` has them without: after a kill all must be reset within 2
s, idle ones, too. Needs root; prints one JSON object, and ends with exit code 1 if anything was not as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

from rama_ebpf.kernel.instance import Instance
from rama_ebpf.loader import unload

from .lab import Host, Lab, wait_for
from .proxy import ProxyProcess
from .relay.flows import expected
from .relay.test_survive import exactly

CONFIG = """
[server]
workers = 2
drain = "60s"
max_generations = 16
[egress]
allow = ["198.18.0.0/15"]
[logging]
access = false
[limits]
connections_per_source = 0
[listeners.main]
address = "0.0.0.0:1080"
stack = "socks"
relay = "wire"
survive = {survive}
[stacks.socks]
service = {{ socks5 = {{}} }}
layers = [{{ timeout = {{ idle = "1h", total = "1h" }} }}]
"""
_CHUNK = 4096
_AHEAD = 16 * _CHUNK
"""Bytes that an end is ahead of the other at most."""


class End:
    """One end of a tunnel: says the bytes of a block in order, and compares what it hears with those of the other."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.sock = sock
        self.name = name
        self.said = self.heard = 0
        self.wrong = ""
        self.reset_at: float | None = None
        self.other: End

    def speak(self) -> None:
        while self.said - self.other.heard < _AHEAD:
            try:
                self.said += self.sock.send(expected(self.said, _CHUNK))
            except BlockingIOError:
                return
            except OSError as error:
                self.fail(error)
                return

    def listen(self) -> None:
        try:
            data = self.sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            self.fail(error)
            return
        if data != expected(self.heard, len(data)) or not data:
            self.wrong = f"{self.name}: {len(data)} bytes behind {self.heard} are not what was said"
        self.heard += len(data)

    def fail(self, error: OSError) -> None:
        if self.reset_at is None:
            self.reset_at = time.monotonic()
            self.wrong = self.wrong or f"{self.name}: {error} behind {self.heard} bytes"


class Traffic(threading.Thread):
    """All tunnels: of four of them three are busy."""

    def __init__(self, tunnels: list[tuple[socket.socket, socket.socket]]) -> None:
        super().__init__(daemon=True)
        self.ends: list[End] = []
        self._epoll = select.epoll()
        self._by_fd: dict[int, End] = {}
        self._halted = threading.Event()
        for number, pair in enumerate(tunnels):
            one, other = (End(sock, f"tunnel {number} {side}") for sock, side in zip(pair, "<>", strict=True))
            one.other, other.other = other, one
            for end in (one, other):
                end.sock.setblocking(False)
                self._by_fd[end.sock.fileno()] = end
                self._epoll.register(end.sock.fileno(), select.EPOLLIN)
                self.ends.append(end)
        self.busy = [end for number, end in enumerate(self.ends) if number // 2 % 4 != 3]

    def run(self) -> None:
        for end in self.busy:
            end.speak()
        while not self._halted.is_set():
            for fd, _ in self._epoll.poll(0.1, 512):
                end = self._by_fd[fd]
                end.listen()
                if end.wrong:
                    self._epoll.unregister(fd)
                elif end.other in self.busy and not end.other.wrong:
                    end.other.speak()

    def halt(self) -> None:
        self._halted.set()
        self.join()

    def turn(self) -> None:
        """Wait until each busy end has heard something more."""
        before = [(end, end.heard) for end in self.busy]
        wait_for(
            lambda: any(end.wrong for end in self.ends) or all(end.heard > heard for end, heard in before),
            timeout=120,
            what="bytes of each tunnel",
        )

    def finish(self) -> list[str]:
        """Let every end, the idle ones too, hear all that was said; return what was wrong."""
        self.halt()
        for end in self.ends:
            if not end.wrong:
                end.speak()
        deadline = time.monotonic() + 120
        waiting = {end.sock.fileno(): end for end in self.ends if not end.wrong}
        while waiting and time.monotonic() < deadline:
            for fd, _ in self._epoll.poll(0.1, 512):
                end = waiting.get(fd)
                if end is not None:
                    end.listen()
            waiting = {fd: end for fd, end in waiting.items() if not end.wrong and end.heard < end.other.said}
        late = [f"{end.name}: heard {end.heard} of {end.other.said} bytes" for end in waiting.values()]
        return [end.wrong for end in self.ends if end.wrong] + late


class Servers:
    """A client, the proxy and a target."""

    def __init__(self, lab: Lab, directory: Path, *, survive: bool) -> None:
        self.host, self.client, self.target = (lab.host(name) for name in ("proxy", "client", "target"))
        file = directory / "rama.toml"
        file.write_text(CONFIG.format(survive=str(survive).lower()))
        self.proxy = ProxyProcess(self.host, f"test-{os.getpid()}-surviving", "--config", str(file))
        self.instance = Instance(self.proxy.instance)
        self.listener = self.target.socket()
        self.listener.bind((self.target.ipv4, 0))
        self.listener.listen(1024)
        self.start()

    def start(self) -> None:
        self.proxy.start()
        wait_for(lambda: self.instance.read_state()["wire"]["state"] == "ready", timeout=60, what="the relay")  # type: ignore[index]

    def rows(self) -> list[dict[str, object]]:
        return [row for row in self.proxy.json("flows")["flows"] if row["relay"] == "wire"]

    def tunnels(self, count: int) -> list[tuple[socket.socket, socket.socket]]:
        """So many that were taken over."""
        made: dict[str, tuple[socket.socket, socket.socket]] = {}
        for _ in range(20):
            for _ in range(count - len(made)):
                client, target = self._dial(self.host)
                made[f"{client.getsockname()[0]}:{client.getsockname()[1]}"] = client, target
            taken = {str(row["source"]) for row in self.rows()}
            for name in made.keys() - taken:
                for sock in made.pop(name):
                    sock.close()
            if len(made) >= count:
                return list(made.values())
        raise AssertionError(f"{len(made)} of {count} tunnels were taken over: {self.proxy.json('flows')['refused']}")

    def _dial(self, host: Host) -> tuple[socket.socket, socket.socket]:
        client = self.client.connect(host.ipv4, 1080)
        name, port = self.listener.getsockname()
        client.sendall(b"\5\1\0\5\1\0\1" + socket.inet_aton(name) + port.to_bytes(2, "big"))
        assert exactly(client, 12)[3] == 0
        target, _ = self.listener.accept()
        target.settimeout(10)
        for source, sink in ((client, target), (target, client)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            source.sendall(b"a word")
            assert exactly(sink, 6) == b"a word"
        return client, target

    def kill(self) -> None:
        os.kill(self.proxy.pid, signal.SIGKILL)
        self.proxy.wait()

    def served(self) -> None:
        wait_for(lambda: self.instance.serving_pid() is None, what="the end of the server")


def survives(servers: Servers, what: str, count: int, rounds: int) -> dict[str, object]:
    traffic = Traffic(servers.tunnels(count))
    traffic.start()
    wrong: list[str] = []
    for _ in range(rounds):
        traffic.turn()
        if what == "kill":
            servers.kill()
            traffic.turn()
            servers.start()
        else:
            servers.proxy.command("upgrade", timeout=300)
        wait_for(lambda: len(servers.rows()) == count, timeout=60, what="all tunnels at the server that serves")
        traffic.turn()
    wrong += traffic.finish()
    moved = sum(end.heard for end in traffic.ends)
    return {
        "tunnels": count,
        "rounds": rounds,
        "gib": round(moved / (1 << 30), 3),
        "wrong": wrong[:10],
        "faults": len(wrong),
    }


def mortal(servers: Servers, count: int) -> dict[str, object]:
    traffic = Traffic(servers.tunnels(count))
    traffic.start()
    traffic.turn()
    killed = time.monotonic()
    servers.kill()
    wait_for(lambda: all(end.wrong for end in traffic.ends), timeout=30, what="a reset of each end")
    traffic.halt()
    resets = sorted(end.reset_at - killed for end in traffic.ends if end.reset_at is not None)
    others = [end.wrong for end in traffic.ends if end.reset_at is None]
    late = sum(seconds > 2 for seconds in resets)
    return {"tunnels": count, "last_reset_s": round(resets[-1], 3), "wrong": others[:10], "faults": len(others) + late}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.surviving")
    parser.add_argument("what", choices=("kill", "upgrade", "mortal"))
    parser.add_argument("tunnels", nargs="?", type=int, default=1000)
    parser.add_argument("rounds", nargs="?", type=int, default=3)
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with Lab() as lab, tempfile.TemporaryDirectory(prefix="rama-ebpf-test-") as directory:
        os.chmod(directory, 0o755)
        os.environ.setdefault("RAMA_EBPF_STATE_DIR", f"{directory}/state")
        servers = Servers(lab, Path(directory), survive=args.what != "mortal")
        try:
            if args.what == "mortal":
                result = mortal(servers, args.tunnels)
            else:
                result = survives(servers, args.what, args.tunnels, args.rounds)
        finally:
            pid = servers.instance.serving_pid()
            if pid:
                os.kill(pid, signal.SIGKILL)
            servers.served()
            unload(servers.instance)
            servers.proxy.end()
    left = servers.instance.run_dir.exists()
    print(json.dumps({"what": args.what} | result | {"left": left}))
    return 1 if result["faults"] or left else 0


if __name__ == "__main__":
    sys.exit(main())
