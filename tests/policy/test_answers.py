"""What XDP sends back, byte by byte: RST for a ``reject``, and the stack's SYN cookies.

The rules are in ``bpf/answer.h`` and ``bpf/syn_cookie.h``."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address

import pytest

from rama_ebpf.core.address import IPAddress
from rama_ebpf.kernel import abi, bpf
from rama_ebpf.kernel.bpf import AttachType
from rama_ebpf.kernel.bytecode import Program
from rama_ebpf.kernel.instance import Instance
from rama_ebpf.policy.rule import Action, Rule, RuleSet, Settings, SynLimit

from ..lab import Host, Lab
from .frames import DST_OPTIONS, FRAGMENT, HOP_BY_HOP, QINQ, VLAN, checksum, ethernet, extension, ipv4, ipv6, tcp
from .probe import Probe, listen

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

A4, B4 = IPv4Address("198.18.0.7"), IPv4Address("198.18.0.1")
A6, B6 = IPv6Address("2001:db8::7"), IPv6Address("2001:db8::1")
MAPPED_A, MAPPED_B = IPv6Address("::ffff:198.18.0.7"), IPv6Address("::ffff:198.18.0.1")
PORT, SOURCE_PORT, SEQUENCE = 1080, 40000, 0xFFFFFFFE
XDP_DROP, XDP_PASS, XDP_TX = 1, 2, 3
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
MTU = 65536  # of the loopback device, by which test runs come in
OPTIONS = bytes.fromhex("020405b40402080a00000001000000000103030a")  # MSS 1460, SACK, timestamps, scale: as Linux's
FAST_OPEN = OPTIONS + bytes.fromhex("220a0102030405060708") + bytes((1, 1))


def syn(flags: int = SYN, *, options: bytes = b"", payload: bytes = b"") -> bytes:
    return tcp(PORT, flags=flags, source_port=SOURCE_PORT, sequence=SEQUENCE, options=options) + payload


def chain(*kinds: int, segment: bytes) -> bytes:
    headers, next_header = segment, 6
    for kind in reversed(kinds):
        headers, next_header = extension(kind, next_header, units=1) + headers, kind
    return ipv6(A6, B6, headers, next_header=next_header)


FRAMES = {
    "IPv4": (ethernet(ipv4(A4, B4, syn())), ()),
    "IPv4, as Linux": (ethernet(ipv4(A4, B4, syn(options=OPTIONS))), ()),
    "IPv4, 40 bytes of options": (ethernet(ipv4(A4, B4, syn(), options=bytes((1,) * 40))), ()),
    "IPv4, ECN": (ethernet(ipv4(A4, B4, syn(SYN | 0xC0, options=OPTIONS))), ()),
    "IPv4 in a VLAN": (ethernet(ipv4(A4, B4, syn()), tags=(VLAN,)), (VLAN,)),
    "IPv4 in QinQ": (ethernet(ipv4(A4, B4, syn(options=FAST_OPEN)), tags=(QINQ, VLAN)), (QINQ, VLAN)),
    "IPv6": (ethernet(ipv6(A6, B6, syn())), ()),
    "IPv6, as Linux": (ethernet(ipv6(A6, B6, syn(options=OPTIONS))), ()),
    "IPv6 in QinQ": (ethernet(ipv6(A6, B6, syn()), tags=(QINQ, VLAN)), (QINQ, VLAN)),
    "IPv6, three extensions": (ethernet(chain(HOP_BY_HOP, DST_OPTIONS, FRAGMENT, segment=syn(options=OPTIONS))), ()),
}

UNANSWERED = {
    "IPv4-mapped IPv6": ethernet(ipv6(MAPPED_A, MAPPED_B, syn())),
    "IPv4-mapped IPv6 that would do for IPv4": ethernet(b"\x60\0\0\x3c" + ipv6(MAPPED_A, MAPPED_B, syn())[4:]),
    "to another hardware address": b"\x02" + ethernet(ipv4(A4, B4, syn()))[1:],
    "to all hardware addresses": b"\xff" * 6 + ethernet(ipv4(A4, B4, syn()))[6:],
    "from a multicast address": ethernet(ipv4(IPv4Address("224.0.0.1"), B4, syn())),
    "from a loopback address": ethernet(ipv4(IPv4Address("127.0.0.1"), B4, syn())),
    "from no address": ethernet(ipv4(IPv4Address("0.0.0.0"), B4, syn())),
    "from all": ethernet(ipv4(IPv4Address("255.255.255.255"), B4, syn())),
    "from the listener's own address": ethernet(ipv4(B4, B4, syn())),
    "from an IPv6 multicast address": ethernet(ipv6(IPv6Address("ff02::1"), B6, syn())),
    "from no IPv6 address": ethernet(ipv6(IPv6Address("::"), B6, syn())),
    "IPv4 shorter than its length": ethernet(ipv4(A4, B4, syn(payload=b"1234")))[:-1],
    "IPv6 shorter than its length": ethernet(ipv6(A6, B6, syn(payload=b"1234")))[:-1],
    "TCP header beyond the packet": ethernet(ipv4(A4, B4, bytearray(syn())[:12] + b"\xf0" + syn()[13:])),
    "TCP header of 16 bytes": ethernet(ipv4(A4, B4, bytearray(syn())[:12] + b"\x40" + syn()[13:])),
}


def segment(source: IPAddress, target: IPAddress, flags: int, sequence: int, acknowledged: int, mss: int = 0) -> bytes:
    """The segment of an answer, from the listener, with its checksum."""
    options = struct.pack("!HH", 0x0204, mss) if mss else b""
    window = min(10 * mss, 65535)
    words = 5 + len(options) // 4
    head = struct.pack(
        "!HHIIBBHHH", PORT, SOURCE_PORT, sequence, acknowledged & 0xFFFFFFFF, words << 4, flags, window, 0, 0
    )
    pseudo = source.packed + target.packed
    if source.version == 4:
        pseudo += struct.pack("!HH", 6, words * 4)
    else:
        pseudo += struct.pack("!II", words * 4, 6)
    return head[:16] + checksum(pseudo + head + options) + head[18:] + options


def answer(tags: tuple[int, ...], version: int, flags: int, sequence: int, acknowledged: int, mss: int = 0) -> bytes:
    """The frame of an answer."""
    if version == 4:
        inner = segment(B4, A4, flags, sequence, acknowledged, mss)
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(inner), 0, 0x4000, 64, 6, 0) + B4.packed + A4.packed
        return ethernet(head[:10] + checksum(head) + head[12:] + inner, tags=tags)
    return ethernet(ipv6(B6, A6, segment(B6, A6, flags, sequence, acknowledged, mss)), tags=tags)


def version(frame: bytes, tags: tuple[int, ...]) -> int:
    return frame[14 + 4 * len(tags)] >> 4


def padded(frame: bytes) -> bytes:
    """As XDP leaves what is shorter than the shortest frame of a wire, if it came at least so long."""
    return frame.ljust(60, b"\0")


def run(probe: Probe, frame: bytes) -> tuple[int, bytes]:
    code, _, out, _ = bpf.prog_test_run(probe.programs["gate_xdp"], frame, output=2048)
    return code, out


@pytest.fixture(scope="module")
def loaded() -> Iterator[Probe]:
    program = Program("gate_xdp", 6, AttachType.XDP)
    with Probe(Instance(f"test-{os.getpid()}-answers"), None, program, defines=("-DSYN_COOKIES",)) as made:
        yield made


def put(probe: Probe, action: Action, *, settings: Settings | None = None) -> None:
    everybody = ("0.0.0.0/0", "::/0")
    rules = (Rule("all", everybody, action, origin="file"),) if settings is None else ()  # type: ignore[arg-type]
    probe.store.replace(RuleSet(rules, settings or Settings()))


def limit_rejects(probe: Probe, emission: int, tolerance: int) -> None:
    bpf.map_update(probe.maps["reject_meter"], bytes(4), abi.REJECT_METER.pack(emission, tolerance, 0))


@pytest.fixture
def probe(loaded: Probe) -> Iterator[Probe]:
    """A listener that no socket serves, and all sources rejected, at any rate."""
    put(loaded, Action.REJECT)
    limit_rejects(loaded, 0, 0)
    with listen(loaded, PORT, answers=True):
        yield loaded


# -- RST --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FRAMES)
def test_rejected_syn_gets_exactly_the_rst_of_rfc_9293(probe: Probe, name: str) -> None:
    frame, tags = FRAMES[name]
    code, out = run(probe, frame)
    expected = answer(tags, version(frame, tags), RST | ACK, 0, SEQUENCE + 1)
    assert (code, out) == (XDP_TX, padded(expected) if len(frame) >= 60 else expected)


def test_hardware_addresses_change_places(probe: Probe) -> None:
    peer, own = bytes.fromhex("020000000007"), bytes.fromhex("020000000001")
    interface = (1).to_bytes(4, sys.byteorder)
    bpf.map_update(probe.maps["interfaces"], interface, abi.INTERFACE.pack(own, 1))
    code, out = run(probe, own + peer + ethernet(ipv4(A4, B4, syn()))[12:])
    assert (code, out[:12]) == (XDP_TX, peer + own)


@pytest.mark.parametrize(("flags", "payload"), [(SYN, b"early data"), (SYN | FIN, b""), (SYN | FIN, b"odd")])
def test_rst_acknowledges_all_that_the_syn_took_of_the_sequence_space(probe: Probe, flags: int, payload: bytes) -> None:
    taken = 1 + bool(flags & FIN) + len(payload)
    for frame, number in (
        (ethernet(ipv4(A4, B4, syn(flags, payload=payload))) + b"padding", 4),
        (ethernet(chain(DST_OPTIONS, segment=syn(flags, options=OPTIONS, payload=payload))) + b"padding", 6),
    ):
        code, out = run(probe, frame)
        assert (code, out) == (XDP_TX, padded(answer((), number, RST | ACK, 0, SEQUENCE + taken)))


def test_rst_is_never_answered(probe: Probe) -> None:
    before = probe.store.counters.silent_rejects()
    assert run(probe, ethernet(ipv4(A4, B4, syn(SYN | RST))))[0] == XDP_DROP
    assert probe.store.counters.silent_rejects() == before + 1


@pytest.mark.parametrize("action", [Action.REJECT, Action.ALLOW])
@pytest.mark.parametrize("name", UNANSWERED)
def test_left_to_the_stack_as_it_came(probe: Probe, server: Host, name: str, action: Action) -> None:
    put(probe, action)
    with served(probe, server, 2), listen(probe, PORT, at=(B4, B6), sockets=1, answers=True):
        assert run(probe, UNANSWERED[name]) == (XDP_PASS, UNANSWERED[name])


def test_nothing_is_answered_where_it_would_not_arrive(loaded: Probe, server: Host) -> None:
    frame = FRAMES["IPv4"][0]
    with served(loaded, server, 2), listen(loaded, PORT, sockets=1, answers=False):
        for action in (Action.REJECT, Action.ALLOW):
            put(loaded, action)
            assert run(loaded, frame) == (XDP_PASS, frame)


@pytest.mark.parametrize("name", ["IPv4", "IPv6"])
def test_beyond_their_rate_rejects_are_silent_and_counted(probe: Probe, name: str) -> None:
    limit_rejects(probe, 3_600_000_000_000, 2 * 3_600_000_000_000)
    silent, rejected = probe.store.counters.silent_rejects(), probe.store.counters.totals()["xdp", "rule", "reject"]
    assert [run(probe, FRAMES[name][0])[0] for _ in range(8)] == [XDP_TX] * 3 + [XDP_DROP] * 5
    assert probe.store.counters.silent_rejects() == silent + 5
    assert probe.store.counters.totals()["xdp", "rule", "reject"] == rejected + 8


@pytest.mark.parametrize(("action", "code"), [(Action.DROP, XDP_DROP), (Action.REJECT, XDP_TX)])
def test_ban_counts_each_syn_that_xdp_turns_away_once(probe: Probe, action: Action, code: int) -> None:
    probe.store.ban(A4, action=action)
    try:
        for _ in range(3):
            assert run(probe, FRAMES["IPv4"][0])[0] == code
        assert [ban.hits for ban in probe.store.bans()] == [3]
    finally:
        probe.store.unban(A4)


@pytest.mark.parametrize(("action", "code"), [(Action.DROP, XDP_DROP), (Action.REJECT, XDP_TX)])
def test_xdp_turns_away_and_counts_every_address_of_a_banned_source(probe: Probe, action: Action, code: int) -> None:
    source = probe.store.source(A6)
    probe.store.ban(source, action=action)
    try:
        for host in (2, 3, 0xFFFF_FFFF_FFFF_FFFF):
            frame = ethernet(ipv6(source[host], B6, syn()))
            assert run(probe, frame)[0] == code
        other = ethernet(ipv6(source[0] + (1 << 64), B6, syn()))
        assert run(probe, other)[0] == XDP_TX  # what the rules say of anybody
        assert [ban.hits for ban in probe.store.bans()] == [3]
    finally:
        probe.store.unban(source)


# -- SYN cookies ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Host]:
    with Lab() as lab:
        yield lab.host("server")


@contextmanager
def served(probe: Probe, server: Host, setting: int) -> Iterator[None]:
    """Put a socket into the listener, of a host whose ``tcp_syncookies`` is this."""
    server.run("sh", "-c", f"echo {setting} > /proc/sys/net/ipv4/tcp_syncookies")
    with server.socket(socket.AF_INET6) as sock:
        sock.bind(("::", PORT))
        sock.listen()
        bpf.map_update(probe.maps["sockets"], bytes(4), sock.fileno().to_bytes(8, sys.byteorder))
        with listen(probe, PORT, sockets=1, answers=True):
            yield


@pytest.mark.parametrize("name", FRAMES)
def test_admitted_syn_gets_exactly_a_syn_ack_with_an_mss_and_nothing_else(
    probe: Probe, server: Host, name: str
) -> None:
    put(probe, Action.ALLOW)
    frame, tags = FRAMES[name]
    number = version(frame, tags)
    with served(probe, server, 2):
        code, out = run(probe, frame)
    assert code == XDP_TX
    at = 14 + 4 * len(tags) + (20 if number == 4 else 40) + 4
    cookie = int.from_bytes(out[at : at + 4], "big")
    mss = MTU - (40 if number == 4 else 60)
    expected = answer(tags, number, SYN | ACK, cookie, SEQUENCE + 1, mss)
    assert out == (padded(expected) if len(frame) >= 60 else expected)


def test_payload_of_a_syn_is_not_acknowledged(probe: Probe, server: Host) -> None:
    put(probe, Action.ALLOW)
    with served(probe, server, 2):
        code, out = run(probe, ethernet(ipv4(A4, B4, syn(payload=b"early data"))))
    assert code == XDP_TX
    cookie = int.from_bytes(out[38:42], "big")
    assert out == padded(answer((), 4, SYN | ACK, cookie, SEQUENCE + 1, MTU - 40))


@pytest.mark.parametrize("flags", [SYN | FIN, SYN | RST])
def test_syn_with_fin_or_rst_gets_no_cookie(probe: Probe, server: Host, flags: int) -> None:
    put(probe, Action.ALLOW)
    frame = ethernet(ipv4(A4, B4, syn(flags)))
    with served(probe, server, 2):
        assert run(probe, frame) == (XDP_PASS, frame)


@pytest.mark.parametrize("setting", [0, 1])
@pytest.mark.parametrize("name", FRAMES)
def test_where_the_stack_would_send_no_cookie_the_frame_passes_as_it_came_and_uncounted(
    probe: Probe, server: Host, name: str, setting: int
) -> None:
    put(probe, Action.ALLOW, settings=Settings(per_source=SynLimit(0.001, 2)))
    before = probe.store.counters.totals()
    with served(probe, server, setting):
        for _ in range(4):
            assert run(probe, FRAMES[name][0]) == (XDP_PASS, FRAMES[name][0])
    assert probe.store.counters.totals() == before


def test_listener_without_a_socket_gives_no_cookie(probe: Probe) -> None:
    put(probe, Action.ALLOW)
    assert run(probe, FRAMES["IPv4"][0]) == (XDP_PASS, FRAMES["IPv4"][0])


@pytest.mark.parametrize(("action", "code"), [(Action.DROP, XDP_DROP), (Action.REJECT, XDP_TX)])
def test_denied_source_gets_no_cookie(probe: Probe, server: Host, action: Action, code: int) -> None:
    put(probe, action)
    with served(probe, server, 2):
        found, out = run(probe, FRAMES["IPv4"][0])
    assert found == code
    assert action is Action.DROP or out == answer((), 4, RST | ACK, 0, SEQUENCE + 1)


def rule_limit() -> RuleSet:
    everybody = ("0.0.0.0/0", "::/0")
    limit = SynLimit(0.001, 3)
    return RuleSet((Rule("all", everybody, Action.LIMIT, limit=limit, origin="file"),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ruleset", "stage"),
    [
        pytest.param(RuleSet((), Settings(per_source=SynLimit(0.001, 3))), "default", id="per source"),
        pytest.param(RuleSet((), Settings(overall=SynLimit(0.001, 3))), "default", id="overall"),
        pytest.param(
            RuleSet((), Settings(per_source=SynLimit(0.001, 9), overall=SynLimit(0.001, 3))), "default", id="both"
        ),
        pytest.param(rule_limit(), "rule", id="of a rule"),
    ],
)
@pytest.mark.parametrize("name", ["IPv4", "IPv6"])
def test_cookie_is_charged_to_each_limit_once(
    probe: Probe, server: Host, name: str, ruleset: RuleSet, stage: str
) -> None:
    probe.store.replace(ruleset)
    for key in [key for key, _ in bpf.map_lookup_batch(probe.maps["buckets"], abi.BUCKET_KEY.size, 8)]:
        bpf.map_delete(probe.maps["buckets"], key)
    before = Counter(probe.store.counters.totals())
    with served(probe, server, 2):
        codes = [run(probe, FRAMES[name][0])[0] for _ in range(8)]
    assert codes == [XDP_TX] * 3 + [XDP_DROP] * 5
    assert Counter(probe.store.counters.totals()) - before == {("xdp", stage, "allow"): 3, ("xdp", "limit", "drop"): 5}
