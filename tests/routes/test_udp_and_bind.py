"""UDP ASSOCIATE and BIND take the routes: through a parent, or not at all (T9, I10, I26)."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from rama_ebpf.layers.auth import StaticUsers
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.routes import Protocol, Route, State
from rama_ebpf.services.route import RoutedSocks
from rama_ebpf.services.socks5 import Binder, Socks5Server, UdpAssociator

from .conftest import Hosts, Peer, dead, direct, group, hang, parent_of, routed

UDP, BIND = b"\5\3\0\1" + bytes(6), b"\5\2\0\1\x7f\0\0\1\0\x09"
EGRESS = EgressPolicy.of(("127.0.0.0/8",))


class UdpEcho(asyncio.DatagramProtocol):
    """Echoes, and notes who asked."""

    def __init__(self) -> None:
        self.sources: list[tuple[str, int]] = []

    def connection_made(self, transport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, source) -> None:
        self.sources.append(source)
        self.transport.sendto(data, source)


@pytest.fixture
async def target():
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(UdpEcho, local_addr=("127.0.0.1", 0))
    protocol.port = transport.get_extra_info("sockname")[1]
    yield protocol
    transport.close()


def front(connector, **more) -> Socks5Server:
    udp = UdpAssociator(Hosts(), EGRESS, idle_timeout=30)
    return Socks5Server(
        connector, udp=udp, binder=Binder(Hosts(), EGRESS, any_peer=True), ways=RoutedSocks(connector), **more
    )


def parent_service(hosts: Hosts | None = None) -> tuple[Socks5Server, UdpAssociator]:
    udp = UdpAssociator(hosts or Hosts(), EGRESS)
    return Socks5Server(direct(), udp=udp, binder=Binder(Hosts(), EGRESS)), udp


class Client:
    """A SOCKS5 client of UDP ASSOCIATE."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(("127.0.0.1", 0))
        self.sock.setblocking(False)

    async def associate(self) -> int:
        self.reader, self.writer = await asyncio.open_connection(self._peer.host, self._peer.port)
        self.writer.write(b"\5\1\0" + UDP)
        reply = await self.reader.readexactly(2 + 10)
        self.relay = socket.inet_ntoa(reply[6:10]), int.from_bytes(reply[10:12], "big")
        return reply[3]

    def send(self, data: bytes, port: int, host: bytes = b"\1\x7f\0\0\1") -> None:
        self.sock.sendto(b"\0\0\0" + host + port.to_bytes(2, "big") + data, self.relay)

    async def receive(self) -> bytes:
        async with asyncio.timeout(20):
            data = await asyncio.get_running_loop().sock_recv(self.sock, 65535)
        return data[10:]

    def close(self) -> None:
        self.sock.close()
        self.writer.close()


@pytest.fixture
async def client(run_service):
    async with contextlib.AsyncExitStack() as cleanup:

        async def start(service) -> Client:
            made = Client(await run_service(service))
            cleanup.callback(made.close)
            return made

        yield start


async def test_datagrams_go_through_the_parent_and_its_end_is_theirs(serve, run_service, client, target):
    service, at_parent = parent_service(Hosts(target_test=["127.0.0.1"]))
    parent = await run_service(service)
    connector = routed({"it": parent_of(parent, "socks5")})
    made = await client(front(connector))
    assert await made.associate() == 0
    for number in range(20):
        made.send(b"%d" % number, target.port)
        assert await made.receive() == b"%d" % number
    made.send(b"by name", target.port, b"\3\x0btarget.test")
    assert await made.receive() == b"by name"
    assert at_parent.live == 1
    assert len(set(target.sources)) == 1
    assert connector.board.read("it").answered > 0
    other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)  # a reply from elsewhere is none
    with other:
        other.sendto(b"\0\0\0\1\x7f\0\0\1\0\1forged", target.sources[0])
        made.send(b"last", target.port)
        assert await made.receive() == b"last"


