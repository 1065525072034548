"""A client that misbehaves is told so, and after a few times is not let in any more."""

from __future__ import annotations

import contextlib
from ipaddress import ip_address

import pytest

from rama_ebpf.core import stack
from rama_ebpf.layers.policy import PolicyLayer
from rama_ebpf.layers.strikes import LocalStrikes, StrikeLayer
from rama_ebpf.policy.local import LocalStore
from rama_ebpf.services.socks5 import Socks5Server

from .peers import GREETING, closed_port, exchange, failed, only_tom, request

WRONG = {
    "password": (b"\x05\x01\x02\x01\x03tom\x05wrong", b"\x05\x02\x01\x01"),
    "command": (b"\x05\x01\x02\x01\x03tom\x06secret\x05\x09\x00\x01" + bytes(6), b"\x05\x02\x01\x00" + failed(7)[2:]),
    "nonsense": (b"\xff\xfe / HTTP/1.1\r\n\r\n", b""),
}


@pytest.fixture
def store() -> LocalStore:
    return LocalStore()


class Policy:
    """A store in this process, asked as a worker asks the server's."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store

    async def verdict(self, ip, port, /):
        return self._store.verdict(ip, port)

    async def ban(self, ip, /, *, ttl, reason):
        self._store.ban(ip, ttl=ttl, reason=reason)


def guarded(store):
    policy = Policy(store)
    return lambda connector: stack(
        PolicyLayer(policy), StrikeLayer(LocalStrikes(policy), strikes=3), Socks5Server(connector, auth=only_tom)
    )


@pytest.mark.parametrize(("sent", "answer"), WRONG.values(), ids=WRONG.keys())
async def test_third_strike_bans_the_client(run_proxy, store, loopback, sent, answer):
    proxy = await run_proxy(make=guarded(store))
    for _ in range(3):
        assert store.bans() == []
        assert await exchange(proxy, sent) == answer
        await proxy.idle()
    [ban] = store.bans()
    assert ip_address(loopback) in ban.network
    with contextlib.suppress(ConnectionResetError):
        assert await exchange(proxy, sent) == b""
    await proxy.idle()
    assert proxy.errors[-1].kind == "policy_denied"


@pytest.mark.parametrize(
    ("sent", "answer"),
    [(GREETING, b"\x05\xff"), (b"GET / HTTP/1.1\r\n\r\n", b""), (b"\x16\x03\x01\x02\x00", b"")],
    ids=["no password", "a browser's URL", "TLS"],
)
async def test_a_stray_client_is_told_and_never_banned(run_proxy, store, sent, answer):
    proxy = await run_proxy(make=guarded(store))
    for _ in range(6):
        assert await exchange(proxy, sent) == answer
        await proxy.idle()
    assert store.bans() == []


async def test_target_that_cannot_be_reached_is_no_strike(run_proxy, store, loopback):
    proxy = await run_proxy(make=guarded(store))
    login = b"\x05\x01\x02\x01\x03tom\x06secret"
    for host, port in (("nowhere.test", 80), (loopback, closed_port(loopback)), ("10.0.0.1", 80)) * 2:
        assert (await exchange(proxy, login + request(host, port)))[:4] == b"\x05\x02\x01\x00"
    await proxy.idle()
    assert store.bans() == []
