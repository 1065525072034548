"""A worker, or another process that parses strangers' bytes, was taken over and tries the ways out: files, sockets,
system calls, signals, pins, other workers. The resolver is part of each worker."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rama_ebpf.kernel import cgroup, landlock
from rama_ebpf.kernel.denials import DenialCounts
from rama_ebpf.kernel.feed_cgroup import Grants, confined_to_grants
from rama_ebpf.kernel.gate_maps import GateMaps
from rama_ebpf.kernel.instance import Instance

from ..conftest import StartProxy
from ..lab import PATIENCE, Host, Lab, temporary_directory

PORT = 1080

# A service that says who it is, is told what it would find out, and answers what came of each attempt: the name of an
# error, or what it got.
APPLICATION = r"""
import ctypes, errno, json, mmap, os, pathlib, resource, signal, socket

libc = ctypes.CDLL(None, use_errno=True)

def call(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(value) for value in arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), "system call")
    return f"system call {number} gave {result}"

def read(path):
    with open(path, "rb") as file:
        return f"read {len(file.read(64))} bytes"

def write(path):
    with open(path, "ab") as file:
        return "opened to write"

def make(family, kind=socket.SOCK_STREAM, protocol=0):
    with socket.socket(family, kind, protocol):
        return "made"

def dial(address, kind=socket.SOCK_STREAM, family=socket.AF_INET):
    with socket.socket(family, kind) as sock:
        sock.settimeout(5)
        sock.connect(address)
        return "connected"

def listen(address):
    with socket.socket() as sock:
        sock.bind(address)
        return "bound"

