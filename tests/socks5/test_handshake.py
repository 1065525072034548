"""Everything before the request, and everything that is no handshake at all."""

from __future__ import annotations

import asyncio
import contextlib
import os

import pytest

from rama_ebpf.core import AuthFailed, HandshakeTimeout, LimitExceeded, PeerClosed, PolicyDenied, ProtocolError, User
from rama_ebpf.process.shared import SharedTable
from rama_ebpf.relay import CloseReason, TunnelLimits
from rama_ebpf.services.socks5 import Command, Socks5Server, UserLimits

from .conftest import echo
from .peers import GREETING, exchange, failed, only_tom, request

LOGIN = b"\x05\x01\x02\x01\x03tom\x06secret"
LOGGED_IN = b"\x05\x02\x01\x00"


def with_users(connector):
    return Socks5Server(connector, auth=only_tom)


async def test_no_acceptable_method_is_05_ff_and_close(run_proxy):
    proxy = await run_proxy(make=with_users)
    assert await exchange(proxy, GREETING + request("target.test", 80)) == b"\x05\xff"
    assert await exchange(proxy, b"\x05\x03\x00\x01\x80") == b"\x05\xff"
    assert await exchange(proxy, b"\x05\x00") == b"\x05\xff"
    await proxy.idle()
    assert [type(error) for error in proxy.errors] == [AuthFailed, AuthFailed, ProtocolError]


async def test_wrong_password_is_rfc_1929_failure_and_an_error_to_strike_for(run_proxy, caplog):
    proxy = await run_proxy(make=with_users)
    attempts = (b"\x03tom\x05wrong", b"\x03eve\x06secret", b"\x00\x00", b"\x03tom\x00", b"\x01\xff\x01\xff")
    with caplog.at_level("INFO"):
        for attempt in attempts:
            assert await exchange(proxy, b"\x05\x01\x02\x01" + attempt + request("target.test", 80)) == (
                b"\x05\x02\x01\x01"
            )
        await proxy.idle()
    assert [type(error) for error in proxy.errors] == [AuthFailed] * len(attempts)
    assert len(caplog.records) == len(attempts)
    assert all(record.exc_info is None for record in caplog.records)
    assert not any("secret" in record.getMessage() for record in caplog.records), "a password was logged"


@pytest.mark.parametrize("error", [LimitExceeded("too busy"), ConnectionRefusedError("no database")])
async def test_authenticator_that_cannot_tell_lets_nobody_in(run_proxy, error):
    async def broken(credentials):
        raise error

    proxy = await run_proxy(make=lambda connector: Socks5Server(connector, auth=broken))
    assert await exchange(proxy, LOGIN + request("target.test", 80)) == b"\x05\x02\x01\x01"
    await proxy.idle()
    assert proxy.errors == [error]


async def test_right_password_connects_and_the_user_is_known(run_proxy, run_target):
    host, port = await run_target(echo)
    proxy = await run_proxy(make=with_users)
    answer = await exchange(proxy, LOGIN + request(host, port) + b"data", eof=True)
    assert answer.startswith(LOGGED_IN + b"\x05\x00\x00")
    assert answer.endswith(b"data")
    await proxy.idle()
    assert [extensions.get(User) for extensions in proxy.extensions] == [User("tom")]


@pytest.mark.parametrize("version", [0, 2, 5])
async def test_rfc_1929_with_another_version_than_1_is_refused(run_proxy, version):
    proxy = await run_proxy(make=with_users)
    answer = await exchange(proxy, b"\x05\x01\x02" + bytes((version,)) + b"\x03tom\x06secret")
    assert answer == b"\x05\x02\x01\x01"
    await proxy.idle()
    assert [type(error) for error in proxy.errors] == [ProtocolError]


async def test_optional_auth_serves_both_and_prefers_to_know_the_user(run_proxy, run_target):
    host, port = await run_target(echo)
    proxy = await run_proxy(make=lambda connector: Socks5Server(connector, auth=only_tom, auth_optional=True))
    anonymous = await exchange(proxy, GREETING + request(host, port) + b"data", eof=True)
    assert anonymous.endswith(b"data")
    known = await exchange(proxy, b"\x05\x02\x00\x02" + LOGIN[3:] + request(host, port) + b"data", eof=True)
    assert known.startswith(LOGGED_IN)
    await proxy.idle()
    assert [extensions.get(User) for extensions in proxy.extensions] == [None, User("tom")]


@pytest.mark.parametrize(
    "sent",
    [b"", b"\x05", GREETING, GREETING + b"\x05\x01", b"\x04\x01\x00\x50\x7f\x00\x00\x01user"],
    ids=["nothing", "version", "greeting", "half a request", "socks4"],
)
async def test_silent_client_is_closed_at_the_handshake_timeout(run_proxy, sent):
    proxy = await run_proxy(make=lambda connector: Socks5Server(connector, handshake_timeout=0.2))
    reader, writer = await proxy.open()
    writer.write(sent)
    async with asyncio.timeout(20):
        assert await reader.read() in (b"", b"\x05\x00")
        await proxy.idle()
    writer.close()
    assert [type(error) for error in proxy.errors] == [HandshakeTimeout]


