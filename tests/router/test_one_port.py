"""A proxy that serves SOCKS4a, SOCKS5 and HTTP on one port, as curl sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from ipaddress import ip_address

import pytest

from rama_ebpf.core import IPAddress
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.services.connect import Connector
from rama_ebpf.services.http import HttpProxy
from rama_ebpf.services.router import PeekRouter, is_http, is_socks
from rama_ebpf.services.socks5 import Socks5Server
from rama_ebpf.services.tcp import TcpServer, bind_tcp

PAGE = b"hello from behind the proxy\n"


@pytest.fixture(params=["127.0.0.1", "::1"], ids=["ipv4", "ipv6"])
def loopback(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def web(loopback: str) -> AsyncIterator[int]:
    async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(PAGE) + PAGE)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(page, loopback, 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


@pytest.fixture
async def port(loopback: str) -> AsyncIterator[int]:
    class Hosts:
        async def resolve(self, name: str) -> Sequence[IPAddress]:
            return [ip_address(loopback)]

    connector = Connector(Hosts(), EgressPolicy.of([f"{loopback}/{ip_address(loopback).max_prefixlen}"]))
    proxy = HttpProxy(connector)
    server = TcpServer(bind_tcp(loopback, 0), PeekRouter((is_socks, Socks5Server(connector)), (is_http, proxy)))
    server.start()
    yield server.listener.getsockname()[1]
    proxy.drain()
    await server.drain(0)
    server.listener.close()


@pytest.mark.parametrize(
    "options",
    [
        ["--proxy", "socks4a://"],
        ["--proxy", "socks5h://"],
        ["--proxy", "http://"],
        ["--proxytunnel", "--proxy", "http://"],
    ],
    ids=["socks4a", "socks5h", "http", "http-connect"],
)
async def test_curl_gets_the_page_by_every_protocol_on_the_one_port(options, port, web, loopback):
    host = f"[{loopback}]" if ":" in loopback else loopback
    command = ["curl", "-sS", "--max-time", "30", *options[:-1], f"{options[-1]}{host}:{port}"]
    process = await asyncio.create_subprocess_exec(
        *command, f"http://target.test:{web}/", stdout=asyncio.subprocess.PIPE, env={"PATH": "/usr/bin:/bin"}
    )
    out, _err = await process.communicate()
    assert out == PAGE
