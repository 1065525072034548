"""UDP ASSOCIATE: only the owner's datagrams go out, only to where policy allows, for as long as its TCP lives."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address

import pytest

from rama_ebpf.relay import CloseReason, TunnelReport
from rama_ebpf.services.socks5 import Drop, Socks5Server, UdpAssociator

from ..namespace import network_namespace
from .peers import GREETING, UDP_ASSOCIATE, Udp, address, domain, exchange, failed, request, start


def associating(**options):
    def make(connector):
        return Socks5Server(connector, udp=UdpAssociator(connector.resolver, connector.egress, **options))

    return make


@pytest.fixture
async def udp(loopback: str) -> AsyncIterator[Callable[..., Udp]]:
    with contextlib.ExitStack() as cleanup:

        def make(host: str = loopback, port: int = 0) -> Udp:
            sock = Udp(host, port)
            cleanup.callback(sock.close)
            return sock

        yield make


def framed(host: str, port: int, payload: bytes, frag: int = 0) -> bytes:
    return bytes((0, 0, frag)) + address(host, port) + payload


UNSPECIFIED = {"127.0.0.1": "0.0.0.0", "::1": "::"}


async def test_datagrams_are_relayed_both_ways_by_address_and_by_name(run_proxy, udp, loopback):
    target, client = udp(), udp()
    proxy = await run_proxy(make=associating())
    _reader, writer, relay = await start(proxy, UNSPECIFIED[loopback], 0, UDP_ASSOCIATE)
    assert relay[0] == loopback
    for name in (loopback, "target.test"):
        for payload in (b"ping", b"", os.urandom(16_000)):
            client.send(framed(name, target.address[1], payload), relay)
            data, source = await target.receive()
            assert data == payload
            target.send(payload[::-1], source)
            assert await client.receive() == (framed(*target.address, payload[::-1]), relay)
    writer.close()
    await proxy.idle()
    (report,) = proxy.results
    assert (report.reason, report.to_targets, report.to_client, report.dropped) == (CloseReason.EOF, 6, 6, {})
    logged = proxy.extensions[0].require(TunnelReport)
    assert (logged.to_upstream, logged.to_client, logged.relay) == (32_008, 32_008, "udp")


async def test_datagram_from_another_address_than_the_clients_is_dropped(run_proxy, udp, loopback):
    with network_namespace("address add 198.18.0.1/32 dev lo", "-6 address add 2001:db8::1/128 dev lo nodad"):
        proxy = await run_proxy(make=associating())
        target, client = udp(), udp()
        thief = udp("2001:db8::1" if ":" in loopback else "198.18.0.1")
        _reader, writer, relay = await start(proxy, UNSPECIFIED[loopback], 0, UDP_ASSOCIATE)
        thief.send(framed(*target.address, b"stolen"), relay)
        client.send(framed(*target.address, b"mine"), relay)
        assert (await target.receive())[0] == b"mine"
        writer.close()
        await proxy.idle()
        assert proxy.results[0].dropped == {Drop.SOURCE: 1}


async def test_port_is_the_announced_one_or_else_the_first_one(run_proxy, udp, loopback):
    proxy = await run_proxy(make=associating())
    target, client, other = udp(), udp(), udp()
    for announced, first in ((client.address, other), ((UNSPECIFIED[loopback], 0), client)):
        _reader, writer, relay = await start(proxy, *announced, UDP_ASSOCIATE)
        first.send(framed(*target.address, b"first"), relay)
        client.send(framed(*target.address, b"client"), relay)
        other.send(framed(*target.address, b"other"), relay)
        client.send(framed(*target.address, b"last"), relay)
        seen = []
        while b"last" not in seen:
            seen.append((await target.receive())[0])
        assert b"other" not in seen
        assert (b"first" in seen) is (first is client)
        writer.close()


async def test_announced_address_behind_nat_does_not_lock_the_client_out(run_proxy, udp, loopback):
    proxy = await run_proxy(make=associating())
    target, client = udp(), udp()
    _reader, writer, relay = await start(proxy, "192.168.1.7", 4711, UDP_ASSOCIATE)
    client.send(framed(*target.address, b"hello"), relay)
    assert (await target.receive())[0] == b"hello"
    writer.close()


async def test_fragments_and_malformed_datagrams_are_dropped(run_proxy, udp, loopback):
    proxy = await run_proxy(make=associating())
    target, client = udp(), udp()
    _reader, writer, relay = await start(proxy, UNSPECIFIED[loopback], 0, UDP_ASSOCIATE)
    good = framed(*target.address, b"good")
    for frag in (1, 2, 0x80, 0xFF):
        client.send(framed(*target.address, b"part", frag), relay)
    header = framed(*target.address, b"")
    malformed = [
        b"",
        b"\0\0\0",
        *(header[:length] for length in range(4, len(header))),
        b"\0\0\0\x02" + bytes(16),
        b"\1\0" + header[2:] + b"rsv",
        b"\0\0\0" + domain(b"", 53) + b"x",
        b"\0\0\0" + domain(b"a\0b", 53) + b"x",
    ]
    for data in malformed:
        client.send(data, relay)
    client.send(good, relay)
    assert (await target.receive())[0] == b"good"
    assert target.nothing()
    writer.close()
    await proxy.idle()
    assert proxy.results[0].dropped == {Drop.FRAGMENT: 4, Drop.MALFORMED: len(malformed)}


async def test_every_target_is_under_policy_by_its_resolved_address(run_proxy, udp, loopback):
    proxy = await run_proxy(make=associating())
    target, client = udp(), udp()
    proxy.hosts.table["mixed.test"] = ["10.0.0.1", loopback]
    _reader, writer, relay = await start(proxy, UNSPECIFIED[loopback], 0, UDP_ASSOCIATE)
    denied = ["10.0.0.1", "private.test", "169.254.169.254", "::ffff:10.0.0.1", "255.255.255.255", "ff02::1"]
    for name in denied:
        client.send(framed(name, target.address[1], b"denied"), relay)
    client.send(framed("nowhere.test", target.address[1], b"lost"), relay)
    client.send(framed("mixed.test", target.address[1], b"allowed"), relay)
    assert (await target.receive())[0] == b"allowed"
    writer.close()
    await proxy.idle()
    assert proxy.results[0].dropped == {Drop.POLICY: len(denied), Drop.RESOLVE: 1}


async def test_datagram_from_where_the_client_sent_nothing_does_not_reach_it(run_proxy, udp, loopback):
    proxy = await run_proxy(make=associating(max_targets=1))
    target, other, client = udp(), udp(), udp()
    _reader, writer, relay = await start(proxy, UNSPECIFIED[loopback], 0, UDP_ASSOCIATE)
    client.send(framed(*other.address, b"open"), relay)
    _data, outside = await other.receive()
    client.send(framed(*target.address, b"open"), relay)  # with one target remembered, this forgets the other
    await target.receive()
    other.send(b"unsolicited", outside)
    udp().send(b"unsolicited", outside)
    target.send(b"answer", outside)
    assert (await client.receive())[0] == framed(*target.address, b"answer")
    assert client.nothing()
    writer.close()
    await proxy.idle()
    assert proxy.results[0].dropped == {Drop.UNSOLICITED: 2}


@pytest.mark.parametrize("end", ["fin", "rst", "drain"])
async def test_association_dies_with_its_tcp_connection(run_proxy, udp, loopback, end):
    proxy = await run_proxy(make=associating(ports=range(42100, 42200)))
    reader, writer, relay = await start(proxy, UNSPECIFIED[loopback], 0, UDP_ASSOCIATE)
    with pytest.raises(OSError, match="in use"):
        udp(*relay)
    if end == "drain":
        await proxy.server.drain(0)
    elif end == "fin":
        writer.write_eof()
        assert await reader.read() == b""
    else:
        writer.transport.abort()
    await proxy.idle()
    udp(*relay)  # the port is free again
    writer.close()


async def test_idle_association_is_closed_and_an_active_one_is_not(run_proxy, udp, loopback):
    proxy = await run_proxy(make=associating(idle_timeout=1.0))
    target, client = udp(), udp()
    reader, _writer, relay = await start(proxy, UNSPECIFIED[loopback], 0, UDP_ASSOCIATE)
    reading = asyncio.create_task(reader.read())
    for _ in range(8):
        client.send(framed(*target.address, b"active"), relay)
        await target.receive()
        await asyncio.sleep(0.2)  # less than the time-out
    assert not reading.done(), "1.6 s of activity outlive an idle time-out of 1 s"
    assert await reading == b""
    await proxy.idle()
    assert proxy.results[0].reason is CloseReason.IDLE_TIMEOUT


async def test_datagrams_of_a_target_do_not_keep_the_association_of_a_silent_client_alive(run_proxy, udp, loopback):
    proxy = await run_proxy(make=associating(idle_timeout=0.5))
    target, client = udp(), udp()
    reader, _writer, relay = await start(proxy, UNSPECIFIED[loopback], 0, UDP_ASSOCIATE)
    client.send(framed(*target.address, b"subscribe"), relay)
    _data, outside = await target.receive()
    closed = asyncio.create_task(reader.read())
    async with asyncio.timeout(20):
        while not closed.done():
            target.send(b"news", outside)
            await asyncio.wait({closed}, timeout=0.05)
    assert closed.result() == b""
    await proxy.idle()
    assert proxy.results[0].reason is CloseReason.IDLE_TIMEOUT


async def test_advertised_address_is_what_the_client_is_told(run_proxy, udp, loopback):
    public = [ip_address("192.0.2.7"), ip_address("2001:db8::7")]
    proxy = await run_proxy(make=associating(advertise=public))
    target, client = udp(), udp()
    _reader, writer, (host, port) = await start(proxy, UNSPECIFIED[loopback], 0, UDP_ASSOCIATE)
    assert host == ("2001:db8::7" if ":" in loopback else "192.0.2.7")
    client.send(framed(*target.address, b"hello"), (loopback, port))
    assert (await target.receive())[0] == b"hello"
    writer.close()


async def test_association_over_the_limit_is_refused_until_one_ends(run_proxy, loopback):
    proxy = await run_proxy(make=associating(max_associations=1))
    _reader, writer, _relay = await start(proxy, UNSPECIFIED[loopback], 0, UDP_ASSOCIATE)
    over = GREETING + request(UNSPECIFIED[loopback], 0, UDP_ASSOCIATE)
    assert await exchange(proxy, over) == failed(2)
    writer.close()
    await proxy.idle()
    _reader, writer, _relay = await start(proxy, UNSPECIFIED[loopback], 0, UDP_ASSOCIATE)
    writer.close()


_QUEUED = 64 * 1024 // (2000 + 64)
"""How many datagrams of 2,000 bytes wait for names: 64 KiB, with 64 bytes for each datagram's own cost."""


