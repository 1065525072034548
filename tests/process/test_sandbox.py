"""What a worker may not do once it serves: a service that was taken over tries the ways out."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import pytest

from rama_ebpf.kernel import landlock

from ..conftest import StartProxy
from ..lab import Lab
from ..proxy import ProxyProcess
from .conftest import status

PORT = 1080

# A service that makes the calls it is told, as [name, [arguments]], and answers with the error of each.
APPLICATION = """
import ctypes, json, os, pathlib

libc = ctypes.CDLL(None, use_errno=True)
CALLS = json.loads((pathlib.Path(__file__).parent / "calls.json").read_text())

def attempt(number, arguments):
    ctypes.set_errno(0)
    processes = {"self": os.getpid(), "parent": os.getppid()}
    values = (ctypes.c_long(processes.get(value, value)) for value in arguments)
    result = libc.syscall(ctypes.c_long(number), *values)
    return ctypes.get_errno() if result == -1 else 0

async def service(stream):
    await stream.write(json.dumps({name: attempt(*call) for name, call in CALLS.items()}).encode())
    await stream.write_eof()
    await stream.close()
"""

EPERM, ENOSYS, EAFNOSUPPORT = errno.EPERM, errno.ENOSYS, errno.EAFNOSUPPORT

# Name: number on x86-64, arguments, and what must come of it. Without the filter most fail otherwise (EFAULT, EINVAL,
# ENOENT, EBADF), or succeed.
WAYS_OUT: dict[str, tuple[int, list[int | str], int]] = {
    "execve": (59, [0, 0, 0], EPERM),
    "execveat": (322, [-1, 0, 0, 0, 0], EPERM),
    "fork": (57, [], EPERM),
    "vfork": (58, [], EPERM),
    "clone a process": (56, [17, 0, 0, 0, 0], EPERM),
    "clone3": (435, [0, 0], ENOSYS),
    "io_uring_setup": (425, [1, 0], ENOSYS),
    "io_uring_enter": (426, [-1, 0, 0, 0, 0, 0], ENOSYS),
    "ptrace": (101, [16, "parent", 0, 0], EPERM),
    "process_vm_readv": (310, ["self", 0, 0, 0, 0, 0], EPERM),
    "process_vm_writev": (311, ["self", 0, 0, 0, 0, 0], EPERM),
    "pidfd_open": (434, ["self", 0], EPERM),
    "pidfd_getfd": (438, [-1, 0, 0], EPERM),
    "pidfd_send_signal": (424, [-1, 0, 0, 0], EPERM),
    "kill the server": (62, ["parent", 0], EPERM),
    "kill the group": (62, [0, 0], EPERM),
    "tgkill the server": (234, ["parent", "parent", 0], EPERM),
    "tkill": (200, ["self", 0], EPERM),
    "prlimit of the server": (302, ["parent", 7, 0, 0], EPERM),
    "unshare a user namespace": (272, [0x10000000], EPERM),
    "setns": (308, [-1, 0], EPERM),
    "mount": (165, [0, 0, 0, 0, 0], EPERM),
    "umount2": (166, [0, 0], EPERM),
    "chroot": (161, [0], EPERM),
    "open_tree": (428, [-1, 0, 0], EPERM),
    "fsopen": (430, [0, 0], EPERM),
    "add_key": (248, [0, 0, 0, 0, 0], EPERM),
    "keyctl": (250, [0, 0, 0, 0, 0], EPERM),
    "request_key": (249, [0, 0, 0, 0], EPERM),
    "userfaultfd": (323, [1], EPERM),
    "memfd_secret": (447, [0], EPERM),
    "perf_event_open": (298, [0, 0, -1, -1, 0], EPERM),
    "open_by_handle_at": (304, [-1, 0, 0], EPERM),
    "mknod": (133, [0, 0, 0], EPERM),
    "shmget": (29, [0, 4096, 0o1600], EPERM),
    "semget": (64, [0, 1, 0o1600], EPERM),
    "personality": (135, [0xFFFFFFFF], EPERM),
    "a vsock": (41, [40, 1, 0], EAFNOSUPPORT),
    "an AF_ALG socket": (41, [38, 5, 0], EAFNOSUPPORT),
    "a netlink socket": (41, [16, 2, 0], EAFNOSUPPORT),
    "a packet socket": (41, [17, 2, 0], EAFNOSUPPORT),
    "a raw socket": (41, [2, 3, 255], EPERM),
    "bpf: make a map": (321, [0, 0, 0], EPERM),
    "bpf: load a program": (321, [5, 0, 0], EPERM),
    "bpf: pin": (321, [6, 0, 0], EPERM),
    "bpf: open a pin": (321, [7, 0, 0], EPERM),
    "bpf: open a map by number": (321, [14, 0, 0], EPERM),
}
# What a service and its libraries do need.
NEEDED: dict[str, tuple[int, list[int | str], int]] = {
    "a signal to itself": (62, ["self", 0], 0),
    "a Unix socket": (41, [1, 1, 0], 0),
    "an IPv4 socket": (41, [2, 1, 0], 0),
    "an IPv6 socket": (41, [10, 2, 0], 0),
    "its own limits": (302, [0, 7, 0, 0], 0),
}


Calls = dict[str, tuple[int, list[int | str], int]]


def outcomes(
    lab: Lab, start_proxy: StartProxy, directory: Path, calls: Calls, option: str
) -> tuple[dict[str, int], ProxyProcess]:
    """Return how each call of ``calls`` ends in a worker of a server with ``option``."""
    (directory / "ways_out.py").write_text(APPLICATION, encoding="utf-8")
    rows = {name: (number, arguments) for name, (number, arguments, _) in calls.items()}
    (directory / "calls.json").write_text(json.dumps(rows), encoding="utf-8")
    server, client = lab.host("proxy"), lab.host("client")
    where = f"{server.ipv4}:{PORT}"
    proxy = start_proxy(server, "ways_out:service", "--listen", where, "--workers", "1", option, cwd=directory)
    said = b""
    with client.connect(server.ipv4, PORT) as sock:
        sock.settimeout(20)
        while chunk := sock.recv(65536):
            said += chunk
    found: dict[str, int] = json.loads(said)
    return found, proxy


@pytest.mark.root
def test_a_worker_that_was_taken_over_finds_no_way_out_by_system_calls(
    lab: Lab, start_proxy: StartProxy, tmp_path: Path
) -> None:
    calls = WAYS_OUT | NEEDED
    found, _ = outcomes(lab, start_proxy, tmp_path, calls, "--require-sandbox")
    assert found == {name: code for name, (_, _, code) in calls.items()}


THREADED = """
import threading

