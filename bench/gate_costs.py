"""What it costs that the gate never says what is not so: ``python -m bench.gate_costs [audit] [block] [reload]``.

- ``audit``: CPU time of the thread that looks each 10 seconds, with 100,000 rules at run time, 60,000 in the set and
  100,000 bans, all of them on disk as well. To be at most 0.1 % of a CPU.
- ``block``: from the call to the answer, with the wait for the disk and the question to the kernel's programs, and
  what of it is the disk's. To be at most 5 ms.
- ``reload``: from SIGHUP to "reloaded", of this tree and of another (``--against``, by default the commit before
  anybody asked the kernel what it does), in turns. To be at most a tenth longer.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

from rama_ebpf.control.api import ControlApi
from rama_ebpf.control.audit import Audit
from rama_ebpf.control.enforced import KernelJudge
from rama_ebpf.kernel.gate_maps import MapSizes
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.kernel.witness import WITNESS_PROGRAM, Witness
from rama_ebpf.loader import unload
from rama_ebpf.policy.integrity import Integrity
from rama_ebpf.policy.kernel_store import KernelStore
from rama_ebpf.policy.rule import Action, Rule, RuleSet, parse_network
from tests.lab import Lab, wait_for
from tests.policy.probe import Probe
from tests.proxy import ProxyProcess

SECONDS = 10.0
"""Between two looks of the audit."""
AGAINST = "cb283da"
MOST_IN_SET = 60_000
"""A set has at most 65,535 combinations of rule and prefix length."""


@contextlib.contextmanager
def _gate() -> Iterator[tuple[KernelStore, KernelJudge, Witness]]:
    sizes = MapSizes(rules=262_144, bans=262_144, buckets=4096)
    with Probe(Instance(f"bench-{os.getpid()}"), sizes, WITNESS_PROGRAM) as probe:
        witness = Witness(probe.programs["witness"])
        yield probe.store, KernelJudge(probe.store, lambda: contextlib.nullcontext(witness)), witness


def _block(number: int, first: int = 0x0A000000) -> Rule:
    network = parse_network(f"{ip_address(first + number)}/32")
    return Rule(f"drop:{network}", (network,), Action.DROP)


def audit(count: int, looks: int) -> bool:
    """Print what a look costs, by what there is; return whether that is little enough."""
    enough = True
    with _gate() as (store, judge, witness):
        for what in ("nothing", "rules at run time", "and in the set", "and bans"):
            if what == "rules at run time":
                store.add_all([_block(number) for number in range(count)])
            elif what == "and in the set":
                rules = [
                    Rule(f"r{n}", _block(n, 0xC0000000).sources, Action.DROP, origin="bench")
                    for n in range(min(count, MOST_IN_SET))
                ]
                store.replace(RuleSet(tuple(rules)))
            elif what == "and bans":
                for number in range(count):
                    store.ban(ip_address(0x64000000 + number), automatic=True, ttl=86400)
            integrity = Integrity(store, witness)
            looker = Audit(store, judge, integrity, lambda: None)
            looker.look()
            costs = []
            for _ in range(looks):
                began = time.thread_time()
                looker.look()
                costs.append(time.thread_time() - began)
            integrity.close()
            share = statistics.fmean(costs) / SECONDS
            enough &= share <= 0.001
            print(
                f"audit, {what}: {share:.3%} of a CPU (mean of {looks} looks {statistics.fmean(costs) * 1e3:.2f} ms, "
                f"median {statistics.median(costs) * 1e3:.2f}, most {max(costs) * 1e3:.2f}), "
                f"{looker.disagreements} disagreements",
                flush=True,
            )
    return enough


def block(calls: int) -> bool:
    """Print how long a block takes; return whether that is short enough."""
    with _gate() as (store, judge, _):
        api = ControlApi(store, judge=judge)
        walls, cpus, disk = [], [], []
        for number in range(calls):
            params = {"source": str(_block(number).sources[0]), "action": "drop"}
            began, cpu = time.perf_counter(), time.thread_time()
            api.call("add", params)
            walls.append((time.perf_counter() - began) * 1e3)
            cpus.append((time.thread_time() - cpu) * 1e3)
            began = time.perf_counter()
            with tempfile.NamedTemporaryFile(dir=os.environ["RAMA_EBPF_STATE_DIR"]) as file:
                file.write(b"x" * 240)
                file.flush()
                os.fdatasync(file.fileno())
            disk.append((time.perf_counter() - began) * 1e3)
    wall, alone = statistics.median(walls), statistics.median(disk)
    print(
        f"block: {wall:.2f} ms (median of {calls}; p99 {sorted(walls)[calls * 99 // 100]:.2f}), of CPU "
        f"{statistics.median(cpus):.2f} ms; a write and fdatasync(2) of this disk alone {alone:.2f} ms"
    )
    return wall <= 5


CONFIG = """
[server]
workers = 2
drain = "100ms"
[listeners.one]
address = "127.0.0.1:1080"
stack = "echo"
[stacks.echo]
service = {{ echo = {{}} }}
[policy]
default = "{default}"
[[policy.rules]]
name = "listed"
action = "drop"
sources = [{sources}]
"""


def _other_tree(commit: str, directory: Path) -> Path:
    top = Path(__file__).parents[1]
    packed = directory / "other.tar"
    subprocess.run(["git", "-C", top, "archive", "--output", packed, commit], check=True)
    (directory / "other").mkdir()
    subprocess.run(["tar", "-xf", packed, "-C", directory / "other"], check=True)
    return directory / "other"


def _ticks(pid: int) -> float:
    """CPU seconds of a process, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _reload(proxy: ProxyProcess, file: Path, text: str) -> tuple[float, float]:
    file.write_text(text)
    proxy.log.clear()
    cpu, began = _ticks(proxy.pid), time.perf_counter()
    proxy.signal(signal.SIGHUP)
    wait_for(lambda: proxy.logged(": reloaded$|reload failed"), timeout=120, what="the reload")
    taken = time.perf_counter() - began
    if not proxy.logged(": reloaded$"):
        raise SystemExit("\n".join(proxy.log))
    return taken, _ticks(proxy.pid) - cpu