def attempts(facts):
    server, other = facts["server"], facts["other"]
    yield from ((f"read {path}", lambda path=path: read(path)) for path in (
        "/etc/shadow", facts["users"], facts["key"], facts["config"], facts["state"], "/root/.profile",
        "/var/log/dpkg.log",
        "/dev/kmsg", "/sys/kernel/debug", "/sys/kernel/btf/vmlinux",
        *(f"/proc/{pid}/{name}" for pid in (server, other) for name in ("environ", "mem", "maps", "cmdline", "fd/0"))))
    yield from ((f"list {path}", lambda path=path: os.listdir(path)) for path in (
        "/", "/tmp", "/run", "/proc", "/home", "/var/lib/rama-ebpf", facts["pins"], facts["metrics"], facts["run"],
        f"/proc/{server}/fd", f"/proc/{other}/fd", "/dev"))
    yield from ((f"write {path}", lambda path=path: write(path)) for path in (
        "/tmp/left-by-a-worker", "/dev/shm/left-by-a-worker", "/var/tmp/left-by-a-worker", facts["here"] + "/left",
        "/etc/left-by-a-worker", "/proc/self/oom_score_adj", "/proc/sys/net/ipv4/ip_forward", "/dev/net/tun",
        "/dev/ptmx", facts["cgroup"] + "/cgroup.procs", facts["cgroup"] + "/workers/cgroup.procs",
        *facts["metrics_files"]))
    yield "make a link", lambda: os.symlink("/etc/shadow", facts["metrics"] + "/counter_9-9.db")
    yield "make a FIFO", lambda: os.mkfifo(facts["metrics"] + "/counter_9-9.db")
    yield "rename a metrics file", lambda: os.rename(facts["metrics_files"][0], facts["metrics"] + "/x")
    yield "remove the pins", lambda: os.rmdir(facts["pins"])
    yield "open a pin", lambda: call(321, 7, 0, 0)
    yield "make a map", lambda: call(321, 0, 0, 0)
    yield "load a program", lambda: call(321, 5, 0, 0)
    yield "walk all maps", lambda: call(321, 12, 0, 0)
    yield "a netlink socket", lambda: make(socket.AF_NETLINK, socket.SOCK_RAW)
    yield "a packet socket", lambda: make(socket.AF_PACKET, socket.SOCK_RAW)
    yield "a packet socket of the old kind", lambda: make(socket.AF_INET, 10)
    yield "a raw socket", lambda: make(socket.AF_INET, socket.SOCK_RAW, 255)
    yield "a vsock", lambda: make(40)
    yield "an AF_ALG socket", lambda: make(38, socket.SOCK_SEQPACKET)
    yield "an XDP socket", lambda: make(44, socket.SOCK_RAW)
    yield "a UDP-Lite socket", lambda: make(socket.AF_INET, socket.SOCK_DGRAM, 136)
    yield "an SCTP socket", lambda: make(socket.AF_INET, socket.SOCK_STREAM, 132)
    yield "connect to the host's loopback", lambda: dial(("127.0.0.1", facts["inside"]))
    yield "connect to the host's address", lambda: dial((facts["address"], facts["inside"]))
    yield "connect to the proxy itself", lambda: dial((facts["address"], facts["port"]))
    yield "connect to the metadata service", lambda: dial(("169.254.169.254", 80))
    yield "connect to /metrics", lambda: dial(("127.0.0.1", facts["metrics_port"]))
    yield "connect to the control socket", lambda: dial(facts["control"], family=socket.AF_UNIX)
    if facts["scopes"]:
        yield "connect to another's abstract socket", lambda: dial("\0" + facts["abstract"], family=socket.AF_UNIX)
    yield "listen on a privileged port", lambda: listen((facts["address"], 99))
    yield "execve", lambda: os.execv("/bin/true", ["true"])
    yield "execveat", lambda: call(322, -1, 0, 0, 0, 0)
    yield "fork", os.fork
    yield "vfork", lambda: call(58)
    yield "clone a process", lambda: call(56, signal.SIGCHLD, 0, 0, 0, 0)
    yield "clone3", lambda: call(435, 0, 0)
    yield "a user namespace", lambda: call(272, 0x10000000)
    yield "a network namespace", lambda: call(272, 0x40000000)
    yield "enter a namespace", lambda: call(308, -1, 0)
    yield "mount", lambda: call(165, 0, 0, 0, 0, 0)
    yield "the new mount interface", lambda: call(428, -1, 0, 0)
    yield "chroot", lambda: os.chroot("/")
    yield "a file by its handle", lambda: call(304, -1, 0, 0)
    yield "a device node", lambda: call(133, 0, 0, 0)
    yield "io_uring", lambda: call(425, 1, 0)
    yield "userfaultfd", lambda: call(323, 1)
    yield "perf events", lambda: call(298, 0, 0, -1, -1, 0)
    yield "kernel keys", lambda: call(250, 0, 0, 0, 0, 0)
    yield "secret memory", lambda: call(447, 0)
    yield "shared memory", lambda: call(29, 0, 4096, 0o1600)
    yield "a message queue", lambda: call(240, 0, 0, 0, 0)
    yield "another seccomp filter", lambda: call(317, 0, 0, 0)
    yield "the kernel's log", lambda: call(103, 3, 0, 0)
    yield "the personality", lambda: call(135, 0x0040000)
    yield "become root", lambda: os.setuid(0)
    yield "become another group", lambda: os.setgroups([0])
    yield "capabilities", lambda: call(126, 0, 0)
    yield "outlive the server", lambda: call(157, 1, 0, 0, 0, 0)
    yield "become dumpable", lambda: call(157, 4, 1, 0, 0, 0)
    yield "a session of its own", os.setsid
    yield "more descriptors", lambda: resource.setrlimit(
        resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1] + 1,) * 2)
    for name, pid in (("the server", server), ("another worker", other)):
        yield f"kill {name}", lambda pid=pid: os.kill(pid, 0)
        yield f"stop {name}", lambda pid=pid: os.kill(pid, signal.SIGSTOP)
        yield f"tgkill {name}", lambda pid=pid: call(234, pid, pid, 0)
        yield f"queue a signal to {name}", lambda pid=pid: call(129, pid, 0, 0)
        yield f"a pidfd of {name}", lambda pid=pid: os.pidfd_open(pid)
        yield f"trace {name}", lambda pid=pid: call(101, 16, pid, 0, 0)
        yield f"read the memory of {name}", lambda pid=pid: call(310, pid, 0, 0, 0, 0, 0)
        yield f"write the memory of {name}", lambda pid=pid: call(311, pid, 0, 0, 0, 0, 0)
        yield f"the limits of {name}", lambda pid=pid: call(302, pid, 7, 0, 0)
        yield f"the schedule of {name}", lambda pid=pid: os.sched_setaffinity(pid, {0})
        yield f"the OOM score of {name}", lambda pid=pid: write(f"/proc/{pid}/oom_score_adj")
    yield "kill everybody", lambda: os.kill(-1, 0)
    yield "a descriptor of the server", lambda: call(438, -1, 0, 0)