threading.Thread(target=threading.Event().wait, daemon=True).start()

async def service(stream):
    await stream.close()
"""


@pytest.mark.root
def test_what_is_missing_of_the_sandbox_is_said_and_with_require_sandbox_nothing_is_served(
    lab: Lab, start_proxy: StartProxy, tmp_path: Path
) -> None:
    """A thread that runs before the rules are set would not be under them."""
    (tmp_path / "threaded.py").write_text(THREADED, encoding="utf-8")
    server = lab.host("proxy")
    arguments = ("threaded:service", "--listen", f"{server.ipv4}:{PORT}", "--workers", "1")
    with pytest.raises(AssertionError, match="files are not restricted: 1 other threads were started before"):
        start_proxy(server, *arguments, "--require-sandbox", cwd=tmp_path)
    proxy = start_proxy(server, *arguments, cwd=tmp_path)
    assert proxy.logged("no whole sandbox: files are not restricted")
    sandbox = proxy.json("status")["sandbox"]
    assert (sandbox["wanted"], sandbox["seccomp"], sandbox["landlock"]) == (True, True, 0)
    assert "system calls filtered, FILES NOT RESTRICTED (doctor says why)" in proxy.command("status").stdout


@pytest.mark.root
def test_status_says_what_workers_are_confined_to(lab: Lab, start_proxy: StartProxy) -> None:
    server = lab.host("proxy")
    proxy = start_proxy(server, "--listen", f"{server.ipv4}:{PORT}", "--workers", "1")
    sandbox = proxy.json("status")["sandbox"]
    assert sandbox == {"user": sandbox["user"], "wanted": True, "seccomp": True, "landlock": landlock.abi()}
    assert sandbox["user"] in ("rama-ebpf", "nobody")
    (worker,) = proxy.workers()
    facts = status(worker)
    assert (facts["Seccomp"], facts["NoNewPrivs"]) == (["2"], ["1"])


@pytest.mark.root
def test_without_the_sandbox_these_ways_are_open_and_the_log_says_so(
    lab: Lab, start_proxy: StartProxy, tmp_path: Path
) -> None:
    names = ("kill the group", "pidfd_open", "a netlink socket")  # of no consequence where they succeed
    found, proxy = outcomes(lab, start_proxy, tmp_path, {name: WAYS_OUT[name] for name in names}, "--no-sandbox")
    assert found == dict.fromkeys(names, 0)
    assert proxy.logged("NO SANDBOX")
    assert "WITHOUT A SANDBOX" in proxy.command("status").stdout


LACKING = {
    "landlock": (
        "Landlock is unknown to it",
        "system calls filtered, FILES NOT RESTRICTED",
        "Landlock",
        "open what their",
    ),
    "seccomp": ("no seccomp filter", "SYSTEM CALLS NOT FILTERED, files restricted", "seccomp", "make any system call"),
}


@pytest.mark.root
@pytest.mark.parametrize("what", LACKING)
def test_on_a_kernel_that_lacks_a_part_of_the_sandbox_that_is_said_and_required_it_is_refused(
    what: str, lab: Lab, instance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``run`` goes on with what there is, and says what is missing; so do ``status`` and ``doctor``."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    logged, shown, subject, found = LACKING[what]
    under = (sys.executable, "-m", "tests.process.old_kernel", what)
    host = lab.host("proxy")
    arguments = ("--listen", f"{host.ipv4}:{PORT}", "--workers", "1")
    required = ProxyProcess(host, instance, *arguments, "--require-sandbox")
    required.under = under
    with pytest.raises(AssertionError, match=logged):
        required.start()
    assert required.wait() == 3
    proxy = ProxyProcess(host, instance, *arguments)
    proxy.under = under
    proxy.start()
    try:
        assert proxy.logged(f"no whole sandbox: .*{logged}")
        assert shown in proxy.command("status").stdout
        doctor = host.run(*under, ProxyProcess.COMMAND, "doctor", "--json", "--instance", instance, timeout=60)
        (finding,) = [row for row in json.loads(doctor.stdout)["findings"] if row["subject"] == subject]
        assert finding["ok"] is None
        assert found in finding["found"]
    finally:
        proxy.end()
