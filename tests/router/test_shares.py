"""What one source may hold: what is above is refused at once in the client's protocol, and others do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest

from rama_ebpf.core import IPAddress, Stream, stack
from rama_ebpf.core.errors import LimitExceeded
from rama_ebpf.core.shares import Held, ShareExceeded, SourceShare
from rama_ebpf.layers.access_log import AccessLogLayer, AccessRecord
from rama_ebpf.layers.strikes import LocalStrikes, StrikeLayer
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.services.connect import Connector
from rama_ebpf.services.protocols import is_socks
from rama_ebpf.services.refusal import Refusal, SourceShareLayer
from rama_ebpf.services.resolver import SystemResolver
from rama_ebpf.services.router import PeekRouter
from rama_ebpf.services.socks5 import Binder, Socks5Server, UdpAssociator
from rama_ebpf.services.tcp import TcpServer, bind_tcp
from rama_ebpf.services.tls import CertificateStore, KeyPair, ServerTls, TlsPeekLayer, TlsTerminateLayer

from ..http.conftest import eventually
from ..tls.pki import Authority

HTTP = b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"
GREETING = b"\x05\x01\x00"
ANYWHERE = b"\x00\x01\x00\x00\x00\x00\x00\x00"
REP_01 = b"\x05\x01\x00\x01\x00\x00\x00\x00\x00\x00"
ALERT = b"\x15\x03\x01\x00\x02\x02\x50"


class Server:
    def __init__(self, service: Any) -> None:
        self.errors: list[BaseException] = []
        self._service = service
        self.tcp = TcpServer(bind_tcp("127.0.0.1", 0), self._serve)
        self.port = self.tcp.listener.getsockname()[1]
        self.writers: list[asyncio.StreamWriter] = []
        self.tcp.start()

    async def _serve(self, stream: Stream) -> None:
        try:
            await self._service(stream)
        except BaseException as error:
            self.errors.append(error)
            raise

    async def open(self, source: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(source, 0))
        self.writers.append(writer)
        return reader, writer

    async def ask(self, *messages: bytes, source: str = "127.0.0.1") -> bytes:
        """Send one message after the other has been answered; return all that comes until the server closes."""
        reader, writer = await self.open(source)
        got = b""
        for message in messages[:-1]:
            writer.write(message)
            got += await reader.read(1000)
        writer.write(messages[-1])
        got += await reader.read()
        writer.close()
        return got

    async def stop(self) -> None:
        for writer in self.writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        await self.tcp.drain(0)
        self.tcp.listener.close()


Run = Callable[[Any], Server]


@pytest.fixture
async def run() -> AsyncIterator[Run]:
    async with contextlib.AsyncExitStack() as cleanup:

        def start(service: Any) -> Server:
            server = Server(service)
            cleanup.push_async_callback(server.stop)
            return server

        yield start


class Bans:
    def __init__(self) -> None:
        self.banned: list[IPAddress] = []

    async def ban(self, ip: IPAddress, /, *, ttl: float, reason: str) -> None:
        self.banned.append(ip)


async def echo(stream: Stream) -> None:
    while data := await stream.read():
        await stream.write(data)


@pytest.fixture
async def full(run: Run) -> tuple[Server, SourceShare, Bans]:
    """A server of which one source holds all that it may."""
    share, bans = SourceShare(Held.CONNECTIONS, 1), Bans()
    server = run(stack(StrikeLayer(LocalStrikes(bans), strikes=1), SourceShareLayer(share), echo))
    reader, writer = await server.open()
    writer.write(b"held")
    assert await reader.readexactly(4) == b"held"
    return server, share, bans


Full = tuple[Server, SourceShare, Bans]


async def test_connection_above_the_share_is_refused_in_its_protocol(full: Full) -> None:
    server, share, bans = full
    refused = await server.ask(HTTP)
    assert refused.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nRetry-After: 1\r\n" in refused
    assert await server.ask(GREETING, b"\x05\x01" + ANYWHERE) == b"\x05\x00" + REP_01
    assert await server.ask(GREETING + b"\x05\x01" + ANYWHERE) == b"\x05\x00" + REP_01
    assert await server.ask(b"\x05\x01\x02", b"\x01\x03tom\x06secret") == b"\x05\x02\x01\x01"
    assert (await server.ask(b"\x04\x01\x00\x50\x01\x02\x03\x04\0"))[:2] == b"\x00\x5b"
    assert await server.ask(b"\x16\x03\x01\x02\x00\x01") == ALERT
    assert await server.ask(b"\xff\xfe\xfd") == b""
    await eventually(lambda: server.tcp.live == 1)
    assert [type(error) for error in server.errors] == [ShareExceeded] * 7
    assert share.refused == 7
    assert bans.banned == []


async def test_a_crowd_above_its_share_has_one_access_line_a_minute(run: Run) -> None:
    records: list[AccessRecord] = []
    clock = [0.0]
    share = SourceShare(Held.CONNECTIONS, 1)
    server = run(stack(AccessLogLayer(records.append, clock=lambda: clock[0]), SourceShareLayer(share), echo))
    _, writer = await server.open()
    writer.write(b"held")
    for minute in range(2):
        clock[0] = minute * 61.0
        for _ in range(5):
            await server.ask(HTTP)
        await eventually(lambda: server.tcp.live == 1)
    assert [record.reason for record in records] == ["source_connections"] * 2
    assert [[(note.key, note.value) for note in record.notes] for record in records] == [[], [("more", "4")]]


async def test_http2_client_above_the_share_is_told_to_calm_down(full: Full) -> None:
    server, _, _ = full
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    events = client.receive_data(await server.ask(client.data_to_send()))
    [ended] = [event for event in events if isinstance(event, h2.events.ConnectionTerminated)]
    assert ended.error_code == 11


async def test_another_source_is_served_meanwhile_and_the_place_comes_back(full: Full) -> None:
    server, _, _ = full
    reader, writer = await server.open("127.0.0.2")
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    server.writers[0].close()
    await eventually(lambda: server.tcp.live == 1)
    reader, writer = await server.open()
    writer.write(b"again")
    assert await reader.readexactly(5) == b"again"


def test_a_refusal_waits_for_bytes_that_can_still_become_a_protocol() -> None:
    for data in (b"", b"\x16", b"GE"):
        assert Refusal().receive(data) == (b"", 0, False)


async def silent(server: Server, count: int, source: str = "127.0.0.1") -> None:
    """Open connections that say nothing, and wait until the server has them."""
    before = server.tcp.live
    for _ in range(count):
        await server.open(source)
    await eventually(lambda: server.tcp.live == before + count)
    for _ in range(10):
        await asyncio.sleep(0)


async def test_undecided_clients_of_one_source_are_bounded(run: Run) -> None:
    server = run(PeekRouter((is_socks, echo), undecided=SourceShare(Held.HANDSHAKES, 2)))
    await silent(server, 2)
    assert await server.ask(GREETING, b"\x05\x01" + ANYWHERE) == b"\x05\x00" + REP_01
    reader, writer = await server.open("127.0.0.2")
    writer.write(GREETING)
    assert await reader.readexactly(3) == GREETING


@pytest.fixture
def context(tmp_path_factory: pytest.TempPathFactory) -> tuple[CertificateStore, ssl.SSLContext]:
    authority = Authority(tmp_path_factory.mktemp("pki"))
    leaf = authority.issue("a.test", stem="shares")
    trust = ssl.create_default_context(cafile=str(authority.certificate))
    return CertificateStore.of_files(ServerTls(), KeyPair(leaf.chain, leaf.key)), trust


async def greeted(server: Server, trust: ssl.SSLContext, source: str) -> bytes:
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", server.port, ssl=trust, server_hostname="a.test", local_addr=(source, 0)
    )
    writer.write(b"hello")
    got = await reader.readexactly(5)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return got


async def test_half_open_handshakes_of_one_source_leave_room_for_others(
    run: Run, context: tuple[CertificateStore, ssl.SSLContext]
) -> None:
    store, trust = context
    bans = Bans()
    terminate = TlsTerminateLayer(store, handshakes=SourceShare(Held.HANDSHAKES, 3))
    server = run(stack(StrikeLayer(LocalStrikes(bans), strikes=1), terminate, echo))
    await silent(server, 3)
    assert await server.ask(b"\x16\x03\x01\x02\x00\x01") == ALERT
    assert await greeted(server, trust, "127.0.0.2") == b"hello"
    assert bans.banned == []


async def test_full_handshake_table_gives_a_newcomer_the_place_of_the_greediest(
    run: Run, context: tuple[CertificateStore, ssl.SSLContext]
) -> None:
    store, trust = context
    terminate = TlsTerminateLayer(store, max_handshakes=4)
    server = run(stack(terminate, echo))
    first, _ = await server.open()
    await silent(server, 3)
    assert await greeted(server, trust, "127.0.0.2") == b"hello"
    with pytest.raises(ConnectionResetError):
        await first.read()
    assert LimitExceeded in map(type, server.errors)
    assert terminate.handshakes == 3


async def test_a_source_cannot_displace_its_equals(run: Run, context: tuple[CertificateStore, ssl.SSLContext]) -> None:
    store, _ = context
    server = run(stack(TlsTerminateLayer(store, max_handshakes=2), echo))
    await silent(server, 1)
    await silent(server, 1, "127.0.0.2")
    with pytest.raises(ConnectionResetError):
        await server.ask(b"\x16\x03\x01", source="127.0.0.3")


async def test_unread_client_hellos_of_one_source_are_bounded(run: Run) -> None:
    server = run(stack(TlsPeekLayer(handshakes=SourceShare(Held.HANDSHAKES, 1)), echo))
    await silent(server, 1)
    assert await server.ask(b"\x16\x03\x01") == ALERT


async def test_associations_and_binds_of_one_source_are_bounded(run: Run) -> None:
    resolver, egress = SystemResolver(), EgressPolicy.of(["127.0.0.0/8"])
    server = run(
        Socks5Server(
            Connector(resolver, egress),
            udp=UdpAssociator(resolver, egress, share=SourceShare(Held.ASSOCIATIONS, 1)),
            binder=Binder(resolver, egress, share=SourceShare(Held.BINDS, 1)),
        )
    )
    for command, target in ((b"\x03", ANYWHERE), (b"\x02", b"\x00\x01\x7f\x00\x00\x01\x00\x50")):
        request = GREETING + b"\x05" + command + target
        reader, writer = await server.open()
        writer.write(request)
        assert (await reader.readexactly(12))[:4] == b"\x05\x00\x05\x00"
        assert await server.ask(request) == b"\x05\x00" + REP_01
        other, held = await server.open("127.0.0.2")
        held.write(request)
        assert (await other.readexactly(12))[:4] == b"\x05\x00\x05\x00"
        writer.close()
        await asyncio.wait_for(_again(server, request), 30)


async def _again(server: Server, request: bytes) -> None:
    """Ask until the place that was given up is there again."""
    while True:
        reader, writer = await server.open()
        writer.write(request)
        answer = await reader.readexactly(12)
        if answer[:4] == b"\x05\x00\x05\x00":
            return
        writer.close()


def test_zero_is_no_limit_and_a_source_is_what_a_ban_is_for() -> None:
    none = SourceShare(Held.CONNECTIONS, 0)
    one = SourceShare(Held.CONNECTIONS, 1)
    with none.hold(ip_address("192.0.2.1")), none.hold(ip_address("192.0.2.1")):
        pass
    with (
        one.hold(ip_address("2001:db8::1")),
        one.hold(ip_address("192.0.2.1")),
        one.hold(ip_address("2001:db8:1::1")),
    ):
        for neighbour in ("2001:db8::2", "192.0.2.1"):
            with pytest.raises(ShareExceeded), one.hold(ip_address(neighbour)):
                pass
    with one.hold(ip_address("2001:db8::2")):
        pass
