"""A Docker daemon of our own, in namespaces of its own.

It has a network namespace (its bridges, NAT rules and forwarding switch are not the host's), a PID namespace (when the
daemon dies, every container dies with it) and a mount namespace (so do the mounts). A daemon that the host runs is
neither used nor touched. To stop it is to kill it: the end of a test and a crash go the same way, and nothing but
directories is left to remove. If the process that started it dies, the kernel kills the daemon too.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import docker

from tests.lab import Host, wait_for

from ..require import SCRATCH

__all__ = ["DockerDaemon", "remove_stale"]

_PREFIX = "rama-ebpf-docker"


class DockerDaemon:
    """``dockerd`` in a lab host. A context manager; ``client`` talks to it while it runs."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.name = f"{_PREFIX}-{os.getpid()}"
        self.directory = SCRATCH / self.name
        self.url = f"unix://{self.directory}/docker.sock"
        self._log = self.directory / "dockerd.log"

    def __enter__(self) -> DockerDaemon:
        self.directory.mkdir(mode=0o700)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        settings = self.directory / "daemon.json"
        settings.write_text("{}", encoding="utf-8")  # not the host's /etc/docker/daemon.json
        with self._log.open("w", encoding="utf-8") as log:
            self._process = self.host.popen(
                *("setpriv", "--pdeathsig", "KILL"),
                *("unshare", "--fork", "--pid", "--kill-child", "--mount", "--mount-proc"),
                *("dockerd", "--config-file", str(settings), "--host", self.url),
                *("--data-root", str(self.directory / "data"), "--exec-root", str(self.directory / "exec")),
                *("--pidfile", str(self.directory / "dockerd.pid")),
                *("--bridge", "none", "--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", f"/{self.name}"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for(self._listens, timeout=60, what="dockerd")
        # As many connections as there are containers: an exec holds one while it runs.
        self.client = docker.DockerClient(base_url=self.url, timeout=120, max_pool_size=32)

    def _listens(self) -> bool:
        if self._process.poll() is not None:
            raise AssertionError("dockerd ended:\n" + "\n".join(self.log()[-20:]))
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(self.url.removeprefix("unix://")) == 0

    def log(self) -> list[str]:
        """What the daemon has logged."""
        return self._log.read_text(encoding="utf-8").splitlines()

    def __exit__(self, *_exc: object) -> None:
        if hasattr(self, "client"):
            self.client.close()
        if hasattr(self, "_process"):
            # The daemon is the first process of its PID namespace and the only child of unshare, which reaps it.
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended by itself
                for child in children.read_text(encoding="ascii").split():
                    os.kill(int(child), signal.SIGKILL)
            self._process.wait(30)
        _remove(self.name)


def remove_stale() -> None:
    """Remove what runs left behind whose process is gone."""
    for path in SCRATCH.glob(f"{_PREFIX}-*"):
        pid = re.fullmatch(rf"{_PREFIX}-(\d+)", path.name)
        if pid and not Path(f"/proc/{pid[1]}").exists():
            _remove(path.name)


def _remove(name: str) -> None:
    with open("/proc/self/mountinfo", encoding="utf-8") as lines:
        hierarchies = [Path(line.split()[4]) for line in lines if " - cgroup" in line]
    for hierarchy in hierarchies:
        for directory, _, _ in os.walk(hierarchy / name, topdown=False):
            # Killed processes leave their cgroup when they have been reaped.
            wait_for(lambda path=directory: _rmdir(path), what=f"the end of {directory}")  # type: ignore[misc]
    shutil.rmtree(SCRATCH / name)


def _rmdir(path: str) -> bool:
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
