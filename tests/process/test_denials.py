"""What a sandbox refuses is counted, by whose it was and the name of the call."""

from __future__ import annotations

import os
import re
import signal
import urllib.request
from pathlib import Path

import pytest

from ..conftest import StartProxy
from ..lab import Host, Lab, wait_for
from ..proxy import ProxyProcess, has_ended

pytestmark = [pytest.mark.root, pytest.mark.ebpf, pytest.mark.timeout(300)]

APPLICATION = """
import ctypes, errno, os, socket

libc = ctypes.CDLL(None, use_errno=True)

def attempt(name):
    ctypes.set_errno(0)
    if name == "vsock":
        result = libc.socket(40, 1, 0)
    elif name == "notify":  # what would let a worker answer for itself
        links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        result = 0 if any("seccomp notify" in link for link in links) else -1
    else:
        result = libc.syscall(*{"ptrace": (101, 16, os.getppid(), 0, 0), "io_uring_setup": (425, 1, 0)}[name])
    return errno.errorcode.get(ctypes.get_errno(), "") if result == -1 else "done"

async def service(stream):
    while name := (await stream.read()).decode().strip():
        await stream.write(attempt(name).encode() or b"nothing")
"""


def asked(host: Host, *names: str) -> list[str]:
    """What comes of each attempt in a worker."""
    found = []
    with host.connect(host.ipv4, 1080) as sock:
        sock.settimeout(60)
        for name in names:
            sock.sendall(name.encode())
            found.append(sock.recv(100).decode())
    return found


def counted(host: Host) -> dict[tuple[str, str], float]:
    """``rama_ebpf_sandbox_denials_total``."""
    text = host.call(lambda: urllib.request.urlopen("http://127.0.0.1:9464/metrics", timeout=60).read().decode())
    rows = re.findall(r'^rama_ebpf_sandbox_denials_total\{call="(.*)",role="(.*)"\} (.*)$', text, flags=re.M)
    rows += [(c, r, n) for r, c, n in re.findall(r'denials_total\{role="(.*)",call="(.*)"\} (.*)$', text, flags=re.M)]
    return {(role, call): float(count) for call, role, count in rows}


@pytest.fixture
def host(lab: Lab) -> Host:
    return lab.host("proxy")


@pytest.fixture
def proxy(host: Host, start_proxy: StartProxy, tmp_path: Path) -> ProxyProcess:
    (tmp_path / "refused.py").write_text(APPLICATION)
    tmp_path.chmod(0o755)
    return start_proxy(
        *(host, "refused:service", "--listen", f"{host.ipv4}:1080", "--workers", "1", "--metrics", "127.0.0.1:9464"),
        "--require-sandbox",
        cwd=tmp_path,
    )


def test_each_refused_call_is_counted_with_its_name_and_fails_with_its_own_error(
    host: Host, proxy: ProxyProcess
) -> None:
    """Whoever goes on trying waits for the count, which costs the server little. No worker has what it would take to
    answer for itself."""
    assert counted(host) == {}
    # The last is one that libraries try, and do without.
    assert asked(host, "ptrace", "ptrace", "vsock", "io_uring_setup") == ["EPERM", "EPERM", "EAFNOSUPPORT", "ENOSYS"]
    assert counted(host) == {("worker", "ptrace"): 2, ("worker", "socket"): 1}
    rows = proxy.json("status")["denials"]
    assert {"role": "worker", "call": "ptrace", "count": 2} in rows
    assert "REFUSED by the sandbox of the worker: ptrace(2), 2 times" in proxy.command("status").stdout
    assert asked(host, "notify", *["ptrace"] * 260) == ["nothing", *["EPERM"] * 260]
    assert counted(host)["worker", "ptrace"] == 262
    assert sum("has refused ptrace(2)" in line for line in proxy.log) == 1
    assert proxy.json("status")["workers"]["serving"] == 1


def test_a_server_that_is_stopped_holds_up_no_refused_call(host: Host, proxy: ProxyProcess) -> None:
    proxy.signal(signal.SIGSTOP)
    assert asked(host, *["ptrace"] * 30, "vsock") == [*["EPERM"] * 30, "EAFNOSUPPORT"]
    proxy.signal(signal.SIGCONT)
    wait_for(lambda: counted(host) == {("worker", "ptrace"): 30, ("worker", "socket"): 1}, what="the counts")


def test_who_answers_for_refused_calls_is_replaced_when_it_is_killed(host: Host, proxy: ProxyProcess) -> None:
    assert asked(host, "ptrace") == ["EPERM"]
    for _ in range(2):
        (child,) = answering(proxy)
        os.kill(child, signal.SIGKILL)
        wait_for(lambda gone=child: has_ended(gone), what="its end")
        assert asked(host, "ptrace") == ["EPERM"]
    assert counted(host) == {("worker", "ptrace"): 3}
    (child,) = answering(proxy)
    proxy.signal(signal.SIGTERM)
    assert proxy.wait() == 0
    assert has_ended(child)


def answering(proxy: ProxyProcess) -> list[int]:
    """The processes that answer for refused calls."""
    found = Path(f"/proc/{proxy.pid}/task").glob("*/children")
    children = [int(pid) for path in found for pid in path.read_text().split()]
    return [pid for pid in children if b"denials_child" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_the_refusals_stand_when_nobody_counts_them(host: Host, proxy: ProxyProcess) -> None:
    """The server dies: its workers go with it, and until then their calls fail."""
    (worker,) = proxy.workers()
    with host.connect(host.ipv4, 1080) as sock:
        sock.settimeout(60)
        proxy.signal(signal.SIGSTOP)
        sock.sendall(b"ptrace")
        proxy.signal(signal.SIGKILL)
        try:
            said = sock.recv(100)
        except ConnectionResetError:
            said = b""
    assert said in (b"", b"ENOSYS", b"EPERM")
    wait_for(lambda: has_ended(worker), what="the worker's end")