async def test_client_that_trickles_bytes_is_closed_at_the_handshake_timeout_too(run_proxy):
    proxy = await run_proxy(make=lambda connector: Socks5Server(connector, handshake_timeout=0.5))
    reader, writer = await proxy.open()
    writer.write(b"\x05\xff")
    reading = asyncio.create_task(reader.read())
    async with asyncio.timeout(20):
        while not reading.done():
            writer.write(b"\x01")
            await asyncio.wait({reading}, timeout=0.05)
    assert reading.exception() is not None or reading.result() == b""
    writer.close()
    await proxy.idle()
    assert [type(error) for error in proxy.errors] == [HandshakeTimeout]


NOT_SOCKS = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls": bytes.fromhex("1603010200010001fc0303") + os.urandom(32),
    "zero": bytes(64),
    "socks6": b"\x06" + bytes(32),
    "noise": b"\xff" * 4096,
}


@pytest.mark.parametrize("sent", NOT_SOCKS.values(), ids=NOT_SOCKS.keys())
async def test_what_is_not_socks_is_closed_with_one_log_line_and_no_reply(run_proxy, sent, caplog):
    proxy = await run_proxy()
    with caplog.at_level("INFO"):
        reader, writer = await proxy.open()
        writer.write(sent)
        with contextlib.suppress(ConnectionResetError):  # the kernel's answer to bytes that nobody will read
            assert await reader.read() == b""
        writer.close()
        await proxy.idle()
    assert [type(error) for error in proxy.errors] == [ProtocolError]
    assert len(caplog.records) == 1
    assert caplog.records[0].exc_info is None


async def test_no_handshake_keeps_a_descriptor_or_logs_a_traceback(run_proxy, run_target, caplog):
    """Every prefix of good and bad handshakes, ended by FIN or by RST at any byte."""
    host, port = await run_target(echo)
    proxy = await run_proxy(make=lambda connector: Socks5Server(connector, auth=only_tom, auth_optional=True))
    handshakes = [
        GREETING + request(host, port) + b"data",
        LOGIN + request("nowhere.test", port),
        LOGIN[:-1] + b"!",
        b"\x04\x01" + port.to_bytes(2, "big") + b"\0\0\0\x01user\0target.test\0data",
        GREETING + request("10.0.0.1", 80),
        *NOT_SOCKS.values(),
    ]
    await exchange(proxy, handshakes[0], eof=True)  # so that what is opened once is open
    await proxy.idle()
    before = len(os.listdir("/proc/self/fd"))
    with caplog.at_level("WARNING"):
        for handshake in handshakes:
            for length in range(0, min(len(handshake), 48)):
                for reset in (False, True):
                    reader, writer = await proxy.open()
                    writer.write(handshake[:length])
                    if reset:
                        writer.transport.abort()
                    else:
                        writer.write_eof()
                        with contextlib.suppress(ConnectionResetError):
                            await reader.read()
                        writer.close()
                    with contextlib.suppress(ConnectionError):
                        await writer.wait_closed()
        await proxy.idle()
    assert len(os.listdir("/proc/self/fd")) <= before
    assert [record for record in caplog.records if record.name.startswith("rama_ebpf")] == []


async def test_client_that_leaves_early_is_peer_closed_not_a_protocol_error(run_proxy):
    proxy = await run_proxy()
    assert await exchange(proxy, b"", eof=True) == b""
    assert await exchange(proxy, b"\x05\x02\x00", eof=True) == b""
    await proxy.idle()
    assert [type(error) for error in proxy.errors] == [PeerClosed] * 2


async def test_user_over_its_connection_limit_is_refused_until_one_ends(run_proxy, run_target):
    host, port = await run_target(echo)
    proxy = await run_proxy(
        make=lambda connector: Socks5Server(connector, auth=only_tom, limits=lambda user: UserLimits(connections=2))
    )
    open_ones = []
    for _ in range(2):
        reader, writer = await proxy.open()
        writer.write(LOGIN + request(host, port) + b"x")
        assert (await reader.readuntil(b"x"))[:4] == LOGGED_IN
        open_ones.append(writer)
    refused = await exchange(proxy, LOGIN + request(host, port))
    assert refused == LOGGED_IN + failed(2)[2:]
    open_ones[0].close()
    await open_ones[0].wait_closed()
    await proxy.until_served(2)  # the refused one and the closed one
    assert (await exchange(proxy, LOGIN + request(host, port) + b"data", eof=True)).endswith(b"data")
    open_ones[1].close()


