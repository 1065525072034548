"""``doctor``: what this host has and lacks, line by line, and how to mend it."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ..control.socket import ControlUnavailable
from ..core.errors import RamaError
from ..kernel import bpffs, cgroup, headers, landlock, syn_cookies
from ..kernel.instance import Instance
from ..kernel.privileges import WORKERS, UserIds
from ..kernel.seccomp import SeccompUnavailable, available, load_library
from ..kernel.suspended import is_stopped
from ..policy.rule import PolicyError
from .flows import live_flows
from .lifecycle import probe
from .output import ENVIRONMENT, OK, print_json

__all__ = ["Finding", "examine", "register"]

_CAP_NET_ADMIN, _CAP_SYS_ADMIN, _CAP_BPF = 12, 21, 39
_OLDEST = (5, 13)
_WIRE = (6, 6)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: ``ok`` is None for something that is merely told. ``remedy`` says how to mend what is not ok."""

    subject: str
    ok: bool | None
    found: str
    remedy: str = ""


def _privileges() -> Finding:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    effective = int(next(line for line in status.splitlines() if line.startswith("CapEff")).split()[1], 16)
    has = {
        name
        for name, bit in (("NET_ADMIN", _CAP_NET_ADMIN), ("SYS_ADMIN", _CAP_SYS_ADMIN), ("BPF", _CAP_BPF))
        if effective >> bit & 1
    }
    ok = "NET_ADMIN" in has and "SYS_ADMIN" in has
    shown = f"uid {os.geteuid()}, capabilities {', '.join(sorted(has)) or 'none'}"
    return Finding("privileges", ok, shown, "run as root, or grant CAP_SYS_ADMIN and CAP_NET_ADMIN")


def _kernel() -> Finding:
    return Finding("kernel", _running() >= _OLDEST, platform.release(), f"needs Linux {_text(_OLDEST)} or later")


def _running() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2] if part.isdigit())


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _cgroup() -> Finding:
    try:
        mount, own = cgroup.cgroup2_mount(), cgroup.own_cgroup()
    except OSError as error:
        return Finding("cgroup v2", False, str(error.strerror), "mount -t cgroup2 none /sys/fs/cgroup")
    shared = "" if os.access(own, os.W_OK) else ", read-only: the gate attaches to it as a whole"
    return Finding("cgroup v2", True, f"mounted at {mount}, own cgroup {own}{shared}")


def _bpffs() -> Finding:
    mounted = bpffs.is_mounted()
    if mounted:
        return Finding("bpffs", True, f"mounted at {bpffs.BPFFS}")
    mendable = os.geteuid() == 0 and bpffs.BPFFS.is_dir()
    return Finding("bpffs", mendable, "not mounted (run mounts it)", f"mount -t bpf bpf {bpffs.BPFFS}")


def _btf() -> Finding:
    present = Path("/sys/kernel/btf/vmlinux").is_file()
    found = "present" if present else "absent: the sockmap relay is not offered (its overlap guard needs BTF)"
    return Finding("kernel BTF", None if not present else True, found, "use a kernel with CONFIG_DEBUG_INFO_BTF")


def _headers() -> Finding:
    present = headers.uapi_present()
    found = "UAPI headers in /usr/include/linux" if present else "no UAPI headers"
    return Finding("headers", present, found, "install linux-libc-dev (Fedora: kernel-headers)")


def _bcc() -> Finding:
    spec = importlib.util.find_spec("bcc")
    found = f"{Path(spec.origin).parent}" if spec is not None and spec.origin else "not importable"
    return Finding("BCC", spec is not None, found, "install python3-bpfcc (Fedora: python3-bcc)")


def _jit() -> Finding:
    path = Path("/proc/sys/net/core/bpf_jit_enable")
    if not path.is_file():
        return Finding("BPF JIT", None, "cannot be told")
    value = path.read_text(encoding="ascii").strip()
    return Finding("BPF JIT", value != "0", f"net.core.bpf_jit_enable = {value}", "sysctl net.core.bpf_jit_enable=1")