async def test_end_of_the_parents_control_connection_ends_the_clients(serve, client, target):
    controls: list[asyncio.StreamWriter] = []
    relay = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    relay.bind(("127.0.0.1", 0))
    relay.setblocking(False)

    async def parent(reader, writer):
        await reader.readexactly(3)
        writer.write(b"\5\0")
        await reader.readexactly(10)
        # I26: it does not know its own address
        writer.write(b"\5\0\0\1" + bytes(4) + relay.getsockname()[1].to_bytes(2, "big"))
        controls.append(writer)
        await reader.read()

    with relay:
        connector = routed({"it": parent_of(await serve(parent), "socks5")})
        made = await client(front(connector))
        assert await made.associate() == 0
        made.send(b"hello", target.port)
        data = await asyncio.get_running_loop().sock_recv(relay, 100)
        assert data == b"\0\0\0\1\x7f\0\0\1" + target.port.to_bytes(2, "big") + b"hello"
        controls[0].close()
        assert await made.reader.read() == b""
    assert target.sources == []


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9", "https://127.0.0.1:9", "socks4://127.0.0.1:9", "socks5s://127.0.0.1:9"]
)
async def test_way_that_cannot_carry_datagrams_refuses_the_association(client, target, url):
    """REP 07, and nothing goes out directly."""
    made = await client(front(routed({"it": url, "g": group("it")}, way="g")))
    assert await made.associate() == 7
    assert target.sources == []


async def test_datagram_without_a_route_for_it_is_dropped_and_its_neighbours_are_not(run_service, client, target):
    """I10: the rule says a proxy without UDP: skipped elsewhere, and sent directly."""
    connector = routed(
        {"web": "http://127.0.0.1:9"},
        Route("web", "web", hosts=("web.test",)),
        Route("bind", "refuse", protocols=(Protocol.BIND,)),
        Route("local", "direct"),
    )
    made = await client(front(connector))
    assert await made.associate() == 0
    made.send(b"lost", target.port, b"\3\x08web.test")
    made.send(b"kept", target.port)
    assert await made.receive() == b"kept"
    assert len(target.sources) == 1


async def test_private_target_of_a_datagram_is_not_asked_of_a_parent(run_service, client, target):
    service, at_parent = parent_service()
    made = await client(front(routed({"it": parent_of(await run_service(service), "socks5")})))
    assert await made.associate() == 0
    made.send(b"no", 53, b"\1\x0a\0\0\1")
    made.send(b"no", 53, b"\3\x09localhost")
    made.send(b"yes", target.port)
    assert await made.receive() == b"yes"
    assert at_parent.live == 1


async def test_dead_parent_of_datagrams_is_blamed_and_the_next_member_carries_them(run_service, client, target):
    service, at_parent = parent_service()
    ways = {"a": dead("socks5"), "b": parent_of(await run_service(service), "socks5"), "it": group("a", "b")}
    connector = routed(ways)
    made = await client(front(connector))
    assert await made.associate() == 0
    for _ in range(200):
        made.send(b"hello", target.port)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                assert await asyncio.get_running_loop().sock_recv(made.sock, 100)
                break
    assert connector.board.read("a").state is State.DOWN
    assert at_parent.live == 1


async def test_direct_datagrams_leave_from_the_ways_source(client, target):
    from ipaddress import ip_network

    from rama_ebpf.routes import Direct

    made = await client(front(routed({"it": Direct((ip_network("127.0.0.77/32"),))})))
    assert await made.associate() == 0
    made.send(b"hello", target.port)
    assert await made.receive() == b"hello"
    assert target.sources[0][0] == "127.0.0.77"


async def test_users_without_a_way_for_datagrams_get_none(run_service, target):
    connector = routed({"web": "http://127.0.0.1:9"}, Route("tom", "direct", users=("tom",)), Route("rest", "web"))
    peer = await run_service(front(connector, auth=StaticUsers({"tom": "x", "ann": "x"})))
    for name, rep in ((b"tom", 0), (b"ann", 7)):
        reader, writer = await asyncio.open_connection(peer.host, peer.port)
        writer.write(b"\5\1\2\1\3" + name + b"\1x" + UDP)
        assert (await reader.readexactly(2 + 2 + 10))[5] == rep
        writer.close()


async def test_bind_is_done_by_the_parent_or_refused(serve, run_service):
    service, _ = parent_service()
    parent = await run_service(service)
    for way, rep in (
        (parent_of(parent, "socks5"), 0),
        (parent_of(await serve(hang), "http"), 1),
    ):
        connector = routed({"it": way})
        peer = await run_service(front(connector))
        reader, writer = await asyncio.open_connection(peer.host, peer.port)
        writer.write(b"\5\1\0" + BIND)
        reply = await reader.readexactly(2 + 10)
        assert reply[3] == rep
        if rep == 0:
            port = int.from_bytes(reply[10:12], "big")
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
            assert (await reader.readexactly(10))[1] == 0
            far_writer.write(b"from the peer")
            assert await reader.readexactly(13) == b"from the peer"
            far_writer.close()
            assert await reader.read() == b""
            assert await far_reader.read() == b""
        writer.close()
