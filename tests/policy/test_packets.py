"""Golden packets: one for every branch of the parser in ``bpf/packet.h``, whose comment has the rules."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

import pytest

from rama_ebpf.core.address import IPAddress
from rama_ebpf.kernel import bpf
from rama_ebpf.kernel.bpf import AttachType
from rama_ebpf.kernel.bytecode import Program
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.rule import Action, Rule, RuleSet

from .frames import AH, DST_OPTIONS, FRAGMENT, HOP_BY_HOP, QINQ, ROUTING, VLAN, ethernet, extension, ipv4, ipv6, tcp
from .probe import Probe, listen

A4, B4 = IPv4Address("198.18.0.7"), IPv4Address("198.18.0.1")
A6, B6 = IPv6Address("2001:db8::7"), IPv6Address("2001:db8::1")
MAPPED_A, MAPPED_B = IPv6Address("::ffff:198.18.0.7"), IPv6Address("::ffff:198.18.0.1")
PORT = 1080
SYN = tcp(PORT)
MF, DF = 0x2000, 0x4000


@pytest.fixture(scope="module")
def probe() -> Iterator[Probe]:
    extra = [Program("gate_xdp", 6, AttachType.XDP), Program("gate_lookup", 30, AttachType.SK_LOOKUP)]
    with Probe(Instance(f"test-{os.getpid()}-packets"), None, *extra) as made:
        yield made


def chain(*kinds: int, units: int = 0) -> bytes:
    """An IPv6 SYN behind these extension headers."""
    headers, next_header = SYN, 6
    for kind in reversed(kinds):
        headers, next_header = extension(kind, next_header, units=units) + headers, kind
    return ipv6(A6, B6, headers, next_header=next_header)


SYNS = {
    "IPv4": (ethernet(ipv4(A4, B4, SYN)), A4),
    "IPv4, don't fragment": (ethernet(ipv4(A4, B4, SYN, fragment=DF)), A4),
    "IPv4, 4 bytes of options": (ethernet(ipv4(A4, B4, SYN, options=bytes((1,) * 4))), A4),
    "IPv4, 40 bytes of options": (ethernet(ipv4(A4, B4, SYN, options=bytes((1,) * 40))), A4),
    "IPv4 in a VLAN": (ethernet(ipv4(A4, B4, SYN), tags=(VLAN,)), A4),
    "IPv4 in a provider's VLAN": (ethernet(ipv4(A4, B4, SYN), tags=(QINQ,)), A4),
    "IPv4 in QinQ": (ethernet(ipv4(A4, B4, SYN), tags=(QINQ, VLAN)), A4),
    "IPv6": (ethernet(ipv6(A6, B6, SYN)), A6),
    "IPv6 in QinQ": (ethernet(ipv6(A6, B6, SYN), tags=(QINQ, VLAN)), A6),
    "IPv6, hop-by-hop options": (ethernet(chain(HOP_BY_HOP)), A6),
    "IPv6, routing header": (ethernet(chain(ROUTING, units=2)), A6),
    "IPv6, destination options": (ethernet(chain(DST_OPTIONS, units=1)), A6),
    "IPv6, authentication header": (ethernet(chain(AH, units=4)), A6),
    "IPv6, the longest extension": (ethernet(chain(DST_OPTIONS, units=16)), A6),
    "IPv6, atomic fragment": (ethernet(chain(FRAGMENT)), A6),
    "IPv6, six extensions": (
        ethernet(chain(HOP_BY_HOP, DST_OPTIONS, ROUTING, FRAGMENT, AH, DST_OPTIONS, units=1)),
        A6,
    ),
    "IPv4-mapped IPv6": (ethernet(ipv6(MAPPED_A, MAPPED_B, SYN)), A4),
    "IPv4-mapped IPv6 behind an extension": (
        ethernet(ipv6(MAPPED_A, B6, extension(HOP_BY_HOP, 6) + SYN, next_header=HOP_BY_HOP)),
        A4,
    ),
}

OTHERS = {
    "ARP": ethernet(bytes(46), protocol=0x0806),
    "three VLAN tags": ethernet(ipv4(A4, B4, SYN), tags=(QINQ, VLAN, VLAN)),
    "IPv4 UDP": ethernet(ipv4(A4, B4, bytes(20), protocol=17)),
    "IPv4 first fragment": ethernet(ipv4(A4, B4, SYN, fragment=MF)),
    "IPv4 later fragment": ethernet(ipv4(A4, B4, SYN, fragment=MF | 3)),
    "IPv4 last fragment": ethernet(ipv4(A4, B4, SYN, fragment=3)),
    "IPv6 UDP": ethernet(ipv6(A6, B6, bytes(20), next_header=17)),
    "IPv6 no next header": ethernet(ipv6(A6, B6, SYN, next_header=59)),
    "IPv6 ESP": ethernet(ipv6(A6, B6, bytes(40), next_header=50)),
    "IPv6 UDP behind options": ethernet(ipv6(A6, B6, extension(HOP_BY_HOP, 17) + bytes(20), next_header=HOP_BY_HOP)),
    "IPv6 first fragment": ethernet(ipv6(A6, B6, extension(FRAGMENT, 6, fragment=1) + SYN, next_header=FRAGMENT)),
    "IPv6 later fragment": ethernet(ipv6(A6, B6, extension(FRAGMENT, 6, fragment=8) + SYN, next_header=FRAGMENT)),
}

_NO_OPTIONS = ipv4(A4, B4, SYN)
MALFORMED = {
    "IPv4 with version 6": ethernet(bytes((0x65,)) + _NO_OPTIONS[1:], protocol=0x0800),
    "IPv4 with a header of 16 bytes": ethernet(bytes((0x44,)) + _NO_OPTIONS[1:]),
    "IPv4 header longer than the packet": ethernet(bytes((0x4F,)) + _NO_OPTIONS[1:]),
    "IPv6 with version 4": ethernet(bytes((0x40,)) + ipv6(A6, B6, SYN)[1:], protocol=0x86DD),
    "IPv6 seven extensions": ethernet(chain(*(DST_OPTIONS,) * 7)),
    "IPv6 extension longer than the packet": ethernet(
        ipv6(A6, B6, bytes((6, 255)) + bytes(6) + SYN, next_header=DST_OPTIONS)
    ),
}


@pytest.mark.parametrize("name", SYNS)
def test_a_syn_is_found_behind(probe: Probe, name: str) -> None:
    frame, source = SYNS[name]
    parsed = probe.judge(frame)
    assert (parsed.kind, parsed.source, parsed.port, parsed.syn) == ("tcp", source, PORT, True)
    assert str(parsed.target) in (str(B4), str(B6))


@pytest.mark.parametrize("name", OTHERS)
def test_not_the_gate_s_business(probe: Probe, name: str) -> None:
    assert probe.judge(OTHERS[name]).kind == "other"


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(probe: Probe, name: str) -> None:
    assert probe.judge(MALFORMED[name]).kind == "malformed"


@pytest.mark.parametrize("name", SYNS)
def test_a_frame_that_is_cut_anywhere_is_malformed(probe: Probe, name: str) -> None:
    frame, _ = SYNS[name]
    for size in range(14, len(frame)):  # the kernel's test run takes no less than an Ethernet header
        assert probe.judge(frame[:size]).kind == "malformed", f"cut to {size} of {len(frame)} bytes"


@pytest.mark.parametrize(
    ("flags", "syn"), [(0x02, True), (0x12, False), (0x10, False), (0x04, False), (0xC2, True), (0x00, False)]
)
def test_a_syn_is_one_without_ack(probe: Probe, flags: int, syn: bool) -> None:
    assert probe.judge(ethernet(ipv4(A4, B4, tcp(PORT, flags=flags)))).syn is syn


# -- what the hooks make of it ----------------------------------------------------------------------------------------

XDP_DROP, XDP_PASS = 1, 2
SK_DROP, SK_PASS = 0, 1


@pytest.fixture
def denied(probe: Probe) -> Iterator[Probe]:
    """A listener, and a policy that denies both sources."""
    with listen(probe, PORT):
        yield probe


def load(probe: Probe, action: Action) -> None:
    sources = tuple(f"{address}/{address.max_prefixlen}" for address in (A4, A6))
    probe.store.replace(RuleSet((Rule("denied", sources, action, origin="file"),)))  # type: ignore[arg-type]


def xdp(probe: Probe, frame: bytes) -> int:
    return bpf.prog_test_run(probe.programs["gate_xdp"], frame)[0]


@pytest.mark.parametrize("name", SYNS)
def test_xdp_drops_the_denied_syn(denied: Probe, name: str) -> None:
    load(denied, Action.DROP)
    assert xdp(denied, SYNS[name][0]) == XDP_DROP
    load(denied, Action.ALLOW)
    assert xdp(denied, SYNS[name][0]) == XDP_PASS


@pytest.mark.parametrize("frame", [*OTHERS.values(), *MALFORMED.values()], ids=[*OTHERS, *MALFORMED])
def test_xdp_leaves_to_the_stack_what_it_cannot_judge(denied: Probe, frame: bytes) -> None:
    load(denied, Action.DROP)
    assert xdp(denied, frame) == XDP_PASS


def test_xdp_leaves_alone_other_ports_and_all_but_syns_and_leaves_rejects_to_sk_lookup(denied: Probe) -> None:
    load(denied, Action.DROP)
    assert xdp(denied, ethernet(ipv4(A4, B4, tcp(PORT + 1)))) == XDP_PASS
    assert xdp(denied, ethernet(ipv4(A4, B4, tcp(PORT, flags=0x10)))) == XDP_PASS
    load(denied, Action.REJECT)
    assert xdp(denied, ethernet(ipv4(A4, B4, SYN))) == XDP_PASS


def sk_lookup(probe: Probe, source: IPAddress, target: IPAddress, port: int) -> int:
    """Run gate_lookup for a SYN. ``struct bpf_sk_lookup`` of ``linux/bpf.h``."""
    family = 2 if source.version == 4 else 10
    context = struct.pack(
        "=QII4s16sHH4s16sII4x",
        0,
        family,
        6,
        source.packed if source.version == 4 else bytes(4),
        source.packed if source.version == 6 else bytes(16),
        struct.unpack("=H", struct.pack("!H", 40000))[0],
        0,
        target.packed if target.version == 4 else bytes(4),
        target.packed if target.version == 6 else bytes(16),
        port,
        0,
    )
    return bpf.prog_test_run(probe.programs["gate_lookup"], context=context)[0]


@pytest.mark.parametrize(("source", "target"), [(A4, B4), (A6, B6), (MAPPED_A, MAPPED_B)])
def test_sk_lookup_rejects_and_leaves_other_ports_alone(denied: Probe, source: IPAddress, target: IPAddress) -> None:
    load(denied, Action.REJECT)
    assert sk_lookup(denied, source, target, PORT) == SK_DROP
    assert sk_lookup(denied, source, target, PORT + 1) == SK_PASS
    before = denied.store.counters.totals().get(("lookup", "rule", "reject"), 0)
    sk_lookup(denied, source, target, PORT)
    assert denied.store.counters.totals()["lookup", "rule", "reject"] == before + 1