async def test_user_limit_holds_for_all_workers_together(run_proxy, run_target):
    host, port = await run_target(echo)
    fd = SharedTable.create(2)
    workers = []
    for column in range(2):
        shared = SharedTable(fd, 2, column, bytes(32))
        workers.append(
            await run_proxy(
                make=lambda connector, shared=shared: Socks5Server(
                    connector, auth=only_tom, limits=lambda user: UserLimits(connections=1), shared=shared
                )
            )
        )
    reader, writer = await workers[0].open()
    writer.write(LOGIN + request(host, port) + b"x")
    assert (await reader.readuntil(b"x"))[:4] == LOGGED_IN
    assert await exchange(workers[1], LOGIN + request(host, port)) == LOGGED_IN + failed(2)[2:]
    writer.close()
    await workers[0].idle()
    assert (await exchange(workers[1], LOGIN + request(host, port) + b"data", eof=True)).endswith(b"data")
    os.close(fd)


async def test_user_without_a_command_is_refused_by_policy(run_proxy):
    def make(connector):
        return Socks5Server(connector, auth=only_tom, limits=lambda user: UserLimits(commands=frozenset()))

    proxy = await run_proxy(make=make)
    assert await exchange(proxy, LOGIN + request("target.test", 80)) == LOGGED_IN + failed(2)[2:]
    await proxy.idle()
    assert [type(error) for error in proxy.errors] == [PolicyDenied]


async def test_socks4_and_4a_connect(run_proxy, run_target):
    host, port = await run_target(echo)
    proxy = await run_proxy()
    names = [b"\0\0\0\x01user\0target.test\0"]
    if ":" not in host:
        names.append(b"\x7f\0\0\x01\0")
    for name in names:
        answer = await exchange(proxy, b"\x04\x01" + port.to_bytes(2, "big") + name + b"data", eof=True)
        assert answer[:2] == b"\x00\x5a"
        assert answer[8:] == b"data"
        if ":" not in host:
            assert answer[4:8] == b"\x7f\0\0\x01", "the bound address is the real one"


REFUSED4 = b"\x00\x5b" + bytes(6)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x04\x01\x00\x50\x0a\0\0\x01\0",
        b"\x04\x01\x00\x50\0\0\0\x01\0nowhere.test\0",
        b"\x04\x01\x00\x50\0\0\0\x01\0\0",
        b"\x04\x03\x00\x50\x7f\0\0\x01\0",
        b"\x04\x01\x00\x50\x7f\0\0\x01" + b"u" * 300,
        b"\x04\x01\x00\x50\0\0\0\x01\0" + b"d" * 300,
    ],
    ids=["denied", "no such name", "empty name", "command", "endless user", "endless name"],
)
async def test_socks4_failure_is_5b(run_proxy, sent):
    proxy = await run_proxy()
    assert await exchange(proxy, sent) == REFUSED4


async def test_socks4_is_refused_where_users_must_be_known_or_it_is_off(run_proxy):
    proxy = await run_proxy(make=with_users)
    assert await exchange(proxy, b"\x04\x01\x00\x50\x7f\0\0\x01\0") == REFUSED4
    await proxy.idle()
    assert [type(error) for error in proxy.errors] == [AuthFailed]
    proxy = await run_proxy(make=lambda connector: Socks5Server(connector, socks4=False))
    assert await exchange(proxy, b"\x04\x01\x00\x50\x7f\0\0\x01\0") == b""


async def test_commands_are_refused_where_they_are_not_served(run_proxy):
    proxy = await run_proxy()
    for command in (Command.BIND, Command.UDP_ASSOCIATE):
        assert await exchange(proxy, GREETING + request("127.0.0.1", 1, command)) == failed(7)


async def test_two_users_do_not_share_a_limit(run_proxy, run_target):
    async def anybody(credentials):
        return User(credentials.username)

    host, port = await run_target(echo)
    proxy = await run_proxy(
        make=lambda connector: Socks5Server(connector, auth=anybody, limits=lambda user: UserLimits(connections=1))
    )
    writers = []
    for name in (b"a", b"b"):
        reader, writer = await proxy.open()
        writer.write(b"\x05\x01\x02\x01\x01" + name + b"\x01x" + request(host, port) + b"x")
        assert (await reader.readuntil(b"x"))[4:7] == b"\x05\x00\x00"
        writers.append(writer)
    for writer in writers:
        writer.close()


async def test_tunnel_limits_of_a_user_bound_the_tunnel(run_proxy, run_target):
    host, port = await run_target(echo)

    def make(connector):
        return Socks5Server(connector, auth=only_tom, limits=lambda user: UserLimits(tunnel=TunnelLimits(idle=0.2)))

    proxy = await run_proxy(make=make)
    with pytest.raises(ConnectionResetError):
        assert await exchange(proxy, LOGIN + request(host, port)) is None
    await proxy.idle()
    assert [report.reason for report in proxy.results] == [CloseReason.IDLE_TIMEOUT]