def answers(facts):
    found = {}
    for name, attempt in attempts(facts):
        try:
            found[name] = f"DONE: {attempt()}"
        except OSError as error:
            found[name] = errno.errorcode.get(error.errno, "OSError")
        except ValueError:
            found[name] = "EPERM"  # of setrlimit(2), as Python says it
    return found

async def service(stream):
    await stream.write(b"%d\n" % os.getpid())
    data = bytearray()
    while not data.endswith(b"\n"):
        data += await stream.read()
    await stream.write(json.dumps(answers(json.loads(data))).encode())
    await stream.write_eof()
    await stream.close()
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can reach: pytest's own are root's."""
    with temporary_directory() as made:
        yield made


# The other processes that strangers' bytes go through: confined by their own code, which then tries the same.
CHILD = r"""
import json, os, socket, sys

channel, role = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
sys.path.insert(0, sys.argv[3])
import ways
facts = json.loads(channel.recv(1 << 20))
if role == "metrics":
    from rama_ebpf.control.metrics_child import enter_sandbox
    from rama_ebpf.kernel.privileges import UserIds, drop_privileges
    drop_privileges(UserIds.of_workers())
    listener = enter_sandbox().listener
    channel.sendall(json.dumps({"listener": listener}).encode())
    channel.recv(1 << 16)
    os.close(listener)
else:
    from rama_ebpf.policy.fetch_child import confine_reader
    confine_reader(channel, 1 << 20, network=True)
channel.sendall(json.dumps(ways.answers(facts)).encode())
"""


def tried_as(role: str, host: Host, place: Path, facts: dict[str, object], workers: Path) -> dict[str, str]:
    """What comes of each attempt in such a process, which must be counted, too."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    counts = DenialCounts()
    with ours, contextlib.ExitStack() as held:
        held.callback(counts.close)
        with theirs:
            command = (sys.executable, "-c", CHILD, str(theirs.fileno()), role, str(place))
            child = host.popen(*command, pass_fds=(theirs.fileno(),))
        if role == "feed":
            maps = held.enter_context(GateMaps.open(Instance(str(facts["instance"])).pin_dir))
            grants = held.enter_context(confined_to_grants(Grants(maps), workers, child.pid, counts))
            held.callback(child.wait)
        else:
            cgroup.move(child.pid, workers)
        ours.settimeout(60 * PATIENCE)
        ours.sendall(json.dumps(facts).encode())
        said = json.loads(ours.recv(1 << 20))
        assert said.keys() == {"listener"}
        grants.follow(said["listener"]) if role == "feed" else counts.follow(role, child.pid, said["listener"])
        ours.sendall(b'{"refusal": ""}')
        found: dict[str, str] = json.loads(ours.recv(1 << 20))
        assert counts.counts()[role, "ptrace"] == 2
    return found


REFUSALS = {"EPERM", "EACCES", "ENOSYS", "EAFNOSUPPORT", "EPROTONOSUPPORT"}


