"""``python -m tests.upgrading N``: N upgrades, 100 by default, while clients connect, denied ones too, and tunnels
live; a worker is killed, and a reload asked for, beside each fifth of them. ``python -m tests.upgrading --faults``:
each step of an upgrade made to fail, by death and by an error.

Needs root. What is counted: connections that were refused, reset or not served; denied sources that got in (a SYN-ACK
on the wire counts); changes of the XDP link; counters that went back; tunnels that were cut. A worker that is killed
takes the connections along that it serves: one of each client at most, and none that is refused.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from rama_ebpf.kernel.instance import Instance
from rama_ebpf.loader import unload

from .hammer import Denied, Served
from .lab import Host, Lab, wait_for
from .proxy import workers_of
from .upgrade.faults import FAULTS
from .upgrade.releases import ALLOWED, DENIED, PORT, UpgradedServer, upgraded_server, xdp_link
from .upgrade.test_failures import fails_without_trace

TUNNELS = 500
_EACH = 5
"""One upgrade in so many is followed by the death of a worker, and one by a reload."""
_SOURCES = (*ALLOWED, *(f"127.0.1.{number}" for number in range(1, 19)))


def _echoes(sock: socket.socket) -> bool:
    try:
        sock.sendall(b"again")
        return sock.recv(5, socket.MSG_WAITALL) == b"again"
    except OSError:
        return False


def _counters(server: UpgradedServer) -> list[int]:
    status = server.proxy.json("status")
    row = status["listeners"][0]
    return [row["established"], row["accepted"], *(row["count"] for row in status["verdicts"])]


def _kill_a_worker(server: UpgradedServer, served: Served) -> list[str]:
    """Of the server that serves; return what was not as it must be when another has taken its place."""
    known, victim = len(served.failures), workers_of(server.pid)[0]
    os.kill(victim, signal.SIGKILL)

    def replaced() -> bool:
        counts = server.proxy.json("status")["workers"]
        return victim not in workers_of(server.pid) and counts["serving"] == counts["expected"]

    wait_for(replaced, timeout=60, what="another worker in the place of the killed one")
    lost, served.failures[known:] = served.failures[known:], []
    refused = [text for text in lost if "not served" not in text]
    if len(lost) > len(_SOURCES):
        refused.append(f"{len(lost)} connections were lost with one worker")
    return refused


def _reload(server: UpgradedServer) -> None:
    def reloads() -> int:
        return sum(line.endswith(": reloaded") for line in server.proxy.log)

    before = reloads()
    os.kill(server.pid, signal.SIGHUP)
    wait_for(lambda: reloads() > before, timeout=60, what="the reload")


def _upgrades(server: UpgradedServer, count: int) -> list[str]:
    """Upgrade so many times under load; return what was not as it must be."""
    wrong: list[str] = []
    server.file.write_text(server.file.read_text().replace("[policy]", '[policy]\nxdp = ["eth0"]'))
    server.upgrade()
    link = xdp_link(server)
    targets = [("127.0.0.1", PORT)]
    with (
        server.host.capture("lo") as capture,
        Served(server.host, _SOURCES, targets[0]) as served,
        Denied(server.host, [DENIED], targets) as denied,
    ):
        tunnels = server.tunnels(TUNNELS)
        before, began = _counters(server), time.monotonic()
        for number in range(1, count + 1):
            server.upgrade()
            if number % _EACH == 0:
                wrong += [f"upgrade {number}: {text}" for text in _kill_a_worker(server, served)]
            if number % _EACH == 2:
                _reload(server)
            now = _counters(server)
            if any(later < earlier for later, earlier in zip(now, before, strict=True)):
                wrong.append(f"upgrade {number}: counters {before} went to {now}")
            before = now
            if xdp_link(server) != link:
                wrong.append(f"upgrade {number}: XDP link {link} is now {xdp_link(server)}")
            answered = [row for row in capture.read(0.1) if row.target == DENIED and row.flags == "SA"]
            if answered:
                wrong.append(f"upgrade {number}: {len(answered)} SYN-ACK to a denied source")
            capture.segments.clear()
            rate = served.served / (time.monotonic() - began)
            print(f"{number} upgrades, {served.served} served ({rate:.0f}/s), {len(served.failures)} not", flush=True)
        cut = sum(not _echoes(sock) for sock in tunnels)
        for sock in tunnels:
            sock.close()
    if cut:
        wrong.append(f"{cut} of {TUNNELS} tunnels were cut")
    return wrong + denied.got_in + served.failures


def _faults(server: UpgradedServer) -> list[str]:
    """Try all; return what was not as it must be."""
    wrong: list[str] = []
    for fault in FAULTS:
        try:
            fails_without_trace(server, fault)
        except AssertionError as error:
            wrong.append(f"{fault.name}: {error}")
            print(f"{fault.name}: {str(error)[:200]}", flush=True)
        else:
            print(f"{fault.name}: step {fault.step}, the old server serves on", flush=True)
    print(f"{len(FAULTS)} faults")
    return wrong


def main() -> int:
    """Run the proof and print what it found."""
    words = sys.argv[1:]
    instance = f"test-{os.getpid()}-upgrading"
    with Lab() as lab, tempfile.TemporaryDirectory(prefix="rama-ebpf-test-") as directory:
        os.chmod(directory, 0o755)
        os.environ.setdefault("RAMA_EBPF_STATE_DIR", f"{directory}/state")
        host: Host = lab.host("proxy")
        try:
            server = "max_generations = 16" if words != ["--faults"] else ""
            with upgraded_server(host, instance, Path(directory), {"workers": 2, "server": server}) as running:
                if words == ["--faults"]:
                    wrong = _faults(running)
                else:
                    wrong = _upgrades(running, int(words[0]) if words else 100)
        finally:
            wait_for(lambda: Instance(instance).serving_pid() is None, what="the end of the server")
            unload(Instance(instance))
    print("\n".join(wrong) or "nothing was wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
