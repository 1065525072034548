"""The SOCKS clients that people use, each against the real server, in IPv4 and IPv6."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from pathlib import Path

import aiohttp
import aiohttp_socks
import httpx
import pytest
import python_socks
import python_socks.async_.asyncio
import socks as pysocks

from rama_ebpf.core import User
from rama_ebpf.services.socks5 import Binder, Request, Socks5Server, UdpAssociator

from .conftest import Proxy
from .peers import Udp, only_tom

PAGE = b"hello from behind the proxy\n"


async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A web server of one page."""
    await reader.readuntil(b"\r\n\r\n")
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(PAGE)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + PAGE)


def everything(connector):
    return Socks5Server(
        connector,
        binder=Binder(connector.resolver, connector.egress),
        udp=UdpAssociator(connector.resolver, connector.egress),
        auth=only_tom,
        auth_optional=True,
    )


@pytest.fixture
async def proxy(run_proxy) -> Proxy:
    return await run_proxy(make=everything)


@pytest.fixture
async def web(run_target) -> int:
    """The port of the web server; its name for the proxy is target.test."""
    _host, port = await run_target(http)
    return port


def literal(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def run(*command: str | Path, stdin: bytes = b"") -> bytes:
    """Run a client and return what it prints; its complaints fail the test."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"]},  # and no proxy settings
    )
    try:
        out, err = await process.communicate(stdin)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    return out


def asked_for(proxy: Proxy) -> list[tuple[int, str]]:
    """Version and host of each request that the proxy has read."""
    requests = [extensions.get(Request) for extensions in proxy.extensions]
    return [(request.version, str(request.target.host)) for request in requests if request is not None]


def users(proxy: Proxy) -> list[User | None]:
    return [extensions.get(User) for extensions in proxy.extensions]


async def curl(proxy: Proxy, option: str, url: str, *options: str) -> bytes:
    return await run("curl", "-sS", "--max-time", "30", option, f"{literal(proxy.host)}:{proxy.port}", *options, url)


async def test_curl_socks5_resolves_itself(proxy, web, loopback):
    resolve = ("--resolve", f"target.test:{web}:{literal(loopback)}")
    assert await curl(proxy, "--socks5", f"http://target.test:{web}/", *resolve) == PAGE
    assert asked_for(proxy) == [(5, loopback)]


async def test_curl_socks5h_lets_the_proxy_resolve(proxy, web):
    assert await curl(proxy, "--socks5-hostname", f"http://target.test:{web}/") == PAGE
    assert asked_for(proxy) == [(5, "target.test")]


async def test_curl_socks4a(proxy, web):
    assert await curl(proxy, "--socks4a", f"http://target.test:{web}/") == PAGE
    assert asked_for(proxy) == [(4, "target.test")]


async def test_curl_with_user_and_password(proxy, web):
    login = ("--proxy-user", "tom:secret")
    assert await curl(proxy, "--socks5-hostname", f"http://target.test:{web}/", *login) == PAGE
    assert users(proxy) == [User("tom")]


async def test_curl_with_a_wrong_password_says_so(proxy, web):
    with pytest.raises(AssertionError, match="rejected by the SOCKS5 server"):
        await curl(proxy, "--socks5-hostname", f"http://target.test:{web}/", "--proxy-user", "tom:wrong")


def request_page(sock: socket.socket) -> bytes:
    with sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return b"".join(iter(lambda: sock.recv(65536), b""))


@pytest.mark.parametrize("kind", [pysocks.SOCKS5, pysocks.SOCKS4], ids=["socks5", "socks4a"])
async def test_pysocks(proxy, web, loopback, kind):
    def client() -> bytes:
        sock = pysocks.create_connection(
            ("target.test", web),
            timeout=30,
            proxy_type=kind,
            proxy_addr=proxy.host,
            proxy_port=proxy.port,
            proxy_rdns=True,
            **({"proxy_username": "tom", "proxy_password": "secret"} if kind == pysocks.SOCKS5 else {}),
        )
        return request_page(sock)

    assert (await asyncio.to_thread(client)).endswith(PAGE)
    assert users(proxy) == [User("tom") if kind == pysocks.SOCKS5 else None]


async def test_pysocks_sends_datagrams(proxy, loopback):
    with socket.socket(socket.AF_INET6 if ":" in loopback else socket.AF_INET, socket.SOCK_DGRAM) as target:
        target.bind((loopback, 0))
        target.settimeout(30)

        def client() -> bytes:
            with pysocks.socksocket(target.family, socket.SOCK_DGRAM) as sock:
                sock.settimeout(30)
                sock.set_proxy(pysocks.SOCKS5, proxy.host, proxy.port)
                sock.sendto(b"datagram", target.getsockname()[:2])
                data, source = target.recvfrom(65535)
                target.sendto(data.upper(), source)
                return bytes(sock.recvfrom(65535)[0])

        if ":" in loopback:
            # PySocks 1.7.1 unpacks an IPv6 socket's name into two values before it sends anything.
            with pytest.raises(ValueError, match="too many values to unpack"):
                await asyncio.to_thread(client)
        else:
            assert await asyncio.to_thread(client) == b"DATAGRAM"


@pytest.mark.parametrize("kind", [python_socks.ProxyType.SOCKS5, python_socks.ProxyType.SOCKS4])
async def test_python_socks(proxy, web, kind):
    client = python_socks.async_.asyncio.Proxy(
        proxy_type=kind,
        host=proxy.host,
        port=proxy.port,
        username="tom" if kind is python_socks.ProxyType.SOCKS5 else None,
        password="secret",
        rdns=True,
    )
    sock = await client.connect(dest_host="target.test", dest_port=web, timeout=30)
    reader, writer = await asyncio.open_connection(sock=sock)
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    assert (await reader.read()).endswith(PAGE)
    writer.close()
    await writer.wait_closed()


async def test_aiohttp_socks(proxy, web):
    url = f"socks5://tom:secret@{literal(proxy.host)}:{proxy.port}"
    connector = aiohttp_socks.ProxyConnector.from_url(url, rdns=True)
    async with aiohttp.ClientSession(connector=connector) as session, session.get(f"http://target.test:{web}/") as got:
        assert await got.read() == PAGE
    assert users(proxy) == [User("tom")]


async def test_httpx_socks(proxy, web):
    url = f"socks5://tom:secret@{literal(proxy.host)}:{proxy.port}"
    async with httpx.AsyncClient(proxy=url, trust_env=False, timeout=30) as client:
        assert (await client.get(f"http://target.test:{web}/")).content == PAGE
    assert users(proxy) == [User("tom")]
    assert asked_for(proxy) == [(5, "target.test")]


async def test_ncat(proxy, web, loopback):
    command = ("ncat", "--proxy", f"{literal(proxy.host)}:{proxy.port}", "--proxy-type", "socks5", loopback, str(web))
    assert (await run(*command, stdin=b"GET / HTTP/1.0\r\n\r\n")).endswith(PAGE)
    known = (*command[:1], "--proxy-auth", "tom:secret", *command[1:])
    assert (await run(*known, stdin=b"GET / HTTP/1.0\r\n\r\n")).endswith(PAGE)
    assert users(proxy) == [None, User("tom")]


async def test_proxychains4(proxy, web, tmp_path):
    config = tmp_path / "proxychains.conf"
    config.write_text(
        f"strict_chain\nproxy_dns\ntcp_read_time_out 30000\n[ProxyList]\nsocks5 {proxy.host} {proxy.port} tom secret\n"
    )
    command = ("proxychains4", "-q", "-f", config, "curl", "-sS", "--max-time", "30", f"http://target.test:{web}/")
    assert await run(*command) == PAGE
    assert asked_for(proxy) == [(5, "target.test")]


@pytest.fixture(scope="session")
def npm_socks() -> Path:
    """The script that uses npm's ``socks``, with that package installed beside it."""
    here = Path(__file__).parent / "npm"
    if not (here / "node_modules" / "socks").is_dir():
        npm = shutil.which("npm")
        assert npm is not None, "npm is missing: packaging/setup test installs it"
        subprocess.run([npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=here, check=True)
    return here / "fetch.js"


@pytest.mark.parametrize("version", ["5", "4"])
async def test_npm_socks_connects(proxy, web, npm_socks, version):
    login = ("tom", "secret") if version == "5" else ("", "")
    command = ("node", npm_socks, "connect", proxy.host, str(proxy.port), version, *login, "target.test", str(web))
    assert (await run(*command)).endswith(PAGE)
    assert asked_for(proxy) == [(int(version), "target.test")]


async def test_npm_socks_sends_datagrams(proxy, npm_socks, loopback):
    target = Udp(loopback)
    port = str(target.address[1])
    command = ("node", npm_socks, "associate", proxy.host, str(proxy.port), "5", "", "", loopback, port)
    client = asyncio.create_task(run(*command))
    data, source = await target.receive()
    target.send(data.upper(), source)
    assert await client == b"DATAGRAM FROM NPM"
    target.close()


async def test_npm_socks_binds(proxy, npm_socks, loopback):
    process = await asyncio.create_subprocess_exec(
        "node", npm_socks, "bind", proxy.host, str(proxy.port), "5", "", "", loopback, "80",
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    _host, port = (await process.stdout.readline()).split()
    _reader, writer = await proxy.dial(loopback, int(port))
    writer.write(b"from the peer")
    writer.write_eof()
    assert await process.stdout.read() == b"from the peer"
    assert await process.wait() == 0
