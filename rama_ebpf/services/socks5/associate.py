"""UDP ASSOCIATE: relaying a client's datagrams for as long as its TCP connection lives (RFC 1928 section 7)."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ...core.address import Authority, IPAddress, SocketAddress, unmap
from ...core.client import source_prefix
from ...core.errors import LimitExceeded, PolicyDenied, RamaError
from ...core.shares import Held, SourceShare
from ...core.stream import Stream
from ...relay import CloseReason, TunnelLimits, TunnelReport
from ..connect import Egress, Resolver
from ..resolver import resolve_for
from .carrier import Carrier, ClientWays, ParentLink
from .ports import advertised, bound_socket
from .wire import Fragment, MalformedAddress, decode_datagram, encode_datagram

__all__ = ["Association", "AssociationReport", "Drop", "UdpAssociator"]

_MAX_DATAGRAM: Final = 65535
_DATAGRAMS_PER_WAKE: Final = 32
_MAX_LOOKUPS: Final = 8
_MAX_PENDING_BYTES: Final = 64 * 1024
_MAX_NAMES: Final = 64
_NAME_SECONDS: Final = 30.0


class Drop(enum.Enum):
    """Why a datagram was not relayed."""

    SOURCE = "source"
    """Not from the client that owns the association."""
    FRAGMENT = "fragment"
    MALFORMED = "malformed"
    POLICY = "policy"
    """Egress policy denies every address of the target."""
    RESOLVE = "resolve"
    UNSOLICITED = "unsolicited"
    """From an endpoint to which the client has sent nothing."""
    OVERFLOW = "overflow"
    """A send buffer or the queue for name look-ups was full."""
    ROUTE = "route"
    """No way may, or can, carry it."""
    SEND = "send"
    """The kernel refused to send: no route, too big, a firewall."""


@dataclass(frozen=True, slots=True)
class AssociationReport:
    """How an association went: datagrams relayed each way, drops by reason, age in seconds.

    Logs and metrics find a :class:`~rama_ebpf.relay.TunnelReport` with the bytes of payload beside it.
    """

    reason: CloseReason
    to_targets: int
    to_client: int
    dropped: Mapping[Drop, int]
    age: float


class UdpAssociator:
    """Opens UDP associations.

    A client's datagrams are taken only from its own address, and from the port that it announced or else used first.
    Each target address is checked by ``egress``, after resolution. Datagrams come back only from the endpoints, at
    most the latest ``max_targets``, to which the client has sent. ``advertise`` holds the addresses (one a family)
    that clients are told instead of our own, for hosts behind NAT; ``ports`` confines the ports that face clients.
    An association whose client has sent no datagram for ``idle_timeout`` seconds is closed, unless the stream's
    :class:`~rama_ebpf.relay.TunnelLimits` say otherwise; datagrams from targets do not count, or they could keep the
    association of a client that has gone alive for ever (RFC 4787 section 4.3). At most ``max_associations`` live at
    once, and of one source as many as ``share`` lets in.
    """

    def __init__(
        self,
        resolver: Resolver,
        egress: Egress,
        *,
        advertise: Sequence[IPAddress] = (),
        ports: range | None = None,
        idle_timeout: float = 120.0,
        max_associations: int = 4096,
        max_targets: int = 256,
        share: SourceShare | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.resolver = resolver
        self.egress = egress
        self.idle_timeout = idle_timeout
        self.max_targets = max_targets
        self.clock = clock
        self.live = 0
        self._advertise = tuple(advertise)
        self._ports = ports
        self._max_associations = max_associations
        self._share = SourceShare(Held.ASSOCIATIONS, 0) if share is None else share

    def open(
        self, client: IPAddress, local: SocketAddress, announced: Authority, ways: ClientWays | None = None
    ) -> Association:
        """Open an association for the client at ``client``, on our address ``local``.

        ``announced`` is the address in the client's request. ``ways`` say how its datagrams go out; without them this
        host sends them. Raises :class:`LimitExceeded` or OSError.
        """
        if self.live >= self._max_associations:
            raise LimitExceeded(f"{self.live} UDP associations are open, the limit")
        place = contextlib.ExitStack()
        place.enter_context(self._share.hold(client))
        try:
            sock = bound_socket(socket.SOCK_DGRAM, local, self._ports)
        except BaseException:
            place.close()
            raise
        # An announced address that is not the client's was rewritten on the way (NAT), and with it the port.
        credible = announced.ip is not None and (unmap(announced.ip) == client or int(announced.ip) == 0)
        port = announced.port if credible else 0
        self.live += 1
        return Association(self, client, port, sock, advertised(sock, self._advertise), place, ways)


class Association:
    """One client's association; ``bound`` is where it has to send to."""

    def __init__(
        self,
        settings: UdpAssociator,
        client: IPAddress,
        port: int,
        front: socket.socket,
        bound: SocketAddress,
        place: contextlib.ExitStack,
        ways: ClientWays | None = None,
    ) -> None:
        self._ways = ways
        self._links: dict[str, ParentLink] = {}
        self.bound = bound
        self._place = place
        self._settings = settings
        self._client_ip = client
        self._client_port = port
        self._client: SocketAddress | None = None
        self._front = front
        self._backs: dict[tuple[str, socket.AddressFamily], socket.socket] = {}
        self._loop = asyncio.get_running_loop()
        self._parent_ended: asyncio.Future[None] = self._loop.create_future()
        self._targets: OrderedDict[SocketAddress, None] = OrderedDict()
        self._names: OrderedDict[str, tuple[float, Sequence[IPAddress]]] = OrderedDict()
        self._waiting: dict[str, list[tuple[int, bytes, Carrier | None]]] = {}
        self._waiting_bytes = 0
        self._lookups: set[asyncio.Task[None]] = set()
        self._to_targets = 0
        self._to_client = 0
        self._bytes_out = 0
        self._bytes_in = 0
        self._dropped: Counter[Drop] = Counter()
        self._last = settings.clock()
        self._closed = False

    async def run(self, stream: Stream) -> AssociationReport:
        """Relay until the client closes ``stream``, its TCP connection, or a time-out passes. Closes the sockets."""
        started = self._last = self._settings.clock()
        limits = stream.extensions.get(TunnelLimits) or TunnelLimits(idle=self._settings.idle_timeout)
        self._loop.add_reader(self._front.fileno(), self._read_client)
        watcher = asyncio.create_task(_until_closed(stream))
        reason = CloseReason.CUT
        try:
            reason = await self._supervise(watcher, started, limits)
        finally:
            watcher.cancel()
            self.close()
            links = [link.task for link in self._links.values()]
            await asyncio.gather(watcher, *self._lookups, *links, return_exceptions=True)
            age = self._settings.clock() - started
            report = AssociationReport(reason, self._to_targets, self._to_client, dict(self._dropped), age)
            stream.extensions.add(report)
            drops = " ".join(f"{why.value}={count}" for why, count in report.dropped.items())
            why = f"dropped {drops}" if drops else ""
            stream.extensions.add(TunnelReport(reason, self._bytes_out, self._bytes_in, age, "udp", why))
        return report

    def close(self) -> None:
        """Close the sockets and forget what waits. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._settings.live -= 1
        self._place.close()
        for sock in (self._front, *self._backs.values()):
            self._loop.remove_reader(sock.fileno())
            sock.close()
        for lookup in self._lookups:
            lookup.cancel()
        for link in self._links.values():
            link.close()

    async def _supervise(self, watcher: asyncio.Task[CloseReason], started: float, limits: TunnelLimits) -> CloseReason:
        while not watcher.done():
            now = self._settings.clock()
            left = []
            if limits.idle is not None:
                left.append((self._last + limits.idle - now, CloseReason.IDLE_TIMEOUT))
            if limits.total is not None:
                left.append((started + limits.total - now, CloseReason.TOTAL_TIMEOUT))
            first = min(left, default=None, key=lambda deadline: deadline[0])
            if first is not None and first[0] <= 0:
                return first[1]
            left_for = None if first is None else first[0]
            await asyncio.wait((watcher, self._parent_ended), timeout=left_for, return_when=asyncio.FIRST_COMPLETED)
            if self._parent_ended.done() and not watcher.done():
                return CloseReason.UPSTREAM_RESET
        return watcher.result()

    # -- client to target --------------------------------------------------------------------------------------

    def _read_client(self) -> None:
        for data, raw in _datagrams(self._front):
            self._from_client(data, SocketAddress.from_sockaddr(raw))

    def _from_client(self, data: bytes, source: SocketAddress) -> None:
        if source.ip != self._client_ip or self._client_port not in (0, source.port):
            self._dropped[Drop.SOURCE] += 1
            return
        try:
            target, start = decode_datagram(data)
        except Fragment:
            self._dropped[Drop.FRAGMENT] += 1
            return
        except MalformedAddress:
            self._dropped[Drop.MALFORMED] += 1
            return
        self._client, self._client_port = source, source.port
        self._last = self._settings.clock()
        carrier: Carrier | None = None
        if self._ways is not None and (carrier := self._ways.choose(target)) is None:
            self._dropped[Drop.ROUTE] += 1
        elif target.ip is not None:
            self._forward((target.ip,), target.port, data[start:], carrier)
        elif carrier is not None and not carrier.resolves_here:
            self._hand_on(target, data[start:], carrier)
        else:
            self._forward_by_name(str(target.host), target.port, data[start:], carrier)

    def _hand_on(self, target: Authority, payload: bytes, carrier: Carrier) -> None:
        """Have a parent send to ``target``."""
        try:
            carrier.check(target)
        except PolicyDenied:
            self._dropped[Drop.POLICY] += 1
            return
        link = self._links.get(carrier.name)
        if link is None:
            link = self._links[carrier.name] = ParentLink(
                carrier, self._from_parent, lambda was_open: self._link_ended(carrier.name, was_open)
            )
        try:
            sent = link.send(payload, target)
        except OSError:
            self._dropped[Drop.SEND] += 1
            return
        if sent:
            self._to_targets += 1
            self._bytes_out += len(payload)
        else:
            self._dropped[Drop.OVERFLOW] += 1

    def _link_ended(self, name: str, was_open: bool) -> None:
        """The end of an association at a parent is the end of this one (RFC 1928 section 7); one that was never open
        may be tried again by the next datagram, where the ways say so."""
        if was_open and not self._parent_ended.done():
            self._parent_ended.set_result(None)
        elif not self._closed:
            self._links.pop(name, None)

    def _from_parent(self, payload: bytes, source: Authority) -> None:
        if self._client is not None and source.ip is not None:
            self._deliver(SocketAddress(unmap(source.ip), source.port), payload)

    def _forward(self, ips: Sequence[IPAddress], port: int, payload: bytes, carrier: Carrier | None) -> None:
        """Send to the first address that policy allows and that the kernel can send to."""
        why = Drop.RESOLVE
        for ip in map(unmap, ips):
            if carrier is not None and carrier.by_parent:
                self._hand_on(Authority(ip, port), payload, carrier)
                return
            try:
                if carrier is None:
                    self._settings.egress.check(ip)
                else:
                    carrier.check(Authority(ip, port))
            except PolicyDenied:
                why = Drop.POLICY
                continue
            target = SocketAddress(ip, port)
            try:
                self._back(target.family, carrier).sendto(payload, target.to_sockaddr())
            except BlockingIOError:
                why = Drop.OVERFLOW
                break
            except PermissionError:  # the kernel's own egress check, or a firewall
                why = Drop.POLICY
                continue
            except OSError:
                why = Drop.SEND
                continue
            self._to_targets += 1
            self._bytes_out += len(payload)
            self._targets[target] = None
            self._targets.move_to_end(target)
            if len(self._targets) > self._settings.max_targets:
                self._targets.popitem(last=False)
            return
        self._dropped[why] += 1

    def _forward_by_name(self, name: str, port: int, payload: bytes, carrier: Carrier | None) -> None:
        known = self._names.get(name)
        if known is not None and known[0] > self._settings.clock():
            self._forward(known[1], port, payload, carrier)
            return
        queue = self._waiting.get(name)
        too_many = queue is None and len(self._waiting) >= _MAX_LOOKUPS
        if too_many or self._waiting_bytes + _cost(payload) > _MAX_PENDING_BYTES:
            self._dropped[Drop.OVERFLOW] += 1
            return
        self._waiting_bytes += _cost(payload)
        if queue is not None:
            queue.append((port, payload, carrier))
            return
        self._waiting[name] = [(port, payload, carrier)]
        lookup = self._loop.create_task(self._look_up(name))
        self._lookups.add(lookup)
        lookup.add_done_callback(self._lookups.discard)

    async def _look_up(self, name: str) -> None:
        try:
            ips = await resolve_for(self._settings.resolver, name, source_prefix(self._client_ip))
        except (RamaError, OSError):
            ips = ()  # remembered like an answer, so that a stream of datagrams is not a stream of look-ups
        finally:
            queue = self._waiting.pop(name)
            self._waiting_bytes -= sum(_cost(payload) for _port, payload, _carrier in queue)
        self._names[name] = (self._settings.clock() + _NAME_SECONDS, ips)
        self._names.move_to_end(name)
        if len(self._names) > _MAX_NAMES:
            self._names.popitem(last=False)
        for port, payload, carrier in queue:
            self._forward(ips, port, payload, carrier)

    # -- target to client --------------------------------------------------------------------------------------

    def _back(self, family: socket.AddressFamily, carrier: Carrier | None) -> socket.socket:
        way = "" if carrier is None else carrier.name
        sock = self._backs.get((way, family))
        if sock is None:
            sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            if carrier is not None:
                try:
                    carrier.prepare(sock, 4 if family == socket.AF_INET else 6)
                except BaseException:
                    sock.close()
                    raise
            self._backs[way, family] = sock
            self._loop.add_reader(sock.fileno(), self._read_target, sock)
        return sock

    def _read_target(self, sock: socket.socket) -> None:
        for data, raw in _datagrams(sock):
            source = SocketAddress.from_sockaddr(raw)
            if source not in self._targets or self._client is None:
                self._dropped[Drop.UNSOLICITED] += 1
                continue
            self._deliver(source, data)

    def _deliver(self, source: SocketAddress, data: bytes) -> None:
        assert self._client is not None
        try:
            self._front.sendto(encode_datagram(source, data), self._client.to_sockaddr())
        except BlockingIOError:
            self._dropped[Drop.OVERFLOW] += 1
        except OSError:
            self._dropped[Drop.SEND] += 1
        else:
            self._to_client += 1
            self._bytes_in += len(data)


def _datagrams(sock: socket.socket) -> Iterator[tuple[bytes, tuple[object, ...]]]:
    """Yield what has arrived, a bounded number so that one association cannot hold the loop."""
    for _ in range(_DATAGRAMS_PER_WAKE):
        try:
            yield sock.recvfrom(_MAX_DATAGRAM)
        except OSError:  # EAGAIN: nothing is left; the others say that an earlier datagram was lost, which UDP may
            return


def _cost(payload: bytes) -> int:
    """What a waiting datagram counts for; empty ones take memory too."""
    return len(payload) + 64


async def _until_closed(stream: Stream) -> CloseReason:
    """Return when the client has closed; what it sends on this connection has no meaning and is dropped."""
    with contextlib.suppress(OSError):
        while await stream.read(4096):
            pass
        return CloseReason.EOF
    return CloseReason.CLIENT_RESET
