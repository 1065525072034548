"""Our client: against our server, and against servers of other people."""

from __future__ import annotations

import asyncio
import errno
import getpass
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest

from rama_ebpf.core import Authority, Credentials, Stream
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.services.connect import ConnectError, Connector
from rama_ebpf.services.socks5 import Binder, Socks5Client, Socks5Server, UdpAssociator

from .conftest import ALLOWED, Hosts, echo
from .peers import closed_port, only_tom

TOM = Credentials("tom", "secret")


def everything(connector):
    return Socks5Server(
        connector,
        binder=Binder(connector.resolver, connector.egress),
        udp=UdpAssociator(connector.resolver, connector.egress),
        auth=only_tom,
    )


@pytest.fixture
def direct() -> Connector:
    return Connector(Hosts({}), EgressPolicy.of(ALLOWED), timeout=10)


async def ask(stream: Stream, data: bytes) -> bytes:
    """Send all, half-close, and read all."""
    await stream.write(data)
    await stream.write_eof()
    answer = b""
    while more := await stream.read():
        answer += more
    await stream.close()
    return answer


async def test_connects_by_address_and_by_name(run_proxy, run_target, direct, loopback):
    host, port = await run_target(echo)
    proxy = await run_proxy(make=everything)
    client = Socks5Client(direct, Authority.of(proxy.host, proxy.port), credentials=TOM)
    for name in (host, "target.test"):
        assert await ask(await client(Authority.of(name, port)), b"hello") == b"hello"


async def test_chain_of_three_proxies(run_proxy, run_target, direct):
    _host, port = await run_target(echo)
    client = direct
    proxies = [await run_proxy(make=everything) for _ in range(3)]
    for proxy in proxies:
        client = Socks5Client(client, Authority.of(proxy.host, proxy.port), credentials=TOM)
    assert await ask(await client(Authority.of("target.test", port)), b"hello") == b"hello"
    assert [proxy.server.accepted for proxy in proxies] == [1, 1, 1]
    assert [proxy.hosts.asked for proxy in proxies] == [[], [], ["target.test"]], "the last one resolves"


async def test_failure_far_away_has_the_errno_of_the_reply(run_proxy, direct, loopback):
    proxy = await run_proxy(make=everything)
    client = Socks5Client(direct, Authority.of(proxy.host, proxy.port), credentials=TOM)
    for host, port, number in (
        (loopback, closed_port(loopback), errno.ECONNREFUSED),
        ("10.0.0.1", 80, errno.EACCES),
        ("nowhere.test", 80, errno.EHOSTUNREACH),
    ):
        with pytest.raises(ConnectError) as caught:
            await client(Authority.of(host, port))
        assert caught.value.errno == number


async def test_binds(run_proxy, direct, loopback):
    proxy = await run_proxy(make=everything)
    client = Socks5Client(direct, Authority.of(proxy.host, proxy.port), credentials=TOM)
    bound = await client.bind(Authority.of(loopback, 80))
    _reader, writer = await proxy.dial(str(bound.address.host), bound.address.port)
    stream, peer = await bound.accept()
    assert (str(peer.host), peer.port) == writer.get_extra_info("sockname")[:2]
    writer.write(b"from the peer")
    assert await stream.read() == b"from the peer"
    await stream.close()
    bound = await client.bind(Authority.of(loopback, 80))
    with pytest.raises(ConnectError) as caught:
        await bound.accept(timeout=0.1)
    assert caught.value.errno == errno.ETIMEDOUT


@pytest.fixture
async def udp_echo(loopback: str) -> AsyncIterator[int]:
    """The port of a UDP server that answers in capital letters."""

    class Echo(asyncio.DatagramProtocol):
        def connection_made(self, transport):
            self.transport = transport

        def datagram_received(self, data, source):
            self.transport.sendto(data.upper(), source)

    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Echo, local_addr=(loopback, 0))
    yield transport.get_extra_info("sockname")[1]
    transport.close()


async def test_sends_and_receives_datagrams(run_proxy, direct, udp_echo, loopback):
    proxy = await run_proxy(make=everything)
    client = Socks5Client(direct, Authority.of(proxy.host, proxy.port), credentials=TOM)
    udp = await client.associate()
    for name in (loopback, "target.test"):
        udp.send(b"hello", Authority.of(name, udp_echo))
        assert await udp.receive() == (b"HELLO", Authority.of(loopback, udp_echo))
    waiting = asyncio.create_task(udp.receive())
    await asyncio.sleep(0)
    await udp.close()
    with pytest.raises(ConnectionAbortedError):
        await waiting
    udp = await client.associate()
    await proxy.server.drain(0)
    with pytest.raises(ConnectionResetError):
        await udp.closed()
    await udp.close()


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def says(answer: bytes, *, then_wait: bool = False) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        if then_wait:
            await reader.read()

    return handler


