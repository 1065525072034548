"""Chains and routes: which way out a client takes, and who is blamed when one fails."""

from __future__ import annotations

import asyncio
import errno

import pytest

from rama_ebpf.core import Authority, PolicyDenied, ProtocolError, User, stack
from rama_ebpf.core.matchers import TargetHost, UserOption
from rama_ebpf.core.routing import Router
from rama_ebpf.layers.auth import StaticUsers
from rama_ebpf.layers.username import DashedUsername, UsernameOptionsLayer
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.services.connect import ConnectError, Connector
from rama_ebpf.services.http import HttpProxy
from rama_ebpf.services.http.proxy.tunnel_client import HttpTunnelClient
from rama_ebpf.services.socks5 import Socks5Server
from rama_ebpf.services.tls import (
    CertificateRejected,
    CertificateStore,
    ClientTls,
    KeyPair,
    ServerTls,
    TlsTerminateLayer,
)
from rama_ebpf.services.upstream import ResolveLayer, parse_chain, parse_hop

from ..tls import pki
from .conftest import ALLOWED, Hosts, echo
from .peers import GREETING, closed_port, exchange, failed, only_tom, request
from .test_client import ask


def url(scheme: str, host: str, port: int, login: str = "") -> str:
    return f"{scheme}://{login}{f'[{host}]' if ':' in host else host}:{port}"


@pytest.fixture
def direct() -> Connector:
    return Connector(Hosts({}), EgressPolicy.of(ALLOWED), timeout=10)


def with_users(connector):
    return Socks5Server(connector, auth=only_tom)


async def test_chain_of_socks_and_http_proxies_reaches_the_target(run_proxy, run_target, direct):
    host, port = await run_target(echo)
    first = await run_proxy(make=with_users)
    second = await run_proxy(make=HttpProxy)
    third = await run_proxy(make=with_users)
    chain = parse_chain(
        [
            url("socks5", first.host, first.port, "tom:secret@"),
            url("http", second.host, second.port),
            url("socks5h", third.host, third.port, "tom:%73ecret@"),
        ]
    )
    connector = stack(chain, direct)
    for name in (host, "target.test"):
        assert await ask(await connector(Authority.of(name, port)), b"hello") == b"hello"
    assert [proxy.server.accepted for proxy in (first, second, third)] == [2, 2, 2]
    assert [proxy.hosts.asked for proxy in (first, second, third)] == [[], [], ["target.test"]]


@pytest.fixture
def certificates(tmp_path, loopback) -> tuple[pki.Authority, CertificateStore]:
    """An authority, and a store with the certificate that it gave to our proxy."""
    authority = pki.Authority(tmp_path)
    leaf = authority.issue(loopback)
    return authority, CertificateStore.of_files(ServerTls(), KeyPair(leaf.chain, leaf.key))


async def test_https_proxy_is_reached_by_tls_and_must_prove_its_name(run_proxy, run_target, direct, certificates):
    host, port = await run_target(echo)
    authority, store = certificates
    proxy = await run_proxy(make=lambda connector: stack(TlsTerminateLayer(store), HttpProxy(connector)))
    hop = url("https", proxy.host, proxy.port)
    trusting = stack(parse_chain([hop], tls=ClientTls(ca=authority.certificate)), direct)
    for name in (host, "target.test"):
        assert await ask(await trusting(Authority.of(name, port)), b"hello") == b"hello"
    with pytest.raises(ConnectError, match="certificate") as caught:
        await stack(parse_chain([hop]), direct)(Authority.of(host, port))
    assert caught.value.errno == errno.EIO
    assert isinstance(caught.value.__cause__, CertificateRejected)


@pytest.mark.parametrize("scheme", ["socks5", "http", "https"])
async def test_way_out_that_is_broken_is_no_answer_about_the_target(run_proxy, direct, loopback, scheme):
    """The proxy's own refusal, or policy against it, must not reach a client as REP 05 or 02 for its target."""
    for hop in (url(scheme, loopback, closed_port(loopback)), f"{scheme}://10.0.0.1:1080"):
        broken = stack(parse_chain([hop]), direct)
        proxy = await run_proxy(make=lambda connector, way_out=broken: Socks5Server(way_out))
        assert await exchange(proxy, GREETING + request("target.test", 80)) == failed(1)


async def test_client_of_a_socks_server_goes_out_by_its_own_options_and_the_target(run_proxy, run_target, direct):
    """The whole way: tom-country-us leaves through the US proxy, one name through another, the rest directly."""
    _host, port = await run_target(echo)
    us, inner = await run_proxy(make=Socks5Server), await run_proxy(make=HttpProxy)
    inner.hosts.table["db.inner.test"] = us.hosts.table["target.test"]
    routes = Router(
        (UserOption("country", "us"), parse_hop(url("socks5", us.host, us.port))(direct)),
        (TargetHost("*.inner.test"), parse_hop(url("http", inner.host, inner.port))(direct)),
        fallback=direct,
    )
    auth = stack(UsernameOptionsLayer(DashedUsername(["country"])), StaticUsers({"tom": "secret"}))
    front = await run_proxy(make=lambda connector: Socks5Server(routes, auth=auth))

    async def through(username: bytes, name: str) -> bytes:
        login = b"\x05\x01\x02\x01" + bytes((len(username),)) + username + b"\x06secret"
        return await exchange(front, login + request(name, port) + b"hello", eof=True)

    assert (await through(b"tom-country-us", "target.test")).endswith(b"hello")
    assert (us.server.accepted, inner.server.accepted) == (1, 0)
    assert (await through(b"tom", "db.inner.test")).endswith(b"hello")
    assert (us.server.accepted, inner.server.accepted) == (1, 1)
    assert (await through(b"tom", front.host)).endswith(b"hello")
    assert (us.server.accepted, inner.server.accepted) == (1, 1)
    assert (await through(b"tom-country", "target.test")) == b"\x05\x02\x01\x01"
    await front.idle()
    assert front.extensions[0].get(User) == User("tom", {"country": "us"})


