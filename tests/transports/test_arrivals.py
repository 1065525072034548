"""Connections between accept(2) and their service: sources take turns, and garbage costs no task and no line."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from rama_ebpf.core import IPAddress, SocketStream, Stream, stack
from rama_ebpf.core.first_bytes import FirstBytes
from rama_ebpf.core.turns import Turns
from rama_ebpf.layers import AccessLogLayer, TimeoutLayer
from rama_ebpf.layers.strikes import LocalStrikes, StrikeLayer
from rama_ebpf.services import arrivals
from rama_ebpf.services.http import HttpServer, Request, Response
from rama_ebpf.services.protocols import is_socks
from rama_ebpf.services.proxy_protocol import ProxyProtocolLayer
from rama_ebpf.services.router import PeekRouter
from rama_ebpf.services.tcp import TcpServer, bind_tcp
from rama_ebpf.services.tls import TlsPeekLayer

from ..http.conftest import eventually
from ..relay.flows import open_descriptors

GARBAGE = b"\xff\xfe\xfd\xfc garbage\r\n"
GREETING = b"\x05\x01\x00"


async def echo(stream: Stream) -> None:
    while data := await stream.read():
        await stream.write(data)


Run = Callable[[Any], TcpServer]


@pytest.fixture
async def run() -> AsyncIterator[Run]:
    async with contextlib.AsyncExitStack() as cleanup:

        def start(service: Any) -> TcpServer:
            listener = bind_tcp("127.0.0.1", 0)
            server = TcpServer(listener, service, name="main")
            server.start()

            async def stop() -> None:
                await server.drain(0)
                listener.close()

            cleanup.push_async_callback(stop)
            return server

        yield start


def dial(server: TcpServer, source: str = "127.0.0.1", data: bytes = b"") -> socket.socket:
    """Connect, and send ``data``, before the server's loop has a turn."""
    client = socket.create_connection(server.listener.getsockname(), source_address=(source, 0))
    client.sendall(data)
    client.setblocking(False)
    return client


async def ended(client: socket.socket) -> bytes:
    """Return what comes until the server ends the connection in order; a reset raises."""
    got = b""
    with client:
        while data := await asyncio.get_running_loop().sock_recv(client, 1000):
            got += data
    return got


def test_sources_take_turns_and_the_crowd_gives_way() -> None:
    turns: Turns[str] = Turns(6)
    for number in range(4):
        assert turns.add("flood", f"flood{number}") is None
    assert turns.add("user", "user") is None
    assert turns.add("other", "other") is None
    assert turns.add("third", "third") == "flood3"
    assert [turns.take() for _ in range(len(turns))] == ["flood0", "user", "other", "third", "flood1", "flood2"]
    assert not turns


async def test_another_source_does_not_wait_behind_a_flood(run: Run) -> None:
    served: list[str] = []

    async def note(stream: Stream) -> None:
        assert stream.peer is not None
        served.append(str(stream.peer.ip))

    server = run(note)
    clients = [dial(server, "127.0.0.1") for _ in range(200)]  # all wait in the listener's queue, the user's last
    clients.append(dial(server, "127.0.0.2"))
    await eventually(lambda: len(served) == 201)
    assert served.index("127.0.0.2") == 1
    for client in clients:
        client.close()


async def test_garbage_costs_no_task_and_one_line_a_minute(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    before = open_descriptors()
    server = run(stack(AccessLogLayer(), TimeoutLayer(), PeekRouter((is_socks, echo))))
    tasks: list[object] = []
    begin = server._begin

    def count(stream: SocketStream) -> None:
        tasks.append(stream)
        begin(stream)

    assert server._arrivals is not None
    server._arrivals._begin = count
    for number in range(50):
        client = dial(server, f"127.0.0.{1 + number % 3}", GARBAGE)
        with pytest.raises(ConnectionResetError):
            await ended(client)
        client.close()
    assert tasks == []
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("127.0.0.1:")
    assert line.endswith(": connection refused: the first bytes are of no protocol that is served here (protocol)")
    client = dial(server, data=GREETING)
    assert await asyncio.get_running_loop().sock_recv(client, 3) == GREETING
    client.close()
    assert len(tasks) == 1
    await eventually(lambda: server.live == 0)
    assert server.accepted == 51
    assert open_descriptors() <= before + 3  # listener, poller, spare


async def test_first_bytes_that_come_late_or_in_pieces_reach_the_service_whole(run: Run) -> None:
    server = run(PeekRouter((is_socks, echo)))
    loop = asyncio.get_running_loop()
    clients = [dial(server) for _ in range(2)]
    await eventually(lambda: server.live == 2)
    for client in clients:
        await loop.sock_sendall(client, GREETING)
    assert [await loop.sock_recv(client, 3) for client in clients] == [GREETING] * 2
    large = bytes([5]) * 50_000
    await loop.sock_sendall(clients[0], large)
    clients[0].shutdown(socket.SHUT_WR)
    assert await ended(clients[0]) == large
    both = dial(server, data=GREETING + large)
    both.shutdown(socket.SHUT_WR)  # bytes and the end in one turn
    assert await ended(both) == GREETING + large
    clients[1].close()


async def test_bytes_and_end_told_together_are_both_seen(run: Run) -> None:
    server = run(PeekRouter((is_socks, echo)))
    client = dial(server)
    await eventually(lambda: server.live == 1)
    client.setblocking(True)
    data = GREETING + bytes(3000)  # more than is judged by
    client.sendall(data)
    client.shutdown(socket.SHUT_WR)
    client.setblocking(False)
    assert await ended(client) == data


async def test_silent_client_is_its_services_after_a_moment(run: Run) -> None:
    begun = asyncio.Event()

    async def greets(stream: Stream) -> None:
        begun.set()
        await stream.write(b"220 hello")

    greets.first_bytes = FirstBytes(lambda _: None)  # type: ignore[attr-defined]
    server = run(greets)
    client = dial(server)
    await begun.wait()
    assert await ended(client) == b"220 hello"


async def test_who_leaves_without_a_word_is_counted_only(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    server = run(PeekRouter((is_socks, echo)))
    for _ in range(5):
        dial(server).close()
    await eventually(lambda: server.accepted == 5 and server.live == 0)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "connection refused: closed without a word (peer_closed)"
    ]


async def test_not_tls_is_told_so_and_closed_in_order(run: Run) -> None:
    server = run(stack(TlsPeekLayer(), echo))
    client = dial(server, data=b"GET / HTTP/1.1\r\n\r\n")
    assert await ended(client) == b"\x15\x03\x01\x00\x02\x02\x0a"
    client = dial(server)  # and one that goes on sending
    await eventually(lambda: server.live == 1)
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ConnectionError):
        for _ in range(20):
            await loop.sock_sendall(client, GARBAGE)
    assert await ended(client) == b"\x15\x03\x01\x00\x02\x02\x0a"


