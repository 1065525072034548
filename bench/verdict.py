"""What a verdict costs, by BPF_PROG_TEST_RUN: ``python -m bench.verdict [IPV4 [IPV6]]``, how many prefixes the largest
sets have (1,000,000).

Sources are drawn at random out of 65,536, half of them inside the rules, half anywhere, so that the tables' cache
misses are in the figure. What drawing costs is measured with the same program without the verdict, and subtracted.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from pathlib import Path

from rama_ebpf.core.address import IPAddress
from rama_ebpf.kernel import bpf
from rama_ebpf.kernel.bpf import AttachType, MapType
from rama_ebpf.kernel.bytecode import Program
from rama_ebpf.kernel.gate_maps import MapSizes
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.ban_record import BanBlock, ban_key, ban_value
from rama_ebpf.policy.ban_snapshot import write_snapshot
from rama_ebpf.policy.prefixes import Prefixes, unpack_network
from rama_ebpf.policy.rule import Action, Ban, Rule, RuleSet, parse_network
from tests.policy.probe import Probe

SOURCES = 65_536
RUNS = 300_000
ROUNDS = 15
# Prefix lengths of a routing table's kind: mostly /24.
LENGTHS4 = (16, 18, 19, 20, 21, 22, 22, 23, 23, 24, 24, 24, 24, 24, 24, 25, 26, 27, 28, 29, 30)
LENGTHS6 = (29, 32, 32, 36, 40, 44, 48, 48, 48, 48, 56, 64, 64)


def random_prefixes(count: int, version: int, pick: random.Random, lengths: Sequence[int]) -> list[int]:
    """Return packed prefixes: IPv4 anywhere, IPv6 in 2000::/3 with a quarter of its allocations' skew."""
    found: set[int] = set()
    width = 32 if version == 4 else 128
    heads = [1 << 125 | pick.getrandbits(18) << 107 for _ in range(4096)]  # /21s
    while len(found) < count:
        length = pick.choice(lengths)
        address = pick.getrandbits(32) if version == 4 else pick.choice(heads) | pick.getrandbits(107)
        found.add(address >> (width - length) << (width - length) << 8 | length)
    return list(found)


def sources(packed: Sequence[int], version: int, pick: random.Random) -> list[IPAddress]:
    """Half inside of the prefixes, half anywhere."""
    width = 32 if version == 4 else 128
    kind: Callable[[int], IPAddress] = IPv4Address if version == 4 else IPv6Address
    addresses = []
    for _ in range(SOURCES // 2):
        key = pick.choice(packed)
        addresses.append(kind(key >> 8 | (pick.getrandbits(width - (key & 255)) if key & 255 < width else 0)))
        addresses.append(kind(pick.getrandbits(32) if version == 4 else 1 << 125 | pick.getrandbits(125)))
    return addresses


@dataclass
class Bench:
    """A probe with the benchmark's programs."""

    probe: Probe
    fd: int

    def measure(self, addresses: Sequence[IPAddress]) -> tuple[float, float]:
        """Return (verdict, base) in nanoseconds: the best of some rounds."""
        for index, address in enumerate(addresses):
            packed = address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed
            bpf.map_update(self.fd, index.to_bytes(4, sys.byteorder), packed)
        best = {
            name: min(bpf.prog_test_run(self.probe.programs[name], bytes(64), repeat=RUNS)[1] for _ in range(ROUNDS))
            for name in ("bench_base", "bench_verdict")
        }
        return best["bench_verdict"] - best["bench_base"], best["bench_base"]


def restore(probe: Probe, version: int, packed: Sequence[int]) -> None:
    """Put bans of these sources into force."""
    bans = (Ban(unpack_network(version, key), Action.DROP, None, 0, 0, "bench", automatic=True) for key in packed)
    with tempfile.TemporaryDirectory() as directory:
        write_snapshot(
            Path(directory) / "bans.snapshot", [BanBlock.of((ban_key(ban.network), ban_value(ban)) for ban in bans)]
        )
        probe.store.remember_in(Path(directory))
        probe.store.restore_bans()


def bench() -> None:
    given = [int(text) for text in sys.argv[1:3]] + [1_000_000] * 2
    counts = {4: given[0], 6: given[1]}
    pick = random.Random(1)
    instance = Instance(f"bench-{os.getpid()}")
    fd = bpf.map_create(MapType.ARRAY, 4, 16, SOURCES)

    programs = [Program(name, 6, AttachType.XDP) for name in ("bench_base", "bench_verdict")]
    source = Path(__file__).with_name("verdict.c")
    with Probe(instance, MapSizes(), *programs, source=source, maps={"bench_sources": fd}) as probe:
        run = Bench(probe, fd)

        def row(title: str, addresses: Sequence[IPAddress]) -> None:
            cost, base = run.measure(addresses)
            print(f"{title:<66} {cost:6.0f} ns   (drawing a source: {base:.0f} ns)", flush=True)

        def load(v4: Sequence[int] = (), v6: Sequence[int] = ()) -> None:
            rule = Rule("bench", Prefixes(v4, v6), Action.DROP, origin="file")
            probe.store.replace(RuleSet((rule,)))

        anywhere = sources([0], 4, pick)
        row("no rules", anywhere)
        exact = random_prefixes(100_000, 4, pick, (32,))
        some = random_prefixes(10_000, 4, pick, LENGTHS4)
        load(exact + some)
        row("IPv4: 100k addresses and 10k prefixes loaded", sources(exact + some, 4, pick))
        probe.store.set_failsafe([parse_network("127.0.0.0/8"), parse_network("10.0.0.0/8"), parse_network("::1")])
        row("  the same, with a failsafe of three networks", sources(exact + some, 4, pick))
        probe.store.set_failsafe([])
        probe.store.sweep()
        load(some)
        for key in exact:
            rule = Rule("block", (parse_network(str(IPv4Address(key >> 8))),), Action.DROP)
            probe.store.add(rule)
        row("IPv4: 100k addresses blocked at run time, 10k prefixes loaded", sources(exact + some, 4, pick))
        for record in probe.store.records():
            if record.rule.origin == "runtime":
                probe.store.remove(record.sources[0])
        probe.store.sweep()
        for version, lengths in ((6, LENGTHS6), (4, LENGTHS4)):
            number = counts[version]
            many = random_prefixes(number, version, pick, lengths)
            load(many if version == 4 else (), many if version == 6 else ())
            row(f"IPv{version}: {number:,} prefixes loaded", sources(many, version, pick))
        load(v6=random_prefixes(110_000, 6, pick, LENGTHS6))
        row(
            "IPv6: 110k prefixes loaded",
            sources([int(IPv6Network("2001:db8::/32").network_address) << 8 | 32], 6, pick),
        )
        probe.store.replace(RuleSet())
        for version, length in ((4, 32), (6, 64)):
            banned = random_prefixes(100_000, version, pick, (length,))
            restore(probe, version, banned)
            row(f"no rules, 100k bans of IPv{version} /{length} more", sources(banned, version, pick))
    os.close(fd)


if __name__ == "__main__":
    bench()
