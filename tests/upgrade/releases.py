"""A server and its releases: copies of the package, of which one is the installed one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rama_ebpf
from rama_ebpf.kernel import bpf
from rama_ebpf.kernel.instance import Instance

from ..hammer import echoed
from ..lab import PATIENCE, Host, wait_for
from ..proxy import ProxyProcess

__all__ = [
    "ALLOWED",
    "DENIED",
    "ONCE_ALLOWED",
    "ONCE_DENIED",
    "PORT",
    "Edit",
    "Releases",
    "UpgradedServer",
    "has_ended",
    "is_live",
    "upgraded_server",
    "xdp_link",
]

PORT = 1080
ALLOWED = ("127.0.0.5", "127.0.0.6")
DENIED = "127.0.0.9"
ONCE_DENIED, ONCE_ALLOWED = "127.0.0.11", "127.0.0.12"
"""By the first configuration; the second has it the other way round."""

CONFIG = """
[server]
workers = {workers}
drain = "1s"
{server}
[listeners.main]
address = "127.0.0.1:1080"
stack = "echo"
{listeners}
[stacks.echo]
service = {{ echo = {{}} }}
[policy]
default = "allow"
{policy}
[[policy.rules]]
name = "denied"
action = "drop"
sources = ["127.0.0.9/32", "{other}/32"]
"""

_QUICK = ("control/takeover.py", "_PROBATION_SECONDS: Final = 5.0", "_PROBATION_SECONDS: Final = 0.5")

Edit = tuple[str, str, str]
"""A file of the package, a text that stands in it once, and what is to be there instead."""


class Releases:
    """Copies of the package below ``directory``, which is on the module path; one of them is installed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._number = 0
        self.path = directory / "current"

    def install(self, *edits: Edit) -> None:
        """Make a release of this checkout with these changes, and put it in the place of the one before. All have a
        short probation."""
        self._number += 1
        release = self._directory / str(self._number)
        package = release / "rama_ebpf"
        # With what was compiled: the copies have the times of the originals.
        shutil.copytree(Path(rama_ebpf.__file__).parent, package, symlinks=False)
        for name, text, instead in (_QUICK, *edits):
            file = package / name
            source = file.read_text()
            assert source.count(text) == 1, f"{name} has {source.count(text)} of {text!r}"
            file.write_text(source.replace(text, instead))
        new = self.path.with_suffix(".new")
        new.symlink_to(release)
        new.rename(self.path)


@dataclass
class UpgradedServer:
    """``rama-ebpf run`` with a configuration, and what follows it."""

    host: Host
    instance: Instance
    file: Path
    releases: Releases
    proxy: ProxyProcess

    def configure(self, *, second: bool = False, workers: int = 1, server: str = "", listeners: str = "") -> None:
        """Write the configuration: the first, or the second one."""
        other = ONCE_ALLOWED if second else ONCE_DENIED
        text = CONFIG.format(workers=workers, server=server, listeners=listeners, policy="", other=other)
        self.file.write_text(text)

    @property
    def pid(self) -> int:
        """Who serves, by the instance's lock."""
        pid = self.instance.serving_pid()
        assert pid, "nobody serves"
        return pid

    def upgrade(self, *, code: int = 0) -> dict[str, Any]:
        """Run the command to its end, and return what it says."""
        done = self.proxy.command("upgrade", "--json", check=False, timeout=90)
        assert done.returncode == code, (done.stdout, done.stderr, self.proxy.log[-30:])
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def served(self, source: str = ALLOWED[0], port: int = PORT, timeout: float = 5.0) -> bool:
        """Whether a source is served."""
        return not self.host.call(lambda: echoed(self.host, source, ("127.0.0.1", port), timeout=timeout))

    def silent(self, source: str) -> bool:
        """Whether a source meets silence."""
        with self.host.socket() as sock:
            sock.settimeout(0.3 * PATIENCE)
            sock.bind((source, 0))
            try:
                sock.connect(("127.0.0.1", PORT))
            except TimeoutError:
                return True
            except OSError:
                return False
            return False

    def tunnels(self, count: int) -> list[socket.socket]:
        """Open connections that are to live long, from several sources: one may not have all of them."""
        found = []
        for number in range(count):
            sock = self.host.connect("127.0.0.1", PORT, source=f"127.0.2.{1 + number % 20}")
            sock.sendall(b"first")
            assert sock.recv(5, socket.MSG_WAITALL) == b"first"
            found.append(sock)
        return found

    def links(self) -> dict[str, int]:
        """The ids of the links of who serves, and of the programs that they attach, by what they attach."""
        found = {}
        for path in Path(f"/proc/{self.pid}/fdinfo").iterdir():
            words = dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)
            if "link_id" in words:
                found[f"{words.get('link_type')} {words['link_id']}"] = int(words["link_id"])
        return found

    def processes(self) -> set[int]:
        """All processes in the instance's cgroup."""
        state = self.instance.read_state()
        top = Path(str(state["cgroup"]))
        files = [top / "cgroup.procs", top / "workers" / "cgroup.procs"]
        return {int(word) for file in files for word in file.read_text().split()}


def xdp_link(server: UpgradedServer) -> int:
    """The id of the XDP link."""
    rows = server.instance.read_state()["xdp"]
    assert isinstance(rows, list)
    return int(rows[0]["link"])


def is_live(link: int) -> bool:
    """Whether a link is there."""
    try:
        os.close(bpf.link_by_id(link))
    except FileNotFoundError:
        return False
    return True


@contextmanager
def upgraded_server(host: Host, name: str, directory: Path, configure: dict[str, Any]) -> Iterator[UpgradedServer]:
    """A server of the first release; whatever has followed it is ended."""
    releases = Releases(directory)
    releases.install()
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(releases.path)
    file = directory / "rama.toml"
    # Elsewhere: `python -m`, as workers are started, looks at first where it is.
    proxy = ProxyProcess(host, name, "--config", str(file), cwd=directory)
    server = UpgradedServer(host, Instance(name), file, releases, proxy)
    server.configure(**configure)
    try:
        proxy.start()
        yield server
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
        _end(server)


def _end(server: UpgradedServer) -> None:
    pid = server.instance.serving_pid()
    if pid:
        os.kill(pid, signal.SIGTERM)
    if server.proxy.pid and pid != server.proxy.pid:
        server.proxy.signal(signal.SIGTERM)
    try:
        wait_for(lambda: server.instance.serving_pid() is None, timeout=20, what="the end of the server")
        server.proxy.wait()
    except (AssertionError, subprocess.TimeoutExpired):
        for pid in server.processes():
            os.kill(pid, signal.SIGKILL)
        raise
    finally:
        server.proxy.end()


def has_ended(pid: int) -> bool:
    """Whether a process is no more, or only a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "XZ"
    except (FileNotFoundError, ProcessLookupError):
        return True
