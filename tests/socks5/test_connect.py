"""CONNECT against the real server: every outcome has its reply, and nothing that a client sends early is lost."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from ipaddress import ip_address

import pytest

from rama_ebpf.core import PolicyDenied
from rama_ebpf.relay import CloseReason
from rama_ebpf.services.socks5 import ReplyTiming, Socks5Server

from .conftest import echo
from .peers import GREETING, address, closed_port, domain, exchange, failed, request, start


async def upper(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer only after the client's EOF."""
    writer.write((await reader.read()).upper())


async def test_connect_relays_both_ways_and_tells_our_own_address(run_proxy, run_target):
    seen = []

    async def target(reader, writer):
        seen.append(writer.get_extra_info("peername")[:2])
        await echo(reader, writer)

    host, port = await run_target(target)
    proxy = await run_proxy()
    for name in (host, "target.test"):
        reader, writer, bound = await start(proxy, name, port)
        writer.write(b"ping")
        assert await reader.readexactly(4) == b"ping"
        assert bound == seen[-1], "BND.ADDR and BND.PORT are those that the target sees"
        writer.close()
    assert proxy.hosts.asked == ["target.test"], "names are resolved by the proxy, and only names"


async def test_handshake_sent_byte_by_byte_is_understood(run_proxy, run_target):
    _host, port = await run_target(echo)
    proxy = await run_proxy()
    reader, writer = await proxy.open()
    writer.transport.set_write_buffer_limits(0)
    for byte in GREETING + request("target.test", port) + b"data":
        writer.write(bytes((byte,)))
        await writer.drain()
        await asyncio.sleep(0.001)  # so that each byte has a segment and a wake-up of its own
    writer.write_eof()
    assert (await reader.read()).endswith(b"data")
    writer.close()


async def test_everything_in_one_segment_with_fin_is_still_answered(run_proxy, run_target):
    host, port = await run_target(upper)
    proxy = await run_proxy()
    assert (await exchange(proxy, GREETING + request(host, port) + b"hello", eof=True)).endswith(b"HELLO")


async def test_reply_that_comes_after_the_clients_fin_arrives(run_proxy, run_target):
    fin_seen = asyncio.Event()

    async def late(reader, writer):
        await reader.read()
        fin_seen.set()
        await asyncio.sleep(0.2)  # the target is slow
        writer.write(b"late answer")

    host, port = await run_target(late)
    proxy = await run_proxy()
    reader, writer, _bound = await start(proxy, host, port)
    writer.write_eof()
    await fin_seen.wait()
    assert await reader.read() == b"late answer"
    writer.close()


async def test_ten_megabytes_both_ways_at_once_are_exact(run_proxy, run_target):
    sent_up, sent_down = os.urandom(10_000_000), os.urandom(10_000_000)
    received_up = hashlib.sha256()

    async def both(reader, writer):
        async def send():
            writer.write(sent_down)
            await writer.drain()

        sending = asyncio.create_task(send())
        while data := await reader.read(65536):
            received_up.update(data)
        await sending

    host, port = await run_target(both)
    proxy = await run_proxy()
    reader, writer, _bound = await start(proxy, host, port)

    async def send():
        writer.write(sent_up)
        await writer.drain()
        writer.write_eof()

    sending = asyncio.create_task(send())
    assert hashlib.sha256(await reader.read()).digest() == hashlib.sha256(sent_down).digest()
    await sending
    writer.close()
    await proxy.idle()
    assert received_up.digest() == hashlib.sha256(sent_up).digest()
    assert proxy.results[0].reason is CloseReason.EOF


async def test_closed_port_is_rep_05(run_proxy, loopback):
    proxy = await run_proxy()
    assert await exchange(proxy, GREETING + request(loopback, closed_port(loopback))) == failed(5)


async def test_name_that_does_not_exist_is_rep_04(run_proxy):
    proxy = await run_proxy()
    assert await exchange(proxy, GREETING + request("nowhere.test", 80)) == failed(4)


