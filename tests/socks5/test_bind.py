"""BIND: two replies, one peer, and no way in for anybody else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from rama_ebpf.core import PeerClosed, PolicyDenied
from rama_ebpf.services.connect import ConnectError
from rama_ebpf.services.socks5 import Binder, Socks5Server

from ..namespace import network_namespace
from .peers import BIND, GREETING, exchange, failed, read_reply, request, start


def binding(**options):
    def make(connector):
        return Socks5Server(connector, binder=Binder(connector.resolver, connector.egress, **options))

    return make


async def test_bind_replies_twice_and_relays_both_ways(run_proxy, loopback):
    proxy = await run_proxy(make=binding())
    for name in (loopback, "target.test"):
        reader, writer, (host, port) = await start(proxy, name, 2021, BIND)
        assert host == loopback
        writer.write(b"sent ahead of the peer")
        peer_reader, peer_writer = await proxy.dial(host, port)
        rep, told = await read_reply(reader)
        assert (rep, told) == (0, peer_writer.get_extra_info("sockname")[:2]), "the second reply names the peer"
        assert await peer_reader.readexactly(22) == b"sent ahead of the peer"
        peer_writer.write(b"from the peer")
        peer_writer.write_eof()
        assert await reader.read() == b"from the peer"
        for end in (writer, peer_writer):
            end.close()


@pytest.fixture
def second_addresses() -> Iterator[None]:
    with network_namespace("address add 198.18.0.1/32 dev lo", "-6 address add 2001:db8::1/128 dev lo nodad"):
        yield


@pytest.mark.root
async def test_connection_from_another_address_is_reset_and_the_wait_goes_on(run_proxy, second_addresses, loopback):
    proxy = await run_proxy(make=binding(), allow=("198.18.0.0/15", "2001:db8::/32"))
    expected = "2001:db8::1" if ":" in loopback else "198.18.0.1"
    reader, _writer, (host, port) = await start(proxy, expected, 2021, BIND)
    stranger_reader, stranger = await proxy.dial(host, port, local_addr=(loopback, 0))
    with pytest.raises(ConnectionResetError):
        assert await stranger_reader.read() is None
    stranger.close()
    _peer_reader, peer = await proxy.dial(host, port, local_addr=(expected, 0))
    rep, told = await read_reply(reader)
    assert (rep, told[0]) == (0, expected)
    peer.close()


async def test_peer_that_policy_denies_is_rep_02_and_no_port_is_opened(run_proxy):
    proxy = await run_proxy(make=binding())
    for name in ("10.0.0.1", "private.test", "0.0.0.0", "::"):
        assert await exchange(proxy, GREETING + request(name, 80, BIND)) == failed(2)
    await proxy.idle()
    assert [type(error) for error in proxy.errors] == [PolicyDenied] * 4


@pytest.mark.root
async def test_any_peer_means_any_that_policy_allows(run_proxy, second_addresses, loopback):
    proxy = await run_proxy(make=binding(any_peer=True))
    reader, _writer, (host, port) = await start(proxy, "::" if ":" in loopback else "0.0.0.0", 0, BIND)
    assert host == loopback
    denied = "2001:db8::1" if ":" in loopback else "198.18.0.1"
    denied_reader, _denied = await proxy.dial(host, port, local_addr=(denied, 0))
    with pytest.raises(ConnectionResetError):
        assert await denied_reader.read() is None
    await proxy.dial(host, port)
    rep, told = await read_reply(reader)
    assert (rep, told[0]) == (0, loopback)


async def test_peer_that_never_comes_is_rep_06_in_the_second_reply(run_proxy, loopback):
    proxy = await run_proxy(make=binding(timeout=0.2))
    reader, _writer, _bound = await start(proxy, loopback, 80, BIND)
    assert (await read_reply(reader))[0] == 6
    assert await reader.read() == b""
    await proxy.idle()
    assert [type(error) for error in proxy.errors] == [ConnectError]


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
async def test_listener_goes_with_its_client(run_proxy, loopback, reset):
    proxy = await run_proxy(make=binding())
    _reader, writer, (host, port) = await start(proxy, loopback, 80, BIND)
    if reset:
        writer.transport.abort()
    else:
        writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    await proxy.idle()
    assert len(proxy.errors) == 1
    assert isinstance(proxy.errors[0], PeerClosed | ConnectionResetError)
    with pytest.raises(ConnectionRefusedError):
        await proxy.dial(host, port)


async def test_listener_goes_when_the_server_is_drained(run_proxy, loopback):
    proxy = await run_proxy(make=binding())
    _reader, writer, (host, port) = await start(proxy, loopback, 80, BIND)
    assert await proxy.server.drain(0) == 1
    with pytest.raises(ConnectionRefusedError):
        await proxy.dial(host, port)
    writer.close()


async def test_flood_of_data_ahead_of_the_peer_is_not_buffered_without_bound(run_proxy, loopback):
    proxy = await run_proxy(make=binding())
    reader, writer, (host, port) = await start(proxy, loopback, 80, BIND)
    sent = bytes(32_000_000)
    writer.write(sent)
    with pytest.raises(TimeoutError):  # the kernel's buffers fill and stop the client: nobody reads any further
        async with asyncio.timeout(1):
            await writer.drain()
    peer_reader, peer = await proxy.dial(host, port)
    assert (await read_reply(reader))[0] == 0
    writer.write_eof()  # behind what still waits
    assert len(await peer_reader.read()) == len(sent)
    for end in (writer, peer):
        end.close()


async def test_advertised_address_and_port_range_are_what_the_client_is_told(run_proxy, loopback):
    public = [ip_address("192.0.2.7"), ip_address("2001:db8::7")]
    proxy = await run_proxy(make=binding(advertise=public, ports=range(42000, 42100)))
    _reader, writer, (host, port) = await start(proxy, loopback, 80, BIND)
    assert host == ("2001:db8::7" if ":" in loopback else "192.0.2.7")
    assert 42000 <= port < 42100
    _peer_reader, peer = await proxy.dial(loopback, port)
    for end in (writer, peer):
        end.close()


async def test_socks4_bind_replies_twice(run_proxy, loopback):
    if ":" in loopback:
        loopback = "127.0.0.1"  # SOCKS4 names IPv4 peers only; the client's own connection stays IPv6
    proxy = await run_proxy(make=binding())
    reader, writer = await proxy.open()
    writer.write(b"\x04\x02\x00\x50\x7f\0\0\x01\0")
    first = await reader.readexactly(8)
    assert first[:2] == b"\x00\x5a"
    assert first[4:] == b"\x7f\0\0\x01"
    peer_reader, peer = await proxy.dial("127.0.0.1", int.from_bytes(first[2:4], "big"))
    second = await reader.readexactly(8)
    assert second == b"\x00\x5a" + peer.get_extra_info("sockname")[1].to_bytes(2, "big") + b"\x7f\0\0\x01"
    writer.write(b"x")
    assert await peer_reader.readexactly(1) == b"x"
    for end in (writer, peer):
        end.close()
