"""What holds the wire relay, in this process: connections over loopback and over real devices, taken over and ended."""

from __future__ import annotations

import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from rama_ebpf.core.reactor import Reactor
from rama_ebpf.kernel.tcp_facts import segments, unacknowledged
from rama_ebpf.kernel.wire import WireMaps
from rama_ebpf.relay.report import CloseReason
from rama_ebpf.relay.splicer import Splicer, Told
from rama_ebpf.relay.wire_rules import Refused

from ..lab import wait_for
from ..namespace import network_namespace

pytestmark = [pytest.mark.root, pytest.mark.ebpf]

FAMILIES = [pytest.param(socket.AF_INET, id="IPv4"), pytest.param(socket.AF_INET6, id="IPv6")]


@pytest.fixture(scope="module")
def maps() -> Iterator[WireMaps]:
    with network_namespace():
        made = WireMaps.load(512)
        yield made
        made.close()


@dataclass
class Holder:
    """A splicer, and what it has said."""

    maps: WireMaps
    reactor: Reactor = field(default_factory=Reactor)
    said: dict[int, list[tuple[Told, CloseReason, tuple[int, int]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.splicer = Splicer(self.maps, self.reactor, quota=64, linger=0.0, sweep=0.05)
        self.splicer.turn()

    def take(
        self,
        number: int,
        near: tuple[socket.socket, socket.socket],
        owed: tuple[int, int] = (0, 0),
        seconds: int = 60,
    ) -> int:
        said = self.said[number] = []
        own = near[0].dup(), near[1].dup()
        deadline = time.monotonic_ns() + int(seconds * 1e9)
        return self.splicer.take("me", number, own, owed, deadline, lambda *told: said.append(told))

    def until(self, number: int, told: Told) -> tuple[Told, CloseReason, tuple[int, int]]:
        def heard() -> bool:
            self.reactor.turn(0.01)
            self.splicer.turn()
            return any(row[0] is told for row in self.said[number])

        wait_for(heard, what=str(told))
        return next(row for row in self.said[number] if row[0] is told)


@pytest.fixture(autouse=True)
def _any_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine makes one of two hand-shakes last many times longer than the other."""
    monkeypatch.setattr("rama_ebpf.relay.wire_rules._RTT_FLOOR", 60.0)


@pytest.fixture
def holder(maps: WireMaps) -> Iterator[Holder]:
    made = Holder(maps)
    yield made
    made.splicer.close()
    made.reactor.close()
    assert maps.flow_count() == 0


@dataclass
class Ends:
    """Two connections: a client's with the proxy, and the proxy's with a target."""

    client: socket.socket
    near: tuple[socket.socket, socket.socket]
    target: socket.socket

    def close(self) -> None:
        for sock in (self.client, *self.near, self.target):
            sock.close()

    def talk(self) -> None:
        for source, sink in ((self.client, self.target), (self.target, self.client)):
            source.sendall(b"a word")
            assert sink.recv(100) == b"a word"


@pytest.fixture
def connect() -> Iterator[Callable[..., Ends]]:
    made: list[Ends] = []

    def make(family: int = socket.AF_INET, *, prepare: Callable[[socket.socket], object] = lambda sock: None) -> Ends:
        client, accepted = pair(family, prepare)
        near, target = pair(family, prepare)
        made.append(Ends(client, (accepted, near), target))
        return made[-1]

    yield make
    for ends in made:
        ends.close()


def pair(family: int, prepare: Callable[[socket.socket], object]) -> tuple[socket.socket, socket.socket]:
    with socket.socket(family) as listener:
        listener.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        listener.listen()
        one = socket.socket(family)
        prepare(one)
        one.connect(listener.getsockname())
        other, _ = listener.accept()
    for sock in (one, other):
        sock.settimeout(20)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one, other


def spliced(holder: Holder, ends: Ends, number: int = 1) -> int:
    taken = holder.take(number, ends.near, (5, 0))
    ends.near[0].sendall(b"reply")
    assert ends.client.recv(100) == b"reply"
    ends.client.sendall(b"first")
    assert ends.target.recv(100) == b"first"
    holder.until(number, Told.TAKEN)
    for sock in ends.near:
        sock.close()
    return taken


@pytest.mark.parametrize("family", FAMILIES)
def test_each_byte_arrives_and_the_end_is_told(holder: Holder, connect: Callable[..., Ends], family: int) -> None:
    ends = connect(family)
    spliced(holder, ends)
    blob = random.Random(1).randbytes(8_000_000)
    thread = threading.Thread(target=lambda: (ends.client.sendall(blob), ends.client.shutdown(socket.SHUT_WR)))
    thread.start()
    got = bytearray()
    while data := ends.target.recv(1 << 20):
        got += data
    thread.join()
    assert bytes(got) == blob
    ends.target.sendall(b"after the end of the other")
    ends.target.shutdown(socket.SHUT_WR)
    assert ends.client.recv(100) == b"after the end of the other"
    assert ends.client.recv(100) == b""
    assert holder.until(1, Told.ENDED) == (Told.ENDED, CloseReason.EOF, (len(blob) + 5, 26))
    wait_for(lambda: (holder.splicer.turn(), len(holder.splicer) == 0)[1], what="the end of the linger")


@pytest.mark.parametrize("who", [0, 1])
def test_reset_of_one_end_reaches_the_other(holder: Holder, connect: Callable[..., Ends], who: int) -> None:
    ends = connect()
    spliced(holder, ends)
    one, other = (ends.client, ends.target) if who == 0 else (ends.target, ends.client)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()
    with pytest.raises(ConnectionResetError):
        other.recv(1)
    reason = CloseReason.CLIENT_RESET if who == 0 else CloseReason.UPSTREAM_RESET
    assert holder.until(1, Told.ENDED)[1] is reason


def test_reader_that_stalls_holds_the_sender_and_the_proxy_holds_nothing(
    holder: Holder, connect: Callable[..., Ends]
) -> None:
    """The window closes from end to end, and opens again."""
    ends = connect()
    spliced(holder, ends)
    ends.client.settimeout(0.3)
    sent = fill(ends.client)
    assert sent < 40_000_000
    got = 0
    while got < sent:
        got += len(ends.target.recv(1 << 20))
    ends.client.settimeout(20)
    ends.talk()


@pytest.mark.parametrize("family", FAMILIES)
def test_parked_sockets_have_nothing_to_send_again(holder: Holder, connect: Callable[..., Ends], family: int) -> None:
    """The acknowledgement of the reply came with data, and so was translated: or else its socket sends that again, and
    gives up in the end."""
    ends = connect(family)
    number = spliced(holder, ends)
    sockets = [sock for sock in holder.splicer._by_pair[number].sockets if sock is not None]
    assert len(sockets) == 2
    wait_for(lambda: not any(map(unacknowledged, sockets)), what="their rest")
    ends.talk()
    assert [told for told, *_ in holder.said[1]] == [Told.TAKEN]


def test_taken_and_cut_before_anybody_heard_of_it(holder: Holder, connect: Callable[..., Ends]) -> None:
    ends = connect()
    holder.take(1, ends.near, (5, 0))
    ends.near[0].sendall(b"reply")
    assert ends.client.recv(100) == b"reply"
    ends.client.sendall(b"first")
    assert ends.target.recv(100) == b"first"
    holder.splicer.cut("me", 1)
    assert holder.until(1, Told.ENDED)[1] is CloseReason.CUT
    with pytest.raises(ConnectionResetError):
        ends.target.recv(1)
    assert len(holder.splicer) == 0


def test_cut_resets_idle_ends_exactly(holder: Holder, connect: Callable[..., Ends]) -> None:
    ends = connect()
    spliced(holder, ends)
    ends.talk()
    holder.splicer.cut("me", 1)
    for sock in (ends.client, ends.target):
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    told, reason, (up, down) = holder.until(1, Told.ENDED)
    assert (told, reason, up) == (Told.ENDED, CloseReason.CUT, 11)
    assert down in (0, 6)  # the acknowledgement of the last word may have waited
    assert len(holder.splicer) == 0


def test_owner_that_ends_takes_its_tunnels_along(holder: Holder, connect: Callable[..., Ends]) -> None:
    ends, armed = connect(), connect()
    spliced(holder, ends)
    holder.take(2, armed.near, (5, 0))
    holder.splicer.leave("me")
    with pytest.raises(ConnectionResetError):
        ends.client.recv(1)
    assert len(holder.splicer) == 0
    armed.near[0].sendall(b"reply")
    assert armed.client.recv(100) == b"reply"


def test_word_before_the_take_over_leaves_the_tunnel_to_its_owner(holder: Holder, connect: Callable[..., Ends]) -> None:
    ends = connect()
    holder.take(1, ends.near, (5, 0))
    ends.target.sendall(b"a banner")
    holder.until(1, Told.SPOILED)
    assert ends.near[1].recv(100) == b"a banner"
    assert len(holder.splicer) == 0
    ends.near[0].sendall(b"reply")
    assert ends.client.recv(100) == b"reply"


def test_given_up_in_time_or_told_that_it_is_taken(holder: Holder, connect: Callable[..., Ends]) -> None:
    ends, late = connect(), connect()
    holder.take(1, ends.near, (5, 0))
    holder.splicer.give_up("me", 1)
    holder.until(1, Told.SPOILED)
    holder.take(2, late.near, (5, 0))
    late.near[0].sendall(b"reply")
    assert late.client.recv(100) == b"reply"
    late.client.sendall(b"first")
    assert late.target.recv(100) == b"first"
    holder.splicer.give_up("me", 2)
    holder.until(2, Told.TAKEN)


def test_nothing_begins_after_the_deadline(holder: Holder, connect: Callable[..., Ends]) -> None:
    ends = connect()
    with pytest.raises(Refused):
        holder.take(1, ends.near, (5, 0), seconds=-1)
    assert len(holder.splicer) == 0


def unread(ends: Ends) -> None:
    ends.client.sendall(b"early")
    select.select([ends.near[0]], [], [])


def unsent(ends: Ends) -> None:
    ends.near[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    ends.near[1].settimeout(0.1)
    fill(ends.near[1])


def fill(sock: socket.socket) -> int:
    """Write until nothing more is taken for a while; return how many bytes were."""
    sent = 0
    while True:
        try:
            sent += sock.send(bytes(1 << 16))
        except TimeoutError:
            return sent


def ended(ends: Ends) -> None:
    ends.target.shutdown(socket.SHUT_WR)
    select.select([ends.near[1]], [], [])


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (unread, "bytes have come already"),
        (unsent, "bytes are waiting to be sent"),
        (ended, "a connection is not established"),
        (lambda ends: ends.near[1].setsockopt(socket.SOL_SOCKET, 36, 7), "a mark, an interface or a type"),
        (lambda ends: ends.near[0].setsockopt(0, socket.IP_TOS, 32), "a mark, an interface or a type"),
    ],
    ids=["unread", "unsent", "ended", "mark", "tos"],
)
def test_what_is_not_quiet_and_plain_is_refused_by_name(
    holder: Holder, connect: Callable[..., Ends], spoil: Callable[[Ends], Any], why: str
) -> None:
    ends = connect()
    spoil(ends)
    with pytest.raises(Refused, match=why):
        holder.take(1, ends.near)
    assert [reason.startswith(why) for reason in holder.splicer.counts.refused] == [True]
    assert len(holder.splicer) == 0


def test_small_window_is_not_promised_away(holder: Holder, connect: Callable[..., Ends]) -> None:
    """The other end was told that it may send more than this one takes."""
    ends = connect()
    client, near = pair(socket.AF_INET, lambda sock: sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096))
    with client, near, pytest.raises(Refused, match="takes less"):
        holder.take(1, (near, ends.near[1]))


def test_legs_of_two_families_are_refused(holder: Holder, connect: Callable[..., Ends]) -> None:
    four, six = connect(), connect(socket.AF_INET6)
    with pytest.raises(Refused, match="IPv6"):
        holder.take(1, (four.near[0], six.near[1]))


def test_connection_of_nobody_s_listener_is_refused(maps: WireMaps, connect: Callable[..., Ends]) -> None:
    reactor, ends = Reactor(), connect()
    splicer = Splicer(maps, reactor, quota=1, listeners=lambda: {(bytes(16), 9)})
    own = ends.near[0].dup(), ends.near[1].dup()
    with pytest.raises(Refused, match="listener"):
        splicer.take("me", 1, own, (0, 0), 0, lambda *_: None)
    splicer.close()
    reactor.close()


def test_quota_and_a_tuple_that_is_taken(holder: Holder, connect: Callable[..., Ends]) -> None:
    ends = connect()
    holder.take(1, ends.near, (5, 0))
    with pytest.raises(Refused, match="another tunnel"):
        holder.take(2, ends.near, (5, 0))
    holder.splicer._quota = 1
    other = connect()
    with pytest.raises(Refused, match="places"):
        holder.take(3, other.near, (5, 0))


def test_place_is_free_again_when_its_tunnel_has_ended(maps: WireMaps, connect: Callable[..., Ends]) -> None:
    small = WireMaps.load(1)
    holder = Holder(small)
    one, other = connect(), connect()
    holder.take(1, one.near, (5, 0))
    with pytest.raises(Refused, match="places"):
        holder.take(2, other.near, (5, 0))
    assert other.near[0].send(b"it is its owner's") > 0
    holder.splicer.cut("me", 1)
    assert holder.take(3, connect().near, (5, 0)) == 0
    holder.splicer.close()
    holder.reactor.close()
    small.close()


def segment(ends: Ends, flags: int, seq: int, ack: int = 0, payload: bytes = b"", *, broken: bool = False) -> None:
    """Forge a segment from the client."""
    source, target = ends.client.getsockname(), ends.client.getpeername()
    tcp = struct.pack("!HHIIBBHHH", source[1], target[1], seq, ack, 0x50, flags, 1000, 0, 0) + payload
    pseudo = socket.inet_aton(source[0]) + socket.inet_aton(target[0]) + struct.pack("!BBH", 0, 6, len(tcp))
    total = pseudo + tcp + b"\0" * (len(tcp) % 2)
    summed = sum(struct.unpack(f"!{len(total) // 2}H", total))
    summed = (summed & 0xFFFF) + (summed >> 16)
    summed = ~(summed + (summed >> 16)) & 0xFFFF ^ (0x0101 if broken else 0)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, 6) as raw:
        raw.bind((source[0], 0))
        raw.sendto(tcp[:16] + struct.pack("!H", summed) + tcp[18:], (target[0], 0))


def test_forged_segments_change_nothing(holder: Holder, connect: Callable[..., Ends]) -> None:
    """Blind resets, ends, acknowledgements and data outside of the window, and a new connection's first segment."""
    ends = connect()
    number = spliced(holder, ends)
    ends.talk()
    wait_for(lambda: holder.splicer._pairs[number].moved == (11, 6), what="the last acknowledgement")
    pair = holder.splicer._pairs[number]
    for offset in (1 << 30, 1 << 20, (1 << 32) - 100_000):
        seq = (pair.client.sent + offset) & 0xFFFFFFFF
        for flags in (0x04, 0x14, 0x11, 0x02, 0x18):
            segment(ends, flags, seq, (pair.client.acked + offset) & 0xFFFFFFFF, b"" if flags & 6 else b"forged")
    holder.reactor.turn(0.05)
    after = holder.splicer._pairs[number]
    assert (after.state, after.client.sent, after.client.acked) == (pair.state, pair.client.sent, pair.client.acked)
    ends.talk()
    assert [told for told, *_ in holder.said[1]] == [Told.TAKEN]


def test_reset_that_a_cable_has_made_is_nobody_s(holder: Holder, connect: Callable[..., Ends]) -> None:
    """Its checksum tells: the target drops it, and so the tunnel has not ended."""
    ends = connect()
    number = spliced(holder, ends)
    ends.talk()
    wait_for(lambda: holder.splicer._pairs[number].moved == (11, 6), what="the last acknowledgement")
    pair = holder.splicer._pairs[number]
    for payload in (b"", b"data"):
        segment(ends, 0x14, pair.client.sent, pair.client.acked, payload, broken=True)
    wait_for(lambda: holder.splicer._pairs[number].client.packets >= pair.client.packets + 2, what="both segments")
    assert holder.splicer._pairs.state(number) == pair.state
    ends.talk()
    segment(ends, 0x14, (pair.client.sent + 6) & 0xFFFFFFFF, (pair.client.acked + 6) & 0xFFFFFFFF)
    assert holder.until(1, Told.ENDED)[1] is CloseReason.CLIENT_RESET


def test_port_of_a_client_can_be_used_again_at_once(holder: Holder, connect: Callable[..., Ends]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = 0
        for number in range(1, 6):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind(("127.0.0.1", port))
            port = client.getsockname()[1]
            client.settimeout(20)
            client.connect(listener.getsockname())
            accepted, _ = listener.accept()
            near, target = pair(socket.AF_INET, lambda sock: None)
            ends = Ends(client, (accepted, near), target)
            spliced(holder, ends, number)
            ends.talk()
            target.close()
            assert client.recv(1) == b""
            client.close()
            assert holder.until(number, Told.ENDED)[1] is CloseReason.EOF


def test_packet_that_reaches_a_parked_socket_ends_the_tunnel(holder: Holder, connect: Callable[..., Ends]) -> None:
    """As when the program is gone from an interface: nothing hangs, and nothing cut short looks complete."""
    ends = connect()
    number = spliced(holder, ends)
    holder.maps.attach([])
    ends.client.sendall(b"to the stack")
    holder.until(1, Told.ENDED)
    assert holder.said[1][-1][1] is CloseReason.INTEGRITY
    for sock in (ends.client, ends.target):
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert holder.splicer._pairs.state(number) == 0


def test_kernel_translates_only_as_long_as_somebody_governs(holder: Holder, connect: Callable[..., Ends]) -> None:
    ends = connect()
    spliced(holder, ends)
    holder.maps.stay_alive(-1)
    ends.client.sendall(b"to the stack")
    wait_for(lambda: stray(holder), what="a packet at the stack")
    assert holder.until(1, Told.ENDED)[1] is CloseReason.INTEGRITY
    with pytest.raises(ConnectionResetError):
        ends.target.recv(1)


def stray(holder: Holder) -> bool:
    """Whether data has come to the client's parked socket: nobody governs, so nothing is swept meanwhile."""
    [splice] = holder.splicer._by_pair.values()
    sock = splice.sockets[0]
    return sock is not None and segments(sock)[1] > splice.strays[0][1]


def test_socket_that_others_end_is_a_cut(holder: Holder, connect: Callable[..., Ends]) -> None:
    """As ``block --kill`` does."""
    from rama_ebpf.kernel import sock_diag

    ends = connect()
    spliced(holder, ends)
    port = ends.client.getpeername()[1]
    [found] = [row for row in sock_diag.connections(port) if row.local_port == port]
    assert sock_diag.destroy(found)
    assert holder.until(1, Told.ENDED)[1] is CloseReason.CUT
    for sock in (ends.client, ends.target):
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