def _syn_cookies() -> Finding:
    refusal = syn_cookies.refusal()
    found = refusal or f"net.ipv4.tcp_syncookies = {syn_cookies.setting()}"
    return Finding("SYN cookies", None if refusal else True, found, "sysctl net.ipv4.tcp_syncookies=1")


def _workers_user() -> Finding:
    """Nothing of the sandbox keeps the server from running: what is missing is told."""
    user = UserIds.of_workers()
    if user.name == WORKERS:
        return Finding("workers' user", True, f"{WORKERS} (uid {user.uid})")
    found = f"there is no user {WORKERS}: workers become {user.name}, whom other daemons may be as well"
    return Finding("workers' user", None, f"{found} (packaging/sysusers.d makes it; [server] user names another)")


def _seccomp() -> Finding:
    try:
        load_library()
    except SeccompUnavailable as error:
        return Finding("seccomp", None, f"workers and feeds' children may make any system call: {error}")
    if not available():
        return Finding(
            "seccomp", None, "workers and feeds' children may make any system call: the kernel has no filters"
        )
    counted = "what is refused is counted" if available(listener=True) else "what is refused is not counted (Linux 5.0)"
    return Finding(
        "seccomp", True, f"workers and feeds' children make the system calls on a list, and no others; {counted}"
    )


def _landlock() -> Finding:
    version = landlock.abi()
    if not version:
        text = "workers and feeds' children open what their user may: the kernel has no Landlock (5.13), or not in lsm="
        return Finding("Landlock", None, text)
    scopes = "" if version >= 6 else "; signals and abstract sockets are left to seccomp before ABI 6"
    return Finding("Landlock", True, f"ABI {version}: workers and feeds' children open the files they need{scopes}")


def _sockmap() -> Finding:
    from ..control.kernel_relay import passed_before  # only here: it brings in the relay and the process model
    from ..relay.selftest import known_bad

    fault, passed = known_bad(platform.release()), passed_before(Instance().relay_record)
    if fault:
        return Finding("sockmap relay", None, f"refused: {fault}")
    if passed is not None:
        return Finding("sockmap relay", True, f"this kernel has passed the self-test, in {passed.seconds:.1f} s")
    return Finding("sockmap relay", None, "not tried since boot: `run` does when a tunnel first wants it (--self-test)")


def _wire() -> Finding:
    state = Instance().read_state().get("wire")
    if _running() < _WIRE:
        return Finding("wire relay", None, f"refused: it takes Linux {_text(_WIRE)} (links for traffic control)")
    if isinstance(state, dict) and state.get("state") == "refused":
        return Finding("wire relay", None, f"refused: {state.get('why')}")
    return Finding("wire relay", None, 'the kernel is new enough: `relay = "wire"` of a listener asks for it')


def _try_sockmap() -> None:
    """Run the relay's self-test; what it says is found by :func:`_sockmap`, a refusal is raised."""
    from ..control.kernel_relay import try_kernel
    from ..kernel.splice import SpliceMaps

    record = Instance().relay_record
    record.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    maps = SpliceMaps.create(1, 64)
    try:
        result = asyncio.run(try_kernel(maps, record))
    finally:
        maps.close()
    if result.refusal:
        raise RamaError(f"sockmap relay refused: {result.refusal}")


_CHECKS: tuple[Callable[[], Finding], ...] = (
    _privileges,
    _kernel,
    _cgroup,
    _bpffs,
    _btf,
    _headers,
    _bcc,
    _jit,
    _syn_cookies,
    _workers_user,
    _seccomp,
    _landlock,
    _sockmap,
    _wire,
)


def examine(instance: Instance) -> list[Finding]:
    """Run all checks; they change nothing."""
    return [*(check() for check in _CHECKS), *_wire_at_work(instance), *_audited(instance), _gate(instance)]