def reload(rounds: int, against: str) -> bool:
    """Print how long reloads take, here and there; return whether ours are short enough."""
    with tempfile.TemporaryDirectory(prefix="reload-") as made, Lab() as lab:
        directory = Path(made)
        trees = {"ours": Path(__file__).parents[1], against: _other_tree(against, directory)}
        listed = ", ".join(f'"198.18.{n}.0/24"' for n in range(200))
        texts = [CONFIG.format(default=default, sources=listed) for default in ("allow", "drop")]
        proxies: dict[str, ProxyProcess] = {}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in trees}
        names = {name: f"bench-{os.getpid()}-{number}" for number, name in enumerate(trees)}
        try:
            for number, (name, tree) in enumerate(trees.items()):
                file = directory / f"{number}.toml"
                file.write_text(texts[0])
                proxy = proxies[name] = ProxyProcess(
                    lab.host(f"host{number}"), names[name], "--config", str(file), cwd=tree
                )
                proxy.environment = {"PYTHONPATH": str(tree)}
                proxy.start()
            for turn in range(1, rounds + 1):
                for number, (name, proxy) in enumerate(proxies.items()):
                    taken[name].append(_reload(proxy, directory / f"{number}.toml", texts[turn % 2]))
                    wait_for(lambda proxy=proxy: len(proxy.workers()) == 2, timeout=60)  # type: ignore[misc]
        finally:
            for name, proxy in proxies.items():
                proxy.end()
                place = Instance(names[name])
                wait_for(lambda place=place: place.serving_pid() is None)  # type: ignore[misc]
                unload(place)
    medians = {}
    for name, rows in taken.items():
        walls, cpus = zip(*rows, strict=True)
        medians[name] = statistics.median(walls)
        print(
            f"reload, {name}: {medians[name]:.3f} s ({min(walls):.3f} - {max(walls):.3f}, {rounds} in turns), CPU of "
            f"the server itself {statistics.median(cpus):.3f} s"
        )
    added = statistics.median(a[0] / b[0] for a, b in zip(taken["ours"], taken[against], strict=True)) - 1
    print(f"reload: {added:+.1%} (median of the pairs)")
    return added <= 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["audit", "block", "reload", []], help="default: all")
    parser.add_argument("--count", type=int, default=100_000, help="rules, and bans, of the audit")
    parser.add_argument("--looks", type=int, default=60)
    parser.add_argument("--calls", type=int, default=300, help="of block")
    parser.add_argument("--rounds", type=int, default=10, help="of reload")
    parser.add_argument("--against", default=AGAINST, metavar="COMMIT")
    args = parser.parse_args()
    what = args.what or ["audit", "block", "reload"]
    enough = [
        "audit" not in what or audit(args.count, args.looks),
        "block" not in what or block(args.calls),
        "reload" not in what or reload(args.rounds, args.against),
    ]
    return 0 if all(enough) else 1


if __name__ == "__main__":
    sys.exit(main())