@pytest.mark.root
@pytest.mark.ebpf
def test_no_process_that_was_taken_over_finds_a_way_out(lab: Lab, start_proxy: StartProxy, place: Path) -> None:
    (place / "ways.py").write_text(APPLICATION, encoding="utf-8")
    for name in ("users", "ca.key"):
        (place / name).write_text("secret\n")
        (place / name).chmod(0o600)
    server, client = lab.host("proxy"), lab.host("client")
    where = f"{server.ipv4}:{PORT}"
    proxy = start_proxy(
        *(server, "ways:service", "--listen", where, "--workers", "2", "--metrics", "127.0.0.1:9464"),
        "--require-sandbox",
        cwd=place,
    )
    (metrics,) = Path("/run").glob(f"rama-ebpf-metrics-{proxy.pid}-*")
    instance = Instance(proxy.instance)
    said = b""
    with (
        server.socket() as inside,
        server.socket(socket.AF_UNIX) as abstract,
        client.connect(server.ipv4, PORT) as sock,
    ):
        inside.bind(("0.0.0.0", 0))
        inside.listen()
        abstract.bind("\0rama-ebpf-test-" + proxy.instance)
        abstract.listen()
        sock.settimeout(60)
        pid = b""
        while not pid.endswith(b"\n"):
            pid += sock.recv(64)
        (other,) = [worker for worker in proxy.workers() if worker != int(pid)]
        facts = {
            "server": proxy.pid,
            "other": other,
            "users": str(place / "users"),
            "key": str(place / "ca.key"),
            "config": "/etc/gshadow",
            "state": str(instance.run_dir / "state.json"),
            "pins": str(instance.pin_dir),
            "metrics": str(metrics),
            "metrics_files": sorted(map(str, metrics.iterdir())),
            "metrics_port": 9464,
            "run": str(instance.run_dir),
            "control": str(instance.control_socket),
            "cgroup": proxy.json("status")["cgroup"],
            "here": str(place),
            "address": server.ipv4,
            "port": PORT,
            "inside": inside.getsockname()[1],
            "abstract": "rama-ebpf-test-" + proxy.instance,
            "scopes": landlock.abi() >= 6,
        }
        assert facts["metrics_files"], "workers count nothing: then nothing is to be forged"
        sock.sendall(json.dumps(facts).encode() + b"\n")
        while chunk := sock.recv(65536):
            said += chunk
        facts["instance"] = proxy.instance
        workers = Path(proxy.json("status")["cgroup"]) / "workers"
        found = {role: tried_as(role, server, place, facts, workers) for role in ("metrics", "feed")}
    assert said, proxy.log
    found["worker"] = json.loads(said)
    for role, answers in found.items():
        assert len(answers) > 100, role
        assert not {name: what for name, what in answers.items() if what not in REFUSALS}, role
    assert sorted(proxy.workers()) == sorted((int(pid), other))


@pytest.mark.root
def test_an_application_reads_and_writes_where_it_is_told_that_it_may(
    lab: Lab, start_proxy: StartProxy, place: Path
) -> None:
    data, state, elsewhere = (place / name for name in ("data", "state", "elsewhere"))
    for directory in (data, state, elsewhere):
        directory.mkdir(mode=0o777)
        directory.chmod(0o777)
        (directory / "file").write_text("x")
    (place / "service").mkdir()
    (place / "service" / "files.py").write_text(
        f"""
import errno, json, pathlib, sqlite3

def attempt(what):
    try:
        what()
    except (OSError, sqlite3.Error) as error:
        return str(getattr(error, "errno", error))
    return "done"

def database(directory):
    with sqlite3.connect(directory / "users.db") as connection:
        connection.execute("create table t (x)")
        connection.execute("insert into t values (1)")
    connection.close()

async def service(stream):
    data, state, elsewhere = map(pathlib.Path, {[str(data), str(state), str(elsewhere)]})
    await stream.write(json.dumps([
        attempt(lambda: (data / "file").read_text()), attempt(lambda: (data / "file").write_text("y")),
        attempt(lambda: (state / "file").read_text()), attempt(lambda: (state / "new").write_text("y")),
        attempt(lambda: database(state)), attempt(lambda: (elsewhere / "file").read_text()),
        attempt(lambda: (elsewhere / "new").write_text("y")),
    ]).encode())
    await stream.write_eof()
    await stream.close()
"""
    )
    server, client = lab.host("proxy"), lab.host("client")
    config = place / "service" / "rama.toml"
    config.write_text(
        f'listeners.a = {{ address = "{server.ipv4}:{PORT}", stack = "s" }}\nserver.workers = 1\n'
        'stacks.s.service = { custom = { target = "files:service" } }\n'
        f'sandbox = {{ read = ["{data}"], write = ["../state"] }}\n'
    )
    start_proxy(server, "--config", str(config), "--require-sandbox")
    said = b""
    with client.connect(server.ipv4, PORT) as sock:
        sock.settimeout(30)
        while chunk := sock.recv(65536):
            said += chunk
    denied = "13"
    assert json.loads(said) == ["done", denied, "done", "done", "done", denied, denied]