async def test_misbehaving_upstream_is_not_held_against_the_client(run_proxy, direct):
    async def raises(target):
        raise ProtocolError("the upstream speaks nonsense")

    proxy = await run_proxy(make=lambda connector: Socks5Server(raises))
    assert await exchange(proxy, GREETING + request("target.test", 80)) == failed(1)
    await proxy.idle()
    assert [type(error) for error in proxy.errors] == [ConnectError]
    assert isinstance(proxy.errors[0].__cause__, ProtocolError)


async def test_names_resolved_here_are_judged_here_and_asked_for_by_address(run_proxy, run_target, direct, loopback):
    _host, port = await run_target(echo)
    far = await run_proxy(make=Socks5Server)
    hosts = Hosts({"good.test": ["10.0.0.1", loopback], "bad.test": ["10.0.0.1"]})
    connector = stack(
        ResolveLayer(hosts, EgressPolicy.of(ALLOWED)), parse_chain([url("socks5", far.host, far.port)]), direct
    )
    assert await ask(await connector(Authority.of("good.test", port)), b"hello") == b"hello"
    assert far.hosts.asked == []
    for name in ("bad.test", "10.0.0.1"):
        with pytest.raises(PolicyDenied):
            await connector(Authority.of(name, port))


STATUS = {
    403: errno.EACCES,
    404: errno.EIO,
    405: errno.EOPNOTSUPP,
    407: errno.EKEYREJECTED,
    502: errno.EHOSTUNREACH,
    503: errno.EHOSTUNREACH,
    504: errno.ETIMEDOUT,
}


@pytest.mark.parametrize(("status", "number"), STATUS.items(), ids=STATUS.keys())
async def test_status_of_an_http_proxy_becomes_an_errno(run_target, direct, status, number):
    async def says(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %d No\r\nContent-Length: 2\r\n\r\nno" % status)

    host, port = await run_target(says)
    with pytest.raises(ConnectError) as caught:
        await HttpTunnelClient(direct, Authority.of(host, port))(Authority.of("target.test", 80))
    assert caught.value.errno == number


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (b"", errno.ECONNRESET),
        (b"HTTP/1.1 200", errno.ECONNRESET),
        (b"\x05\x00", errno.EPROTO),
        (b"SSH-2.0-x\r\n\r\n", errno.EPROTO),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 20_000, errno.EPROTO),
        (b"HTTP/1.1 103 Early\r\n\r\n" * 17, errno.EPROTO),
    ],
    ids=["closes", "cut short", "socks", "ssh", "endless", "interim for ever"],
)
async def test_failing_http_proxy_is_a_connect_error(run_target, direct, answer, number):
    async def says(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)

    host, port = await run_target(says)
    with pytest.raises(ConnectError) as caught:
        await HttpTunnelClient(direct, Authority.of(host, port))(Authority.of("target.test", 80))
    assert caught.value.errno == number


async def test_silent_http_proxy_is_a_timeout(run_target, direct):
    async def silent(reader, writer):
        await reader.read()

    host, port = await run_target(silent)
    with pytest.raises(ConnectError) as caught:
        await HttpTunnelClient(direct, Authority.of(host, port), timeout=0.2)(Authority.of("target.test", 80))
    assert caught.value.errno == errno.ETIMEDOUT


async def test_bytes_that_come_with_the_response_are_the_tunnels(run_target, direct):
    async def banner(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n\n220 \x00banner")

    host, port = await run_target(banner)
    stream = await HttpTunnelClient(direct, Authority.of(host, port))(Authority.of("target.test", 25))
    assert await stream.read() == b"\n220 \x00banner"
    await stream.close()


async def test_host_that_would_break_the_request_line_is_never_sent(run_target, direct):
    asked = asyncio.Event()

    async def listens(reader, writer):
        asked.set()

    host, port = await run_target(listens)
    for name in ("a\r\nX-Injected: 1", "a b", "x" * 64 + ".test"):
        with pytest.raises(Exception, match="not a valid domain name"):
            await HttpTunnelClient(direct, Authority.of(host, port))(Authority(name, 80))
    assert not asked.is_set()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "target:1080",
        "ftp://host",
        "socks5://",
        "socks5://host:99999",
        "http://host/path",
        "http://host?q",
        "socks5://[",
    ],
)
def test_url_that_names_no_proxy_is_refused_without_its_password(text):
    with pytest.raises(ValueError, match="proxy URL") as caught:
        parse_hop(text.replace("//", "//tom:hidden@", 1))
    assert "hidden" not in str(caught.value)
