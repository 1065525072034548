"""The real ``rama-ebpf`` command as a process under test."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.kernel_store import KernelStore
from rama_ebpf.policy.rule import RUNTIME

from .lab import PATIENCE, Host, wait_for

__all__ = ["ProxyProcess", "has_ended", "rama_ebpf", "workers_of"]


def rama_ebpf(*args: str, check: bool = True, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run a ``rama-ebpf`` command to its end."""
    result = subprocess.run([ProxyProcess.COMMAND, *args], capture_output=True, text=True, timeout=timeout * PATIENCE)
    if check and result.returncode != 0:
        raise AssertionError(f"rama-ebpf {' '.join(args)}: exit {result.returncode}\n{result.stdout}{result.stderr}")
    return result


def has_ended(pid: int) -> bool:
    """Whether a process is no more, or waits for somebody to ask how it ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _command_line(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""  # it has ended


def workers_of(server: int) -> list[int]:
    """The process ids of the workers of a server, by its own."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    return [int(pid) for pid in children if b"rama_ebpf.process.worker" in _command_line(pid)]


class ProxyProcess:
    """``rama-ebpf run`` inside a lab host. Its log is collected; :meth:`start` returns when it serves."""

    COMMAND = str(Path(sys.executable).with_name("rama-ebpf"))

    def __init__(self, host: Host, instance: str, *args: str, cwd: Path | None = None) -> None:
        self.host = host
        self.instance = instance
        self._args = args
        self.cwd = cwd
        self.environment: dict[str, str] = {}
        """What the server gets beside this process's."""
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self.log: list[str] = []
        self.under: tuple[str, ...] = ()
        """A command that starts the server, if one is to."""
        self.passed: tuple[int, ...] = ()
        """Descriptors that it is given."""

    def start(self, timeout: float = 60.0) -> ProxyProcess:
        """Start the server and wait until it is ready."""
        self._launch(*self.under, pass_fds=self.passed)
        wait_for(lambda: self.logged("ready after") or self._ended(), timeout=timeout, what="the proxy's readiness")
        return self

    def _launch(self, *under: str, pass_fds: Sequence[int] = ()) -> None:
        """Start the process, by a command before it if there is one."""
        self.log = []
        self._process = self.host.popen(
            *under,
            self.COMMAND,
            "run",
            "--instance",
            self.instance,
            *self._args,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
            cwd=self.cwd,
            pass_fds=pass_fds,
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self.log.append(line.rstrip("\n"))

    def _ended(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError("the proxy ended:\n" + "\n".join(self.log))
        return False

    def logged(self, pattern: str) -> bool:
        """Whether a log line matches."""
        return any(re.search(pattern, line) for line in self.log)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def signal(self, number: int) -> None:
        """Send a signal to the server."""
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self, timeout: float = 30.0) -> int:
        """Wait for the end and return the exit code."""
        assert self._process is not None
        return self._process.wait(timeout * PATIENCE)

    def end(self) -> None:
        """Kill the server if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._reader is not None:
            self._reader.join(10)  # its workers hold the pipe for a moment longer

    def json(self, command: str, *args: str, check: bool = True) -> Any:
        """Run a command on this instance and return its JSON."""
        return json.loads(self.command(command, *args, "--json", check=check).stdout)

    def command(
        self, command: str, *args: str, check: bool = True, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this instance."""
        return rama_ebpf(command, *args, "--instance", self.instance, check=check, timeout=timeout)

    def forget_rules(self) -> None:
        """Take back all rules at run time and all bans, so that the next test finds the server as it began."""
        with KernelStore(Instance(self.instance)) as store:
            for record in store.records(now=0):
                if record.rule.origin == RUNTIME:
                    store.remove(record.sources[0], record.rule.port)
            for ban in store.bans():
                store.unban(ban.network)

    def accepted(self) -> int:
        """How many connections the server accepted, over all its listeners."""
        return sum(row["accepted"] for row in self.json("status")["listeners"])

    def hits(self, source: str) -> int:
        """The counter of the rule for exactly this source."""
        rows = [rule for rule in self.json("list")["rules"] if rule["sources"] == [source]]
        assert len(rows) == 1, rows
        return int(rows[0]["hits"])

    def descriptors(self) -> int:
        """How many descriptors the server and its workers have open."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in (self.pid, *self.workers()))

    def programs(self) -> set[int]:
        """The ids of the BPF programs that the server holds."""
        texts = [path.read_text() for path in Path(f"/proc/{self.pid}/fdinfo").iterdir()]
        return {int(number) for text in texts for number in re.findall(r"^prog_id:\s+(\d+)", text, flags=re.M)}

    def workers(self) -> list[int]:
        """The process ids of the workers: the server has other children for a moment, a compiler and a self-test."""
        return workers_of(self.pid)
