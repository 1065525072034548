"""CONNECT against the real server: every outcome has its reply, and nothing that a client sends early is lost."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import ip_address

import pytest

from rama_ebpf.core import AuthFailed, Credentials, HandshakeTimeout, PolicyDenied, ProtocolError, User
from rama_ebpf.services.socks5 import Socks5Server

from .conftest import Proxy, echo

GREETING = b"\x05\x01\x00"
REJECTED_ADDRESS = b"\x00\x01" + bytes(6)


async def only_tom(credentials: Credentials) -> User:
    if credentials != Credentials("tom", "secret"):
        raise AuthFailed(f"wrong user name or password for {credentials.username!r}")
    return User("tom")


def address(host: str, port: int) -> bytes:
    try:
        ip = ip_address(host)
    except ValueError:
        return bytes((3, len(host))) + host.encode() + port.to_bytes(2, "big")
    return bytes((1 if ip.version == 4 else 4,)) + ip.packed + port.to_bytes(2, "big")


def connect(host: str, port: int) -> bytes:
    return b"\x05\x01\x00" + address(host, port)


async def exchange(proxy: Proxy, data: bytes, *, eof: bool = False) -> bytes:
    """Send ``data`` in one segment and return everything the proxy answers until it closes."""
    reader, writer = await proxy.open()
    writer.write(data)
    if eof:
        writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer


async def closed_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


def failed(rep: int) -> bytes:
    """The method selection and a reply that refuses."""
    return b"\x05\x00" + bytes((5, rep)) + REJECTED_ADDRESS


async def test_connect_relays_both_ways_and_tells_our_own_address(run_proxy, run_target):
    seen = []

    async def target(reader, writer):
        seen.append(writer.get_extra_info("peername")[:2])
        await echo(reader, writer)

    host, port = await run_target(target)
    proxy = await run_proxy()
    for name in (host, "target.test"):
        reader, writer = await proxy.open()
        writer.write(GREETING)
        assert await reader.readexactly(2) == b"\x05\x00"
        writer.write(connect(name, port))
        size = 10 if ip_address(host).version == 4 else 22
        reply = await reader.readexactly(size)
        writer.write(b"ping")
        assert await reader.readexactly(4) == b"ping"
        assert reply == b"\x05\x00\x00" + address(*seen[-1]), "BND.ADDR and BND.PORT are those the target sees"
        writer.close()


async def test_everything_in_one_segment_with_fin_is_still_answered(run_proxy, run_target):
    async def upper(reader, writer):
        writer.write((await reader.read()).upper())

    host, port = await run_target(upper)
    proxy = await run_proxy()
    answer = await exchange(proxy, GREETING + connect(host, port) + b"hello", eof=True)
    assert answer.endswith(b"HELLO")


async def test_closed_port_is_rep_05(run_proxy, loopback):
    proxy = await run_proxy()
    assert await exchange(proxy, GREETING + connect(loopback, await closed_port(loopback))) == failed(5)


async def test_name_that_does_not_exist_is_rep_04(run_proxy):
    proxy = await run_proxy()
    assert await exchange(proxy, GREETING + connect("nowhere.test", 80)) == failed(4)


@pytest.mark.parametrize("host", ["10.0.0.1", "private.test", "169.254.169.254", "fd00::1", "::ffff:10.0.0.1"])
async def test_target_denied_by_policy_is_rep_02(run_proxy, host):
    proxy = await run_proxy()
    assert await exchange(proxy, GREETING + connect(host, 80)) == failed(2)
    await proxy.idle()
    assert [type(error) for error in proxy.errors] == [PolicyDenied]


async def test_unknown_command_is_rep_07_and_unknown_address_type_rep_08(run_proxy):
    proxy = await run_proxy()
    assert await exchange(proxy, GREETING + b"\x05\x09\x00" + address("127.0.0.1", 80)) == failed(7)
    assert await exchange(proxy, GREETING + b"\x05\x01\x00\x02abcdef") == failed(8)
    await proxy.idle()
    assert {error.kind for error in proxy.errors} == {"protocol"}


async def test_no_acceptable_method_is_05_ff_and_close(run_proxy):
    proxy = await run_proxy(make=lambda connector: Socks5Server(connector, auth=only_tom))
    assert await exchange(proxy, GREETING + connect("target.test", 80)) == b"\x05\xff"
    assert await exchange(proxy, b"\x05\x00") == b"\x05\xff"
    await proxy.idle()
    assert [type(error) for error in proxy.errors] == [AuthFailed, ProtocolError]


async def test_wrong_password_is_rfc_1929_failure_and_a_typed_error(run_proxy, caplog):
    proxy = await run_proxy(make=lambda connector: Socks5Server(connector, auth=only_tom))
    with caplog.at_level("INFO"):
        for attempt in (b"\x01\x03tom\x05wrong", b"\x01\x03eve\x06secret", b"\x01\x00\x00"):
            assert await exchange(proxy, b"\x05\x01\x02" + attempt + connect("target.test", 80)) == b"\x05\x02\x01\x01"
        await proxy.idle()
    assert [error.kind for error in proxy.errors] == ["auth_failed"] * 3
    assert len(caplog.records) == 3
    assert all(record.exc_info is None for record in caplog.records)
    assert "wrong" not in caplog.records[0].getMessage().replace("wrong user name", ""), "a password was logged"


async def test_right_password_connects_and_the_user_is_known(run_proxy, run_target):
    users = []

    class Watched(Socks5Server):
        async def __call__(self, stream, /):
            report = await super().__call__(stream)
            users.append(stream.extensions.get(User))
            return report

    host, port = await run_target(echo)
    proxy = await run_proxy(make=lambda connector: Watched(connector, auth=only_tom))
    answer = await exchange(proxy, b"\x05\x02\x00\x02\x01\x03tom\x06secret" + connect(host, port) + b"data", eof=True)
    assert answer.startswith(b"\x05\x02\x01\x00\x05\x00\x00")
    assert answer.endswith(b"data")
    await proxy.idle()
    assert users == [User("tom")]


async def test_silent_client_is_closed_at_the_handshake_timeout(run_proxy):
    proxy = await run_proxy(make=lambda connector: Socks5Server(connector, handshake_timeout=0.2))
    for start in (b"", b"\x05", GREETING, GREETING + b"\x05\x01"):
        reader, writer = await proxy.open()
        writer.write(start)
        async with asyncio.timeout(10):
            assert await reader.read() in (b"", b"\x05\x00")
        writer.close()
    await proxy.idle()
    assert [type(error) for error in proxy.errors] == [HandshakeTimeout] * 4