def _wire_at_work(instance: Instance) -> list[Finding]:
    """Which tunnels of the running server the wire relay did not take, and why."""
    state = instance.read_state().get("wire") if instance.serving_pid() is not None else None
    if not isinstance(state, dict) or state.get("state") != "ready":
        return []
    try:
        refused = live_flows(instance)["refused"]
    except (ControlUnavailable, PolicyError, TimeoutError) as error:
        return [Finding("wire relay at work", None, f"the server does not say what it refuses: {error}")]
    rows = sorted(((count, why) for why, count in refused.items() if why.startswith("no wire: ")), reverse=True)
    if not rows:
        return [Finding("wire relay at work", True, "it takes every tunnel that it is asked for")]
    told = "; ".join(f"{count} {why.removeprefix('no wire: ')}" for count, why in rows)
    return [Finding("wire relay at work", None, f"tunnels that went another way: {told} (docs/wire.md has the rules)")]


def _audited(instance: Instance) -> list[Finding]:
    """What the running server's audit has found."""
    audit = instance.read_state().get("audit") if instance.serving_pid() is not None else None
    if not isinstance(audit, dict):
        return []
    remedy = "rama-ebpf policy load the policy again, or restart; rama-ebpf status says more"
    if audit["standing"]:
        return [Finding("policy in force", False, "; ".join(audit["standing"]), remedy)]
    if audit["disagreements"]:
        found = f"{audit['disagreements']} disagreements of kernel and policy were put in order: {audit['last']}"
        return [Finding("policy in force", None, found)]
    return [Finding("policy in force", True, "kernel and policy agree")]


def _gate(instance: Instance) -> Finding:
    """What the server of the instance says of its gate."""
    subject = f"gate of instance {instance.name}"
    pid = instance.serving_pid()
    if pid is None:
        return Finding(subject, None, "no server runs")
    if is_stopped(pid):
        text = f"process {pid} is stopped: its workers serve by the policy as it is, and nothing is put right"
        return Finding(subject, False, text, f"fg in its terminal, or kill -CONT {pid}")
    said = probe(instance)
    if said is not None and said.get("stopping") is True:
        return Finding(subject, None, f"process {pid}{instance.doing(pid)}")
    if said is None and (how := instance.doing(pid)):
        return Finding(subject, None, f"process {pid}{how}")
    if said is None:
        return Finding(subject, False, "its server does not answer", "look into its log; unload --stop ends it")
    rows = cast("list[dict[str, object]]", said.get("listeners", []))
    guards = [f"{row['address']} {row['guard']}" for row in rows if "guard" in row]
    problems = cast("dict[str, str]", said.get("problems", {}))
    if problems:
        text = "; ".join(f"{what}: {why}" for what, why in problems.items())
        return Finding(subject, False, f"DOES NOT GUARD: {text}", "mend that: the server looks again by itself")
    return Finding(subject, True, ", ".join(guards) or "no TCP listeners")


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    text = "say what this host has and lacks, and how to mend it"
    parser = commands.add_parser("doctor", parents=[shared], help=text, description=text)
    parser.add_argument("--self-test", action="store_true", help="first try the kernel's relay (some seconds; as root)")
    parser.set_defaults(main=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    if args.self_test:
        _try_sockmap()
    findings = examine(args.instance)
    missing = [finding for finding in findings if finding.ok is False]
    if args.json:
        rows = [{"subject": f.subject, "ok": f.ok, "found": f.found, "remedy": f.remedy} for f in findings]
        print_json({"ready": not missing, "findings": rows})
    else:
        for finding in findings:
            mark = {True: "ok  ", False: "MISS", None: "note"}[finding.ok]
            print(f"{mark}  {finding.subject}: {finding.found}")
            if finding.ok is False:
                print(f"      mend: {finding.remedy}")
        lacking = [finding for finding in missing if not finding.subject.startswith("gate of")]
        if lacking:
            print("not ready: policy would run in userspace only")
        else:
            print("ready: the gate can run in the kernel" if not missing else "not ready: the gate does not guard")
    return ENVIRONMENT if missing else OK
