"""``python -m tests.hammering N``: sources that are denied connect without pause through N starts, N reloads in which
policy and services change, N stops, N loads, N trials and N upgrades. None of them may get in, and no allowed one may
be refused while a listener is up: it may wait, and be reset when the server that it was with has gone.

An upgrade is from the last commit whose maps have another layout: its server serves, ends or is killed, and leaves its
pins; then this one starts. Before that it is a downgrade: the old one finds what this one has left.
"""

from __future__ import annotations

import os
import random
import re
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

from .hammer import Denied, Hammer
from .lab import Host, Lab, wait_for
from .proxy import ProxyProcess, rama_ebpf

SERVER = {4: "198.18.0.80", 6: "2001:db8::80"}
PORTS = (1080, 1081)
DENIED = ("198.18.66.6", "198.18.66.7", "2001:db8:66::6")
"""By every configuration, on every port."""
STRANGERS = ("198.18.7.7", "198.18.7.8")
"""Those of the configuration with a service that gives itself away may never be served by it."""
ALLOWED = ("198.18.1.1", "198.18.1.2", "2001:db8:1::1")

OPEN = """
[listeners.four]
address = "{four}:1080"
stack = "s"
[listeners.six]
address = "[{six}]:1080"
stack = "s"
[stacks.s]
service = {{ echo = {{}} }}
[policy]
default = "allow"
persist = true
[[policy.rules]]
name = "denied"
action = "drop"
sources = ["198.18.66.0/24", "2001:db8:66::/64"]
"""
"""Strangers are let in, to a service that is no secret."""
OFFICE = """
[listeners.four]
address = "{four}:1080"
stack = "s"
[listeners.six]
address = "[{six}]:1080"
stack = "s"
[listeners.admin]
address = "{four}:1081"
stack = "s"
[stacks.s]
service = {{ http = {{}} }}
[policy]
default = "drop"
persist = true
[[policy.rules]]
name = "office"
action = "allow"
sources = ["198.18.1.0/24", "2001:db8:1::/64"]
"""
"""Only the office gets in, and needs no password."""


_ENDS = (
    (signal.SIGTERM,),
    (signal.SIGINT,),
    (signal.SIGTERM, signal.SIGTERM),
    (signal.SIGTERM, signal.SIGKILL),
    (signal.SIGHUP, signal.SIGTERM),
    (signal.SIGKILL,),
)
"""How a server is ended."""


class Strangers(Hammer):
    """Connect without pause and say nonsense: an echo comes from the service that is for all, an answer of another kind
    from the one that is not for them."""

    def __init__(self, host: Host) -> None:
        super().__init__(host, STRANGERS)
        self.served: Counter[str] = Counter()

    def _run(self, source: str) -> None:
        while not self._stopping.is_set():
            with socket.socket() as sock:
                sock.settimeout(0.3)
                try:
                    sock.bind((source, 0))
                    sock.connect((SERVER[4], 1080))
                    sock.sendall(b"nonsense\r\n\r\n")
                    answer = sock.recv(64)
                except ConnectionRefusedError:
                    self.served["refused"] += 1
                    self._stopping.wait(0.002)
                except OSError:
                    self.served["silence or reset"] += 1
                else:
                    self.served["echo" if answer.startswith(b"nonsense") else "closed" if not answer else "OFFICE"] += 1


class Allowed(Hammer):
    """Connect without pause; ``refused`` counts those that met an RST while ``up`` was set throughout."""

    def __init__(self, host: Host) -> None:
        super().__init__(host, ALLOWED)
        self.counts: Counter[str] = Counter()
        self.refused: list[str] = []
        self.up = threading.Event()
        self.phase = ""
        self._downs = 0

    def down(self) -> None:
        """From now on nothing is promised, until ``up`` is set."""
        self.up.clear()
        self._downs += 1

    def _run(self, source: str) -> None:
        six = ":" in source
        while not self._stopping.is_set():
            was_up, downs = self.up.is_set(), self._downs
            with socket.socket(socket.AF_INET6 if six else socket.AF_INET) as sock:
                sock.settimeout(10)
                try:
                    sock.bind((source, 0))
                    sock.connect((SERVER[6 if six else 4], 1080))
                except OSError as error:
                    self.counts[type(error).__name__] += 1
                    if was_up and downs == self._downs and self.up.is_set():
                        self.refused.append(f"{source} in {self.phase}: {error!r}")
                    self._stopping.wait(0.005)
                else:
                    self.counts["in"] += 1
                    self._stopping.wait(0.001)


def _configure(file: Path, text: str) -> None:
    server = '[server]\nworkers = 2\ndrain = "500ms"\n'
    file.write_text(server + text.format(four=SERVER[4], six=SERVER[6]))


def _busy(proxy: ProxyProcess, chance: random.Random) -> list[int]:
    """Stop some workers: they do not close what they have for a while."""
    chosen = [pid for pid in proxy.workers() if chance.random() < 0.5]
    for pid in chosen:
        os.kill(pid, signal.SIGSTOP)
    return chosen


