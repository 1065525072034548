"""Loading a million prefixes (or as many as are named), and swapping them while verdicts are given:
``python -m bench.swap [10000000]`` (root).

A program is run over and over by BPF_PROG_TEST_RUN on another CPU: it judges sources at random, keeps a histogram of
how long each verdict took, and counts those that neither set would give. Two sets of the same million prefixes take
turns.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import resource
import sys
import threading
import time
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from rama_ebpf.kernel import abi, bpf
from rama_ebpf.kernel.bpf import AttachType, MapType
from rama_ebpf.kernel.bytecode import Program
from rama_ebpf.kernel.gate_maps import MapSizes
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.feed import parse_feed
from rama_ebpf.policy.prefixes import Prefixes
from rama_ebpf.policy.rule import Action, Rule, RuleSet
from tests.policy.probe import Probe

from .verdict import LENGTHS4, SOURCES, random_prefixes

PREFIXES = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
SWAPS = 10
BUCKETS = 1024 + 64


class Traffic(threading.Thread):
    """Verdicts without end; each run of the program is a system call, which leaves Python's lock to others."""

    def __init__(self, program: int) -> None:
        super().__init__(daemon=True)
        self.program = program
        self.ending = threading.Event()

    def run(self) -> None:
        while not self.ending.is_set():
            bpf.prog_test_run(self.program, bytes(64), repeat=50_000)


def take(fd: int, count: int) -> list[int]:
    """Read the counters of an array and set them to zero."""
    values = []
    for index in range(count):
        raw = bpf.map_lookup(fd, index.to_bytes(4, sys.byteorder), 8)
        assert raw is not None
        values.append(int.from_bytes(raw, sys.byteorder))
        bpf.map_update(fd, index.to_bytes(4, sys.byteorder), bytes(8))
    return values


def quantiles(histogram: Sequence[int]) -> str:
    """Show the upper edges of the buckets at some quantiles, in nanoseconds."""
    total = sum(histogram)
    shown = []
    for share in (0.5, 0.99, 0.999, 0.9999, 1.0):
        counts = itertools.accumulate(histogram)
        bucket = next(index for index, count in enumerate(counts) if count >= total * share)
        edge = (bucket + 1) * 16 if bucket < 1024 else 2 << (bucket - 1024)
        shown.append(f"p{share * 100:g} {edge:,} ns")
    return ", ".join(shown).replace("p100", "most")


def main() -> None:
    pick = random.Random(1)
    packed = random_prefixes(PREFIXES, 4, pick, LENGTHS4)
    text = "\n".join(str(IPv4Network((key >> 8, key & 255))) for key in packed).encode()
    instance = Instance(f"swap-{os.getpid()}")
    fds = {
        "bench_sources": bpf.map_create(MapType.ARRAY, 4, 16, SOURCES),
        "bench_latency": bpf.map_create(MapType.ARRAY, 4, 8, BUCKETS),
        "bench_outcome": bpf.map_create(MapType.ARRAY, 4, 8, 3),
    }

    # Sources at even places are in the first half of the address space, at odd places in the second.
    halves = [key for key in packed if key >> 39 == 0], [key for key in packed if key >> 39 == 1]
    for index in range(SOURCES):
        key = pick.choice(halves[index & 1])
        address = IPv4Address(key >> 8 | pick.getrandbits(32 - (key & 255)) if key & 255 < 32 else key >> 8)
        bpf.map_update(fds["bench_sources"], index.to_bytes(4, sys.byteorder), bytes(10) + b"\xff\xff" + address.packed)

    def ruleset(actions: tuple[Action, Action]) -> RuleSet:
        rules = (
            Rule(f"half-{number}", Prefixes(half), action, origin="file")
            for number, (half, action) in enumerate(zip(halves, actions, strict=True))
        )
        return RuleSet(tuple(rules))

    source = Path(__file__).with_name("swap.c")
    with Probe(instance, MapSizes(), Program("bench_swap", 6, AttachType.XDP), source=source, maps=fds) as probe:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter(), time.process_time()
        parsed = parse_feed(text).prefixes
        parsing = time.perf_counter() - started[0], time.process_time() - started[1]
        rule = Rule("all", parsed, Action.DROP, origin="file")
        started = time.perf_counter(), time.process_time()
        probe.store.replace(RuleSet((rule,)))
        loading = time.perf_counter() - started[0], time.process_time() - started[1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        slots = 4 * abi.constants()["MAX_SLOTS"] * abi.SLOT.size // 2
        gate = probe.store.tables.gate()
        with contextlib.closing(probe.store.tables.sets.open(gate.active)) as opened:
            pages = opened.pages * abi.constants()["PAGE_BYTES"]
        print(f"{PREFIXES:,} prefixes from the text of a feed: {parsing[0]:.2f} s ({parsing[1]:.2f} s of CPU)")
        print(f"compiled and in force: {loading[0]:.2f} s ({loading[1]:.2f} s of CPU)")
        kernel = (pages + slots) / 2**20
        print(f"in the kernel: {kernel:.1f} MiB a set; the loader's memory grew by {peak / 2**10:.0f} MiB")

        sets = ruleset((Action.DROP, Action.ALLOW)), ruleset((Action.REJECT, Action.REJECT))
        probe.store.replace(sets[0])
        traffic = Traffic(probe.programs["bench_swap"])
        take(fds["bench_latency"], BUCKETS)
        take(fds["bench_outcome"], 3)
        traffic.start()
        time.sleep(5)
        print(f"quiet:    {quantiles(take(fds['bench_latency'], BUCKETS))}")
        took = []
        for swap in range(SWAPS):
            began = time.perf_counter()
            probe.store.replace(sets[(swap + 1) % 2])
            took.append(time.perf_counter() - began)
        time.sleep(0.5)
        print(f"swapping: {quantiles(take(fds['bench_latency'], BUCKETS))}")
        first, second, mixed = take(fds["bench_outcome"], 3)
        traffic.ending.set()
        traffic.join()
        print(f"{SWAPS} swaps, {min(took):.2f} - {max(took):.2f} s each, beside {first + second + mixed:,} verdicts:")
        print(f"{first:,} by the first set, {second:,} by the second, {mixed} by neither")
    for fd in fds.values():
        os.close(fd)


if __name__ == "__main__":
    main()