@pytest.mark.parametrize(
    ("server", "number"),
    [
        (says(b""), errno.ECONNRESET),
        (says(b"\x05\x00\x05"), errno.ECONNRESET),
        (says(b"HTTP/1.1 400 Bad Request\r\n\r\n"), errno.EPROTO),
        (says(b"\x05\xff"), errno.EKEYREJECTED),
        (says(b"\x05\x02\x01\x01"), errno.EKEYREJECTED),
        (says(b"\x05", then_wait=True), errno.ETIMEDOUT),
        (says(b"\x05\x00\x05\x06"), errno.ETIMEDOUT),
        (says(b"\x05\x00\x05\x63"), errno.EIO),
    ],
    ids=["closes", "cut short", "http", "no method", "wrong password", "silent", "ttl", "unknown code"],
)
async def test_failing_proxy_is_a_connect_error_and_leaks_nothing(run_target, direct, server, number):
    host, port = await run_target(server)
    client = Socks5Client(direct, Authority.of(host, port), credentials=TOM, timeout=0.5)
    with pytest.raises(ConnectError) as caught:
        await client(Authority.of("example.test", 80))
    assert caught.value.errno == number


async def test_bytes_that_come_with_the_reply_are_the_tunnels(run_target, direct):
    host, port = await run_target(says(b"\x05\x00\x05\x00\x00\x01" + bytes(6) + b"banner"))
    stream = await Socks5Client(direct, Authority.of(host, port))(Authority.of("example.test", 25))
    assert await stream.read() == b"banner"
    await stream.close()


# -- servers of other people -------------------------------------------------------------------------------------


async def started(command: Sequence[str], host: str, port: int) -> asyncio.subprocess.Process:
    """Start a server and return when it takes connections."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    async with asyncio.timeout(30):
        while True:
            assert process.returncode is None, f"{command[0]} has ended"
            try:
                _reader, writer = await asyncio.open_connection(host, port)
            except ConnectionRefusedError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                await writer.wait_closed()
                return process


async def ended(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    await process.wait()


@pytest.fixture
async def microsocks(loopback: str) -> AsyncIterator[Authority]:
    port = closed_port(loopback)
    command = ("microsocks", "-i", loopback, "-p", str(port), "-u", "tom", "-P", "secret")
    process = await started(command, loopback, port)
    yield Authority.of(loopback, port)
    await ended(process)


async def test_microsocks(microsocks, run_target, direct):
    host, port = await run_target(echo)
    stream = await Socks5Client(direct, microsocks, credentials=TOM)(Authority.of(host, port))
    await stream.write(b"hello")  # without a half-close, which microsocks takes for the end of both directions
    assert await stream.read_exactly(5) == b"hello"
    await stream.close()
    with pytest.raises(ConnectError) as caught:
        await Socks5Client(direct, microsocks, credentials=Credentials("tom", "wrong"))(Authority.of(host, port))
    assert caught.value.errno == errno.EKEYREJECTED


@pytest.fixture
async def danted(tmp_path) -> AsyncIterator[Authority]:
    """Dante on IPv4 loopback: Debian's is from 2014 and refuses IPv6 clients."""
    port = closed_port("127.0.0.1")
    config = tmp_path / "danted.conf"
    config.write_text(
        f"""
        logoutput: {tmp_path}/danted.log
        internal: 127.0.0.1 port = {port}
        external: 127.0.0.1
        clientmethod: none
        socksmethod: none
        user.privileged: {getpass.getuser()}
        user.unprivileged: {getpass.getuser()}
        client pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}
        socks pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 command: connect bind udpassociate bindreply udpreply }}
        """
    )
    process = await started(("danted", "-f", str(config), "-p", str(tmp_path / "danted.pid")), "127.0.0.1", port)
    yield Authority.of("127.0.0.1", port)
    await ended(process)


@pytest.mark.parametrize("loopback", ["127.0.0.1"], indirect=True, ids=["ipv4"])
async def test_dante_connects_binds_and_relays_datagrams(danted, run_target, direct, udp_echo, loopback):
    host, port = await run_target(echo)
    client = Socks5Client(direct, danted)
    assert await ask(await client(Authority.of(host, port)), b"hello") == b"hello"

    bound = await client.bind(Authority.of(loopback, 80))
    with socket.create_connection((str(bound.address.host), bound.address.port)) as peer:
        stream, address = await bound.accept()
        assert (str(address.host), address.port) == peer.getsockname()
        peer.sendall(b"from the peer")
        assert await stream.read() == b"from the peer"
        await stream.close()

    udp = await client.associate()
    udp.send(b"hello", Authority.of(loopback, udp_echo))
    assert await udp.receive() == (b"HELLO", Authority.of(loopback, udp_echo))
    await udp.close()