async def test_slow_resolver_holds_a_bounded_queue(run_proxy, udp, loopback):
    answer = asyncio.Event()

    class Slow:
        asked = 0

        async def resolve(self, name):
            self.asked += 1
            await answer.wait()
            return [ip_address(loopback)]

    slow = Slow()

    def make(connector):
        return Socks5Server(connector, udp=UdpAssociator(slow, connector.egress))

    proxy = await run_proxy(make=make)
    target, client = udp(), udp()
    _reader, writer, relay = await start(proxy, UNSPECIFIED[loopback], 0, UDP_ASSOCIATE)
    for index in range(100):
        client.send(framed(f"host{index % 20}.test", target.address[1], bytes(2000)), relay)
        await asyncio.sleep(0)
    client.send(framed(*target.address, b"direct"), relay)
    assert (await target.receive())[0] == b"direct", "a slow name does not hold up other targets"
    answer.set()
    for _ in range(_QUEUED):
        await target.receive()
    writer.close()
    await proxy.idle()
    (report,) = proxy.results
    assert slow.asked == 8
    assert report.to_targets == 1 + _QUEUED
    assert report.dropped == {Drop.OVERFLOW: 100 - _QUEUED}


async def test_thousand_concurrent_associations_each_reach_the_target(run_proxy, udp, loopback, many_descriptors):
    proxy = await run_proxy(make=associating())
    target = udp()
    _reader, writer, _relay = await start(proxy, UNSPECIFIED[loopback], 0, UDP_ASSOCIATE)
    writer.close()  # what is opened once is open now
    await writer.wait_closed()
    await proxy.idle()
    before = len(os.listdir("/proc/self/fd"))
    opened = []
    for index in range(1000):
        _reader, writer, relay = await start(proxy, UNSPECIFIED[loopback], 0, UDP_ASSOCIATE)
        opened.append((index, writer, relay, udp()))
    assert proxy.server.live == 1000
    for index, _writer, relay, client in opened:
        client.send(framed(*target.address, b"%d" % index), relay)
        data, source = await target.receive()
        target.send(data, source)
    for index, _writer, relay, client in opened:
        assert await client.receive() == (framed(*target.address, b"%d" % index), relay)
    for _index, writer, _relay, client in opened:
        writer.close()
        client.close()
        await writer.wait_closed()
    await proxy.idle()
    assert len(os.listdir("/proc/self/fd")) <= before
    assert {report.reason for report in proxy.results} == {CloseReason.EOF}
