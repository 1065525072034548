"""``status`` and ``unload``: what runs, and how to leave nothing behind."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import signal
import time
from typing import cast

from .. import loader
from ..control import socket as control
from ..control.api import Json, feed_rows
from ..kernel import xdp
from ..kernel.gate_maps import LayoutMismatch
from ..kernel.guard_registry import guarding_pids
from ..kernel.instance import Instance, InstanceBusy
from ..kernel.suspended import is_stopped, stopped_hint
from ..policy.feed_store import FeedStore
from ..policy.kept import KeptPolicy
from ..policy.kernel_store import KernelStore
from ..policy.rule import PolicyError, boottime_ns
from .output import NO, OK, duration, print_json, table

__all__ = ["probe", "register", "status"]

_STOP_SECONDS = 60.0
_PROBE_SECONDS = 5.0
_DENIALS_SHOWN = 8
_WAYS_SHOWN = 16


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    """Add the commands."""
    text = "show the server, its listeners, and what the gate has decided"
    status = commands.add_parser("status", parents=[shared], help=text, description=text)
    status.set_defaults(main=_status)
    text = "forget the policy, and leave nothing in the kernel and under /run; bans and journal stay unless purged"
    unload = commands.add_parser("unload", parents=[shared], help=text, description=text)
    unload.add_argument("--stop", action="store_true", help="stop the running server first (SIGTERM, then wait)")
    text = "also forget bans, journal, copies of feeds and compiled programs"
    unload.add_argument("--purge", action="store_true", help=text)
    unload.set_defaults(main=_unload)


def status(instance: Instance) -> Json:
    """Collect what :command:`status` shows."""
    pid = instance.serving_pid()
    state = instance.read_state() if pid is not None else {}
    if pid and state.get("pid") != pid:
        state = {}  # of the server before, or of none: this one is starting
    state |= probe(instance) or {}
    result: Json = {
        "instance": instance.name,
        "running": pid is not None,
        "pid": pid,
        "policy": state.get("policy", "kernel" if instance.pinned else None),
        "why_local": state.get("why_local"),
        "cgroup": state.get("cgroup"),
        "egress": state.get("egress"),
        "ready": state.get("ready", False) is True,
        "stopping": state.get("stopping", False) is True,
        "starting": pid is not None and state.get("starting", True) is True,
        "suspended": bool(pid) and is_stopped(pid or 0),
        "ends_by": state.get("ends_by"),
        "problems": state.get("problems") or {},
        "xdp": [_xdp(row) for row in _rows(state, "xdp")],
        "audit": state.get("audit"),
        "syn_cookies": state.get("syn_cookies"),
        "silent_rejects": 0,
        "sockmap": state.get("sockmap"),
        "wire": state.get("wire"),
        "workers": state.get("workers"),
        "sandbox": state.get("sandbox"),
        "denials": _rows(state, "denials"),
        "draining": _rows(state, "draining"),
        "guards": sorted(guarding_pids(instance)),
        "ways": _rows(state, "ways"),
        "confirm_within": None,
        "feeds": [],
        "listeners": [],
        "verdicts": [],
    }
    if not instance.pinned:
        result["listeners"] = [_shown(row) for row in _rows(state, "listeners")]
        return result
    try:
        opened = KernelStore(instance)
    except (FileNotFoundError, LayoutMismatch) as error:
        result["why_unknown"] = f"the pins cannot be read: {error}"
        result["listeners"] = [_shown(row) for row in _rows(state, "listeners")]
        return result
    with opened as store:
        result["listeners"] = [_counted(store, row) for row in _rows(state, "listeners")]
        result["verdicts"] = [
            {"hook": hook, "stage": stage, "action": action, "count": count}
            for (hook, stage, action), count in sorted(store.counters.totals().items())
        ]
        result["silent_rejects"] = store.counters.silent_rejects()
        result["revision"] = store.revision
        result["feeds"] = feed_rows(store, FeedStore(instance.feeds_dir))
        if (end := store.pending) is not None:
            result["confirm_within"] = round(max(0, end - boottime_ns()) / 1e9, 1)
    return result


def probe(instance: Instance) -> Json | None:
    """Have the live server look at its gate now, and return what it says; None if there is none, or it says nothing."""
    if instance.control_socket.exists():
        with contextlib.suppress(control.ControlUnavailable, PolicyError, TimeoutError):
            return control.call(instance.control_socket, "probe", {}, timeout=_PROBE_SECONDS)
    return None


def _shown(row: Json) -> Json:
    return {name: row[name] for name in ("name", "address", "guarded", "guard", "open") if name in row}


def _confined(sandbox: Json, serving: object) -> str:
    who = f"workers run as {sandbox['user'] or 'who started them'}"
    if not sandbox["wanted"]:
        return f"{who}, WITHOUT A SANDBOX (--no-sandbox)"
    if not serving:
        return f"{who}; how they are confined they say when they serve"
    abi = cast("int", sandbox["landlock"])
    calls = "system calls filtered" if sandbox["seccomp"] else "SYSTEM CALLS NOT FILTERED"
    files = f"files restricted (Landlock {abi})" if abi else "FILES NOT RESTRICTED"
    return f"{who}: {calls}, {files}" + ("" if abi and sandbox["seccomp"] else " (doctor says why)")


def _counted(store: KernelStore, row: Json) -> Json:
    counted: Json = {**_shown(row)}
    if "id" in row:  # a Unix socket is not under the gate
        ids = cast("list[int]", row.get("ids", [row["id"]]))  # of both families, where it serves bindings
        counted |= {
            "established": sum(map(store.counters.established, ids)),
            "accepted": sum(map(store.counters.accepted, ids)),
        }
    return counted


def _xdp(row: Json) -> Json:
    attached = xdp.is_attached(cast("int", row["link"]))
    mode = row["mode"] if attached else "detached"
    return {"interface": row["interface"], "mode": mode, "why": row["why"], "why_silent": row["why_silent"]}


def _rows(state: Json, name: str) -> list[Json]:
    rows = state.get(name)
    return cast("list[Json]", rows) if isinstance(rows, list) else []


def _status(args: argparse.Namespace) -> int:
    result = status(args.instance)
    if args.json:
        print_json(result)
        return OK if result["running"] else NO
    if result["starting"]:
        print(f"instance {result['instance']} is being started by process {result['pid']}: nobody gets in yet")
    elif result["stopping"]:
        within = args.instance.time_to_stop(result).strip()
        waits = f"waits {within} for its connections to end" if within else "waits for its connections to end"
        print(f"instance {result['instance']} is stopping: process {result['pid']} {waits}")
    elif result["running"]:
        print(f"instance {result['instance']} is served by process {result['pid']}, policy in the {result['policy']}")
    else:
        kept = ", its policy is pinned" if result["policy"] else ""
        print(f"instance {result['instance']} is not running{kept}")
    for pid in cast("list[int]", result["guards"]):
        print(f"process {pid} guards listeners of other programs by its policy")
    if result["suspended"]:
        print(
            f"process {result['pid']} IS STOPPED (Ctrl-Z, SIGSTOP): workers serve by the policy as it is, and nothing "
            f"else goes on{stopped_hint(cast('int', result['pid']))}"
        )
    for row in cast("list[Json]", result["draining"]):
        age = duration(time.time() - cast("float", row["since"]))
        print(f"process {row['pid']}, which was followed {age} ago, drains")
    if result["confirm_within"] is not None:
        within = duration(result["confirm_within"])
        print(f"a set of rules is ON TRIAL: undone in {within} unless confirmed (rama-ebpf policy confirm)")
    if result["why_local"]:
        print(f"policy is not in the kernel: {result['why_local']}")
    if result.get("why_unknown"):
        print(f"counters are unknown: {result['why_unknown']}")
    if result["egress"]:
        print(f"egress policy is kept by {result['egress']}")
    for row in cast("list[Json]", result["xdp"]):
        print(f"XDP on {row['interface']}: {row['mode']}" + (f" (native: {row['why']})" if row["why"] else ""))
        if row["why_silent"]:
            print(f"XDP on {row['interface']} answers nothing, the stack does: {row['why_silent']}")
    workers = result["workers"]
    if not result["stopping"] and isinstance(workers, dict) and workers["serving"] < workers["expected"]:
        since = f", since {time.time() - workers['since']:.0f} s" if workers["since"] is not None else ""
        print(f"{workers['serving']} of {workers['expected']} workers serve{since}")
    if isinstance(audit := result["audit"], dict) and audit["disagreements"]:
        found = audit["disagreements"]
        print(f"{found} disagreement{'s' * (found > 1)} of kernel and policy, the last: {audit['last']}")
        for what in audit["standing"]:
            print(f"THE KERNEL DOES NOT HAVE WHAT WAS ASKED FOR: {what}")
    if isinstance(sandbox := result["sandbox"], dict):
        print(_confined(sandbox, isinstance(workers, dict) and workers["serving"]))
    for row in cast("list[Json]", result["denials"])[:_DENIALS_SHOWN]:
        times = "once" if row["count"] == 1 else f"{row['count']} times"
        print(f"REFUSED by the sandbox of the {row['role']}: {row['call']}(2), {times}")
    if isinstance(cookies := result["syn_cookies"], dict):
        print(f"SYN cookies by XDP: {cookies['why_never'] or 'on'}")
    if isinstance(sockmap := result["sockmap"], dict):
        print(f"sockmap relay: {': '.join(filter(None, (sockmap['state'], sockmap['why'])))}")
    if isinstance(wire := result["wire"], dict) and wire["state"] != "unused":
        print(f"wire relay: {': '.join(filter(None, (wire['state'], wire['why'])))}")
    if isinstance(wire, dict) and (elders := wire.get("elders")):
        print(f"{sum(elders)} tunnels of earlier servers go on")
    for row in cast("list[Json]", result["ways"])[:_WAYS_SHOWN]:
        since = "" if row.get("since") is None else f" for {duration(row['since'])}"
        cause = f": {row['cause']}" if row.get("cause") else ""
        print(f"way {row['way']} is {row['state']}{since}{cause}")
    for what, why in cast("dict[str, str]", result["problems"]).items():
        print(f"NOT AS IT SHOULD BE: {what}: {why}")
    listeners = cast("list[Json]", result["listeners"])
    if listeners:
        counts = [(row["address"], row.get("established"), row.get("accepted"), _guard(row)) for row in listeners]
        print(table(("LISTENER", "ESTABLISHED", "ACCEPTED", "GATE"), counts))
    verdicts = cast("list[Json]", result["verdicts"])
    if verdicts:
        rows = [(row["hook"], row["stage"], row["action"], row["count"]) for row in verdicts]
        print(table(("HOOK", "STAGE", "ACTION", "COUNT"), rows))
    if result["silent_rejects"]:
        print(f"{result['silent_rejects']} of those rejected got no RST: more came than are answered")
    return OK if result["running"] else NO


def _guard(row: Json) -> object:
    closed = "" if row.get("open", True) else "CLOSED, "
    return f"{closed}{row['guard']}" if "guard" in row else "Unix socket"


def _unload(args: argparse.Namespace) -> int:
    instance: Instance = args.instance
    if args.stop:
        _stop(instance)
    try:
        loader.unload(instance)
    except InstanceBusy as busy:
        raise ValueError(f"{busy}: stop it first, or add --stop") from None
    KeptPolicy(instance.state_dir).forget()
    if args.purge:
        if instance.state_dir.is_dir():
            shutil.rmtree(instance.state_dir)
        loader.forget_compiled()
    kept = str(instance.state_dir) if instance.state_dir.is_dir() else None
    if args.json:
        print_json({"instance": instance.name, "unloaded": True, "kept": kept})
    elif kept:
        print(f"instance {instance.name}: nothing is left but bans and journal in {kept} (--purge forgets them)")
    else:
        print(f"instance {instance.name}: nothing is left")
    return OK


def _stop(instance: Instance) -> None:
    pid = instance.serving_pid()
    if not pid:
        return
    # A pidfd names the process that held the lock a moment ago, even if its number is reused meanwhile.
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        signal.pidfd_send_signal(pidfd, signal.SIGCONT)  # one that is stopped would not see it
        ready, _, _ = select.select([pidfd], [], [], _STOP_SECONDS)
    finally:
        os.close(pidfd)
    if not ready:
        raise ValueError(f"process {pid} still drains after {_STOP_SECONDS:.0f} s: send it SIGTERM again to cut")
