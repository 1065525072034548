"""Files of an instance that are not what they should be, disks that refuse, locks whose holder sleeps."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rama_ebpf.kernel.instance import Instance

from ..conftest import StartProxy
from ..hammer import Denied
from ..lab import Host, wait_for
from ..proxy import ProxyProcess, rama_ebpf
from .conftest import ALLOWED, DENIED, TARGET, EchoServer, StartEcho, met

pytestmark = [pytest.mark.root, pytest.mark.ebpf]


def _fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def _elsewhere(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 << 30)


def _noise(path: Path) -> None:
    path.write_bytes(
        os.urandom(65536) + b"\n" + b"[" * 200_000 + b'\n{"address": 7}\n{"address":"1.1.1.1","until":1e999}\n'
    )


def _torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7] if path.exists() else b'{"addr')


HARMS: list[Callable[[Path], None]] = [_fifo, _directory, _loop, _elsewhere, _huge, _noise, _torn]
FILES = ["bans", "journal"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.timeout(300)
def test_whatever_lies_in_place_of_a_state_file_hinders_no_start_or_is_named(
    name: str, start_echo: StartEcho, instance: str
) -> None:
    """With each a start serves, or ends with one line that names the file; commands answer, and nothing waits."""
    server = start_echo(workers=1)
    server.proxy.command("ban", "198.18.66.9")
    state = Instance(instance).state_dir
    kill(server)
    saved = {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}
    for harm in HARMS:
        if harm is not _torn:
            subprocess.run(["rm", "-rf", str(state / name)], check=True)
        harm(state / name)
        what = f"{name} is {harm.__name__}"
        try:
            server.proxy.start()
        except AssertionError:
            assert str(state / name) in "\n".join(server.proxy.log), f"{what}: {server.proxy.log}"
        else:
            assert server.served(), what
            assert not server.served(DENIED[0]), what
            for command in (("ban", ALLOWED[3]), ("unblock", ALLOWED[3]), ("block", ALLOWED[3]), ("list",)):
                done = server.proxy.command(*command, check=False)
                assert "Traceback" not in done.stderr, f"{what}: {done.stderr}"
                # Nothing is to be taken back where the ban before it was refused.
                assert done.returncode in (0, 1) or str(state / name) in done.stderr, f"{what}: {command} {done}"
            done = rama_ebpf("policy", "log", "--instance", instance, check=False)
            assert "Traceback" not in done.stderr, f"{what}: {done.stderr}"
        assert not server.proxy.logged("Traceback"), f"{what}: {server.proxy.log}"
        kill(server)
        subprocess.run(["rm", "-rf", str(state)], check=True)
        for path, data in saved.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    server.proxy.start()
    server.wait_until_whole()


def kill_server(proxy: ProxyProcess) -> None:
    """Kill a server."""
    proxy.signal(signal.SIGKILL)
    proxy.end()


def kill(server: EchoServer) -> None:
    """Kill the server."""
    kill_server(server.proxy)


class Disk:
    """The state directory on a file system of a few pages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self) -> None:
        with self._filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(512))
            except OSError:
                pass

    def empty(self) -> None:
        self._filler.unlink()

    def make_read_only(self, read_only: bool) -> None:
        subprocess.run(["mount", "-o", f"remount,{'ro' if read_only else 'rw'}", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    path = tmp_path / "state"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=755", "tmpfs", str(path)], check=True)
    monkeypatch.setenv("RAMA_EBPF_STATE_DIR", str(path))
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_disk_that_refuses_loses_no_policy_and_hinders_no_start(
    disk: Disk, how: str, host: Host, instance: str, start_proxy: StartProxy
) -> None:
    """What a command cannot keep it refuses, and the gate is as it was; the server starts, reloads and stops."""
    proxy = start_proxy(host, "--listen", f"{TARGET[0]}:{TARGET[1]}", "--workers", "1", "--persist")
    proxy.command("ban", "198.18.66.6")
    proxy.command("block", "198.18.66.7")
    disk.fill() if how == "full" else disk.make_read_only(True)

    lifted = False
    with Denied(host, DENIED[1:], [TARGET]) as denied:
        for command, source, before, after in (
            (("ban", ALLOWED[1]), ALLOWED[1], "in", "silence"),
            (("unblock", DENIED[0]), DENIED[0], "silence", "in"),
            (("block", ALLOWED[2]), ALLOWED[2], "in", "silence"),
        ):
            done = proxy.command(*command, check=False)
            assert "Traceback" not in done.stderr, done.stderr
            assert met(host, source) == (after if done.returncode == 0 else before), (command, done)
            assert (done.returncode == 0) or done.stderr.strip(), command
            lifted |= source == DENIED[0] and done.returncode == 0  # there may be room for a row
        proxy.signal(signal.SIGKILL)
        proxy.end()
        proxy.start()
    assert denied.got_in == []
    proxy.signal(signal.SIGTERM)
    assert proxy.wait() == 0
    assert not proxy.logged("Traceback"), proxy.log
    disk.empty() if how == "full" else disk.make_read_only(False)
    proxy.start()
    assert [met(host, source) for source in DENIED] == ["in" if lifted else "silence", "silence"]
    proxy.command("ban", DENIED[0])
    proxy.command("unblock", DENIED[0])
    assert met(host, DENIED[0]) == "in"


def test_whoever_sleeps_with_the_lock_holds_up_changes_alone(start_echo: StartEcho, instance: str) -> None:
    server = start_echo()
    with Instance(instance).policy_lock(), Denied(server.host, DENIED, [TARGET]) as denied:
        assert server.proxy.json("status")["running"]
        assert server.proxy.json("flows")["flows"] == []
        assert server.proxy.command("test", ALLOWED[0]).returncode == 0
        os.kill(server.proxy.workers()[0], signal.SIGKILL)
        wait_for(server.served, timeout=30, what="service")
        wait_for(server.serves_by_all, timeout=60, what="all workers")
        server.proxy.signal(signal.SIGTERM)
        code = server.proxy.wait()
    assert code == 0 or server.proxy.logged("something holds the server up"), server.proxy.log
    assert denied.got_in == []
    server.proxy.end()
    server.proxy.start()
    server.wait_until_whole()


def test_services_ban_beside_whoever_sleeps_with_the_lock(
    host: Host, instance: str, start_proxy: StartProxy, tmp_path: Path
) -> None:
    """What they ban is in force at once, and on disk; a change by an operator waits, and is told who has the lock."""
    file = tmp_path / "rama.toml"
    file.write_text(
        f'[server]\nworkers = 1\n[listeners.main]\naddress = "{TARGET[0]}:{TARGET[1]}"\nstack = "s"\n[stacks.s]\n'
        'service = "mixed"\nlayers = [{ strikes = { strikes = 2, window = "5m", ban = "1h" } }]\n'
    )
    proxy = start_proxy(host, "--config", str(file))

    def strike(source: str) -> None:
        for _ in range(2):
            with contextlib.suppress(ConnectionError), host.connect(*TARGET, source=source, timeout=15) as sock:
                sock.sendall(b"\x05\x01\x00\x05\x09\x00\x01" + bytes(6))  # SOCKS5, and no command that there is
                while sock.recv(64):
                    pass

    strike(ALLOWED[0])
    wait_for(lambda: met(host, ALLOWED[0]) == "silence", what="the first ban")
    with Instance(instance).policy_lock():
        for source in ALLOWED[1:3]:
            strike(source)
            wait_for(lambda s=source: met(host, s) == "silence", what="the ban beside the lock's holder")
    bans = {row["address"] for row in proxy.json("bans")["bans"]}
    assert bans == set(ALLOWED[:3])
    kill_server(proxy)
    proxy.start()
    assert [met(host, source) for source in ALLOWED[:4]] == ["silence", "silence", "silence", "in"]


def test_what_status_shows_may_not_be_writable_and_costs_no_client(start_echo: StartEcho, instance: str) -> None:
    """A reload that could not write it refused every client; a worker that died then was not replaced."""
    server = start_echo()
    in_the_way = Instance(instance).run_dir / "state.json.new"
    in_the_way.mkdir()
    with Denied(server.host, DENIED, [TARGET]) as denied:
        server.proxy.signal(signal.SIGHUP)
        wait_for(lambda: server.proxy.logged(": reloaded$|reload failed"), timeout=60, what="the reload")
        assert server.proxy.logged(": reloaded$"), server.proxy.log
        wait_for(server.served, timeout=30, what="service")
        wait_for(lambda: len(server.proxy.workers()) == 2, timeout=60, what="the end of the workers before")
        before = server.proxy.workers()
        os.kill(before[0], signal.SIGKILL)
        wait_for(lambda: set(server.proxy.workers()) - set(before), timeout=30, what="a replacement")
    assert server.proxy.logged("what status shows cannot be written")
    in_the_way.rmdir()
    server.wait_until_whole()
    assert denied.got_in == []
