"""The proxy that is served without a configuration, with users: every protocol on the one port demands a password."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator

import pytest

from rama_ebpf.layers import StaticUsers
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.services.connect import Connector, SystemResolver
from rama_ebpf.services.proxy import mixed_proxy
from rama_ebpf.services.tcp import TcpServer, bind_tcp

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
CHALLENGE = b"HTTP/1.1 407 Proxy Authentication Required\r\n"


@pytest.fixture
async def web() -> AsyncIterator[int]:
    async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = await reader.readuntil(b"\r\n\r\n")
        assert b"roxy-Auth" not in seen
        writer.write(OK)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(page, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


@pytest.fixture
async def port() -> AsyncIterator[int]:
    connector = Connector(SystemResolver(), EgressPolicy.of(["127.0.0.0/8"]))
    server = TcpServer(bind_tcp("127.0.0.1", 0), mixed_proxy(connector, auth=StaticUsers({"tom": "secret"})))
    server.start()
    yield server.listener.getsockname()[1]
    await server.drain(0)
    server.listener.close()


async def curl(*options: str) -> tuple[int, bytes]:
    process = await asyncio.create_subprocess_exec(
        "curl", "-sS", "--max-time", "30", *options, stdout=asyncio.subprocess.PIPE, env={"PATH": "/usr/bin:/bin"}
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out


@pytest.mark.parametrize("options", [["--proxy"], ["--proxytunnel", "--proxy"]], ids=["http", "http-connect"])
async def test_http_clients_get_in_with_the_password_only(options: list[str], port: int, web: int) -> None:
    url = f"http://127.0.0.1:{web}/"
    assert await curl(*options, f"http://tom:secret@127.0.0.1:{port}", url) == (0, b"ok")
    for credentials in ("", "tom:wrong@"):
        code = "%{http_connect}" if len(options) > 1 else "%{http_code}"
        proxy = f"http://{credentials}127.0.0.1:{port}"
        assert (await curl(*options, proxy, "-o", "/dev/null", "-w", code, url))[1] == b"407"


async def test_the_password_after_407_is_taken_on_the_same_connection(port: int, web: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    line = b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % (web, web)
    writer.write(line + b"\r\n")
    answer = await reader.readuntil(b"\r\n\r\n")
    assert answer.startswith(CHALLENGE)
    assert b'\r\nProxy-Authenticate: Basic realm="proxy", charset="UTF-8"\r\n' in answer
    assert b"\r\nConnection:" not in answer
    await reader.readexactly(len(b"authentication required\n"))
    writer.write(line + b"Proxy-Authorization: Basic " + base64.b64encode(b"tom:secret") + b"\r\n\r\n")
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert await reader.read() == OK
    writer.close()


async def test_socks5_takes_the_same_users(port: int, web: int) -> None:
    url = f"http://127.0.0.1:{web}/"
    assert await curl("--proxy", f"socks5h://tom:secret@127.0.0.1:{port}", url) == (0, b"ok")
    assert (await curl("--proxy", f"socks5h://tom:wrong@127.0.0.1:{port}", url))[0] == 97
    assert (await curl("--proxy", f"socks5h://127.0.0.1:{port}", url))[0] == 97


@pytest.mark.parametrize(
    "first",
    [
        b"\x04\x01\x00\x50\x7f\x00\x00\x01tom\x00",
        b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + bytes(194),
    ],
    ids=["socks4", "tls"],
)
async def test_protocols_that_give_no_password_are_turned_away(
    first: bytes, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(first)
    try:
        answer = await reader.read()
    except ConnectionResetError:
        answer = b""
    writer.close()
    assert answer == b""
    reason = "of no protocol that is served here" if first[0] == 22 else "not a SOCKS version that is served here"
    assert reason in caplog.text