@pytest.mark.parametrize(
    "host",
    ["10.0.0.1", "private.test", "169.254.169.254", "fd00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "0.0.0.0", "::"],
)
async def test_target_denied_by_policy_is_rep_02(run_proxy, host):
    proxy = await run_proxy()
    assert await exchange(proxy, GREETING + request(host, 80)) == failed(2)
    await proxy.idle()
    assert [type(error) for error in proxy.errors] == [PolicyDenied]


@pytest.mark.parametrize("literal", ["10.0.0.1", "fd00::1", "[fd00::1]", "::ffff:10.0.0.1"])
async def test_ip_literal_sent_as_domain_is_under_the_same_policy(run_proxy, literal):
    proxy = await run_proxy()
    assert await exchange(proxy, GREETING + b"\x05\x01\x00" + domain(literal.encode(), 80)) == failed(2)
    assert proxy.hosts.asked == [], "a literal needs no resolver"


async def test_ip_literal_sent_as_domain_connects(run_proxy, run_target):
    host, port = await run_target(echo)
    proxy = await run_proxy()
    literals = [host.encode()] if ip_address(host).version == 4 else [host.encode(), b"[" + host.encode() + b"]"]
    for literal in literals:
        answer = await exchange(proxy, GREETING + b"\x05\x01\x00" + domain(literal, port) + b"hi", eof=True)
        assert answer.endswith(b"hi")


async def test_domain_of_255_bytes_connects(run_proxy, run_target):
    host, port = await run_target(echo)
    proxy = await run_proxy()
    name = ".".join(["a" * 63] * 3) + "." + "b" * 63
    assert len(name) == 255
    proxy.hosts.table[name] = [host]
    answer = await exchange(proxy, GREETING + b"\x05\x01\x00" + domain(name.encode(), port) + b"hi", eof=True)
    assert answer.endswith(b"hi")


@pytest.mark.parametrize("name", [b"", b"a\0b", b"a\nb", b"a b", b"\xff\xfe", b"fe80::1%lo", b"\x1b[2J"])
async def test_domain_that_no_host_has_is_refused_unresolved(run_proxy, name):
    proxy = await run_proxy()
    assert await exchange(proxy, GREETING + b"\x05\x01\x00" + domain(name, 80)) == failed(1)
    assert proxy.hosts.asked == []


async def test_unknown_command_is_rep_07_and_unknown_address_type_rep_08(run_proxy):
    proxy = await run_proxy()
    for command in (0, 2, 3, 4, 255):  # BIND and UDP ASSOCIATE are off in this server
        assert await exchange(proxy, GREETING + bytes((5, command, 0)) + address("127.0.0.1", 80)) == failed(7)
    for atyp in (0, 2, 5, 255):
        assert await exchange(proxy, GREETING + bytes((5, 1, 0, atyp)) + bytes(6)) == failed(8)
    await proxy.idle()
    assert {error.kind for error in proxy.errors} == {"protocol", "socks_command"}


@pytest.mark.parametrize("broken", [b"\x04\x01\x00", b"\x05\x01\x01"], ids=["version", "reserved"])
async def test_malformed_request_is_rep_01(run_proxy, broken):
    proxy = await run_proxy()
    assert await exchange(proxy, GREETING + broken + address("127.0.0.1", 80)) == failed(1)


async def test_target_that_does_not_answer_is_rep_06(run_proxy, loopback, full_backlog):
    proxy = await run_proxy(timeout=0.3)
    assert await exchange(proxy, GREETING + request(loopback, full_backlog)) == failed(6)


async def test_eager_reply_comes_before_the_target_answers_and_failure_is_a_reset(run_proxy, run_target, loopback):
    def make(connector):
        return Socks5Server(connector, reply=ReplyTiming.EAGER)

    proxy = await run_proxy(make=make)
    host, port = await run_target(echo)
    answer = await exchange(proxy, GREETING + request(host, port) + b"hi", eof=True)
    assert answer == failed(0) + b"hi"
    reader, writer = await proxy.open()
    writer.write(GREETING + request(loopback, closed_port(loopback)))
    with pytest.raises(ConnectionResetError):
        # Whether the success was read before the reset does not matter; that no clean EOF follows it does.
        assert await reader.read() is None
    writer.close()


async def test_upstream_is_closed_when_the_client_has_reset_before_the_reply(run_proxy, run_target, loopback):
    """A client that goes away while the proxy connects must not leave the upstream connection behind."""
    ended = asyncio.Event()

    async def target(reader, writer):
        with contextlib.suppress(ConnectionResetError):
            await reader.read()
        ended.set()

    _host, port = await run_target(target)
    proxy = await run_proxy()
    _reader, writer = await proxy.open()
    writer.write(GREETING + request("target.test", port))
    await writer.drain()
    writer.transport.abort()
    await ended.wait()
