"""Limits of memory and of processes, as a container or a unit has them, and a kernel that has no memory for a fork."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from rama_ebpf.kernel.cgroup import cgroup2_mount
from rama_ebpf.kernel.instance import Instance

from ..hammer import Denied, Served, echoed
from ..lab import Host, wait_for
from ..proxy import ProxyProcess, has_ended
from .conftest import ALLOWED, CONFIG, DENIED, TARGET, EchoServer
from .refusing import ForksRefused

pytestmark = [pytest.mark.root, pytest.mark.ebpf, pytest.mark.timeout(300)]

V1 = Path("/sys/fs/cgroup")


class Group:
    """A cgroup with a limit, in the hierarchy of ``controller`` (v1) or in the one there is (v2)."""

    def __init__(self, controller: str, limit: tuple[str, str], usage: tuple[str, str]) -> None:
        is_v1 = (V1 / controller / "cgroup.procs").exists()
        root = V1 / controller if is_v1 else cgroup2_mount()
        if not is_v1:
            (root / "cgroup.subtree_control").write_text(f"+{controller}")
        self.path = root / f"rama-ebpf-faults-{os.getpid()}"
        self.path.mkdir()
        self._limit, self._usage = self.path / limit[not is_v1], self.path / usage[not is_v1]
        self._none = self._limit.read_text()

    @property
    def under(self) -> tuple[str, ...]:
        """The beginning of a command that runs in here."""
        return ("sh", "-c", f'echo $$ > {self.path}/cgroup.procs && exec "$@"', "sh")

    def usage(self) -> int:
        return int(self._usage.read_text())

    def limit(self, value: int | None) -> None:
        self._limit.write_text(self._none if value is None else str(value))

    def remove(self) -> None:
        def try_it() -> bool:
            with contextlib.suppress(OSError):
                for path in sorted(self.path.rglob("*"), reverse=True):
                    if path.is_dir():
                        path.rmdir()
                self.path.rmdir()
            return not self.path.exists()

        wait_for(try_it, timeout=30, what="an empty cgroup")


@pytest.fixture
def processes() -> Iterator[Group]:
    group = Group("pids", ("pids.max", "pids.max"), ("pids.current", "pids.current"))
    yield group
    group.remove()


@pytest.fixture
def memory() -> Iterator[Group]:
    group = Group("memory", ("memory.limit_in_bytes", "memory.max"), ("memory.usage_in_bytes", "memory.current"))
    yield group
    group.remove()


def started(host: Host, instance: str, file: Path, under: tuple[str, ...], passed: tuple[int, ...] = ()) -> EchoServer:
    text = CONFIG.format(workers=2, server="", policy="")
    file.write_text(text.replace('drain = "1s"', 'drain = "30s"'))  # a busy host takes its time to end a worker
    proxy = ProxyProcess(host, instance, "--config", str(file))
    proxy.under, proxy.passed = under, passed
    proxy.start()
    return EchoServer(host, Instance(instance), file, proxy)


def test_no_process_and_no_thread_more_costs_what_needs_one_and_passes(
    processes: Group, host: Host, instance: str, tmp_path: Path
) -> None:
    """The other worker serves, a reload is refused, nothing gives up for good; a stop stops."""
    server = started(host, instance, tmp_path / "rama.toml", processes.under)
    try:
        with Denied(host, DENIED, [TARGET]) as denied, Served(host, ALLOWED, TARGET) as served:
            processes.limit(1)
            os.kill(server.proxy.workers()[0], signal.SIGKILL)
            wait_for(lambda: server.proxy.logged("cannot be started: .*unavailable"), timeout=20, what="the refusal")
            count = served.served
            wait_for(lambda: served.served > count + 20, timeout=30, what="service by the other worker")
            server.proxy.signal(signal.SIGHUP)
            wait_for(lambda: server.proxy.logged("reload failed"), timeout=30, what="the refused reload")
            processes.limit(None)
            server.wait_until_whole()
            server.proxy.log.clear()
            server.proxy.signal(signal.SIGHUP)
            wait_for(lambda: server.proxy.logged(": reloaded$"), timeout=60, what="the reload")
            server.wait_until_whole()
            processes.limit(1)
        assert denied.got_in == []
        server.proxy.signal(signal.SIGTERM)
        assert server.proxy.wait() == 0, "\n".join(line for line in server.proxy.log if "access" not in line)
        assert not server.proxy.logged("Traceback|itself failed"), server.proxy.log
    finally:
        server.proxy.end()


GLUTTON = """
from rama_ebpf.core import stack

eaten = []

async def service(stream):
    while data := await stream.read():
        if data == b"eat!!":
            eaten.append(bytearray(b"x" * (512 << 20)))
        await stream.write(data)

application = stack(service)
"""


def test_when_memory_runs_out_a_worker_goes_and_is_replaced_and_nobody_gets_in(
    memory: Group, host: Host, instance: str, tmp_path: Path
) -> None:
    (tmp_path / "glutton.py").write_text(GLUTTON)
    tmp_path.chmod(0o755)
    listen = f"{TARGET[0]}:{TARGET[1]}"
    arguments = ("glutton:application", "--listen", listen, "--workers", "2")
    proxy = ProxyProcess(host, instance, *arguments, cwd=tmp_path)
    proxy.under = memory.under
    proxy.start()
    try:
        proxy.command("block", DENIED[0])
        proxy.command("block", DENIED[1])
        memory.limit(memory.usage() + (96 << 20))
        with Denied(host, DENIED, [TARGET]) as denied:
            for _ in range(2):
                before = set(proxy.workers())
                with host.connect(*TARGET, source=ALLOWED[0]) as sock, contextlib.suppress(ConnectionError):
                    sock.settimeout(60)
                    sock.sendall(b"eat!!")
                    assert sock.recv(100) == b"", "there was memory enough"
                wait_for(lambda known=before: any(map(has_ended, known)), timeout=30, what="the victim")
                wait_for(lambda: proxy.json("status")["workers"]["serving"] == 2, timeout=60, what="its replacement")
                assert not host.call(lambda: echoed(host, ALLOWED[1], TARGET))
        assert denied.got_in == []
        assert not has_ended(proxy.pid)
        memory.limit(None)
        proxy.signal(signal.SIGTERM)
        assert proxy.wait() == 0
    finally:
        proxy.end()


@pytest.mark.parametrize("error", [errno.ENOMEM, errno.EAGAIN], ids=["ENOMEM", "EAGAIN"])
def test_a_fork_that_the_kernel_refuses_is_tried_again_until_it_succeeds(
    error: int, host: Host, instance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    with ForksRefused() as kernel:
        server = started(host, instance, tmp_path / "rama.toml", kernel.under, kernel.pass_fds)
        try:
            with Denied(host, DENIED, [TARGET]) as denied, Served(host, ALLOWED, TARGET) as served:
                kernel.error = error
                os.kill(server.proxy.workers()[0], signal.SIGKILL)
                wait_for(lambda: kernel.refused >= 3, timeout=30, what="attempts")
                assert server.proxy.logged(f"cannot be started: .*{os.strerror(error)}")
                count = served.served
                wait_for(lambda: served.served > count + 20, timeout=30, what="service by the other worker")
                kernel.error = 0
                server.wait_until_whole()
            assert denied.got_in == []
            assert not server.proxy.logged("Traceback"), server.proxy.log
        finally:
            server.proxy.end()
