"""The bookkeeping of the wire relay, in the one process that may write to its maps: take over, watch, cut, forget.

A pair is *watched* first: its packets go to the sockets, and the kernel notes whether anything comes that these have to
see (then it is *spoiled*, for good). When both ends have acknowledged all that the proxy had to say it is *taken*: from
that very packet on the kernel translates. Its sockets are then *parked* here, in repair mode, in which closing them
says nothing: they keep the ports, are seen by ss(8) and by ``block --kill``, and tell of every packet that was not
translated, which ends the tunnel. At its end the client's socket is closed at once, the rest after a *linger*, for
segments that are still under way.

A tunnel with a *story* survives its owner: it is an *orphan* then, whose time-outs are kept here until somebody adopts
it.

Reference: docs/wire.md; tcp(7); ``TCP_REPAIR`` in ``include/uapi/linux/tcp.h``.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field
from typing import Final, Protocol, cast

from ..core.bucket import TokenBucket
from ..kernel.conntrack import Conntrack
from ..kernel.raw_packets import RawPackets
from ..kernel.ringbuf import RingBuffer
from ..kernel.routes import Routes
from ..kernel.tcp_facts import TcpFacts, netns_cookie, segments, unacknowledged
from ..kernel.wire import STATE, Pair, PairMemory, WireKey, WireMaps
from .orphan import Orphan
from .report import CloseReason
from .wire_errors import translated_error
from .wire_rules import End, Refused, check
from .wire_story import Story

__all__ = ["ALIVE_SECONDS", "LINGER", "SWEEP", "Reactor", "Splice", "Splicer", "Tell", "Told", "reason_of"]

log = logging.getLogger(__name__)

ALIVE_SECONDS: Final = 5.0
"""For how long the kernel translates when nothing is heard of this process any more."""
LINGER: Final = 2.0
"""Seconds for which the flows of a tunnel stay when it is over."""
SWEEP: Final = 2.0
"""Seconds between looks at all tunnels: whether packets go to the stack."""
_ROUTES_SECONDS: Final = 0.1
_NOTICES: Final = 64
_ERRORS: Final = 1000.0
"""ICMP errors that are sent a second; what is above that is dropped, for the packets come again."""
_CHANGES: Final = 1024
_REPAIR: Final = 19
_WIRE_BYTES: Final = 16 * 1024
"""What the proxy may still have to say to an end when it is taken over."""
_GONE: Final = select.EPOLLERR | select.EPOLLHUP
_TAKEN, _SPOILED = STATE["WIRE_TAKEN"], STATE["WIRE_SPOILED"]
_FINACKS: Final = STATE["WIRE_FINACK0"] | STATE["WIRE_FINACK1"]


class Told(enum.Enum):
    """What the owner of a tunnel is told of it."""

    TAKEN = "taken"
    SPOILED = "spoiled"
    """Its sockets are its owner's alone again."""
    ENDED = "ended"


Tell = Callable[[Told, CloseReason, tuple[int, int]], None]
"""Told what becomes of a tunnel: for one that has ended also why, and how many bytes it has moved up and down."""


