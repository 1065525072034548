"""Runs commands in forks of a process that has imported them: as quick as they themselves are.

``python -m tests.crash.forkserver`` reads requests from the descriptor in its argument; each fork is a command of
``rama-ebpf``, or a writer of the server's own (:data:`WRITERS`), with its output in a file.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path

from rama_ebpf import cli
from rama_ebpf.core.errors import RamaError
from rama_ebpf.kernel import bpf
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.feed_store import FeedStore
from rama_ebpf.policy.kernel_store import KernelStore
from rama_ebpf.policy.refresh import Refresher
from rama_ebpf.policy.rule import Action, PolicyError, Settings

from .interpose import Call, Fault, Watch, be_watched, receive_listener

__all__ = ["CommandRunner", "Outcome"]

WRITERS: dict[str, Callable[[Instance, KernelStore], object]] = {
    "sweep": lambda _, store: store.sweep(),
    "restore bans": lambda _, store: store.restore_bans(),
    "strike": lambda _, store: store.ban(ip_address("198.18.1.2"), ttl=3600, reason="strikes", automatic=True),
    "strike a banned one": lambda _, store: store.ban(ip_address("198.18.3.1"), ttl=60, automatic=True),
    "failsafe": lambda _, store: store.set_failsafe([ip_network("198.18.1.1"), ip_network("2001:db8:2::/48")]),
    "no failsafe": lambda _, store: store.set_failsafe([]),
    "default drop": lambda _, store: store.set_settings(Settings(Action.DROP)),
    "default allow": lambda _, store: store.set_settings(Settings(Action.ALLOW)),
    "failsafe of the baseline": lambda _, store: store.set_failsafe([ip_network("198.18.4.1")]),
    "forget rules": lambda _, store: _forget_rules(store),
    "forget bans": lambda _, store: _forget_bans(store),
    "feeds": lambda place, store: Refresher(store, FeedStore(place.feeds_dir)).run(all_feeds=True),
}
"""What the server does to its policy by itself. Some begin where another has been (see :mod:`.operations`)."""


def _forget_rules(store: KernelStore) -> None:
    for record in store.records():
        for source in record.sources:
            store.remove(source, record.rule.port)
    store.sweep()


def _forget_bans(store: KernelStore) -> None:
    """As after a reboot: they are on disk only."""
    fd = store.tables.maps["bans"]
    info = bpf.map_info(fd)
    for key, _ in bpf.map_lookup_batch(fd, info.key_size, info.value_size):
        bpf.map_delete(fd, key)
    store.rebuild()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended. ``code`` is negative for a signal; ``calls`` are those of a watched one."""

    code: int
    output: str
    calls: tuple[Call, ...] = ()
    happened: bool = False


class CommandRunner:
    """A context manager over the process that forks."""

    def __init__(self, instance: str, roots: Sequence[str]) -> None:
        self._instance = instance
        self._roots = roots
        self._output = Path(tempfile.mkstemp(prefix="crash-")[1])

    def __enter__(self) -> CommandRunner:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tests.crash.forkserver", str(theirs.fileno()), str(self._output)]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        return self

    def __exit__(self, *_exc: object) -> None:
        self._socket.close()
        self._process.wait()
        self._output.unlink()

    def run(self, what: Sequence[str], *, watched: bool = False, fault: Fault | None = None) -> Outcome:
        """Run ``("block", "198.18.1.2")``, or ``("writer", NAME)``, to its end."""
        watched = watched or fault is not None
        request = {"what": list(what), "instance": self._instance, "watched": watched}
        self._socket.send(json.dumps(request).encode())
        started = json.loads(self._socket.recv(65536))
        status = 0
        happened = False
        calls: tuple[Call, ...] = ()

        def ended() -> bool:
            nonlocal status
            status = json.loads(self._socket.recv(65536))["status"]
            return True

        if not watched:
            ended()
        else:
            message, listener = receive_listener(self._socket)
            if listener < 0:
                raise AssertionError(f"{what} cannot be watched: {message!r} {self._output.read_text()}")
            watch = Watch(listener, started["pid"], self._roots)
            watch.arm(fault)
            try:
                watch.run(ended, wakes=self._socket.fileno())
            finally:
                watch.close()
            happened, calls = watch.happened, tuple(watch.calls)
        return Outcome(os.waitstatus_to_exitcode(status), self._output.read_text(), calls, happened)


def _write(instance: str, name: str) -> int:
    place = Instance(instance)
    try:
        with KernelStore(place) as store:
            WRITERS[name](place, store)
    except (PolicyError, RamaError, OSError) as error:
        print(error, file=sys.stderr)
        return 3
    return 0


def _child(request: dict[str, object], report: socket.socket, output: str) -> int:
    fd = os.open(output, os.O_WRONLY | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    if request["watched"]:
        be_watched(report)
    report.close()
    command, *rest = list(request["what"])  # type: ignore[call-overload]
    if command == "writer":
        return _write(str(request["instance"]), rest[0])
    verbs = 1 if command in ("policy", "ca") else 0
    sys.argv = ["rama-ebpf", command, *rest]
    return cli.main([command, *rest[:verbs], "--instance", str(request["instance"]), *rest[verbs:]])


def _serve(report: socket.socket, output: str) -> None:
    for module in ("policy", "ruleset", "bans", "lifecycle", "ca"):
        importlib.import_module(f"rama_ebpf.cli.{module}")
    importlib.import_module("rama_ebpf.config.policy")
    importlib.import_module("rama_ebpf.config.show")
    while message := report.recv(65536):
        request = json.loads(message)
        begin, begun = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(begun)
            os.read(begin, 1)
            code = 70
            try:
                code = _child(request, report, output)
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:  # noqa: BLE001  as the interpreter itself would
                traceback.print_exc()
                code = 1
            finally:
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        report.send(json.dumps({"pid": pid}).encode())
        os.close(begun)
        os.close(begin)
        _, status = os.waitpid(pid, 0)
        report.send(json.dumps({"status": status}).encode())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
