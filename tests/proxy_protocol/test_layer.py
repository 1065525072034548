"""PROXY protocol over real connections, in and out, and against HAProxy and curl."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rama_ebpf.core import Authority, HandshakeTimeout, Stream, client_address, local_address
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.services.connect import Connector, SystemResolver
from rama_ebpf.services.proxy_protocol import (
    ProxyHeader,
    ProxyProtocolConnector,
    ProxyProtocolError,
    ProxyProtocolLayer,
    TlvType,
)

from ..http.conftest import Run, free_ports
from ..http.conftest import run as run
from ..http.peers import command, spawn

V1 = b"PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\n"


async def tell(stream: Stream) -> None:
    """Answer with the addresses the connection is taken for, and the first bytes behind the header."""
    first = await stream.read()
    await stream.write(f"{client_address(stream)} {local_address(stream)} ".encode() + first)


async def test_header_of_a_trusted_peer_becomes_the_clients_address(run: Run) -> None:
    server = run(ProxyProtocolLayer(["127.0.0.0/8"])(tell))
    assert await server.exchange(V1 + b"hello") == b"192.0.2.1:56324 198.51.100.7:443 hello"
    assert await server.exchange(V1, b"hello") == b"192.0.2.1:56324 198.51.100.7:443 hello"


async def test_trusted_peer_without_a_header_is_not_served(run: Run) -> None:
    server = run(ProxyProtocolLayer(["127.0.0.0/8"], require=False)(tell))
    with pytest.raises(ConnectionResetError):
        await server.exchange(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
    assert [type(error) for error in server.errors] == [ProxyProtocolError]


async def test_header_of_an_untrusted_peer_is_never_believed(run: Run) -> None:
    strict = run(ProxyProtocolLayer(["192.0.2.0/24"])(tell))
    with pytest.raises(ConnectionResetError):
        await strict.exchange(V1 + b"hello")
    lenient = run(ProxyProtocolLayer(["192.0.2.0/24"], require=False)(tell))
    answer = await lenient.exchange(V1 + b"hello")
    assert answer.startswith(b"127.0.0.1:")
    assert answer.endswith(V1 + b"hello")


async def test_header_that_does_not_come_in_time_ends_the_connection(run: Run) -> None:
    server = run(ProxyProtocolLayer(["127.0.0.0/8"], timeout=0.1)(tell))
    with pytest.raises(ConnectionResetError):
        await server.exchange(V1[:10])
    assert [type(error) for error in server.errors] == [HandshakeTimeout]


async def test_header_cut_off_by_eof_ends_the_connection(run: Run) -> None:
    server = run(ProxyProtocolLayer(["127.0.0.0/8"])(tell))
    with pytest.raises(ConnectionResetError):
        await server.exchange(V1[:10], eof=True)


async def test_local_leaves_the_transports_address(run: Run) -> None:
    server = run(ProxyProtocolLayer(["127.0.0.0/8"])(tell))
    local = bytes.fromhex("0d0a0d0a000d0a515549540a20000000")
    assert (await server.exchange(local + b"x")).startswith(b"127.0.0.1:")


@pytest.mark.parametrize("version", [1, 2])
async def test_what_goes_out_comes_in(run: Run, version: int) -> None:
    inner = run(ProxyProtocolLayer(["127.0.0.0/8"])(tell))
    connector = Connector(SystemResolver(), EgressPolicy.of(["127.0.0.0/8"]))
    out = ProxyProtocolConnector(connector, version=1 if version == 1 else 2)

    async def forward(stream: Stream) -> None:
        upstream = await out.bind(stream)(Authority.of("127.0.0.1", inner.port))
        await upstream.write(await stream.read())
        while data := await upstream.read():
            await stream.write(data)
        await upstream.close()

    outer = run(forward)
    reader, writer = await outer.open()
    host, port = writer.get_extra_info("sockname")
    writer.write(b"hello")
    assert await reader.read() == f"{host}:{port} {outer.authority} hello".encode()
    writer.close()


@contextlib.asynccontextmanager
async def haproxy(directory: Path, to: int) -> AsyncIterator[tuple[int, int]]:
    """A real HAProxy in front of port ``to``: yields the ports behind which it sends v1 and v2 headers."""
    listen1, listen2 = free_ports(2)
    config = directory / "haproxy.cfg"
    config.write_text(
        f"""\
        defaults
            mode tcp
            timeout connect 5s
            timeout client 10s
            timeout server 10s
        listen v1
            bind 127.0.0.1:{listen1}
            server s 127.0.0.1:{to} send-proxy
        listen v2
            bind 127.0.0.1:{listen2}
            unique-id-format id-1
            server s 127.0.0.1:{to} send-proxy-v2 proxy-v2-options crc32c,unique-id
"""
    )
    async with spawn("haproxy", "-db", "-f", config, ports=[listen1, listen2], log=directory / "log"):
        yield listen1, listen2


async def test_headers_of_haproxy_are_understood_with_checksum_and_unique_id(run: Run, tmp_path: Path) -> None:
    seen: list[ProxyHeader] = []

    async def note(stream: Stream) -> None:
        seen.append(stream.extensions.require(ProxyHeader))
        await tell(stream)

    server = run(ProxyProtocolLayer(["127.0.0.1/32"])(note))
    async with haproxy(tmp_path, server.port) as ports:
        for port in ports:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            client = writer.get_extra_info("sockname")[1]
            writer.write(b"hello")
            assert await reader.read() == f"127.0.0.1:{client} 127.0.0.1:{port} hello".encode()
            writer.close()
    assert {header.version for header in seen} == {1, 2}
    assert seen[-1].tlv(TlvType.UNIQUE_ID) == b"id-1"
    assert seen[-1].tlv(TlvType.CRC32C) is not None


async def test_header_of_curl_is_understood(run: Run) -> None:
    async def app(stream: Stream) -> None:
        await stream.read()
        body = str(stream.extensions.require(ProxyHeader).version).encode()
        await stream.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\n" + body)

    server = run(ProxyProtocolLayer(["127.0.0.1/32"])(app))
    assert await command("curl", "-s", "--haproxy-protocol", f"http://{server.authority}/") == b"1"