class Reactor(Protocol):
    """Who tells of descriptors."""

    def add(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call ``handler`` with the events of epoll(7), as long as there are any."""

    def remove(self, fd: int) -> None:
        """Tell of it no more."""


@dataclass(slots=True, eq=False)
class Splice:
    """A tunnel: ``number`` is what its ``owner`` calls it, None for an orphan. One with a ``story`` survives its
    owner."""

    owner: Hashable
    number: int
    pair: int
    keys: tuple[WireKey, WireKey]
    flows: tuple[dict[str, object], dict[str, object]]
    sockets: list[socket.socket | None]
    tell: Tell
    story: bytes = b""
    parked: bool = False
    watched: bool = False
    """Whether its sockets are, for whatever comes to them."""
    strays: list[tuple[int, int]] = field(default_factory=list)
    """Segments, and those with data, that had come to each socket when it was looked at last."""
    strayed: bool = False
    over_at: float | None = None


@dataclass(slots=True)
class _Counts:
    taken: int = 0
    refused: Counter[str] = field(default_factory=Counter)


class Splicer:
    """``listeners`` says at which addresses (16 bytes, port) clients may have connected, None for any. ``quota`` is how
    many tunnels one owner may have."""

    def __init__(
        self,
        maps: WireMaps,
        reactor: Reactor,
        *,
        quota: int,
        listeners: Callable[[], Collection[tuple[bytes, int]]] | None = None,
        linger: float = LINGER,
        sweep: float = SWEEP,
    ) -> None:
        self.counts = _Counts()
        self._maps = maps
        self._reactor = reactor
        self._quota = quota
        self._listeners = listeners
        self._linger = linger
        self._sweep_seconds = sweep
        self._pairs = PairMemory(maps.maps["pairs"])
        self._free = deque(range(maps.count))  # first in, first out: a pair rests as long as it can
        self._by_pair: dict[int, Splice] = {}
        self._by_owner: dict[Hashable, dict[int, Splice]] = {}
        self._by_key: dict[WireKey, Splice] = {}
        self._over: deque[Splice] = deque()
        self._orphans: dict[int, Orphan] = {}
        self._routes = Routes()
        self._conntrack = Conntrack()
        self._raw = RawPackets()
        self._changes = RingBuffer(maps.maps["changes"])
        self._notices = RingBuffer(maps.maps["notices"])
        self._errors = TokenBucket(_ERRORS, _ERRORS)
        self._routes_changed: float | None = None
        self._swept = time.monotonic()
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            self._namespace = netns_cookie(sock)
        reactor.add(self._changes.fd, select.EPOLLIN, lambda _: self._hear())
        reactor.add(self._notices.fd, select.EPOLLIN, lambda _: self._answer())
        reactor.add(self._routes.changes.fileno(), select.EPOLLIN, lambda _: self._note_routes())
        self._attach()

    def __len__(self) -> int:
        """How many tunnels there are, those that linger among them."""
        return len(self._by_pair)

    # -- take-over ---------------------------------------------------------------------------------------------------

    def take(
        self,
        owner: Hashable,
        number: int,
        sockets: tuple[socket.socket, socket.socket],
        owed: tuple[int, int],
        deadline: int,
        tell: Tell,
        story: bytes = b"",
    ) -> int:
        """Watch the pair of a client's and a target's socket, to be taken over when it is quiet; return its number.

        ``owed`` are the bytes that the owner sends to client and target once this has returned, and nothing else.
        ``deadline`` is in ns of CLOCK_MONOTONIC: later nothing begins. ``tell`` is called with what becomes of it. With
        a ``story`` (:class:`~.wire_story.Story`) it survives its owner. The sockets are closed here, whatever happens.
        Raises :class:`~.wire_rules.Refused`, OSError, or ValueError for a story that makes no sense.
        """
        try:
            if story:
                Story.unpack(story)
            splice = self._begin(owner, number, sockets, owed, deadline, tell)
            splice.story = story
        except BaseException as error:
            for sock in sockets:
                sock.close()
            if isinstance(error, Refused):
                self.counts.refused[str(error)] += 1
            raise
        return splice.pair

    def _begin(
        self,
        owner: Hashable,
        number: int,
        sockets: tuple[socket.socket, socket.socket],
        owed: tuple[int, int],
        deadline: int,
        tell: Tell,
    ) -> Splice:
        own = self._by_owner.get(owner, {})
        if number in own or not all(0 <= count <= _WIRE_BYTES for count in owed):
            raise Refused("it has too much to say")
        if len(own) >= self._quota or not self._free:
            raise Refused("all places are taken")
        client, target = (TcpFacts.of(sock) for sock in sockets)
        keys = client.arriving, target.arriving
        if {client.namespace, target.namespace} != {self._namespace}:
            raise Refused("another network namespace")
        if not self._was_accepted(client.arriving):
            raise Refused("the client has not come by a listener")
        ends = End(client, self._maps.snapshot(keys[0])), End(target, self._maps.snapshot(keys[1]))
        check(*ends)
        for end in ends:
            if end.now.device not in self._maps.devices:
                raise Refused("an interface that does not carry the program")
            if self._conntrack.rewrites(end.facts.arriving.reverse):
                raise Refused("addresses are rewritten (NAT)")
        for key in keys:
            if key.reverse in self._by_key:
                # Over loopback, from one tunnel into the next: a packet is translated once on its way.
                raise Refused("its other end is a tunnel's")
            if (former := self._by_key.get(key)) is not None:
                if former.over_at is None:
                    raise Refused("its addresses are those of another tunnel")
                self._forget(former)
        return self._watch(owner, number, sockets, ends, owed, deadline, tell)

    def _was_accepted(self, arriving: WireKey) -> bool:
        if self._listeners is None:
            return True
        port = int.from_bytes(arriving.dport, "big")
        places = self._listeners()
        return (arriving.target, port) in places or (bytes(16), port) in places

    def _watch(
        self,
        owner: Hashable,
        number: int,
        sockets: tuple[socket.socket, socket.socket],
        ends: tuple[End, End],
        owed: tuple[int, int],
        deadline: int,
        tell: Tell,
    ) -> Splice:
        client, target = ends
        keys = client.facts.arriving, target.facts.arriving
        acked = client.now.write_seq + owed[0], target.now.write_seq + owed[1]
        up, down = acked[1] - client.now.rcv_nxt, acked[0] - target.now.rcv_nxt
        flows: tuple[dict[str, object], dict[str, object]] = (
            _flow(0, keys[1], up, -down, client, target, acked[0]),
            _flow(1, keys[0], down, -up, target, client, acked[1]),
        )
        pair = self._free.popleft()
        splice = Splice(owner, number, pair, keys, flows, list(sockets), tell)
        self._pairs.begin(pair, client.now, target.now, (acked[0] & 0xFFFFFFFF, acked[1] & 0xFFFFFFFF))
        self._by_pair[pair] = splice
        self._by_owner.setdefault(owner, {})[number] = splice
        try:
            for key, flow in zip(keys, flows, strict=True):
                self._maps.put_flow(key, pair, **flow)  # type: ignore[arg-type]
                self._by_key[key] = splice
            # What came between the first look and this was not noted. (What was under way between the program and the
            # socket meanwhile will make the parked socket readable, and end the tunnel.)
            again = [End(end.facts, self._maps.snapshot(key)) for end, key in zip(ends, keys, strict=True)]
            check(*again)
            for end, later in zip(ends, again, strict=True):
                if (end.now.rcv_nxt, end.now.write_seq) != (later.now.rcv_nxt, later.now.write_seq):
                    raise Refused("bytes have come already")
            bits = STATE["WIRE_GO"]
            for later, count, bit in zip(again, owed, ("WIRE_ACKED0", "WIRE_ACKED1"), strict=True):
                if not count and later.now.snd_una == later.now.write_seq:
                    bits |= STATE[bit]
            if not self._maps.flip(pair, bits, unless=_SPOILED, deadline=deadline):
                raise Refused("bytes have come already")
        except BaseException:
            self._forget(splice)
            raise
        return splice

    # -- what becomes of it ------------------------------------------------------------------------------------------

    def give_up(self, owner: Hashable, number: int) -> None:
        """Watch a pair no more, unless it has been taken by now: its owner is told what it is."""
        splice = self._by_owner.get(owner, {}).get(number)
        if splice is not None and not splice.parked:
            self._maps.flip(splice.pair, _SPOILED, unless=_TAKEN)
            self._look(splice)

    def cut(self, owner: Hashable, number: int, reason: CloseReason = CloseReason.CUT) -> None:
        """End a tunnel: both ends get RST."""
        splice = self._by_owner.get(owner, {}).get(number)
        if splice is not None:
            self._cut(splice, reason)

    def leave(self, owner: Hashable) -> None:
        """End all tunnels of an owner that is no more, but those that survive it."""
        self.let_go(owner)
        for splice in list(self._by_owner.get(owner, {}).values()):
            splice.tell = _tell_nobody
            self._cut(splice, CloseReason.CUT)

    # -- those that survive ------------------------------------------------------------------------------------------

    @property
    def survivors(self) -> int:
        """How many live tunnels survive their owners."""
        return sum(_survives(splice) for splice in self._by_pair.values())

    @property
    def orphans(self) -> list[int]:
        """The pairs that nobody owns."""
        return list(self._orphans)

    def let_go(self, owner: Hashable) -> None:
        """Own no more what survives the owner."""
        for splice in list(self._by_owner.get(owner, {}).values()):
            self._look(splice)  # it may have been taken in this moment
            if _survives(splice):
                self._disown(splice)

    def _disown(self, splice: Splice) -> None:
        orphan = Orphan(splice.story, self._pairs[splice.pair].moved)
        self._remove_from_owner(splice)
        splice.owner = None
        splice.tell = lambda _, reason, moved: orphan.ended(reason, moved)
        self._orphans[splice.pair] = orphan

    def adopt(self, pair: int, owner: Hashable, number: int, tell: Tell) -> bytes:
        """Give an orphan an owner; return its story."""
        del self._orphans[pair]
        splice = self._by_pair[pair]
        splice.owner, splice.number, splice.tell = owner, number, tell
        self._by_owner.setdefault(owner, {})[number] = splice
        return splice.story

    def reset_mortals(self) -> None:
        """End all tunnels that do not survive their owners."""
        for splice in list(self._by_pair.values()):
            self._look(splice)
            if not _survives(splice):
                splice.tell = _tell_nobody
                self._cut(splice, CloseReason.CUT)

    def _expire(self, now: float) -> None:
        for pair, orphan in list(self._orphans.items()):
            if (reason := orphan.expired(self._pairs[pair].moved, now)) is not None:
                self._cut(self._by_pair[pair], reason)

    def _cut(self, splice: Splice, reason: CloseReason) -> None:
        if splice.over_at is not None:
            self._forget(splice)
            return
        if not splice.parked and self._maps.flip(splice.pair, _SPOILED, unless=_TAKEN):
            self._forget(splice)
            self._end(splice, Told.SPOILED)
            return
        pair = self._pairs[splice.pair]
        self._park(splice)
        self._forget(splice)  # the sockets first, in silence: from here on the stack resets whatever comes
        self._raw.reset(splice.keys[0].reverse, pair.client.acked)
        self._raw.reset(splice.keys[1].reverse, pair.target.acked)
        self._end(splice, Told.ENDED, reason, pair.moved)

    def _hear(self) -> None:
        """The kernel has taken, spoiled or ended pairs."""
        for record in self._changes.read(_CHANGES):
            splice = self._by_pair.get(int.from_bytes(record, "little"))
            if splice is not None:
                self._look(splice)

    def _look(self, splice: Splice) -> None:
        state = self._pairs.state(splice.pair)
        if not state & _TAKEN:
            if state & _SPOILED:
                self._forget(splice)
                self._end(splice, Told.SPOILED)
            return
        if not splice.parked:
            self._park(splice)
            self.counts.taken += 1
            splice.strays = [segments(sock) for sock in splice.sockets if sock is not None]
            splice.tell(Told.TAKEN, CloseReason.EOF, (0, 0))
            self._watch_parked(splice)
        pair = self._pairs[splice.pair]
        if splice.over_at is None and (reason := reason_of(pair)) is not None:
            splice.over_at = time.monotonic()
            self._close(splice, 0)  # the client may come again from the same port
            self._over.append(splice)
            self._end(splice, Told.ENDED, reason, pair.moved)
        if splice.over_at is not None and state & STATE["WIRE_DEAD"]:
            self._forget(splice)

    def _park(self, splice: Splice) -> None:
        """From here on the sockets say nothing, whoever closes them."""
        splice.parked = True
        for sock in splice.sockets:
            if sock is not None:
                with contextlib.suppress(OSError):  # it is gone: then it says nothing either
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
                    sock.setsockopt(socket.IPPROTO_TCP, _REPAIR, 1)
        self._settle(splice)

    def _watch_parked(self, splice: Splice) -> None:
        """Hear of whatever comes to the sockets."""
        splice.watched = True
        for index, sock in enumerate(splice.sockets):
            if sock is not None:
                self._reactor.add(
                    sock.fileno(),
                    select.EPOLLIN | select.EPOLLRDHUP,
                    lambda events, index=index: self._disturbed(splice, index, events),  # type: ignore[misc]
                )

    def _settle(self, splice: Splice) -> None:
        """Acknowledge to the parked sockets what their ends have acknowledged by packets that were translated, or they
        would send it again for a quarter of an hour, and end then."""
        for sock, key, flow in zip(splice.sockets, splice.keys, splice.flows, strict=True):
            if sock is not None and unacknowledged(sock):
                received, acked = flow["expect_received"], flow["expect_acked"]
                self._raw.acknowledge(key, cast("int", received), cast("int", acked))

    def _disturbed(self, splice: Splice, index: int, events: int) -> None:
        """Something has come to a parked socket: it was ended by others, or a packet was not translated."""
        sock = splice.sockets[index]
        assert sock is not None
        if splice.over_at is not None:
            self._close(splice, index)
            return
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if events & _GONE else 0
        if error:
            log.info("the socket of a tunnel was ended: it is reset")
            self._cut(splice, CloseReason.CUT)
        else:
            self._bypassed(splice)

    def _bypassed(self, splice: Splice) -> None:
        log.warning("packets of a tunnel went to the stack and not through the program: it is reset")
        self._cut(splice, CloseReason.INTEGRITY)

    def _look_for_strays(self, splice: Splice) -> None:
        """Packets that come to a parked socket without being what it expects do not make it readable."""
        counts = [segments(sock) for sock in splice.sockets if sock is not None]
        before, splice.strays = splice.strays, counts
        if counts == before:
            splice.strayed = False
            return
        data = any(now[1] != then[1] for now, then in zip(counts, before, strict=True))
        if data or splice.strayed:
            self._bypassed(splice)
        splice.strayed = True  # an acknowledgement may have been under way when it was parked

    def _end(
        self, splice: Splice, told: Told, reason: CloseReason = CloseReason.CUT, moved: tuple[int, int] = (0, 0)
    ) -> None:
        self._remove_from_owner(splice)
        self._orphans.pop(splice.pair, None)
        splice.tell(told, reason, moved)
        splice.tell = _tell_nobody

    def _close(self, splice: Splice, index: int) -> None:
        sock = splice.sockets[index]
        if sock is not None:
            splice.sockets[index] = None
            if splice.watched:
                self._reactor.remove(sock.fileno())
            sock.close()

    def _forget(self, splice: Splice) -> None:
        """Remove all traces, the sockets first."""
        if self._by_pair.get(splice.pair) is not splice:
            return
        for index in (0, 1):
            self._close(splice, index)
        for key in splice.keys:
            if self._by_key.get(key) is splice:
                self._maps.remove_flow(key)
                del self._by_key[key]
        self._pairs.clear(splice.pair)
        del self._by_pair[splice.pair]
        self._orphans.pop(splice.pair, None)
        self._remove_from_owner(splice)
        self._free.append(splice.pair)

    def _remove_from_owner(self, splice: Splice) -> None:
        own = self._by_owner.get(splice.owner)
        if own is not None and own.get(splice.number) is splice:
            del own[splice.number]
            if not own:
                del self._by_owner[splice.owner]

    # -- the host around it ------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Do what is due; to be called twice a second at least. Raises OSError where the kernel fails us."""
        now = time.monotonic()
        self._maps.stay_alive(ALIVE_SECONDS)
        while self._over and now - (self._over[0].over_at or 0.0) > self._linger:
            self._forget(self._over.popleft())
        if self._routes_changed is not None and now - self._routes_changed > _ROUTES_SECONDS:
            self._routes_changed = None
            self._follow_routes()
        if now - self._swept > self._sweep_seconds:
            self._swept = now
            self._expire(now)
            for splice in list(self._by_pair.values()):
                self._look(splice)  # the ring may have been full
                if splice.parked and splice.over_at is None:
                    self._look_for_strays(splice)

    def _note_routes(self) -> None:
        self._routes.forget_changes()
        if self._routes_changed is None:
            self._routes_changed = time.monotonic()

    def _attach(self) -> None:
        self._maps.mend()
        for device, why in self._maps.attach(self._routes.devices()).items():
            log.warning("the wire relay is not on interface %d: %s", device, why)

    def _follow_routes(self) -> None:
        """Send by the interfaces that lead to the ends now; what has no such way is cut."""
        self._attach()
        for splice in list(self._by_pair.values()):
            if splice.over_at is not None:
                continue
            for leg, flow in enumerate(splice.flows):
                device = self._routes.device(splice.keys[not leg].reverse)
                if device is None or device not in self._maps.devices:
                    log.info("there is no way to an end of a tunnel any more: it is reset")
                    self._cut(splice, CloseReason.ERROR)
                    break
                if device != flow["device"]:
                    flow["device"] = device
                    self._maps.put_flow(splice.keys[leg], splice.pair, **flow, replace=True)  # type: ignore[arg-type]

    def _answer(self) -> None:
        """Tell ends what became of packets that were translated, or could not be."""
        for record in self._notices.read(_NOTICES):
            splice = self._by_pair.get(int.from_bytes(record[:4], "little"))
            if splice is None or not splice.parked:
                continue
            error = translated_error(record, splice.keys, splice.flows, self._pairs[splice.pair])
            if error is not None and not self._errors.take(time.monotonic()):
                self._raw.error(*error)

    def close(self) -> None:
        """Reset all tunnels, and give everything up but the maps."""
        for splice in list(self._by_pair.values()):
            self._cut(splice, CloseReason.CUT)
        for fd in (self._changes.fd, self._notices.fd, self._routes.changes.fileno()):
            self._reactor.remove(fd)
        self._changes.close()
        self._notices.close()
        self._pairs.close()
        self._routes.close()
        self._conntrack.close()
        self._raw.close()


def _flow(leg: int, becomes: WireKey, seq: int, ack: int, end: End, other: End, acked: int) -> dict[str, object]:
    return {
        "leg": leg,
        "becomes": becomes.reverse,
        "seq": seq,
        "ack": ack,
        "device": other.now.device,
        "expect_received": end.now.rcv_nxt,
        "expect_acked": acked,
        "scales": (end.facts.snd_wscale, other.facts.rcv_wscale),
    }


def _survives(splice: Splice) -> bool:
    return bool(splice.story) and splice.parked and splice.over_at is None


def reason_of(pair: Pair) -> CloseReason | None:
    """Say how a pair has ended, None if it has not."""
    if pair.state & STATE["WIRE_RESET0"]:
        return CloseReason.CLIENT_RESET
    if pair.state & STATE["WIRE_RESET1"]:
        return CloseReason.UPSTREAM_RESET
    return CloseReason.EOF if pair.state & _FINACKS == _FINACKS else None


def _tell_nobody(_told: Told, _reason: CloseReason, _moved: tuple[int, int]) -> None:
    pass