def _go_on(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            continue


def _old_version(directory: Path) -> Path:
    """Put the last version whose pins have another layout into a directory. Raises CalledProcessError without git."""
    top = Path(__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", top, *words], check=True, capture_output=True, text=True).stdout.strip()

    changed = git("log", "-1", "--format=%H", "-GLAYOUT_VERSION = ", "--", "bpf/policy.h")
    packed = directory / "old.tar"
    git("archive", "--output", str(packed), f"{changed}^")
    old = directory / "old"
    old.mkdir()
    subprocess.run(["tar", "-xf", packed, "-C", old], check=True)
    layouts = [re.search(r"LAYOUT_VERSION = (\d+)", (one / "bpf/policy.h").read_text()) for one in (old, top)]
    assert len({found[1] for found in layouts if found is not None}) == 2, "the layout is the same"
    return old


def hammer(count: int, directory: Path) -> int:
    """Run it; return how many got in who may not, or were refused who may."""
    chance = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}", flush=True)
    name = f"test-{os.getpid()}-hammer"
    file, shut = directory / "rama.toml", directory / "shut.toml"
    shut.write_text(
        'default = "drop"\n[[rules]]\nname = "office"\naction = "allow"\n'
        'sources = ["198.18.1.0/24", "2001:db8:1::/64"]\n'
    )
    targets = [(address, port) for address in SERVER.values() for port in PORTS]
    done: Counter[str] = Counter()
    with Lab() as lab:
        host = lab.host("proxy")
        for address in (*SERVER.values(), *DENIED, *STRANGERS, *ALLOWED):
            host.add_address(f"{address}/{128 if ':' in address else 32}", "lo")
        _configure(file, OPEN)
        proxy = ProxyProcess(host, name, "--config", str(file))
        old = _old_version(directory)
        try:
            with Denied(host, DENIED, targets) as denied, Strangers(host) as strangers, Allowed(host) as allowed:
                begun = time.monotonic()
                for number in range(count):
                    _configure(file, OPEN)
                    denied.phase = f"in round {number}, while it starts"
                    proxy.start()
                    done["starts"] += 1
                    allowed.phase = "reloads"
                    denied.phase = f"in round {number}, while it reloads"
                    allowed.up.set()
                    for text in (OFFICE, OPEN):
                        _configure(file, text)
                        stopped = _busy(proxy, chance)
                        proxy.log.clear()
                        proxy.signal(signal.SIGHUP)
                        threading.Timer(chance.random() * 2, _go_on, (stopped,)).start()
                        wait_for(lambda: proxy.logged(": reloaded$|reload failed"), timeout=90, what="the reload")
                        done["reloads" if proxy.logged(": reloaded$") else "refused reloads"] += 1
                        if number % 10 == 0:
                            wait_for(lambda: len(proxy.workers()) == 2, timeout=60, what="the end of old workers")
                    allowed.phase = "loads"
                    denied.phase = f"in round {number}, while sets are loaded"
                    rama_ebpf("policy", "load", "--instance", name, str(shut))
                    rama_ebpf("policy", "load", "--instance", name, str(shut), "--confirm-timeout", "1h")
                    rama_ebpf("policy", "rollback" if chance.random() < 0.5 else "confirm", "--instance", name)
                    done["loads"] += 1
                    done["trials"] += 1
                    allowed.phase = "stop"
                    allowed.down()
                    stopped = _busy(proxy, chance)
                    ends = chance.choice(_ENDS)
                    denied.phase = f"in round {number}, while it ends by {' '.join(one.name for one in ends)}"
                    for number_of_signal in ends:
                        proxy.signal(number_of_signal)
                        time.sleep(chance.random() * 0.2)
                    threading.Timer(chance.random(), _go_on, (stopped,)).start()
                    proxy.wait(30)
                    proxy.end()
                    done["stops"] += 1
                    allowed.phase = "upgrade"
                    denied.phase = f"in round {number}, while the old version starts"
                    proxy.environment, proxy.cwd = {"PYTHONPATH": str(old)}, old  # workers search both
                    proxy.start()
                    end = signal.SIGTERM if chance.random() < 0.5 else signal.SIGKILL
                    denied.phase = f"in round {number}, while the old version ends by {end.name}"
                    proxy.signal(end)
                    proxy.wait(30)
                    proxy.end()
                    layouts = sorted(path.name for path in Instance(name).pin_root.iterdir())
                    assert set(layouts) - {Instance(name).pin_dir.name}, layouts
                    proxy.environment, proxy.cwd = {}, None
                    done["upgrades"] += 1
                    if number % 10 == 9:
                        rama_ebpf("unload", "--instance", name)
                    if number % 5 == 4:
                        seconds = time.monotonic() - begun
                        print(
                            f"{number + 1} rounds in {seconds:.0f} s: {dict(done)}; in: {len(denied.got_in)} of "
                            f"{denied.tries} denied; strangers: {dict(strangers.served)}; allowed: "
                            f"{dict(allowed.counts)}, refused while up: {len(allowed.refused)}",
                            flush=True,
                        )
                        print("".join(f"  FAULT {line}\n" for line in denied.got_in[:20]), end="", flush=True)
        finally:
            proxy.end()
            wait_for(lambda: Instance(name).serving_pid() is None, what="the end of the server")
            unload(Instance(name))
    for line in (*denied.got_in[:20], *allowed.refused[:20]):
        print(f"FAULT {line}")
    faults = len(denied.got_in) + strangers.served["OFFICE"] + len(allowed.refused)
    print(f"{dict(done)}: {faults} faults")
    return faults


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="hammer-") as made:
        os.environ["RAMA_EBPF_STATE_DIR"] = f"{made}/state"
        Path(made, "state").mkdir()
        sys.exit(1 if hammer(int(sys.argv[1]), Path(made)) else 0)