async def app(request: Request) -> Response:
    return Response(204)


@pytest.mark.parametrize(
    ("sent", "banned"),
    [(GARBAGE, True), (bytes(8), True), (b"\x16\x03\x01\x02\x00\x01", False), (b"(\r\n\r\n", True)],
    ids=["garbage", "zeros", "TLS", "a separator"],
)
async def test_what_no_request_begins_with_is_a_bad_request_at_once(run: Run, sent: bytes, banned: bool) -> None:
    bans = Bans()
    bans.may_ban.set()
    server = run(stack(StrikeLayer(LocalStrikes(bans), strikes=1), HttpServer(app)))
    assert (await ended(dial(server, data=sent))).startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert bool(bans.banned) is banned
    request = b"\r\nGET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n"
    assert (await ended(dial(server, "127.0.0.2", request))).startswith(b"HTTP/1.1 204 ")


class Bans:
    def __init__(self) -> None:
        self.banned: list[IPAddress] = []
        self.asked = asyncio.Event()
        self.may_ban = asyncio.Event()

    async def ban(self, ip: IPAddress, /, *, ttl: float, reason: str) -> None:
        self.asked.set()
        await self.may_ban.wait()
        self.banned.append(ip)


async def test_garbage_is_struck_and_its_ban_is_in_force_before_it_is_closed(run: Run) -> None:
    bans = Bans()
    server = run(stack(StrikeLayer(LocalStrikes(bans), strikes=2), PeekRouter((is_socks, echo))))
    with pytest.raises(ConnectionResetError):
        await ended(dial(server, data=GARBAGE))
    client = dial(server, data=GARBAGE)
    waiting = asyncio.create_task(ended(client))
    await bans.asked.wait()
    with dial(server, "127.0.0.2", GREETING) as other:  # meanwhile others are served
        assert await asyncio.get_running_loop().sock_recv(other, 3) == GREETING
    assert not waiting.done()
    bans.may_ban.set()
    with pytest.raises(ConnectionResetError):
        await waiting
    assert [str(ip) for ip in bans.banned] == ["127.0.0.1"]
    stray = dial(server, data=b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ConnectionResetError):
        await ended(stray)
    assert len(bans.banned) == 1


def test_layers_that_do_not_know_first_bytes_keep_them_for_the_service() -> None:
    router = PeekRouter((is_socks, echo))
    assert isinstance(stack(TimeoutLayer(), router).first_bytes, FirstBytes)  # type: ignore[attr-defined]
    # Behind the header of a balancer come the client's first bytes, and not before it.
    assert not hasattr(stack(ProxyProtocolLayer(["127.0.0.0/8"]), router), "first_bytes")
    assert getattr(PeekRouter((is_socks, echo), fallback=echo), "first_bytes", None) is None


async def test_those_who_wait_for_their_turn_are_served_or_cut_by_a_drain(run: Run) -> None:
    server = run(PeekRouter((is_socks, echo)))
    client = dial(server)
    await eventually(lambda: server.live == 1)
    loop = asyncio.get_running_loop()
    draining = asyncio.create_task(server.drain(30))
    await asyncio.sleep(0)
    await loop.sock_sendall(client, GREETING)
    assert await loop.sock_recv(client, 3) == GREETING
    client.close()
    assert await draining == 0


async def test_a_crowd_above_the_bound_loses_its_newest(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "_MOST", 10)
    server = run(echo)
    user = dial(server, "127.0.0.2", b"user")
    crowd = [dial(server, data=b"crowd") for _ in range(20)]
    loop = asyncio.get_running_loop()
    assert await loop.sock_recv(user, 10) == b"user"
    outcomes = await asyncio.gather(*(loop.sock_recv(client, 10) for client in crowd), return_exceptions=True)
    assert sum(isinstance(outcome, ConnectionResetError) for outcome in outcomes) == 11
    assert outcomes[:9] == [b"crowd"] * 9
    for client in (user, *crowd):
        client.close()
